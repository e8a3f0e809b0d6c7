"""Messages from the guest: checked, and dispatched to the part of the bus that handles them.

Source: docs/protocol/messages.md#message-table, docs/protocol/messages.md#wrong-messages.

A message is a private copy of what the guest posted. One that is too short, unknown, not for a host, not of the
agreed version or not legal at this time is counted, logged and not answered, as Hyper-V does; where the guest waits
for an answer, the handler sends one. The dispatcher keeps no state.

    HvPostMessage → Bus.handle_message → MessageDispatcher.dispatch → a handler below → Bus, Channel
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.gpadl import GpadlAssembler
from vmbus.bus.channel.opening import OpenRequest, ReservedClient
from vmbus.bus.contact import SINT_COUNT, Connection, ContactRequest, Phase, read_contact
from vmbus.bus.outbox import Outbox, Target
from vmbus.bus.sockets import SocketRequest
from vmbus.errors import GuestError, ProtocolError
from vmbus.ports import Synic
from vmbus.refusals import Refusals
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

MAX_UNDELIVERED = 256
"""Messages waiting for the guest's slot beyond which the guest must take some before it may post more."""

EARLY_ACKNOWLEDGED = frozenset(
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
"""Messages whose answers, if any, go where all answers of the connection go: they can be acknowledged early."""

POSTED = EARLY_ACKNOWLEDGED - {int(MessageType.REQUESTOFFERS)}
"""Those of them with at most one answer, so their number bounds that of the answers. REQUESTOFFERS has any number."""


class PostResult(enum.Enum):
    """The result of HvPostMessage. ``RETRY``: nothing happened, the guest must post it again (status 0x13)."""

    OK = "ok"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class PostedMessage:
    """A message as the guest posted it.

    ``trusted``: it came from a paravisor on a confidential connection. ``acknowledged``: HvPostMessage has
    succeeded already, so the guest cannot be made to retry.
    """

    connection_id: int
    payload: bytes
    trusted: bool = False
    acknowledged: bool = False


class BusActions(Protocol):
    """What the dispatcher needs of the bus: the state that messages are checked against, and actions."""

    connection: Connection
    gpadl_assembler: GpadlAssembler
    outbox: Outbox
    refusals: Refusals
    synic: Synic

    def send(self, payload: bytes, target: Target | None = None) -> None:
        """Send a message to the guest."""

    def find(self, relid: int) -> Channel | None:
        """Return the channel with that id."""

    def contact(self, request: ContactRequest, *, acknowledged: bool) -> PostResult:
        """Handle INITIATE_CONTACT."""

    def unload(self) -> None:
        """Handle UNLOAD."""

    def request_offers(self) -> None:
        """Handle REQUESTOFFERS."""

    def modify_connection(self, parent_to_child: int, child_to_parent: int) -> None:
        """Handle MODIFY_CONNECTION."""

    def pause_for_guest(self) -> None:
        """Handle PAUSE."""

    def resume_for_guest(self) -> None:
        """Handle RESUME."""

    def connect_socket(self, request: SocketRequest) -> None:
        """Handle TL_CONNECT_REQUEST."""


Handler = Callable[[PostedMessage], PostResult | None]

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
    """Checks, parses and dispatches the guest's messages."""

    def __init__(self, bus: BusActions) -> None:
        self._bus = bus
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

    def dispatch(self, message: PostedMessage) -> PostResult:
        """Handle one message."""
        bus = self._bus
        try:
            number = self._check(message.payload, message.trusted)
            if number is MessageType.INITIATE_CONTACT:
                request = read_contact(message.payload, message.connection_id, trusted=message.trusted)
                return bus.contact(request, acknowledged=message.acknowledged)
            if (
                number is not MessageType.UNLOAD
                and not message.acknowledged
                and self.flooded(bus.connection.target)
            ):
                return PostResult.RETRY
            return self._handlers[number](message) or PostResult.OK
        except GuestError as error:
            bus.refusals.refuse(error.reason, error.detail)
            return PostResult.OK

    def _check(self, payload: bytes, trusted: bool) -> MessageType:
        """Return the number of a message that may be handled now. Raises :class:`ProtocolError`."""
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

    def flooded(self, target: Target, *, lasting: bool = False) -> bool:
        """Return whether ``target`` has to take some messages before the guest may cause more.

        ``lasting``: those that the guest would cause outlive its connection. It names a target for each, so all
        targets together have the limit of one.
        """
        outbox = self._bus.outbox
        full = outbox.undelivered(target) >= MAX_UNDELIVERED
        if not full and not (lasting and outbox.lasting >= MAX_UNDELIVERED):
            return False
        self._bus.refusals.refuse("message-flood", f"VP {target.vp}, SINT {target.sint}")
        return True

    def _channel(self, relid: int, reason: str) -> Channel:
        channel = self._bus.find(relid)
        if channel is None or not channel.offered:
            raise ProtocolError(reason, f"{relid}")
        return channel

    # --- the connection ---

    def _request_offers(self, posted: PostedMessage) -> None:
        self._bus.request_offers()

    def _unload(self, posted: PostedMessage) -> None:
        self._bus.unload()

    def _modify_connection(self, posted: PostedMessage) -> None:
        pages = MODIFY_CONNECTION.parse(posted.payload)
        self._bus.modify_connection(pages.parent_to_child, pages.child_to_parent)

    def _pause(self, posted: PostedMessage) -> None:
        self._bus.pause_for_guest()

    def _resume(self, posted: PostedMessage) -> None:
        if not self._bus.connection.paused:
            raise ProtocolError("resume-not-paused")
        self._bus.resume_for_guest()

    def _tl_connect(self, posted: PostedMessage) -> None:
        with_silo = (
            self._bus.connection.at_least(Version.WIN10_RS5)
            and len(posted.payload) >= TL_CONNECT_REQUEST_SILO.size
        )
        if with_silo:
            long = TL_CONNECT_REQUEST_SILO.parse(posted.payload)
            request = SocketRequest(long.endpoint_id, long.service_id, long.silo_id)
        else:
            short = TL_CONNECT_REQUEST.parse(posted.payload)
            request = SocketRequest(short.endpoint_id, short.service_id)
        self._bus.connect_socket(request)

    # --- GPADLs ---

    def _gpadl_header(self, posted: PostedMessage) -> None:
        header = GPADL_HEADER.parse(posted.payload)
        try:
            channel = self._channel(header.relid, "gpadl-unknown-relid")
            if channel.reserved:
                raise ProtocolError("gpadl-reserved-channel", f"{header.relid}")
            if header.gpadl_id in channel.gpadls:
                raise ProtocolError("gpadl-id-in-use", f"{header.gpadl_id:#x}")
            assembly = self._bus.gpadl_assembler.begin(header, posted.payload[GPADL_HEADER.size :])
        except GuestError:
            answer = GpadlCreated(header.relid, header.gpadl_id, STATUS_UNSUCCESSFUL)
            self._bus.send(GPADL_CREATED.build(answer))
            raise
        if assembly.complete:
            channel.accept_gpadl(assembly)

    def _gpadl_body(self, posted: PostedMessage) -> None:
        body = GPADL_BODY.parse(posted.payload)
        assembly = self._bus.gpadl_assembler.assemblies.get(body.gpadl_id)
        if assembly is None:
            raise ProtocolError("gpadl-body-unknown", f"{body.gpadl_id:#x}")
        assembly.append(posted.payload[GPADL_BODY.size :])
        if assembly.complete:
            channel = self._bus.find(assembly.relid)
            if channel is None:
                self._bus.gpadl_assembler.abandon(assembly)
                raise ProtocolError("gpadl-unknown-relid", f"{assembly.relid}")
            channel.accept_gpadl(assembly)

    def _gpadl_teardown(self, posted: PostedMessage) -> None:
        request = GPADL_TEARDOWN.parse(posted.payload)
        self._channel(request.relid, "teardown-unknown-relid").teardown(request.gpadl_id)

    # --- channels ---

    def _open(self, posted: PostedMessage) -> None:
        connection = self._bus.connection
        message = OPENCHANNEL.parse(posted.payload)
        event_flag = connection_id = None
        redirect = False
        extended = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.CHANNEL_INTERRUPT_REDIRECTION
        if connection.features & extended:
            if len(posted.payload) < OPENCHANNEL_EXTENDED.size:
                raise ProtocolError("message-short", f"long OPENCHANNEL of {len(posted.payload)} bytes")
            long = OPENCHANNEL_EXTENDED.parse(posted.payload)
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

    def _close(self, posted: PostedMessage) -> None:
        self._channel(CLOSECHANNEL.parse(posted.payload).relid, "close-unknown-relid").close()

    def _relid_released(self, posted: PostedMessage) -> None:
        message = RELID_RELEASED.parse(posted.payload)
        if self._bus.connection.phase is not Phase.CONNECTED:
            return  # Linux releases every channel when hv_vmbus is unloaded, after UNLOAD has freed them all
        self._channel(message.relid, "release-unknown-relid").release()

    def _modify_channel(self, posted: PostedMessage) -> None:
        message = MODIFYCHANNEL.parse(posted.payload)
        try:
            channel = self._channel(message.relid, "modify-unknown-relid")
        except ProtocolError:
            if self._bus.connection.at_least(Version.IRON):
                answer = ModifyChannelResponse(message.relid, STATUS_UNSUCCESSFUL)
                self._bus.send(MODIFYCHANNEL_RESPONSE.build(answer))
            raise
        channel.modify(message.target_vp)

    def _open_reserved(self, posted: PostedMessage) -> PostResult | None:
        message = OPEN_RESERVED_CHANNEL.parse(posted.payload)
        target = self._reserved_target(message.target_vp, message.target_sint)
        channel = self._channel(message.relid, "open-reserved-unknown-relid")
        if not posted.acknowledged and self.flooded(target, lasting=True):
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

    def _close_reserved(self, posted: PostedMessage) -> PostResult | None:
        message = CLOSE_RESERVED_CHANNEL.parse(posted.payload)
        target = self._reserved_target(message.target_vp, message.target_sint)
        channel = self._bus.find(message.relid)
        if channel is None:
            raise ProtocolError("close-reserved-unknown-relid", f"{message.relid}")
        if not posted.acknowledged and self.flooded(target, lasting=True):
            return PostResult.RETRY
        channel.close_reserved(target)
        return None

    def _reserved_target(self, vp: int, sint: int) -> Target:
        if vp >= self._bus.synic.vp_count or sint >= SINT_COUNT:
            raise ProtocolError("reserved-target", f"VP {vp}, SINT {sint}")
        return Target(vp, sint)
