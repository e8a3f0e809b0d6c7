"""The bus: one guest's connection and the channels that are offered to it.

Source: docs/protocol/messages.md#message-table, docs/protocol/messages.md#life-cycle.

``Bus`` is a pure state machine. The hypervisor part calls :meth:`Bus.message` for every HvPostMessage and the
event ports for every HvSignalEvent; devices call :meth:`Bus.offer` and :meth:`Bus.revoke`. It talks to the guest
through :class:`~vmbus.ports.Synic` alone. States of the connection are drawn in ``contact``, of a channel in
``channel``.

A disconnection (UNLOAD, another contact, a machine reset) is not over until every device has let its channel go:
UNLOAD_RESPONSE, and the answer to the next contact, wait for that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.endpoint import Endpoint
from vmbus.bus.channel.gpadl import GpadlTable
from vmbus.bus.channel_list import ChannelList
from vmbus.bus.contact import (
    DEFAULT_FEATURES,
    HOME,
    MESSAGE_SINT,
    MONITOR_CONNECTION_ID,
    SHARED_EVENT_CONNECTION_ID,
    SINT_COUNT,
    UNSUPPORTED,
    Connection,
    ContactRequest,
    Failure,
    Limits,
    MonitorPages,
    NextAction,
    Phase,
    answer_agreement,
    answer_failure,
    check_monitor_pages,
    decide,
)
from vmbus.bus.messages import MAX_UNDELIVERED, PROMISED, MessageDispatcher, PostResult
from vmbus.bus.monitor import MonitorScan, set_interrupt_bit, take_interrupt_bits
from vmbus.bus.offers import Offer
from vmbus.bus.outbox import Outbox, Outgoing, Target
from vmbus.bus.saved_state.restore import BusStateRefused, check_state, thaw_assembly
from vmbus.bus.saved_state.values import (
    BusState,
    ConnectionRecord,
    HeldMessage,
    assembly_record,
)
from vmbus.bus.sockets import NoSockets, SocketListener, SocketRequest
from vmbus.ports import GuestMemory, Synic, Timers
from vmbus.refusals import Refusals
from vmbus.wire.header import MAX_MESSAGE, STATUS_CONNECTION_REFUSED
from vmbus.wire.messages import (
    ALLOFFERS_DELIVERED,
    MODIFY_CONNECTION_RESPONSE,
    PAUSE_RESPONSE,
    RESCIND_CHANNELOFFER,
    TL_CONNECT_RESULT,
    UNLOAD_RESPONSE,
    ChannelOnly,
    ContactState,
    HeaderOnly,
    ModifyConnectionResponse,
    TlConnectResult,
)
from vmbus.wire.version import NO_FEATURES, Feature, Version

_logger = logging.getLogger(__name__)

MAX_INBOX = 16
"""Guest messages that a paused bus keeps; the guest is told to retry the next."""


class Bus:
    """The host's end of VMBus for one guest."""

    def __init__(
        self,
        *,
        memory: GuestMemory,
        synic: Synic,
        timers: Timers,
        max_version: Version = Version.COPPER,
        supported_flags: Feature = DEFAULT_FEATURES,
        server_monitor_pages: MonitorPages | None = None,
        listener: SocketListener | None = None,
    ) -> None:
        self.memory = memory
        self.synic = synic
        self.timers = timers
        self.limits = Limits(max_version, supported_flags, server_monitor_pages)
        self.listener: SocketListener = listener or NoSockets()
        self.connection = Connection()
        self.gpadls = GpadlTable(memory)
        self.outbox = Outbox(synic)
        self.refusals = Refusals("bus", _logger)
        self.paused = False
        self.offered = ChannelList(self)
        self._inbox: deque[tuple[int, bytes, bool]] = deque()
        self._reception = MessageDispatcher(self)
        self._monitor = MonitorScan(memory, timers, self._monitor_page, self._with_ids)
        self._abandoning = False
        synic.connect_event_port(SHARED_EVENT_CONNECTION_ID, self._shared_doorbell)
        synic.connect_event_port(MONITOR_CONNECTION_ID, self._ignore_signal)

    # ---- for the hypervisor part

    def message(self, vp: int, connection_id: int, payload: bytes, *, trusted: bool = False) -> PostResult:
        """A guest posted ``payload``; ``vp`` is where it runs, which says nothing about where answers go.

        ``trusted``: it came from a paravisor on a confidential connection.
        """
        payload = bytes(payload)
        if not self.paused:
            return self._reception.receive(connection_id, payload, trusted)
        if len(payload) > MAX_MESSAGE:
            self.refusals.refuse("message-size", f"{len(payload)} bytes")
            return PostResult.OK
        if len(self._inbox) >= MAX_INBOX:
            return PostResult.RETRY
        self._inbox.append((connection_id, payload, trusted))
        return PostResult.OK

    def can_acknowledge_early(self, payload: bytes) -> bool:
        """Whether a message can be answered with success before :meth:`handle_acknowledged` acts on it.

        So its processor need not wait for what the message causes. Not for messages that may have to be put off:
        those to a guest that does not take its answers, or whose answers go elsewhere than the connection's.
        """
        return (
            not self.paused
            and int.from_bytes(payload[:4], "little") in PROMISED
            and self.outbox.undelivered(self.connection.target) < MAX_UNDELIVERED
        )

    def handle_acknowledged(self, connection_id: int, payload: bytes) -> None:
        """Act on a message that was promised; nothing else may have come between."""
        self._reception.receive(connection_id, payload, False, promised=True)

    def reset(self) -> None:
        """The machine was reset: nothing of the guest is left, all offers stay."""
        self._inbox.clear()
        self.offered.forget_restoring()
        self.synic.discard_messages()
        self.outbox.clear()
        self.connection.target = HOME
        self._disconnect(NextAction.NONE, reserved_too=True)

    # ---- for devices

    @property
    def channels(self) -> tuple[Channel, ...]:
        """All channels, in the order of their offers, with those that a guest has not released yet."""
        return tuple(self.offered.channels)

    @property
    def version(self) -> Version | None:
        """The agreed version, None while disconnected."""
        return self.connection.version if self.connection.phase is Phase.CONNECTED else None

    def offer(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """Offer a channel, now or when the guest asks for offers.

        Raises :class:`DeviceError`: a device with that interface and instance is offered already, another
        interface uses the instance, or a sub-channel has no primary.
        """
        return self.offered.add(offer, endpoint)

    def revoke(self, channel: Channel) -> None:
        """Take a channel away from the guest, its sub-channels before it. No effect if it is gone already."""
        self.offered.revoke(channel)

    def refuse_socket(self, request: SocketRequest) -> None:
        """Tell the guest that a socket request which a listener took came to nothing."""
        connection = self.connection
        if connection.phase is not Phase.CONNECTED or not connection.at_least(Version.WIN10_RS3_0):
            return
        result = TlConnectResult(request.endpoint_id, request.service_id, STATUS_CONNECTION_REFUSED)
        self.send(TL_CONNECT_RESULT.build(result))

    # ---- for whoever saves the machine, and for people

    def pause(self) -> None:
        """Take no messages from the guest and send none; both wait in order. Channels: :meth:`Channel.stop`."""
        self.paused = True
        self.outbox.hold("bus")

    def resume(self) -> None:
        """Undo :meth:`pause`; after :meth:`import_state` go on where the saved bus stood.

        Then guest memory must be complete, and all devices offered: a saved channel without one is rescinded.
        """
        if not self.paused:
            return
        if self.offered.restoring:
            self.offered.go_on()
            self._monitor.update()
            self._finish_disconnect()
        self.paused = False
        self.outbox.release("bus")
        while self._inbox and not self.paused:
            self._reception.receive(*self._inbox.popleft(), promised=True)

    def export_state(self) -> BusState:
        """Everything that another bus needs to go on for this guest; changes nothing.

        Pause the bus first, and stop the channels: what happens later is not in it.
        """
        return BusState(
            connection=ConnectionRecord.of(self.connection),
            channels=self.offered.records(),
            assemblies=tuple(assembly_record(each) for each in self.gpadls.assemblies.values()),
            inbox=tuple(HeldMessage(*each) for each in self._inbox),
            outbox=self.outbox.held,
        )

    def import_state(self, state: BusState) -> None:
        """Be in ``state``, paused; devices may be offered before and after. Then :meth:`resume`.

        Raises :class:`BusStateRefused`, and then has changed nothing.
        """
        if self.connection.phase is not Phase.DISCONNECTED or not self.offered.fresh:
            raise BusStateRefused("not-fresh", f"the bus is {self.connection.phase.value}")
        check_state(state, self.limits, self.memory, self.synic.vp_count)
        self.pause()
        self.connection = state.connection.thaw()
        self.offered.restore(state.channels)
        for each in state.assemblies:
            self.gpadls.restore(thaw_assembly(each))
        self._inbox.extend((each.connection_id, each.payload, each.trusted) for each in state.inbox)
        self.outbox.put_back(state.outbox)
        if self.connection.paused:
            self.outbox.hold("guest")

    def status(self) -> dict[str, object]:
        """What a person wants to know, as JSON knows it."""
        connection = self.connection
        return {
            "state": connection.phase.value,
            "version": str(connection.version) if connection.version is not None else None,
            "features": int(connection.features),
            "message_vp": connection.target.vp,
            "offers_sent": connection.offers_sent,
            "paused": self.paused,
            "gpadls": self.gpadls.gpadls,
            "gpadls_in_progress": len(self.gpadls.assemblies),
            "messages_waiting": self.outbox.undelivered(connection.target),
            "refusals": dict(self.refusals.counts),
            "channels": [channel.status() for channel in self.channels],
        }

    # ---- for reception: the connection

    def contact(self, request: ContactRequest) -> PostResult:
        """INITIATE_CONTACT."""
        target = request.target
        if request.vtl:
            self.refusals.refuse("contact-vtl", f"{request.vtl}")
            return PostResult.OK
        if target.sint != MESSAGE_SINT:
            self.refusals.refuse("contact-sint", f"{target.sint}")
            if target.sint < SINT_COUNT and target.vp < self.synic.vp_count:
                if self._reception.flooded(target):
                    return PostResult.RETRY
                self.send(answer_failure(UNSUPPORTED), target)
            return PostResult.OK
        self._disconnect(NextAction.CONTACT, contact=request)
        return PostResult.OK

    def unload(self) -> None:
        """UNLOAD."""
        first = self.connection.version is Version.V1
        self._disconnect(NextAction.NONE if first else NextAction.UNLOAD_RESPONSE)

    def request_offers(self) -> None:
        """REQUESTOFFERS."""
        if self.connection.offers_sent:
            self.refusals.refuse("offers-requested-twice")
            return
        self.connection.offers_sent = True
        self.offered.offer_all()
        self.send(ALLOFFERS_DELIVERED.build(HeaderOnly()))

    def modify_connection(self, parent_to_child: int, child_to_parent: int) -> None:
        """MODIFY_CONNECTION."""
        state = ContactState.SUCCESSFUL
        pages = check_monitor_pages(parent_to_child, child_to_parent, self.memory)
        if Feature.SERVER_SPECIFIED_MONITOR_PAGES in self.connection.features:
            pages = Failure("modify-connection-server-pages", "")
        if isinstance(pages, Failure):
            self.refusals.refuse(pages.reason, pages.detail)
            state = ContactState.FAILED_UNKNOWN
        else:
            self.connection.monitor_pages = pages
            self._monitor.update()
        self.send(MODIFY_CONNECTION_RESPONSE.build(ModifyConnectionResponse(state)))

    def pause_for_guest(self) -> None:
        """PAUSE."""
        self.send(PAUSE_RESPONSE.build(HeaderOnly()))
        self.connection.paused = True
        self.outbox.hold("guest")

    def resume_for_guest(self) -> None:
        """RESUME."""
        self.connection.paused = False
        self.outbox.release("guest")

    def connect_socket(self, request: SocketRequest) -> None:
        """TL_CONNECT_REQUEST."""
        try:
            taken = self.listener.connect(request)
        except Exception:
            _logger.exception("socket listener failed")
            taken = False
        if not taken:
            self.refuse_socket(request)

    def find(self, relid: int) -> Channel | None:
        """The channel with that id."""
        return self.offered.by_relid.get(relid)

    # ---- for channels

    def send(self, payload: bytes, target: Target | None = None) -> None:
        """To the guest; with a target, to the client of a reserved channel."""
        if target is None:
            self.outbox.post(Outgoing(self.connection.target, payload))
        else:
            self.outbox.post(Outgoing(target, payload, lasting=True))

    def connection_id_taken(self, connection_id: int) -> bool:
        """Whether a signal on that id reaches a channel."""
        return any(channel.signals.port == connection_id for channel in self.offered.channels)

    def leave_subchannels(self, channel: Channel) -> bool:
        """Rescind the sub-channels of ``channel``; whether the guest has been told about all."""
        return self.offered.leave_subchannels(channel)

    def rescinded(self, channel: Channel) -> None:
        """``channel`` is revoked now: tell the guest."""
        if channel.relid is not None:
            self.send(RESCIND_CHANNELOFFER.build(ChannelOnly(channel.relid)))
        self.offered.departed(channel)

    def left(self, channel: Channel) -> None:
        """``channel`` is released now: its id is free."""
        self.offered.release(channel)
        self._finish_disconnect()

    def offer_again(self, channel: Channel) -> None:
        """The guest released the id of a revoked device that is here again."""
        self.offered.send_offer(channel)

    def shared_signal(self, relid: int) -> bool:
        """Signal through the interrupt page of versions below 2.4."""
        if not self.connection.interrupt_page:
            return False
        set_interrupt_bit(self.memory, self.connection.interrupt_page, relid)
        self.synic.signal_event(0, MESSAGE_SINT, 0)
        return True

    def monitor_changed(self) -> None:
        """A channel with a monitor bit was opened or closed."""
        self._monitor.update()

    # ---- connecting and disconnecting

    def _disconnect(
        self, action: NextAction, contact: ContactRequest | None = None, *, reserved_too: bool = False
    ) -> None:
        """End the connection, if there is one; then, when every device has let go, take ``action``."""
        connection = self.connection
        connection.next_action, connection.next_contact = action, contact
        self.outbox.drop()
        self.outbox.release("guest")
        if connection.phase is Phase.CONNECTED or reserved_too:
            connection.phase = Phase.DISCONNECTING
            connection.offers_sent = connection.paused = False
            connection.interrupt_page = 0
            connection.monitor_pages = None
            self.offered.waiting.clear()
            self.gpadls.abandon_all()
            self._abandoning = True
            for channel in self.offered.subchannels_first():
                if channel.reserved and not reserved_too:
                    channel.detach()
                else:
                    channel.abandon()
            self._abandoning = False
            self._monitor.update()
        self._finish_disconnect()

    def _finish_disconnect(self) -> None:
        connection = self.connection
        if self._abandoning:
            return
        if connection.phase is Phase.DISCONNECTING:
            if not self.offered.all_let_go:
                return
            connection.phase = Phase.DISCONNECTED
            connection.version = connection.client_id = None
            connection.features = NO_FEATURES
            connection.trusted = False
        if connection.phase is Phase.DISCONNECTED:
            self._act()

    def _act(self) -> None:
        """Do what was to follow the disconnection."""
        connection = self.connection
        action, contact = connection.next_action, connection.next_contact
        connection.next_action, connection.next_contact = NextAction.NONE, None
        if action is NextAction.UNLOAD_RESPONSE:
            self.send(UNLOAD_RESPONSE.build(HeaderOnly()))
        elif action is NextAction.CONTACT and contact is not None:
            self._agree(contact)

    def _agree(self, request: ContactRequest) -> None:
        connection = self.connection
        connection.target = request.target if request.target.vp < self.synic.vp_count else HOME
        outcome = decide(request, self.limits, self.memory, self.synic.vp_count)
        if isinstance(outcome, Failure):
            self.refusals.refuse(outcome.reason, outcome.detail)
            self.send(answer_failure(outcome))
            return
        connection.phase = Phase.CONNECTED
        connection.version = outcome.version
        connection.features = outcome.features
        connection.interrupt_page = outcome.interrupt_page
        connection.monitor_pages = outcome.monitor_pages
        connection.client_id = request.client_id
        connection.trusted = request.trusted and Feature.CONFIDENTIAL_CHANNELS in outcome.features
        _logger.info("connected: version %s, features %#x", outcome.version, outcome.features)
        self.send(answer_agreement(outcome))

    # ---- signals

    def _shared_doorbell(self) -> None:
        """HvSignalEvent on the shared connection: versions below 2.4."""
        connection = self.connection
        if connection.phase is not Phase.CONNECTED or connection.at_least(Version.WIN8):
            return
        if connection.interrupt_page:
            relids = take_interrupt_bits(self.memory, connection.interrupt_page)
        else:
            relids = set(self.offered.by_relid)
        for relid in sorted(relids):
            channel = self.offered.by_relid.get(relid)
            if channel is not None and channel.is_open:
                channel.doorbell()

    def _ignore_signal(self) -> None:
        """HvSignalEvent on the hypervisor's own monitor port."""

    def _with_ids(self) -> Iterable[Channel]:
        return self.offered.by_relid.values()

    def _monitor_page(self) -> int:
        pages = self.connection.monitor_pages
        return pages.child_to_parent if pages is not None else 0
