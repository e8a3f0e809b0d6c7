"""The commands of a served guest's control socket that the other verbs send."""

from __future__ import annotations

from vmbus.cli import channel, cont, device, migrate, shutdown, snapshot
from vmbus.machine.served import HostCommand

CONTROL_COMMANDS: dict[str, HostCommand] = {
    **shutdown.CONTROL_COMMANDS,
    **device.CONTROL_COMMANDS,
    **cont.CONTROL_COMMANDS,
    **channel.CONTROL_COMMANDS,
    "migrate": migrate.answer,
    "move": migrate.move,  # a guest that `vmbus run` started has its own
    "take-back": migrate.take_back,
    "migration": migrate.progress,
    "wait-ready": migrate.wait_ready,
    "snapshot": snapshot.answer,
}
