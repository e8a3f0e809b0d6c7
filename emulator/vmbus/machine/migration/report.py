"""What the emulator did for a migration or a snapshot of its guest, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmbus.saving.stream import ChannelStatistics
from vmbus.wire.saved import ChannelIdentity

ENDED = frozenset({"completed", "failed", "cancelled"})
"""Statuses in which QEMU's migrations end."""


@dataclass(slots=True)
class Report:
    """The emulator's part in one migration or snapshot of its guest. Times in seconds."""

    state_bytes: int = 0
    channels: tuple[ChannelStatistics, ...] = ()
    names: dict[ChannelIdentity, str] = field(default_factory=dict)
    pages_marked: int = 0
    """Pages marked in the pause, while the guest stood still."""
    pages_marked_early: int = 0
    """Pages marked before the pause."""
    pages_carried: int = 0
    """Pages that the state carries; they are not marked."""
    answers_carried: int = 0
    prepared_in: float = 0.0
    """Seconds from the pause until QEMU was asked whether it still waits, and told to continue."""
    refusal: str = ""
    statuses: list[str] = field(default_factory=list)
    """QEMU's migration statuses, in order."""

    @property
    def status(self) -> str:
        """The last status; empty before the first."""
        return self.statuses[-1] if self.statuses else ""

    @property
    def ended(self) -> bool:
        """Whether the migration has ended."""
        return self.status in ENDED

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "state_bytes": self.state_bytes,
            "prepared_in": self.prepared_in,
            "pages_marked": self.pages_marked,
            "pages_marked_early": self.pages_marked_early,
            "pages_carried": self.pages_carried,
            "answers_carried": self.answers_carried,
            "statuses": list(self.statuses),
            "channels": [
                {
                    "name": self.names.get(channel.identity, ""),
                    "identity": str(channel.identity),
                    "chunks": channel.chunks,
                    "bytes": channel.size,
                    "statuses": [str(status) for status in channel.statuses],
                }
                for channel in self.channels
            ],
        }
