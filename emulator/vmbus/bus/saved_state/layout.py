"""The layout of the saved bus: :mod:`~vmbus.bus.saved_state.values` as bytes; forms as in :mod:`vmbus.wire.saved`.

Enumerations are stored as numbers: a member keeps its place in the lists below for ever, new members are appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import construct as c

from vmbus.bus.channel.gpadl import (
    MAX_ASSEMBLIES,
    MAX_CHANNEL_GPADLS,
    MAX_CHANNEL_PAGES,
    RANGE_WEIGHT,
)
from vmbus.bus.channel.opening import OpenRequest, ReservedClient
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import ContactRequest, MonitorPages, NextAction, Phase
from vmbus.bus.outbox import Outgoing, Target
from vmbus.bus.saved_state.values import (
    MAX_CHANNELS,
    MAX_INBOX,
    MAX_OUTBOX,
    AssemblyRecord,
    BusState,
    ChannelRecord,
    ConnectionRecord,
    GpadlRecord,
    RangeRecord,
    WaitingMessage,
)
from vmbus.wire.codec import Record
from vmbus.wire.plain import Blob, FixedTuple, Guid, Nested, Nullable, PlainAdapter, VarTuple, VarUint
from vmbus.wire.version import ALL_FEATURES, Feature, Version

_PHASES = (Phase.DISCONNECTED, Phase.CONNECTED, Phase.DISCONNECTING)
_ACTIONS = (NextAction.NONE, NextAction.UNLOAD_RESPONSE, NextAction.CONTACT)
_STATES = (
    ChannelState.RELEASED,
    ChannelState.CLOSED,
    ChannelState.OPENING,
    ChannelState.OPEN,
    ChannelState.CLOSING,
    ChannelState.CLOSING_REOPEN,
    ChannelState.REVOKED,
    ChannelState.REOFFERED,
)


class _Choice(PlainAdapter):
    """A member of an enumeration, as its place in a list."""

    def __init__(self, members: Sequence[Enum]) -> None:
        super().__init__(c.Int8ul)
        self._members = members

    def _decode(self, obj: int, context: Any, path: str) -> Enum:
        if obj >= len(self._members):
            raise c.ValidationError(f"{obj}, and there are {len(self._members)}", path)
        return self._members[obj]

    def _encode(self, obj: Enum, context: Any, path: str) -> int:
        return self._members.index(obj)


class _Bool(PlainAdapter):
    def _decode(self, obj: int, context: Any, path: str) -> bool:
        if obj > 1:
            raise c.ValidationError(f"{obj} is neither 0 nor 1", path)
        return bool(obj)

    def _encode(self, obj: bool, context: Any, path: str) -> int:
        return int(obj)


class _Version(PlainAdapter):
    def _decode(self, obj: int, context: Any, path: str) -> Version:
        if obj not in Version.__members__.values():
            raise c.ValidationError(f"version {obj:#x}", path)
        return Version(obj)

    def _encode(self, obj: Version, context: Any, path: str) -> int:
        return int(obj)


class _Features(PlainAdapter):
    def __init__(self, *, known: bool = True) -> None:
        super().__init__(c.Int32ul)
        self._known = known

    def _decode(self, obj: int, context: Any, path: str) -> Feature:
        if self._known and obj & ~int(ALL_FEATURES):
            raise c.ValidationError(f"features {obj:#x}", path)
        return Feature(obj)

    def _encode(self, obj: Feature, context: Any, path: str) -> int:
        return int(obj)


_FLAG = _Bool(c.Int8ul)
_AGREED = _Version(c.Int32ul)
_FEATURES = _Features()

_TARGET = Record(Target, "vp" / c.Int32ul, "sint" / c.Int8ul)
_MONITOR_PAGES = Record(MonitorPages, "parent_to_child" / c.Int64ul, "child_to_parent" / c.Int64ul)
_CONTACT = Record(
    ContactRequest,
    "version" / c.Int32ul,
    "target" / Nested(_TARGET),
    "vtl" / c.Int8ul,
    # As the guest sent them: they are checked when the contact is answered.
    "features" / _Features(known=False),
    "interrupt_page" / c.Int64ul,
    "parent_to_child" / c.Int64ul,
    "child_to_parent" / c.Int64ul,
    "client_id" / Nullable(Guid),
    "trusted" / _FLAG,
)
_CONNECTION = Record(
    ConnectionRecord,
    "phase" / _Choice(_PHASES),
    "version" / Nullable(_AGREED),
    "features" / _FEATURES,
    "target" / Nested(_TARGET),
    "interrupt_page" / c.Int64ul,
    "monitor_pages" / Nullable(Nested(_MONITOR_PAGES)),
    "client_id" / Nullable(Guid),
    "trusted" / _FLAG,
    "offers_sent" / _FLAG,
    "paused" / _FLAG,
    "next_action" / _Choice(_ACTIONS),
    "next_contact" / Nullable(Nested(_CONTACT)),
)
_RESERVED = Record(ReservedClient, "target" / Nested(_TARGET), "version" / _AGREED, "features" / _FEATURES)
_REQUEST = Record(
    OpenRequest,
    "open_id" / c.Int32ul,
    "ring_gpadl_id" / c.Int32ul,
    "target_vp" / Nullable(c.Int32ul),
    "downstream_offset" / c.Int32ul,
    "user_data" / Blob,
    "event_flag" / Nullable(c.Int16ul),
    "connection_id" / Nullable(c.Int32ul),
    "redirect_interrupt" / _FLAG,
    "reserved" / Nullable(Nested(_RESERVED)),
)
_RANGE = Record(
    RangeRecord,
    "byte_count" / c.Int32ul,
    "byte_offset" / c.Int32ul,
    "runs" / VarTuple(FixedTuple(VarUint[2]), MAX_CHANNEL_PAGES),
)
_GPADL = Record(
    GpadlRecord,
    "gpadl_id" / c.Int32ul,
    "ranges" / VarTuple(Nested(_RANGE), MAX_CHANNEL_PAGES // RANGE_WEIGHT),
    "tearing_down" / _FLAG,
    "device_notified" / _FLAG,
)
_ASSEMBLY = Record(
    AssemblyRecord,
    "relid" / c.Int32ul,
    "gpadl_id" / c.Int32ul,
    "capacity" / c.Int32ul,
    "range_count" / c.Int32ul,
    "data" / Blob,
)
_CHANNEL = Record(
    ChannelRecord,
    "interface_id" / Guid,
    "instance_id" / Guid,
    "subchannel_index" / c.Int16ul,
    "state" / _Choice(_STATES),
    "relid" / Nullable(c.Int32ul),
    "monitor_id" / Nullable(c.Int32ul),
    "offered" / _FLAG,
    "request" / Nullable(Nested(_REQUEST)),
    "reopen" / Nullable(Nested(_REQUEST)),
    "target_vp" / Nullable(c.Int32ul),
    "pending_target" / Nullable(c.Int32ul),
    "close_answer" / Nullable(Nested(_TARGET)),
    "revoking" / _FLAG,
    "abandoned" / _FLAG,
    "released_by_guest" / _FLAG,
    "waiting" / _FLAG,
    "gpadls" / VarTuple(Nested(_GPADL), MAX_CHANNEL_GPADLS),
)
_WAITING = Record(WaitingMessage, "connection_id" / c.Int32ul, "payload" / Blob, "trusted" / _FLAG)
_OUTGOING = Record(Outgoing, "target" / Nested(_TARGET), "payload" / Blob, "lasting" / _FLAG)

SAVED_BUS = Record(
    BusState,
    "connection" / Nested(_CONNECTION),
    "channels" / VarTuple(Nested(_CHANNEL), MAX_CHANNELS),
    "assemblies" / VarTuple(Nested(_ASSEMBLY), MAX_ASSEMBLIES),
    "inbox" / VarTuple(Nested(_WAITING), MAX_INBOX),
    "outbox" / VarTuple(Nested(_OUTGOING), MAX_OUTBOX),
)
