"""A snapshot is loaded although a migration failed before, whose error QEMU keeps and takes for one of the load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.snapshots import ImageNode, SnapshotFailed, forget_failed_migration
from vmbus.machine.migration.state_machine import Phase

IMAGE = ImageNode("vmbus-snapshots", Path("snapshots.qcow2"), {}, frozenset(), {})


class FakeQmp:
    """A QEMU whose last migration ended as ``migration`` says; its jobs fail with ``job_error``."""

    def __init__(self, migration: dict[str, str], job_error: str = "") -> None:
        self.migration = migration
        self.job_error = job_error
        self.jobs: list[tuple[str, str, list[str]]] = []
        self._job = ""
        self.began: Callable[[], None] = lambda: None

    async def execute(self, command: str, arguments: Any = None) -> Any:
        if command == "query-migrate":
            return self.migration
        if command == "query-jobs":
            job = {"id": self._job, "status": "concluded"}
            return [job | ({"error": self.job_error} if self.job_error else {})]
        if command != "job-dismiss":
            self.began()
            self._job = arguments["job-id"]
            self.jobs.append((command, arguments["tag"], arguments["devices"]))
        return {}


class FakeCoordinator:
    """A coordinator whose guest is stopped in ``phase``; ``refusal``: why its state cannot be saved."""

    def __init__(self, qmp: FakeQmp, phase: Phase = Phase.IDLE, refusal: str = "") -> None:
        self.ports = SimpleNamespace(qmp=qmp)
        self.phase = phase
        self.report = SimpleNamespace(refusal=refusal)
        self.phases: list[Phase] = []
        qmp.began = lambda: self.phases.append(self.phase)

    async def begin_snapshot(self) -> None:
        self.phase = Phase.SNAPSHOT

    def end_snapshot(self) -> None:
        self.phase = Phase.IDLE


async def forget(qmp: FakeQmp, phase: Phase = Phase.IDLE, refusal: str = "") -> FakeCoordinator:
    coordinator = FakeCoordinator(qmp, phase, refusal)
    await forget_failed_migration(cast("Coordinator", coordinator), IMAGE, timeout=10)
    assert coordinator.phase is phase
    return coordinator


@pytest.mark.parametrize("migration", [{}, {"status": "completed"}])
async def test_without_an_error_nothing_is_done(migration: dict[str, str]) -> None:
    qmp = FakeQmp(migration)
    await forget(qmp)
    assert qmp.jobs == []


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_an_error_is_forgotten_by_a_snapshot_that_is_deleted_again(status: str) -> None:
    qmp = FakeQmp({"status": status, "error-desc": "Channel error: Input/output error"})
    coordinator = await forget(qmp)
    assert (
        coordinator.phases == [Phase.SNAPSHOT] * 2
    )  # no refusal goes into it, so nothing is resumed because of one
    (saved, tag, devices), deleted = qmp.jobs
    assert (saved, devices) == ("snapshot-save", ["vmbus-snapshots"])
    assert deleted == ("snapshot-delete", tag, devices)
    snapshots._check_name(tag)


async def test_a_guest_is_not_given_up_for_a_load_that_would_fail() -> None:
    qmp = FakeQmp({"status": "failed", "error-desc": "Connection refused"}, "No space left on device")
    with pytest.raises(SnapshotFailed, match=r"No space left on device; nothing was changed"):
        await forget(qmp)
    assert [command for command, *_ in qmp.jobs] == ["snapshot-save"]


async def test_a_guest_whose_state_cannot_be_saved_is_not_given_up() -> None:
    qmp = FakeQmp({"status": "failed", "error-desc": "Connection refused"})
    with pytest.raises(SnapshotFailed, match=r"a device is busy; nothing was changed"):
        await forget(qmp, refusal="a device is busy")
    assert qmp.jobs == []


async def test_a_guest_that_is_lost_stays_so_until_another_is_loaded() -> None:
    qmp = FakeQmp({"status": "failed", "error-desc": "Connection refused"})
    coordinator = await forget(qmp, Phase.LOST)
    assert coordinator.phases == [Phase.LOST] * 2
