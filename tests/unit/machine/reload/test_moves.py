"""A worker's move that fails at one of its steps: the guest is at one place, and nothing of the other place stays."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.errors import QemuError
from vmbus.machine.host import Host
from vmbus.machine.migration.drive import MigrationFailed
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.reload import moves
from vmbus.machine.reload.moves import Mover

from tests.unit.machine.test_guest_move import Images, Place


class Keeper:
    """The keeper's machines."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses
        self.fails: Exception | None = None
        """What an end of a machine raises."""
        self.did: list[str] = []

    async def open_machine(self, *, share_memory: bool) -> tuple[Path, Path]:
        self.did.append("open")
        if self.refuses:
            raise MigrationFailed("there is no room")
        return Path("there"), Path("there/qmp.sock")

    async def take_machine(self) -> None:
        self.did.append("take")
        if self.fails is not None:
            raise self.fails

    async def discard_machine(self) -> None:
        self.did.append("discard")
        if self.fails is not None:
            raise self.fails


class Move:
    """A guest of a worker that moves; ``fails``: the step that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.here, self.there = Place(), Place()
        self.here.options = self.there.options = "options"  # type: ignore[attr-defined]
        self.devices = [Images(), Images()]
        self.keeper = Keeper(refuses=fails == "open")
        self.served: list[Host] = []
        self.fails = fails
        monkeypatch.setattr(Host, "attach", self._attach)
        monkeypatch.setattr(moves, "transfer", self._transfer)
        self.mover = Mover(self.keeper, cast("Any", lambda lines: self.devices), self.served.append)

    async def _attach(self, monitor: Path, devices: list[Images], options: object) -> Place:
        assert (monitor, options) == (Path("there/qmp.sock"), "options")
        if self.fails == "attach":
            raise QemuError("QEMU has no gateway")
        for device in devices:
            device.was_started = True
        return self.there

    async def _transfer(self, *arguments: object, **options: object) -> object:
        if self.fails == "transfer":
            raise MigrationFailed("it failed")
        return SimpleNamespace(as_dict=lambda: {"downtime": 0.01})

    async def run(self) -> object:
        return await self.mover._move(cast("Host", self.here), False, 1.0)


async def test_a_guest_that_has_moved_is_served_there_and_its_old_machine_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    move = Move(monkeypatch)
    await move.run()
    assert move.served == [cast("Host", move.there)]
    assert move.keeper.did == ["open", "take"]
    assert (move.here.closed, move.there.closed) == (True, False)


@pytest.mark.parametrize(
    ("fails", "error", "stopped"),
    [("open", MigrationFailed, 1), ("attach", QemuError, 1), ("transfer", MigrationFailed, 0)],
)
async def test_what_a_failed_move_has_begun_is_ended(
    monkeypatch: pytest.MonkeyPatch, fails: str, error: type[Exception], stopped: int
) -> None:
    move = Move(monkeypatch, fails)
    with pytest.raises(error):
        await move.run()
    assert move.served == []
    assert move.keeper.did == ["open", "discard"]
    assert not move.here.closed
    assert move.there.closed is (fails == "transfer")
    assert [device.stopped for device in move.devices] == [stopped, stopped]


@pytest.mark.parametrize(
    "error", [MigrationFailed("no room"), OSError(errno.ENOSPC, "No space left on device")]
)
async def test_a_guest_stays_where_it_is_though_the_other_machine_cannot_be_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    move = Move(monkeypatch, "transfer")
    move.here.phase = Phase.LEFT
    move.keeper.fails = error
    with pytest.raises(MigrationFailed, match="it failed"):
        await move.run()
    assert move.here.taken_back
    assert move.there.closed
    assert "not all that a move leaves behind was removed: No" in caplog.text or "no room" in caplog.text


async def test_a_guest_that_has_moved_stays_there_though_the_old_machine_cannot_be_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    move = Move(monkeypatch)
    move.keeper.fails = MigrationFailed("no room")
    await move.run()
    assert move.served == [cast("Host", move.there)]
    assert move.here.closed
    assert "no room" in caplog.text


async def test_what_the_system_has_no_room_for_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move(monkeypatch)

    async def full(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Host, "attach", full)
    host = cast("Host", move.here)
    move.here.driven_here = contextlib.nullcontext  # type: ignore[attr-defined]
    with pytest.raises(MigrationFailed, match=r"^the move failed: Too many open files$"):
        await move.mover.asked(host, {})
    assert move.keeper.did == ["open", "discard"]
