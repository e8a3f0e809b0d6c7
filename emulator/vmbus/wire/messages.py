"""Channel messages 1 to 29.

Source: docs/protocol/messages.md#message-table.

Every message has a frozen dataclass and a declaration of the same name in capitals. Where a message grew with the
protocol, each form has a declaration of its own. ``MESSAGES`` lists for each number its sender, the version or
feature from which it exists, and its forms. Offers are in :mod:`vmbus.wire.offer`, GPADLs in
:mod:`vmbus.wire.gpadl`. Sizes include the 8-byte message header.
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass
from typing import Any

import construct as c

from vmbus.wire import gpadl, offer
from vmbus.wire.codec import Record
from vmbus.wire.header import MessageType, channel_message
from vmbus.wire.plain import Guid
from vmbus.wire.version import NO_FEATURES, Feature, Version

USER_DATA_SIZE = 120
"""Bytes of user data in OPENCHANNEL."""


@dataclass(frozen=True, slots=True)
class HeaderOnly:
    """A message without a body, 8 bytes."""


def _bare(number: MessageType) -> Record[HeaderOnly]:
    return channel_message(HeaderOnly, number)


REQUESTOFFERS = _bare(MessageType.REQUESTOFFERS)
ALLOFFERS_DELIVERED = _bare(MessageType.ALLOFFERS_DELIVERED)
UNLOAD = _bare(MessageType.UNLOAD)
UNLOAD_RESPONSE = _bare(MessageType.UNLOAD_RESPONSE)
PAUSE = _bare(MessageType.PAUSE)
PAUSE_RESPONSE = _bare(MessageType.PAUSE_RESPONSE)
RESUME = _bare(MessageType.RESUME)


@dataclass(frozen=True, slots=True)
class ChannelOnly:
    """A message with only a channel's relid, 12 bytes."""

    relid: int


def _channel_only(number: MessageType) -> Record[ChannelOnly]:
    return channel_message(ChannelOnly, number, "relid" / c.Int32ul)


RESCIND_CHANNELOFFER = _channel_only(MessageType.RESCIND_CHANNELOFFER)
CLOSECHANNEL = _channel_only(MessageType.CLOSECHANNEL)
RELID_RELEASED = _channel_only(MessageType.RELID_RELEASED)
CLOSE_RESERVED_RESPONSE = _channel_only(MessageType.CLOSE_RESERVED_RESPONSE)


@dataclass(frozen=True, slots=True)
class OpenChannel:
    """OPENCHANNEL (5), 148 bytes (docs/protocol/messages.md#open-channel).

    ``downstream_offset``: pages of the ring GPADL before the host-to-guest ring.
    """

    relid: int
    open_id: int
    ring_gpadl_id: int
    target_vp: int
    downstream_offset: int
    user_data: bytes


_OPEN_FIELDS = (
    "relid" / c.Int32ul,
    "open_id" / c.Int32ul,
    "ring_gpadl_id" / c.Int32ul,
    "target_vp" / c.Int32ul,
    "downstream_offset" / c.Int32ul,
    "user_data" / c.Bytes(USER_DATA_SIZE),
)

OPENCHANNEL = channel_message(OpenChannel, MessageType.OPENCHANNEL, *_OPEN_FIELDS)


@dataclass(frozen=True, slots=True)
class OpenChannelExtended:
    """OPENCHANNEL (5), 156 bytes: if guest-specified signal parameters or interrupt redirection was negotiated."""

    relid: int
    open_id: int
    ring_gpadl_id: int
    target_vp: int
    downstream_offset: int
    user_data: bytes
    connection_id: int
    event_flag: int
    open_flags: int


OPENCHANNEL_EXTENDED = channel_message(
    OpenChannelExtended,
    MessageType.OPENCHANNEL,
    *_OPEN_FIELDS,
    "connection_id" / c.Int32ul,
    "event_flag" / c.Int16ul,
    "open_flags" / c.Int16ul,
)

NO_INTERRUPTS_VP = 0xFFFF_FFFF
"""``target_vp`` of a channel without interrupts."""


class OpenFlags(enum.IntFlag):
    """``open_flags`` of the extended OPENCHANNEL."""

    REDIRECT_INTERRUPT = 0x1


