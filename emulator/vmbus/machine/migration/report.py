"""What an emulator did for a migration or a snapshot of its guest, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vmbus.saving.stream import ChannelStatistics
from vmbus.wire.saved import ChannelIdentity

ENDED = frozenset({"completed", "failed", "cancelled"})
"""QEMU's last statuses of a migration."""


@dataclass(slots=True)
class Report:
    """What the emulator did for the last migration (or snapshot) of its guest. Times in seconds."""

    state_bytes: int = 0
    channels: tuple[ChannelStatistics, ...] = ()
    names: dict[ChannelIdentity, str] = field(default_factory=dict)
    pages_marked: int = 0
    """In the pause, while the guest stood still."""
    pages_marked_early: int = 0
    """Before it."""
    pages_carried: int = 0
    """Not marked: they are in the state."""
    answers_carried: int = 0
    prepared_in: float = 0.0
    """How long the stopped guest stood because of the emulator."""
    refusal: str = ""
    statuses: list[str] = field(default_factory=list)
    """QEMU's migration statuses, in order."""

    @property
    def status(self) -> str:
        """The last of them; empty before the first."""
        return self.statuses[-1] if self.statuses else ""

    @property
    def ended(self) -> bool:
        """Whether there will be no more."""
        return self.status in ENDED

    def as_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
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
