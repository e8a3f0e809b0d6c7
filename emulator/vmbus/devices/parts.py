"""Devices with parts that come, go and grow while the guest runs: the disks of a controller, for instance.

``vmbus device`` asks every device that fulfils :class:`HasParts`; it needs to know nothing else of the device:

    | command                            | calls                                                                  |
    | vmbus device list                  | parts()                                                                |
    | vmbus device add NAME,...          | Joinable.join(other), then parts() to name what was added              |
    | vmbus device remove DEVICE/PART    | part_name(PART), detach_part(name)                                     |
    | vmbus device remove DEVICE         | detach_part(name) of each, then waits for the guest: not busy(),       |
    |                                    | NoticesRemoval.removal_noticed()                                       |
    | vmbus device resize DEVICE/PART 4G | part_name(PART), resize_part(name, bytes), then parts() for the result |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a device, as ``vmbus device list`` shows it."""

    type: str
    """What it is, in a word: ``disk``, ``cdrom``, ``port``."""
    line: str = ""
    """The text after ``--device`` that makes another one like it; empty if code has made it."""
    size: int | None = None
    """Bytes; ``None`` for a part that cannot be resized."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """Further keys and plain values for ``vmbus device list --json``."""


@runtime_checkable
class HasParts(Protocol):
    """A device whose parts ``vmbus device`` can list, remove and resize. All calls come from the event loop."""

    def parts(self) -> Mapping[str, Part]:
        """Return the parts by name, in the order in which they are listed."""

    def part_name(self, text: str) -> str | None:
        """Return the name of the part that a user means by ``text``; ``None`` if there is none."""

    def detach_part(self, name: str) -> None:
        """Take a part away and notify the guest. Outstanding work on the part may end later."""

    async def resize_part(self, name: str, size: int | None) -> None:
        """Make a part ``size`` bytes large, or with ``None`` find out its present size; notify the guest.

        Blocking work belongs into a thread (``asyncio.to_thread``). Raises :class:`~vmbus.errors.UserError` with the
        reason when the part cannot have that size.
        """

    def busy(self) -> bool:
        """Return whether requests of the guest are outstanding."""


@runtime_checkable
class NoticesRemoval(Protocol):
    """A device with parts that knows whether the guest has found out about those that were detached."""

    def removal_noticed(self) -> bool:
        """Return whether the guest has found each detached part gone that it can have known."""
