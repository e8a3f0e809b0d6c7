"""Messages from the guest: what is let in, and who handles it.

Source: docs/protocol/messages.md#message-table, docs/protocol/messages.md#wrong-messages.

A message is a private copy of what the guest posted. Too short, unknown, not for a host, not of this version, or
not now: counted, logged, and no answer, as Hyper-V does; where the guest waits for an answer, the handler gives
one. What a handler needs of the bus it calls there; it keeps no state of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.bus.channel.state import OpenRequest, ReservedClient
from vmbus.bus.contact import SINT_COUNT, Phase, read_contact
from vmbus.bus.outbox import Target
from vmbus.bus.sockets import SocketRequest
from vmbus.errors import GuestError, ProtocolError
from vmbus.wire.gpadl import (
    GPADL_BODY,
    GPADL_CREATED,
    GPADL_HEADER,
    GPADL_TEARDOWN,
    GpadlCreated,
)
from vmbus.wire.header import MAX_MESSAGE, STATUS_UNSUCCESSFUL, MessageType, message_number
from vmbus.wire.messages import (
    CLOSE_RESERVED_CHANNEL,
    CLOSECHANNEL,
    MESSAGES,
    MODIFY_CONNECTION,
    MODIFYCHANNEL,
    MODIFYCHANNEL_RESPONSE,
    NO_INTERRUPTS_VP,
    OPEN_RESERVED_CHANNEL,
    OPENCHANNEL,
    OPENCHANNEL_EXTENDED,
    RELID_RELEASED,
    TL_CONNECT_REQUEST,
    TL_CONNECT_REQUEST_SILO,
    ModifyChannelResponse,
    OpenFlags,
    Sender,
)
from vmbus.wire.version import Feature, Version

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel
    from vmbus.bus.server import Bus

MAX_UNDELIVERED = 256
"""Messages waiting for the guest's slot beyond which the guest must take some before it may post more."""


PROMISED = frozenset(
    {
        int(MessageType.REQUESTOFFERS),
        int(MessageType.GPADL_HEADER),
        int(MessageType.GPADL_BODY),
        int(MessageType.GPADL_TEARDOWN),
        int(MessageType.OPENCHANNEL),
        int(MessageType.CLOSECHANNEL),
        int(MessageType.RELID_RELEASED),
        int(MessageType.MODIFYCHANNEL),
    }
)
"""Messages that are answered, if at all, where the connection's answers go."""


class PostResult(enum.Enum):
    """What HvPostMessage tells the guest. ``RETRY``: nothing happened, post it again (status 0x13)."""

    OK = "ok"
    RETRY = "retry"


Handler = Callable[[bytes], PostResult | None]

_WHILE_PAUSED = frozenset({MessageType.RESUME, MessageType.UNLOAD, MessageType.INITIATE_CONTACT})
_WHILE_DISCONNECTED = frozenset(
    {
        MessageType.INITIATE_CONTACT,
        MessageType.UNLOAD,
        MessageType.CLOSE_RESERVED_CHANNEL,
        MessageType.RELID_RELEASED,
    }
)


