"""OFFERCHANNEL, and the layouts of its user-defined area.

Source: docs/protocol/messages.md#offers, docs/protocol/messages.md#socket-offer.
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record
from vmbus.wire.header import MessageType, channel_message
from vmbus.wire.plain import Guid

USER_DEFINED_SIZE = 120
"""Bytes of the user-defined area."""
NO_MONITOR = 0xFF
"""``monitor_id`` of a channel without a monitored notification."""


class OfferFlags(enum.IntFlag):
    """Channel flags of an offer."""

    ENUMERATE_DEVICE_INTERFACE = 0x0001
    CONFIDENTIAL_RING_BUFFER = 0x0002
    CONFIDENTIAL_EXTERNAL_MEMORY = 0x0004
    REQUIRE_PINNED_EXTERNAL_MEMORY = 0x0008
    NAMED_PIPE_MODE = 0x0010
    LOOPBACK_OFFER = 0x0100
    PARENT_OFFER = 0x0200
    REQUEST_MONITORED_NOTIFICATION = 0x0400
    FORCE_NEW_CHANNEL = 0x1000
    TLNPI_PROVIDER = 0x2000


class PipeMode(enum.IntEnum):
    """How a named-pipe channel frames its data."""

    BYTE = 0
    MESSAGE = 4


@dataclass(frozen=True, slots=True)
class OfferChannel:
    """OFFERCHANNEL (1), 196 bytes including the message header."""

    interface_id: uuid.UUID
    instance_id: uuid.UUID
    flags: int
    mmio_megabytes: int
    user_defined: bytes
    subchannel_index: int
    mmio_megabytes_optional: int
    relid: int
    monitor_id: int
    monitor_allocated: int
    is_dedicated: int
    connection_id: int


OFFERCHANNEL = channel_message(
    OfferChannel,
    MessageType.OFFERCHANNEL,
    "interface_id" / Guid,
    "instance_id" / Guid,
    "_reserved" / c.Padding(16),
    "flags" / c.Int16ul,
    "mmio_megabytes" / c.Int16ul,
    "user_defined" / c.Bytes(USER_DEFINED_SIZE),
    "subchannel_index" / c.Int16ul,
    "mmio_megabytes_optional" / c.Int16ul,
    "relid" / c.Int32ul,
    "monitor_id" / c.Int8ul,
    "monitor_allocated" / c.Int8ul,
    "is_dedicated" / c.Int16ul,
    "connection_id" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class PipeArea:
    """User-defined area of a channel in named-pipe mode, 120 bytes; ``mode``: a :class:`PipeMode`."""

    mode: int
    user_data: bytes
    pipe_flags: int


PIPE_AREA = Record(
    PipeArea,
    "mode" / c.Int32ul,
    "user_data" / c.Bytes(112),
    "pipe_flags" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class SocketArea:
    """User-defined area of a socket (hvsock) channel, 120 bytes, in the layout of Windows 10 RS5.

    ``for_guest_accept``: 1 if the host connects to a listener in the guest, 0 if the offer answers a
    TL_CONNECT_REQUEST of the guest.
    """

    mode: int
    for_guest_accept: int
    for_guest_container: int
    version: int
    silo_id: uuid.UUID


SOCKET_AREA_VERSION = 1

SOCKET_AREA = Record(
    SocketArea,
    "mode" / c.Int32ul,
    "for_guest_accept" / c.Int8ul,
    "for_guest_container" / c.Int8ul,
    "version" / c.Int32ul,
    "silo_id" / Guid,
    "_padding" / c.Padding(2),
    "_unused" / c.Padding(USER_DEFINED_SIZE - 28),
)
