"""One command at a time for each guest: a second one would change what the first one relies on.

A move takes seconds before QEMU reports that a migration has begun, and so does a load before its guest is stopped:
the phase of the guest does not show them yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from vmbus.errors import UserError
from vmbus.machine.migration.state_machine import Phase


class Commanded(Protocol):
    """A guest; :class:`~vmbus.machine.migration.coordinator.Coordinator`."""

    command: str
    """The command that moves, saves, loads or takes back the guest now; empty if there is none."""

    @property
    def phase(self) -> Phase:
        """Where the guest is."""


def check_alone(guest: Commanded, failed: type[UserError] = UserError) -> None:
    """Raise ``failed`` while a command is under way."""
    if guest.command:
        raise failed(f"`{guest.command}` is under way for this guest: try again when it has ended")


def check_idle(guest: Commanded, what: str) -> None:
    """Raise :class:`~vmbus.errors.UserError` unless ``what`` (plural) can be changed: nothing is under way."""
    check_alone(guest)
    if guest.phase is not Phase.IDLE:
        raise UserError(
            f"{what} cannot be changed while the guest is {guest.phase.value}; try again afterwards"
        )


@contextlib.contextmanager
def alone(guest: Commanded, command: str, failed: type[UserError] = UserError) -> Iterator[None]:
    """Have no other command in the block. Raises ``failed`` if there is one already."""
    check_alone(guest, failed)
    guest.command = command
    try:
        yield
    finally:
        guest.command = ""
