"""Numbers of channel messages, and their 8-byte header.

Source: docs/protocol/messages.md#message-table, docs/protocol/messages.md#message-header.

A channel message is the payload of HvPostMessage (guest to host) or of a SynIC message slot (host to guest). It has
at most 240 bytes, of which the first 8 are the header. ``channel_message`` declares a message with its header, so
that offsets and sizes of the declarations are those of the protocol.
"""

from __future__ import annotations

import enum
from typing import Any, TypeVar

import construct as c

from vmbus.wire.codec import Record

T = TypeVar("T")

HEADER_SIZE = 8
MAX_MESSAGE = 240
"""Bytes of a channel message, including the header."""


class MessageType(enum.IntEnum):
    """Message numbers (docs/protocol/messages.md#message-table)."""

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
"""Status in the answer to a GPADL, an open or a modify request that failed."""
STATUS_CONNECTION_REFUSED = 0xC000_0236
"""Status in TL_CONNECT_RESULT for a service that the host does not have."""


def channel_message(cls: type[T], number: MessageType, *fields: Any) -> Record[T]:
    """Return the codec of message ``number``: the header, then ``fields``."""
    return Record(
        cls,
        "_message_type" / c.Default(c.Int32ul, int(number)),
        "_header_padding" / c.Default(c.Int32ul, 0),
        *fields,
    )


def message_number(payload: bytes) -> int | None:
    """Return the message number of ``payload``, or None if it is too short for a header."""
    if len(payload) < HEADER_SIZE:
        return None
    return int.from_bytes(payload[:4], "little")
