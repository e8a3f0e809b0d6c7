"""What is known of the host's end of a channel: its state, its counters, what is saved of it, what it needs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vmbus.ports import GuestPages

if TYPE_CHECKING:
    from vmbus.bus.offers import Offer


class IoState(enum.Enum):
    """States of :class:`~vmbus.bus.io.channel_io.ChannelIo`."""

    CLOSED = "closed"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"


@dataclass(slots=True)
class IoCounters:
    """What passed since the channel was first offered. Bytes are ring bytes, trailers included."""

    packets_in: int = 0
    bytes_in: int = 0
    packets_out: int = 0
    bytes_out: int = 0
    doorbells: int = 0
    """Signals from the guest."""
    interrupts: int = 0
    """Signals to the guest."""
    turns: int = 0
    ring_full: int = 0
    """How often the guest had to be asked for room."""
    dropped: int = 0
    """Packets that a device sent after the channel was closed or had failed."""


@dataclass(frozen=True, slots=True)
class ChannelIoState:
    """All that an open channel holds besides its rings, which are guest memory.

    ``owed`` and ``awaited``: transaction ids and how often each is open, of the guest's packets and of the
    host's; ``output``: packets without trailer that are not in the ring yet.
    """

    owed: tuple[tuple[int, int], ...] = ()
    awaited: tuple[tuple[int, int], ...] = ()
    output: tuple[bytes, ...] = ()
    held: bool = False
    failure: str = ""


class OpenChannel(Protocol):
    """What is needed of a :class:`~vmbus.bus.channel.channel.Channel`."""

    @property
    def offer(self) -> Offer:
        """What was offered."""

    def ring_pages(self) -> tuple[GuestPages, GuestPages]:
        """Pages of the ring from the guest, and of the ring to the guest."""

    def signal_guest(self) -> None:
        """Interrupt the guest for this channel."""
