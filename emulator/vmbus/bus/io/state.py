"""The state and the counters of the host's end of a channel, and what is saved of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class IoState(enum.Enum):
    """States of :class:`~vmbus.bus.io.channel_io.ChannelIo`."""

    CLOSED = "closed"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"


@dataclass(slots=True)
class IoCounters:
    """Traffic since the channel was first offered. Bytes are ring bytes, trailers included."""

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
    """How often output did not fit, and the pending send size was set."""
    dropped: int = 0
    """Packets that a device sent after the channel was closed or had failed."""


class PacketState(NamedTuple):
    """What a device keeps of a packet that is not completed.

    ``state``: bytes in a versioned format of the device's own. ``from_guest``: the device owes the completion;
    otherwise the device sent the packet, and the guest owes it.
    """

    transaction_id: int
    state: bytes
    from_guest: bool = True


class RingPositions(NamedTuple):
    """Where the host stands in the rings of an opening: its read index, and its write index, in bytes."""

    read: int
    write: int


@dataclass(frozen=True, slots=True)
class ChannelIoState:
    """Everything that an open channel holds besides its rings, which are guest memory.

    ``owed`` and ``awaited``: transaction ids and how often each is open, of the guest's packets and of the host's;
    ``output``: packets without trailer that are not in the ring yet; ``input_paused``: the device takes no packets;
    ``transaction_quota``: 0 if the device set none.
    """

    owed: tuple[tuple[int, int], ...] = ()
    awaited: tuple[tuple[int, int], ...] = ()
    output: tuple[bytes, ...] = ()
    input_paused: bool = False
    failure: str = ""
    transaction_quota: int = 0
