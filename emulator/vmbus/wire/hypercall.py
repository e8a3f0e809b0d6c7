"""Hypercalls: control word, status codes, and the input blocks of HvPostMessage and HvSignalEvent.

Source: docs/protocol/discovery.md#hypercalls, docs/protocol/discovery.md#hvpostmessage,
docs/protocol/discovery.md#hvsignalevent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import construct as c

from vmbus.wire.bits import BitRecord
from vmbus.wire.codec import Record, derive_struct


class CallCode(IntEnum):
    """Hypercalls that this host implements."""

    NOTIFY_LONG_SPIN_WAIT = 0x0008
    POST_MESSAGE = 0x005C
    SIGNAL_EVENT = 0x005D


class HvStatus(IntEnum):
    """Status codes, bits 15:0 of a hypercall's result.

    Source: docs/protocol/discovery.md#hypercall-status.
    """

    SUCCESS = 0x00
    INVALID_HYPERCALL_CODE = 0x02
    INVALID_HYPERCALL_INPUT = 0x03
    INVALID_ALIGNMENT = 0x04
    INVALID_PARAMETER = 0x05
    ACCESS_DENIED = 0x06
    INVALID_PARTITION_STATE = 0x07
    OPERATION_DENIED = 0x08
    UNKNOWN_PROPERTY = 0x09
    VALUE_OUT_OF_RANGE = 0x0A
    INSUFFICIENT_MEMORY = 0x0B
    INVALID_PARTITION_ID = 0x0D
    INVALID_VP_INDEX = 0x0E
    NOT_FOUND = 0x10
    INVALID_PORT_ID = 0x11
    INVALID_CONNECTION_ID = 0x12
    INSUFFICIENT_BUFFERS = 0x13
    NOT_ACKNOWLEDGED = 0x14
    INVALID_VP_STATE = 0x15
    INVALID_SYNIC_STATE = 0x18
    OBJECT_IN_USE = 0x19
    NO_DATA = 0x1B
    NO_RESOURCES = 0x1D
    FEATURE_UNAVAILABLE = 0x1E
    PARTIAL_PACKET = 0x1F
    INVALID_LP_INDEX = 0x41
    INVALID_REGISTER_VALUE = 0x50
    OPERATION_FAILED = 0x71
    TIMEOUT = 0x78
    UNKNOWN_REGISTER_NAME = 0x87


@dataclass(frozen=True, slots=True)
class Control:
    """The hypercall input value, 64 bits; ``reserved*`` must be 0."""

    code: int
    fast: bool = False
    variable_header: int = 0
    reserved_low: int = 0
    nested: bool = False
    rep_count: int = 0
    reserved_middle: int = 0
    rep_start: int = 0
    reserved_high: int = 0


CONTROL = BitRecord(
    Control,
    "code" / c.BitsInteger(16),
    "fast" / c.Flag,
    "variable_header" / c.BitsInteger(10),
    "reserved_low" / c.BitsInteger(4),
    "nested" / c.Flag,
    "rep_count" / c.BitsInteger(12),
    "reserved_middle" / c.BitsInteger(4),
    "rep_start" / c.BitsInteger(12),
    "reserved_high" / c.BitsInteger(4),
)


MESSAGE_PAYLOAD_MAX = 240
"""Bytes of a message that HvPostMessage takes."""


@dataclass(frozen=True, slots=True)
class PostMessageInput:
    """Input block of HvPostMessage, 256 bytes; the first ``payload_size`` of the 240 payload bytes are used."""

    connection_id: int
    message_type: int
    payload_size: int
    payload: bytes


POST_MESSAGE_INPUT = Record(
    PostMessageInput,
    "connection_id" / c.Int32ul,
    "_reserved" / c.Padding(4),
    "message_type" / c.Int32ul,
    "payload_size" / c.Int32ul,
    "payload" / c.Bytes(MESSAGE_PAYLOAD_MAX),
)
POST_MESSAGE_STRUCT = derive_struct(POST_MESSAGE_INPUT.struct)


@dataclass(frozen=True, slots=True)
class SignalEventInput:
    """Input of HvSignalEvent, 8 bytes: in memory, or in the first input register of a fast call."""

    connection_id: int
    flag: int
    reserved: int = 0


SIGNAL_EVENT_INPUT = Record(
    SignalEventInput, "connection_id" / c.Int32ul, "flag" / c.Int16ul, "reserved" / c.Int16ul
)
SIGNAL_EVENT_STRUCT = derive_struct(SIGNAL_EVENT_INPUT.struct)

CONNECTION_ID_MASK = 0xFFFFFF
"""Bits of a connection id; the other bits are reserved."""

HYPERCALL_PAGE_CODE = bytes.fromhex("f30f1efa 0f01c1 c3")
"""ENDBR64, VMCALL, RET: the code at the start of the hypercall page."""
HYPERCALL_PAGE_FILLER = 0xCC
"""INT3: the rest of the hypercall page."""
