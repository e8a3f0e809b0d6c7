"""A move that fails at one of its steps: the guest is at one place, and nothing of the other place stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.devices.registry import Registry
from vmbus.errors import MissingRequirement, QemuError
from vmbus.machine import guest as module
from vmbus.machine import moving, rundir
from vmbus.machine.guest import Guest, Station
from vmbus.machine.host import Host
from vmbus.machine.migration.drive import MigrationFailed
from vmbus.machine.migration.state_machine import Phase


class Place:
    """A station: a QEMU with its host."""

    def __init__(self) -> None:
        self.phase = Phase.IDLE
        self.command = self.load_refused = ""
        self.buffer_size = 1
        self.closed = self.taken_back = False
        self.directory = SimpleNamespace(memory=Path("memory"), path=Path("place"))
        self.qmp = None
        self.migration = self
        self.devices: list[object] = []
        self.facts = SimpleNamespace(dbus_address="unix:path=bus")

    @property
    def serving(self) -> Place:
        return self

    host = serving

    async def close(self) -> None:
        self.closed = True

    async def take_back(self) -> None:
        self.taken_back = True

    def stop(self) -> None:
        pass


class Images:
    """A device; ``was_started``: by a host."""

    was_started = False
    stopped = 0

    def stop(self) -> None:
        self.stopped += 1


class Move:
    """A guest that moves from ``old`` to ``new``; ``fails``: the step that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.old, self.new = Place(), Place()
        self.devices = [Images(), Images()]
        self.fails = fails
        self.removed = False
        guest = self.guest = Guest.__new__(Guest)
        guest._moving = False
        guest._new_devices = cast("Any", lambda lines: self.devices)
        guest._station = cast("Station", self.old)
        guest._console = None
        guest._setup = cast(
            "Any", SimpleNamespace(memory_size=1, options=SimpleNamespace(reserve_memory=False))
        )
        guest.directory = cast("Any", SimpleNamespace(name="web", point_to=lambda directory: None))
        guest.served = cast("Any", SimpleNamespace(host=self.old, replace=self._replace))
        directory = SimpleNamespace(make_memory=self._step("memory"), remove=self._remove)
        monkeypatch.setattr(rundir, "within", lambda directory_of: directory)
        monkeypatch.setattr(module, "replace", lambda what, **more: what)
        monkeypatch.setattr(Station, "open", self._open)
        for name in ("receive", "migrate", "arrived"):
            monkeypatch.setattr(moving, name, self._step(name))

    def _replace(self, host: Place) -> None:
        self.guest.served.host = cast("Any", host)

    def _remove(self) -> None:
        self.removed = True

    def _step(self, name: str) -> Callable[..., Any]:
        async def step(*arguments: object, **options: object) -> object:
            if name == "migrate":
                self.old.phase = Phase.LEFT
            if self.fails == name:
                raise MissingRequirement("no room") if name == "memory" else MigrationFailed("it failed")
            return "outcome"

        return step

    async def _open(self, *arguments: object) -> Place:
        self.devices[0].was_started = True
        if self.fails == "open":
            raise QemuError("QEMU did not start")
        self.devices[1].was_started = True
        return self.new


@pytest.mark.parametrize(("fails", "stopped"), [("memory", [1, 1]), ("open", [0, 1])])
async def test_devices_that_no_host_got_are_closed(
    monkeypatch: pytest.MonkeyPatch, fails: str, stopped: list[int]
) -> None:
    """The emulator lives on, with every image, daemon and connection that they opened."""
    move = Move(monkeypatch, fails)
    with pytest.raises((MissingRequirement, QemuError)):
        await move.guest.move()
    assert [device.stopped for device in move.devices] == stopped
    assert move.removed is (fails == "memory")
    assert move.guest._station is cast("Station", move.old)


async def test_a_guest_that_has_arrived_is_served_there_whatever_follows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The QEMU that it left was served before, and the one that ran it was known to nobody."""
    move = Move(monkeypatch)

    async def leave_memory(qmp: Any, stays: bool) -> None:
        if not stays:
            raise QemuError("not now")

    monkeypatch.setattr(moving, "leave_memory", leave_memory)
    await move.guest.move(share_memory=True)
    assert move.guest._station is cast("Station", move.new)
    assert move.guest.host is cast("Host", move.new)
    assert (move.old.closed, move.new.closed) == (True, False)
    assert "leave guest memory out of a migration" in caplog.text


async def test_a_guest_is_taken_back_although_qemu_refuses_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    move = Move(monkeypatch, "arrived")

    async def leave_memory(qmp: Any, stays: bool) -> None:
        if not stays:
            raise QemuError("not now")

    monkeypatch.setattr(moving, "leave_memory", leave_memory)
    with pytest.raises(MigrationFailed, match="it failed"):
        await move.guest.move(share_memory=True)
    assert (move.new.closed, move.old.taken_back) == (True, True)


def test_a_device_knows_whether_a_host_got_it() -> None:
    device = Registry().create("heartbeat")
    assert not device.was_started
    device.start(cast("Any", SimpleNamespace()))
    assert device.was_started


async def test_a_guest_stays_though_the_new_station_cannot_be_closed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    move = Move(monkeypatch, "migrate")

    async def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(move.new, "close", full)
    with pytest.raises(MigrationFailed, match="it failed"):
        await move.guest.move()
    assert move.old.taken_back
    assert "No space left on device" in caplog.text


async def test_a_guest_that_has_moved_stays_there_though_the_old_station_cannot_be_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    move = Move(monkeypatch)
    pointed: list[object] = []

    async def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(move.old, "close", full)
    monkeypatch.setattr(move.guest.directory, "point_to", pointed.append)
    assert cast("Any", await move.guest.move()) == "outcome"
    assert move.guest.served.host is cast("Any", move.new)
    assert pointed == [move.new.directory]
