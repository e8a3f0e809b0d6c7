"""A snapshot is loaded although a migration failed before, whose error QEMU keeps and takes for one of the load."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.snapshots import ImageNode, SnapshotFailed, forget_failed_migration

IMAGE = ImageNode("vmbus-snapshots", Path("snapshots.qcow2"), {}, frozenset(), {})


class FakeQmp:
    """A QEMU whose last migration ended as ``migration`` says; its jobs fail with ``job_error``."""

    def __init__(self, migration: dict[str, str], job_error: str = "") -> None:
        self.migration = migration
        self.job_error = job_error
        self.jobs: list[tuple[str, str, list[str]]] = []
        self._job = ""

    async def execute(self, command: str, arguments: Any = None) -> Any:
        if command == "query-migrate":
            return self.migration
        if command == "query-jobs":
            job = {"id": self._job, "status": "concluded"}
            return [job | ({"error": self.job_error} if self.job_error else {})]
        if command != "job-dismiss":
            self._job = arguments["job-id"]
            self.jobs.append((command, arguments["tag"], arguments["devices"]))
        return {}


async def forget(qmp: FakeQmp) -> None:
    await forget_failed_migration(
        cast("Coordinator", SimpleNamespace(ports=SimpleNamespace(qmp=qmp))), IMAGE, timeout=10
    )


@pytest.mark.parametrize("migration", [{}, {"status": "completed"}])
async def test_without_an_error_nothing_is_done(migration: dict[str, str]) -> None:
    qmp = FakeQmp(migration)
    await forget(qmp)
    assert qmp.jobs == []


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_an_error_is_forgotten_by_a_snapshot_that_is_deleted_again(status: str) -> None:
    qmp = FakeQmp({"status": status, "error-desc": "Channel error: Input/output error"})
    await forget(qmp)
    (saved, tag, devices), deleted = qmp.jobs
    assert (saved, devices) == ("snapshot-save", ["vmbus-snapshots"])
    assert deleted == ("snapshot-delete", tag, devices)
    snapshots._check_name(tag)


async def test_a_guest_is_not_given_up_for_a_load_that_would_fail() -> None:
    qmp = FakeQmp({"status": "failed", "error-desc": "Connection refused"}, "No space left on device")
    with pytest.raises(SnapshotFailed, match=r"No space left on device; nothing was changed"):
        await forget(qmp)
    assert [command for command, *_ in qmp.jobs] == ["snapshot-save"]
