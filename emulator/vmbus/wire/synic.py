"""Pages that a guest shares with its synthetic interrupt controllers and the reference clock.

Source: docs/protocol/discovery.md#reference-tsc-page, docs/protocol/discovery.md#message-page.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import construct as c

from vmbus.wire.codec import Record, derive_struct

MESSAGE_SLOT_SIZE = 256
MESSAGE_PAYLOAD_MAX = 240
MESSAGE_PENDING = 0x01
"""Flag of a message slot: another message waits, the guest must write EOM."""
EVENT_AREA_SIZE = 256
EVENT_FLAG_COUNT = EVENT_AREA_SIZE * 8


class MessageType(IntEnum):
    """Type of a message, the first word of its slot."""

    NONE = 0
    CHANNEL = 1
    TIMER_EXPIRED = 0x80000010


@dataclass(frozen=True, slots=True)
class MessageSlot:
    """One of the 16 slots of the message page (SIMP), 256 bytes; ``sender``: a partition or port id."""

    message_type: int
    payload_size: int
    flags: int
    sender: int
    payload: bytes


MESSAGE_SLOT = Record(
    MessageSlot,
    "message_type" / c.Int32ul,
    "payload_size" / c.Int8ul,
    "flags" / c.Int8ul,
    "_reserved" / c.Padding(2),
    "sender" / c.Int64ul,
    "payload" / c.Bytes(MESSAGE_PAYLOAD_MAX),
)
MESSAGE_SLOT_STRUCT = derive_struct(MESSAGE_SLOT.struct)
SLOT_TYPE_SIZE = 4
SLOT_FLAGS_OFFSET = 5


@dataclass(frozen=True, slots=True)
class TimerExpired:
    """Payload of a timer message, 24 bytes; times are reference time, in units of 100 ns."""

    timer: int
    expiration: int
    delivery: int


TIMER_EXPIRED = Record(
    TimerExpired,
    "timer" / c.Int32ul,
    "_reserved" / c.Padding(4),
    "expiration" / c.Int64ul,
    "delivery" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class ReferenceTscPage:
    """The reference TSC page, 24 bytes: time = (tsc * scale >> 64) + offset, in units of 100 ns (TLFS 12.7).

    ``sequence`` 0: the page is not valid, the guest must read TIME_REF_COUNT.
    """

    sequence: int
    scale: int
    offset: int


REFERENCE_TSC_PAGE = Record(
    ReferenceTscPage,
    "sequence" / c.Int32ul,
    "_reserved" / c.Padding(4),
    "scale" / c.Int64ul,
    "offset" / c.Int64sl,
)
TSC_SEQUENCE_INVALID = 0
TSC_SEQUENCE_RESERVED = 0xFFFFFFFF
