"""One command at a time moves, saves, loads, takes back or changes a guest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.cli import channel, device, migrate
from vmbus.errors import UserError
from vmbus.machine.guest import Guest
from vmbus.machine.host import Host
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.alone import alone
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.state_machine import Phase

Command = Callable[[Host, Mapping[str, Any]], Awaitable[object]]

COMMANDS: Mapping[str, tuple[Command, dict[str, object]]] = {
    "migrate": (migrate.answer, {"uri": "unix:there", "descriptors": ()}),
    "take-back": (migrate.take_back, {}),
    "device": (device.answer, {"action": "remove", "device": "echo"}),
    "channel": (channel.answer, {"action": "pause", "channel": "echo"}),
}


def idle(command: str = "") -> SimpleNamespace:
    """A coordinator whose guest is idle as far as QEMU has reported, while ``command`` is under way."""
    return SimpleNamespace(phase=Phase.IDLE, command=command)


@pytest.mark.parametrize("second", COMMANDS)
async def test_a_snapshot_and_another_command_do_not_meet(second: str) -> None:
    """The guest would leave, or change, while its disks are put back for another memory."""
    host = SimpleNamespace(migration=idle("vmbus snapshot load"), state=None, devices=[])
    answer, request = COMMANDS[second]
    with pytest.raises(UserError, match=r"`vmbus snapshot load` is under way for this guest: try again"):
        await answer(cast("Host", host), request)


async def test_a_move_and_a_snapshot_do_not_meet() -> None:
    """QEMU reports the migration only when the new QEMU listens, seconds after the move began."""
    guest = Guest.__new__(Guest)
    guest._moving = False
    coordinator = idle("vmbus snapshot load")
    guest.served = cast("Any", SimpleNamespace(host=SimpleNamespace(migration=coordinator)))
    with pytest.raises(UserError, match="`vmbus snapshot load` is under way"):
        await guest.move()
    assert not guest._moving
    coordinator.command = ""
    with alone(coordinator, "vmbus migrate"):
        for command in (snapshots.save, snapshots.load, snapshots.delete):
            with pytest.raises(snapshots.SnapshotFailed, match="`vmbus migrate` is under way"):
                await command(cast("Coordinator", coordinator), "tag")
    assert coordinator.command == ""
