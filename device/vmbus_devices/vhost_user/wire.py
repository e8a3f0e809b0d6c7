"""The vhost-user protocol's layouts, as far as a front end with one queue uses them. All little-endian.

Source: QEMU, docs/interop/vhost-user.rst. Descriptors of files and eventfds come with a message, as SCM_RIGHTS.

    front end                                  back end (the server)
    Header + payload [+ descriptors] ────────▶
             ◀──────────────────────────────── Header (REPLY) + payload, to GET_* and where NEED_REPLY is set
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import construct as c
from vmbus.wire.codec import Record

VERSION = 1
"""Of the protocol: the lowest two bits of the flags."""
VERSION_MASK = 3


class Flag(enum.IntFlag):
    """Flags of a message."""

    REPLY = 4
    NEED_REPLY = 8


class Message(enum.IntEnum):
    """What a message asks for."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEMORY = 5
    SET_QUEUE_SIZE = 8
    SET_QUEUE_ADDRESSES = 9
    SET_QUEUE_BASE = 10
    SET_QUEUE_KICK = 12
    SET_QUEUE_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    ENABLE_QUEUE = 18


class Feature(enum.IntFlag):
    """Features of the virtio device."""

    FLUSH = 1 << 9
    """Of virtio-blk: there is a write cache, and requests that flush it."""
    INDIRECT = 1 << 28
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32


class ProtocolFeature(enum.IntFlag):
    """Features of the protocol itself."""

    REPLY_ACK = 1 << 3
    """The back end says of each message whether it could do it."""


@dataclass(frozen=True, slots=True)
class Header:
    """Begins each message; ``size`` bytes of payload follow."""

    message: int
    flags: int
    size: int


HEADER = Record(Header, "message" / c.Int32ul, "flags" / c.Int32ul, "size" / c.Int32ul)


@dataclass(frozen=True, slots=True)
class Number:
    """The payload of messages about features, of descriptors (the number of the queue), and of replies."""

    value: int


NUMBER = Record(Number, "value" / c.Int64ul)


@dataclass(frozen=True, slots=True)
class QueueValue:
    """A value of queue ``index``."""

    index: int
    value: int


QUEUE_VALUE = Record(QueueValue, "index" / c.Int32ul, "value" / c.Int32ul)


@dataclass(frozen=True, slots=True)
class QueueAddresses:
    """Where queue ``index`` is, by the addresses of the front end's process."""

    index: int
    flags: int
    descriptors: int
    used: int
    available: int
    log: int


QUEUE_ADDRESSES = Record(
    QueueAddresses,
    "index" / c.Int32ul,
    "flags" / c.Int32ul,
    "descriptors" / c.Int64ul,
    "used" / c.Int64ul,
    "available" / c.Int64ul,
    "log" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """``size`` bytes of a file, from ``file_offset`` on.

    ``guest_address``: as descriptors name them, ``user_address``: as the front end's process does.
    """

    guest_address: int
    size: int
    user_address: int
    file_offset: int


MEMORY_REGION = Record(
    MemoryRegion,
    "guest_address" / c.Int64ul,
    "size" / c.Int64ul,
    "user_address" / c.Int64ul,
    "file_offset" / c.Int64ul,
)
MAX_REGIONS = 8


@dataclass(frozen=True, slots=True)
class MemoryHead:
    """The payload of SET_MEMORY; ``count`` regions follow."""

    count: int


MEMORY_HEAD = Record(MemoryHead, "count" / c.Int32ul, c.Padding(4))