class MessageDispatcher:
    """Reads, checks and hands on the guest's messages."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._promised = False
        self._handlers: dict[int, Handler] = {
            MessageType.REQUESTOFFERS: self._request_offers,
            MessageType.OPENCHANNEL: self._open,
            MessageType.CLOSECHANNEL: self._close,
            MessageType.GPADL_HEADER: self._gpadl_header,
            MessageType.GPADL_BODY: self._gpadl_body,
            MessageType.GPADL_TEARDOWN: self._gpadl_teardown,
            MessageType.RELID_RELEASED: self._relid_released,
            MessageType.UNLOAD: self._unload,
            MessageType.OPEN_RESERVED_CHANNEL: self._open_reserved,
            MessageType.CLOSE_RESERVED_CHANNEL: self._close_reserved,
            MessageType.TL_CONNECT_REQUEST: self._tl_connect,
            MessageType.MODIFYCHANNEL: self._modify_channel,
            MessageType.MODIFY_CONNECTION: self._modify_connection,
            MessageType.PAUSE: self._pause,
            MessageType.RESUME: self._resume,
        }

    def receive(
        self, connection_id: int, payload: bytes, trusted: bool, *, promised: bool = False
    ) -> PostResult:
        """Act on one message. ``promised``: the guest was told that it is taken, so it cannot be put off."""
        self._promised = promised
        try:
            number = self._check(payload, trusted)
            if number is MessageType.INITIATE_CONTACT:
                return self._bus.contact(read_contact(payload, connection_id, trusted=trusted))
            if number is not MessageType.UNLOAD and self.flooded(self._bus.connection.target):
                return PostResult.RETRY
            return self._handlers[number](payload) or PostResult.OK
        except GuestError as error:
            self._bus.refusals.refuse(error.reason, error.detail)
            return PostResult.OK

    def _check(self, payload: bytes, trusted: bool) -> MessageType:
        """The number of a message that may be handled now."""
        connection = self._bus.connection
        number = message_number(payload)
        if number is None or len(payload) > MAX_MESSAGE:
            raise ProtocolError("message-size", f"{len(payload)} bytes")
        try:
            number = MessageType(number)
        except ValueError:
            raise ProtocolError("message-unknown", f"{number}") from None
        rule = MESSAGES[number]
        if rule.sender is not Sender.GUEST:
            raise ProtocolError("message-from-guest", number.name)
        if connection.trusted and not trusted:
            raise ProtocolError("message-untrusted", number.name)
        if number in _WHILE_DISCONNECTED:
            pass
        elif connection.phase is not Phase.CONNECTED:
            raise ProtocolError("message-disconnected", number.name)
        elif not connection.at_least(rule.since) or rule.feature not in connection.features:
            raise ProtocolError("message-version", f"{number.name} in {connection.version!s}")
        if connection.paused and number not in _WHILE_PAUSED:
            raise ProtocolError("message-paused", number.name)
        if len(payload) < rule.record.size:
            raise ProtocolError("message-short", f"{number.name} of {len(payload)} bytes")
        return number

    def flooded(self, target: Target) -> bool:
        """Whether ``target`` has to take some messages before it may cause more."""
        if self._promised or self._bus.outbox.undelivered(target) < MAX_UNDELIVERED:
            return False
        self._bus.refusals.refuse("message-flood", f"VP {target.vp}, SINT {target.sint}")
        return True

    def _channel(self, relid: int, reason: str) -> Channel:
        channel = self._bus.find(relid)
        if channel is None or not channel.offered:
            raise ProtocolError(reason, f"{relid}")
        return channel

    # ---- the connection

    def _request_offers(self, payload: bytes) -> None:
        self._bus.request_offers()

    def _unload(self, payload: bytes) -> None:
        self._bus.unload()

    def _modify_connection(self, payload: bytes) -> None:
        pages = MODIFY_CONNECTION.parse(payload)
        self._bus.modify_connection(pages.parent_to_child, pages.child_to_parent)

    def _pause(self, payload: bytes) -> None:
        self._bus.pause_for_guest()

    def _resume(self, payload: bytes) -> None:
        if not self._bus.connection.paused:
            raise ProtocolError("resume-not-paused")
        self._bus.resume_for_guest()

    def _tl_connect(self, payload: bytes) -> None:
        with_silo = (
            self._bus.connection.at_least(Version.WIN10_RS5) and len(payload) >= TL_CONNECT_REQUEST_SILO.size
        )
        if with_silo:
            long = TL_CONNECT_REQUEST_SILO.parse(payload)
            request = SocketRequest(long.endpoint_id, long.service_id, long.silo_id)
        else:
            short = TL_CONNECT_REQUEST.parse(payload)
            request = SocketRequest(short.endpoint_id, short.service_id)
        self._bus.connect_socket(request)

    # ---- GPADLs

    def _gpadl_header(self, payload: bytes) -> None:
        header = GPADL_HEADER.parse(payload)
        try:
            channel = self._channel(header.relid, "gpadl-unknown-relid")
            if channel.reserved:
                raise ProtocolError("gpadl-reserved-channel", f"{header.relid}")
            if header.gpadl_id in channel.gpadls:
                raise ProtocolError("gpadl-id-in-use", f"{header.gpadl_id:#x}")
            assembly = self._bus.gpadls.begin(header, payload[GPADL_HEADER.size :])
        except GuestError:
            answer = GpadlCreated(header.relid, header.gpadl_id, STATUS_UNSUCCESSFUL)
            self._bus.send(GPADL_CREATED.build(answer))
            raise
        if assembly.complete:
            channel.gpadl_complete(assembly)

    def _gpadl_body(self, payload: bytes) -> None:
        body = GPADL_BODY.parse(payload)
        assembly = self._bus.gpadls.assemblies.get(body.gpadl_id)
        if assembly is None:
            raise ProtocolError("gpadl-body-unknown", f"{body.gpadl_id:#x}")
        assembly.append(payload[GPADL_BODY.size :])
        if assembly.complete:
            channel = self._bus.find(assembly.relid)
            if channel is None:
                self._bus.gpadls.abandon(assembly)
                raise ProtocolError("gpadl-unknown-relid", f"{assembly.relid}")
            channel.gpadl_complete(assembly)

    def _gpadl_teardown(self, payload: bytes) -> None:
        request = GPADL_TEARDOWN.parse(payload)
        self._channel(request.relid, "teardown-unknown-relid").teardown(request.gpadl_id)

    # ---- channels

    def _open(self, payload: bytes) -> None:
        connection = self._bus.connection
        message = OPENCHANNEL.parse(payload)
        event_flag = connection_id = None
        redirect = False
        extended = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.CHANNEL_INTERRUPT_REDIRECTION
        if connection.features & extended:
            if len(payload) < OPENCHANNEL_EXTENDED.size:
                raise ProtocolError("message-short", f"long OPENCHANNEL of {len(payload)} bytes")
            long = OPENCHANNEL_EXTENDED.parse(payload)
            if Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS in connection.features:
                event_flag, connection_id = long.event_flag, long.connection_id
            if Feature.CHANNEL_INTERRUPT_REDIRECTION in connection.features:
                redirect = bool(long.open_flags & OpenFlags.REDIRECT_INTERRUPT)
        target_vp: int | None = message.target_vp if connection.at_least(Version.WIN8) else 0
        if target_vp == NO_INTERRUPTS_VP:
            target_vp = None
        request = OpenRequest(
            open_id=message.open_id,
            ring_gpadl_id=message.ring_gpadl_id,
            target_vp=target_vp,
            downstream_offset=message.downstream_offset,
            user_data=message.user_data,
            event_flag=event_flag,
            connection_id=connection_id,
            redirect_interrupt=redirect,
        )
        self._channel(message.relid, "open-unknown-relid").open(request)

    def _close(self, payload: bytes) -> None:
        self._channel(CLOSECHANNEL.parse(payload).relid, "close-unknown-relid").close()

    def _relid_released(self, payload: bytes) -> None:
        message = RELID_RELEASED.parse(payload)
        if self._bus.connection.phase is not Phase.CONNECTED:
            return  # Linux, when its hv_vmbus is unloaded, names every channel after UNLOAD has let them all go
        self._channel(message.relid, "release-unknown-relid").release()

    def _modify_channel(self, payload: bytes) -> None:
        message = MODIFYCHANNEL.parse(payload)
        try:
            channel = self._channel(message.relid, "modify-unknown-relid")
        except ProtocolError:
            if self._bus.connection.at_least(Version.IRON):
                answer = ModifyChannelResponse(message.relid, STATUS_UNSUCCESSFUL)
                self._bus.send(MODIFYCHANNEL_RESPONSE.build(answer))
            raise
        channel.modify(message.target_vp)

    def _open_reserved(self, payload: bytes) -> PostResult | None:
        message = OPEN_RESERVED_CHANNEL.parse(payload)
        target = self._reserved_target(message.target_vp, message.target_sint)
        channel = self._channel(message.relid, "open-reserved-unknown-relid")
        if self.flooded(target):
            return PostResult.RETRY
        connection = self._bus.connection
        if connection.version is None:
            raise ProtocolError("message-disconnected", "OPEN_RESERVED_CHANNEL")
        channel.open(
            OpenRequest(
                open_id=0,
                ring_gpadl_id=message.ring_gpadl_id,
                target_vp=None,
                downstream_offset=message.downstream_offset,
                reserved=ReservedClient(target, connection.version, connection.features),
            )
        )
        return None

    def _close_reserved(self, payload: bytes) -> PostResult | None:
        message = CLOSE_RESERVED_CHANNEL.parse(payload)
        target = self._reserved_target(message.target_vp, message.target_sint)
        channel = self._bus.find(message.relid)
        if channel is None:
            raise ProtocolError("close-reserved-unknown-relid", f"{message.relid}")
        if self.flooded(target):
            return PostResult.RETRY
        channel.close_reserved(target)
        return None

    def _reserved_target(self, vp: int, sint: int) -> Target:
        if vp >= self._bus.synic.vp_count or sint >= SINT_COUNT:
            raise ProtocolError("reserved-target", f"VP {vp}, SINT {sint}")
        return Target(vp, sint)
