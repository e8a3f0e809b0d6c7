"""What a channel is made of: its states, what the guest asked for, and what it needs of its bus.

Source: docs/protocol/messages.md#channel-states.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vmbus.bus.channel.gpadl import GpadlTable
from vmbus.bus.contact import Connection
from vmbus.bus.outbox import Target
from vmbus.ports import GuestMemory, Synic, Timers
from vmbus.wire.version import NO_FEATURES, Feature, Version

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel


class ChannelState(enum.Enum):
    """States of docs/protocol/messages.md#channel-states."""

    RELEASED = "released"
    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSING_REOPEN = "closing, re-open pending"
    REVOKED = "revoked"
    REOFFERED = "re-offered"


class Busy(enum.Enum):
    """What the device has been told about the rings and, but for ``OPEN``, has not finished."""

    NO = "no"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class ReservedClient:
    """Who opened a reserved channel: where it wants its answers, and what was agreed when it came."""

    target: Target
    version: Version
    features: Feature = NO_FEATURES


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What a guest asked for when it opened a channel.

    ``target_vp`` None: no interrupts. ``event_flag`` and ``connection_id`` are the guest's own choice, None when
    that was not negotiated. ``reserved``: the client, if it opened it as a reserved channel.
    """

    open_id: int
    ring_gpadl_id: int
    target_vp: int | None
    downstream_offset: int
    user_data: bytes = b""
    event_flag: int | None = None
    connection_id: int | None = None
    redirect_interrupt: bool = False
    reserved: ReservedClient | None = None


@dataclass(slots=True)
class ChannelCounters:
    """What happened on a channel since it was offered by its device."""

    opens: int = 0
    doorbells: int = 0
    interrupts: int = 0
    interrupts_dropped: int = 0


class ChannelHost(Protocol):
    """What a channel needs of its bus."""

    memory: GuestMemory
    synic: Synic
    timers: Timers
    connection: Connection
    gpadls: GpadlTable

    def send(self, payload: bytes, target: Target | None = None) -> None:
        """To the guest; with a target, to the client of a reserved channel."""

    def connection_id_taken(self, connection_id: int) -> bool:
        """Whether a signal on that id reaches a channel."""

    def leave_subchannels(self, channel: Channel) -> bool:
        """Rescind the sub-channels of ``channel``; whether the guest has been told about all."""

    def rescinded(self, channel: Channel) -> None:
        """The channel has left and is revoked: tell the guest."""

    def left(self, channel: Channel) -> None:
        """The channel has left and is released."""

    def offer_again(self, channel: Channel) -> None:
        """The guest released what the device had offered again."""

    def shared_signal(self, relid: int) -> bool:
        """Signal through the interrupt page; False when this connection has none."""

    def monitor_changed(self) -> None:
        """A channel with a monitor bit was opened or closed."""
