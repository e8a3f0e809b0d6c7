"""A worker's move that fails at one of its steps: the guest is at one place, and nothing of the other place stays."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.errors import QemuError
from vmbus.machine.host import Host
from vmbus.machine.migration.drive import MigrationFailed
from vmbus.machine.reload import moves
from vmbus.machine.reload.moves import Mover

from tests.unit.machine.test_guest_move import Images, Place


class Keeper:
    """The keeper's machines."""

    def __init__(self, *, refuses: bool) -> None:
        self.refuses = refuses
        self.did: list[str] = []

    async def open_machine(self, *, share_memory: bool) -> tuple[Path, Path]:
        self.did.append("open")
        if self.refuses:
            raise MigrationFailed("there is no room")
        return Path("there"), Path("there/qmp.sock")

    async def take_machine(self) -> None:
        self.did.append("take")

    async def discard_machine(self) -> None:
        self.did.append("discard")


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
