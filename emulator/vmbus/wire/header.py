"""Numbers and the 8-byte header of channel messages.

Source: docs/protocol/messages.md#message-table, docs/protocol/messages.md#message-header.

A channel message is the payload of HvPostMessage (guest to host) or of a SynIC message slot (host to guest): at
most 240 bytes, of which the first 8 are the header. ``channel_message`` declares a message with its header, so
offsets and sizes in the declarations are those of the specification.
"""

from __future__ import annotations

import enum
from typing import Any, TypeVar

import construct as c

from vmbus.wire.codec import Record

T = TypeVar("T")

HEADER_SIZE = 8
MAX_MESSAGE = 240
"""Bytes, header included."""


class MessageType(enum.IntEnum):
    """Message numbers."""

    OFFERCHANNEL = 1
    RESCIND_CHANNELOFFER = 2
    REQUESTOFFERS = 3
    ALLOFFERS_DELIVERED = 4
    OPENCHANNEL = 5
    OPENCHANNEL_RESULT = 6
    CLOSECHANNEL = 7
    GPADL_HEADER = 8
    GPADL_BODY = 9
    GPADL_CREATED = 10
    GPADL_TEARDOWN = 11
    GPADL_TORNDOWN = 12
    RELID_RELEASED = 13
    INITIATE_CONTACT = 14
    VERSION_RESPONSE = 15
    UNLOAD = 16
    UNLOAD_RESPONSE = 17
    OPEN_RESERVED_CHANNEL = 18
    CLOSE_RESERVED_CHANNEL = 19
    CLOSE_RESERVED_RESPONSE = 20
    TL_CONNECT_REQUEST = 21
    MODIFYCHANNEL = 22
    TL_CONNECT_RESULT = 23
    MODIFYCHANNEL_RESPONSE = 24
    MODIFY_CONNECTION = 25
    MODIFY_CONNECTION_RESPONSE = 26
    PAUSE = 27
    PAUSE_RESPONSE = 28
    RESUME = 29


STATUS_SUCCESS = 0
STATUS_UNSUCCESSFUL = 0x8000_FFFF
"""What a guest is told when a GPADL, an open or a modify request failed."""
STATUS_CONNECTION_REFUSED = 0xC000_0236


def channel_message(cls: type[T], number: MessageType, *fields: Any) -> Record[T]:
    """The codec of message ``number``: header, then ``fields``."""
    return Record(
        cls,
        "_message_type" / c.Default(c.Int32ul, int(number)),
        "_header_padding" / c.Default(c.Int32ul, 0),
        *fields,
    )


def message_number(payload: bytes) -> int | None:
    """The number that ``payload`` carries, or None when it is too short for a header."""
    if len(payload) < HEADER_SIZE:
        return None
    return int.from_bytes(payload[:4], "little")