@dataclass(frozen=True, slots=True)
class OpenResult:
    """OPENCHANNEL_RESULT (6), 20 bytes."""

    relid: int
    open_id: int
    status: int


OPENCHANNEL_RESULT = channel_message(
    OpenResult,
    MessageType.OPENCHANNEL_RESULT,
    "relid" / c.Int32ul,
    "open_id" / c.Int32ul,
    "status" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class InitiateContact:
    """INITIATE_CONTACT (14), 40 bytes.

    ``target_info``: below version 5.0 the address of the interrupt page, from 5.0 on a :class:`TargetInfo`.
    ``parent_to_child`` and ``child_to_parent``: addresses (GPA) of the monitor pages.
    """

    version: int
    target_vp: int
    target_info: bytes
    parent_to_child: int
    child_to_parent: int


_CONTACT_FIELDS = (
    "version" / c.Int32ul,
    "target_vp" / c.Int32ul,
    "target_info" / c.Bytes(8),
    "parent_to_child" / c.Int64ul,
    "child_to_parent" / c.Int64ul,
)

INITIATE_CONTACT = channel_message(InitiateContact, MessageType.INITIATE_CONTACT, *_CONTACT_FIELDS)


@dataclass(frozen=True, slots=True)
class InitiateContactWithClient:
    """INITIATE_CONTACT (14), 56 bytes: with the feature CLIENT_ID."""

    version: int
    target_vp: int
    target_info: bytes
    parent_to_child: int
    child_to_parent: int
    client_id: uuid.UUID


INITIATE_CONTACT_WITH_CLIENT = channel_message(
    InitiateContactWithClient, MessageType.INITIATE_CONTACT, *_CONTACT_FIELDS, "client_id" / Guid
)


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """``target_info`` from version 5.0 on, 8 bytes: SINT; VTL from 5.1; feature flags from 6.0."""

    sint: int
    vtl: int
    features: int


TARGET_INFO = Record(
    TargetInfo,
    "sint" / c.Int8ul,
    "vtl" / c.Int8ul,
    "_padding" / c.Padding(2),
    "features" / c.Int32ul,
)


class ContactState(enum.IntEnum):
    """Connection state in VERSION_RESPONSE (15) and MODIFY_CONNECTION_RESPONSE (26)."""

    SUCCESSFUL = 0
    FAILED_LOW_RESOURCES = 1
    FAILED_UNKNOWN = 2


@dataclass(frozen=True, slots=True)
class VersionResponse:
    """VERSION_RESPONSE (15), 16 bytes.

    ``selected``: below version 5.0 the version, from 5.0 on the connection id for all further messages.
    """

    supported: int
    state: int
    selected: int


_RESPONSE_FIELDS = (
    "supported" / c.Int8ul,
    "state" / c.Int8ul,
    "_padding" / c.Padding(2),
    "selected" / c.Int32ul,
)

VERSION_RESPONSE = channel_message(VersionResponse, MessageType.VERSION_RESPONSE, *_RESPONSE_FIELDS)


@dataclass(frozen=True, slots=True)
class VersionResponseFeatures:
    """VERSION_RESPONSE (15), 20 bytes: from version 6.0 on."""

    supported: int
    state: int
    selected: int
    features: int


VERSION_RESPONSE_FEATURES = channel_message(
    VersionResponseFeatures, MessageType.VERSION_RESPONSE, *_RESPONSE_FIELDS, "features" / c.Int32ul
)


@dataclass(frozen=True, slots=True)
class VersionResponseMonitor:
    """VERSION_RESPONSE (15), 40 bytes: with server-specified monitor pages (GPA)."""

    supported: int
    state: int
    selected: int
    features: int
    parent_to_child: int
    child_to_parent: int


VERSION_RESPONSE_MONITOR = channel_message(
    VersionResponseMonitor,
    MessageType.VERSION_RESPONSE,
    *_RESPONSE_FIELDS,
    "features" / c.Int32ul,
    "_features_padding" / c.Padding(4),
    "parent_to_child" / c.Int64ul,
    "child_to_parent" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class OpenReservedChannel:
    """OPEN_RESERVED_CHANNEL (18), 28 bytes; the result is sent to ``target_sint`` of ``target_vp``."""

    relid: int
    target_vp: int
    target_sint: int
    ring_gpadl_id: int
    downstream_offset: int


OPEN_RESERVED_CHANNEL = channel_message(
    OpenReservedChannel,
    MessageType.OPEN_RESERVED_CHANNEL,
    "relid" / c.Int32ul,
    "target_vp" / c.Int32ul,
    "target_sint" / c.Int32ul,
    "ring_gpadl_id" / c.Int32ul,
    "downstream_offset" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class CloseReservedChannel:
    """CLOSE_RESERVED_CHANNEL (19), 20 bytes; the response is sent to ``target_sint`` of ``target_vp``."""

    relid: int
    target_vp: int
    target_sint: int


CLOSE_RESERVED_CHANNEL = channel_message(
    CloseReservedChannel,
    MessageType.CLOSE_RESERVED_CHANNEL,
    "relid" / c.Int32ul,
    "target_vp" / c.Int32ul,
    "target_sint" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class TlConnectRequest:
    """TL_CONNECT_REQUEST (21), 40 bytes: the guest connects to the host's service ``service_id``."""

    endpoint_id: uuid.UUID
    service_id: uuid.UUID


TL_CONNECT_REQUEST = channel_message(
    TlConnectRequest, MessageType.TL_CONNECT_REQUEST, "endpoint_id" / Guid, "service_id" / Guid
)


@dataclass(frozen=True, slots=True)
class TlConnectRequestSilo:
    """TL_CONNECT_REQUEST (21), 56 bytes: from version 5.2 on; the short form stays valid."""

    endpoint_id: uuid.UUID
    service_id: uuid.UUID
    silo_id: uuid.UUID


TL_CONNECT_REQUEST_SILO = channel_message(
    TlConnectRequestSilo,
    MessageType.TL_CONNECT_REQUEST,
    "endpoint_id" / Guid,
    "service_id" / Guid,
    "silo_id" / Guid,
)


@dataclass(frozen=True, slots=True)
class TlConnectResult:
    """TL_CONNECT_RESULT (23), 44 bytes."""

    endpoint_id: uuid.UUID
    service_id: uuid.UUID
    status: int


TL_CONNECT_RESULT = channel_message(
    TlConnectResult,
    MessageType.TL_CONNECT_RESULT,
    "endpoint_id" / Guid,
    "service_id" / Guid,
    "status" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class ModifyChannel:
    """MODIFYCHANNEL (22), 16 bytes."""

    relid: int
    target_vp: int


MODIFYCHANNEL = channel_message(
    ModifyChannel, MessageType.MODIFYCHANNEL, "relid" / c.Int32ul, "target_vp" / c.Int32ul
)


@dataclass(frozen=True, slots=True)
class ModifyChannelResponse:
    """MODIFYCHANNEL_RESPONSE (24), 16 bytes, from version 5.3 on."""

    relid: int
    status: int


MODIFYCHANNEL_RESPONSE = channel_message(
    ModifyChannelResponse, MessageType.MODIFYCHANNEL_RESPONSE, "relid" / c.Int32ul, "status" / c.Int32ul
)


@dataclass(frozen=True, slots=True)
class ModifyConnection:
    """MODIFY_CONNECTION (25), 24 bytes: new monitor pages (GPA)."""

    parent_to_child: int
    child_to_parent: int


MODIFY_CONNECTION = channel_message(
    ModifyConnection,
    MessageType.MODIFY_CONNECTION,
    "parent_to_child" / c.Int64ul,
    "child_to_parent" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class ModifyConnectionResponse:
    """MODIFY_CONNECTION_RESPONSE (26), 9 bytes."""

    state: int


MODIFY_CONNECTION_RESPONSE = channel_message(
    ModifyConnectionResponse, MessageType.MODIFY_CONNECTION_RESPONSE, "state" / c.Int8ul
)


class Sender(enum.Enum):
    """Sender of a message."""

    GUEST = "guest"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class MessageRule:
    """One row of the message table; ``longer``: (version or feature, declaration) of later, longer forms."""

    sender: Sender
    record: Record[Any]
    since: Version = Version.V1
    feature: Feature = NO_FEATURES
    longer: tuple[tuple[Version | Feature, Record[Any]], ...] = ()


_SIGNAL = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
_REDIRECT = Feature.CHANNEL_INTERRUPT_REDIRECTION
_G, _H = Sender.GUEST, Sender.HOST

MESSAGES: dict[MessageType, MessageRule] = {
    MessageType.OFFERCHANNEL: MessageRule(_H, offer.OFFERCHANNEL),
    MessageType.RESCIND_CHANNELOFFER: MessageRule(_H, RESCIND_CHANNELOFFER),
    MessageType.REQUESTOFFERS: MessageRule(_G, REQUESTOFFERS),
    MessageType.ALLOFFERS_DELIVERED: MessageRule(_H, ALLOFFERS_DELIVERED),
    MessageType.OPENCHANNEL: MessageRule(
        _G, OPENCHANNEL, longer=((_SIGNAL, OPENCHANNEL_EXTENDED), (_REDIRECT, OPENCHANNEL_EXTENDED))
    ),
    MessageType.OPENCHANNEL_RESULT: MessageRule(_H, OPENCHANNEL_RESULT),
    MessageType.CLOSECHANNEL: MessageRule(_G, CLOSECHANNEL),
    MessageType.GPADL_HEADER: MessageRule(_G, gpadl.GPADL_HEADER),
    MessageType.GPADL_BODY: MessageRule(_G, gpadl.GPADL_BODY),
    MessageType.GPADL_CREATED: MessageRule(_H, gpadl.GPADL_CREATED),
    MessageType.GPADL_TEARDOWN: MessageRule(_G, gpadl.GPADL_TEARDOWN),
    MessageType.GPADL_TORNDOWN: MessageRule(_H, gpadl.GPADL_TORNDOWN),
    MessageType.RELID_RELEASED: MessageRule(_G, RELID_RELEASED),
    MessageType.INITIATE_CONTACT: MessageRule(
        _G, INITIATE_CONTACT, longer=((Feature.CLIENT_ID, INITIATE_CONTACT_WITH_CLIENT),)
    ),
    MessageType.VERSION_RESPONSE: MessageRule(
        _H,
        VERSION_RESPONSE,
        longer=(
            (Version.COPPER, VERSION_RESPONSE_FEATURES),
            (Feature.SERVER_SPECIFIED_MONITOR_PAGES, VERSION_RESPONSE_MONITOR),
        ),
    ),
    MessageType.UNLOAD: MessageRule(_G, UNLOAD),
    MessageType.UNLOAD_RESPONSE: MessageRule(_H, UNLOAD_RESPONSE),
    MessageType.OPEN_RESERVED_CHANNEL: MessageRule(_G, OPEN_RESERVED_CHANNEL, Version.WIN10),
    MessageType.CLOSE_RESERVED_CHANNEL: MessageRule(_G, CLOSE_RESERVED_CHANNEL, Version.WIN10),
    MessageType.CLOSE_RESERVED_RESPONSE: MessageRule(_H, CLOSE_RESERVED_RESPONSE, Version.WIN10),
    MessageType.TL_CONNECT_REQUEST: MessageRule(
        _G, TL_CONNECT_REQUEST, Version.WIN10, longer=((Version.WIN10_RS5, TL_CONNECT_REQUEST_SILO),)
    ),
    MessageType.MODIFYCHANNEL: MessageRule(_G, MODIFYCHANNEL, Version.WIN10_RS3_0),
    MessageType.TL_CONNECT_RESULT: MessageRule(_H, TL_CONNECT_RESULT, Version.WIN10_RS3_0),
    MessageType.MODIFYCHANNEL_RESPONSE: MessageRule(_H, MODIFYCHANNEL_RESPONSE, Version.IRON),
    MessageType.MODIFY_CONNECTION: MessageRule(
        _G, MODIFY_CONNECTION, Version.COPPER, Feature.MODIFY_CONNECTION
    ),
    MessageType.MODIFY_CONNECTION_RESPONSE: MessageRule(
        _H, MODIFY_CONNECTION_RESPONSE, Version.COPPER, Feature.MODIFY_CONNECTION
    ),
    MessageType.PAUSE: MessageRule(_G, PAUSE, Version.COPPER, Feature.PAUSE_RESUME),
    MessageType.PAUSE_RESPONSE: MessageRule(_H, PAUSE_RESPONSE, Version.COPPER, Feature.PAUSE_RESUME),
    MessageType.RESUME: MessageRule(_G, RESUME, Version.COPPER, Feature.PAUSE_RESUME),
}
