"""The state of the bus as plain values (docs/protocol/saving.md#bus-state), and how they are captured.

    live objects --capture_*()--> values (here) --layout--> bytes --layout--> values --restore--> live objects

No value refers to a live object. Rings are not part of the state: they are guest memory. Messages that the SynIC has
queued belong to the state of the hypervisor. Page lists are runs of (first page frame number, count).
"""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmbus.bus.channel.gpadl import Assembly, Gpadl, GpadlState
from vmbus.bus.channel.opening import OpenRequest
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import Connection, ContactRequest, MonitorPages, NextAction, Phase
from vmbus.bus.offers import OfferKey
from vmbus.bus.outbox import Outgoing, Target
from vmbus.wire.version import Feature, Version

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel


MAX_INBOX = 16
"""Messages of the guest that a paused bus keeps; the guest must retry those after them."""
MAX_OUTBOX = 16384
"""Messages to the guest that a state may have: an offer of each channel, and answers that the guest waits for."""
MAX_CHANNELS = 4096
"""Channels of a state: those with an id, of which there are 2047, and as many that are released."""


@dataclass(frozen=True, slots=True)
class RangeRecord:
    """One range of a GPADL."""

    byte_count: int
    byte_offset: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class GpadlRecord:
    """A complete GPADL. ``device_notified``: its device was notified of it, and has not given it back."""

    gpadl_id: int
    ranges: tuple[RangeRecord, ...]
    tearing_down: bool = False
    device_notified: bool = True


@dataclass(frozen=True, slots=True)
class AssemblyRecord:
    """A GPADL in progress; ``capacity`` and ``data`` in bytes."""

    relid: int
    gpadl_id: int
    capacity: int
    range_count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ChannelRecord:
    """A channel; fields as in :class:`~vmbus.bus.channel.channel.Channel`.

    ``waiting``: the channel is released only because no id was free. A released channel that does not wait was
    released by the guest, and is not offered again on this connection.
    """

    interface_id: uuid.UUID
    instance_id: uuid.UUID
    subchannel_index: int
    state: ChannelState
    relid: int | None = None
    monitor_id: int | None = None
    offered: bool = False
    request: OpenRequest | None = None
    reopen: OpenRequest | None = None
    target_vp: int | None = None
    pending_target: int | None = None
    close_answer: Target | None = None
    revoking: bool = False
    abandoned: bool = False
    released_by_guest: bool = False
    waiting: bool = False
    gpadls: tuple[GpadlRecord, ...] = ()

    @property
    def key(self) -> OfferKey:
        return (self.interface_id, self.instance_id, self.subchannel_index)


@dataclass(frozen=True, slots=True)
class ConnectionRecord:
    """What is agreed with the guest; fields as in :class:`~vmbus.bus.contact.Connection`."""

    phase: Phase
    version: Version | None
    features: Feature
    target: Target
    interrupt_page: int
    monitor_pages: MonitorPages | None
    client_id: uuid.UUID | None
    trusted: bool
    offers_sent: bool
    paused: bool
    next_action: NextAction
    next_contact: ContactRequest | None


@dataclass(frozen=True, slots=True)
class WaitingMessage:
    """A message of the guest that a paused bus has acknowledged, and not handled yet."""

    connection_id: int
    payload: bytes
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class BusState:
    """The whole state. ``inbox`` and ``outbox``: messages that wait, in order."""

    connection: ConnectionRecord
    channels: tuple[ChannelRecord, ...] = ()
    assemblies: tuple[AssemblyRecord, ...] = ()
    inbox: tuple[WaitingMessage, ...] = ()
    outbox: tuple[Outgoing, ...] = ()


def capture_connection(connection: Connection) -> ConnectionRecord:
    """Return what is agreed with the guest as a record."""
    return ConnectionRecord(
        *(getattr(connection, field.name) for field in dataclasses.fields(ConnectionRecord))
    )


def capture_gpadl(gpadl: Gpadl) -> GpadlRecord:
    """Return a complete GPADL as a record."""
    ranges = tuple(RangeRecord(each.byte_count, each.byte_offset, tuple(each.runs)) for each in gpadl.ranges)
    return GpadlRecord(gpadl.gpadl_id, ranges, gpadl.state is GpadlState.TEARING_DOWN, gpadl.device_notified)


def capture_assembly(assembly: Assembly) -> AssemblyRecord:
    """Return a GPADL in progress as a record."""
    return AssemblyRecord(
        assembly.relid, assembly.gpadl_id, assembly.capacity, assembly.range_count, bytes(assembly.data)
    )


def capture_channel(channel: Channel, *, waiting: bool) -> ChannelRecord:
    """Return a channel as a record; ``waiting`` for a free id."""
    return ChannelRecord(
        interface_id=channel.offer.interface_id,
        instance_id=channel.offer.instance_id,
        subchannel_index=channel.offer.subchannel_index,
        state=channel.state,
        relid=channel.relid,
        monitor_id=channel.monitor_id,
        offered=channel.offered,
        request=channel.request,
        reopen=channel.reopen,
        target_vp=channel.target_vp,
        pending_target=channel.signals.pending_target,
        close_answer=channel.close_answer,
        revoking=channel.revoking,
        abandoned=channel.abandoned,
        released_by_guest=channel.released_by_guest,
        waiting=waiting,
        gpadls=tuple(capture_gpadl(gpadl) for gpadl in channel.gpadls.values()),
    )
