"""The bus: one guest's connection and the channels that are offered to it.

Source: docs/protocol/messages.md#message-table, docs/protocol/messages.md#life-cycle.

``Bus`` is a pure state machine. The hypervisor part calls :meth:`Bus.handle_message` for every HvPostMessage and
the event ports for every HvSignalEvent; devices call :meth:`Bus.offer` and :meth:`Bus.revoke`. The bus reaches the
guest through :class:`~vmbus.ports.Synic` alone. The states of the connection are drawn in
:mod:`~vmbus.bus.contact`, those of a channel in :mod:`~vmbus.bus.channel.channel`.

A disconnection (UNLOAD, another contact, a machine reset) is not over until every channel is released, which waits
for its endpoint: UNLOAD_RESPONSE, and the answer to the next contact, follow then.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque

from vmbus.bus.budget import MemoryBudget
from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.endpoint import Endpoint
from vmbus.bus.channel.gpadl import GpadlAssembler
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
from vmbus.bus.messages import (
    EARLY_ACKNOWLEDGED,
    MAX_UNDELIVERED,
    MessageDispatcher,
    PostedMessage,
    PostResult,
)
from vmbus.bus.monitor import MonitorScan, set_interrupt_bit, take_interrupt_bits
from vmbus.bus.offers import Offer
from vmbus.bus.outbox import Outbox, Outgoing, Target
from vmbus.bus.saved_state.restore import BusStateRefused, check_state, restored_assembly, restored_connection
from vmbus.bus.saved_state.values import (
    MAX_INBOX,
    BusState,
    WaitingMessage,
    capture_assembly,
    capture_connection,
)
from vmbus.bus.sockets import NoSockets, SocketListener, SocketRequest
from vmbus.ports import GuestMemory, Synic, Timers
from vmbus.refusals import Refusals
from vmbus.wire.header import MAX_MESSAGE, STATUS_CONNECTION_REFUSED
from vmbus.wire.messages import (
    ALLOFFERS_DELIVERED,
    MODIFY_CONNECTION_RESPONSE,
    PAUSE_RESPONSE,
    TL_CONNECT_RESULT,
    UNLOAD_RESPONSE,
    ContactState,
    HeaderOnly,
    ModifyConnectionResponse,
    TlConnectResult,
)
from vmbus.wire.version import NO_FEATURES, Feature, Version

_logger = logging.getLogger(__name__)


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
        self.budget = MemoryBudget()
        """What this guest makes the host hold: page lists, and what its devices keep."""
        self.gpadl_assembler = GpadlAssembler(memory, self.budget)
        self.outbox = Outbox(synic)
        self.refusals = Refusals("bus", _logger)
        self.paused = False
        self.channel_list = ChannelList(self, self._finish_disconnect)
        self._inbox: deque[PostedMessage] = deque()
        self._dispatcher = MessageDispatcher(self)
        self._monitor = MonitorScan(memory, timers, self._monitor_page, self.channel_list.by_relid.values)
        self._abandoning = False
        synic.connect_event_port(SHARED_EVENT_CONNECTION_ID, self._shared_doorbell)
        synic.connect_event_port(MONITOR_CONNECTION_ID, self._ignore_signal)

    # --- for the hypervisor part ---

    def handle_message(
        self, vp: int, connection_id: int, payload: bytes, *, trusted: bool = False
    ) -> PostResult:
        """Handle a message of the guest; a paused bus keeps it.

        ``vp`` is the processor that posted it, which does not determine where answers go. ``trusted``: the message
        came from a paravisor on a confidential connection.
        """
        message = PostedMessage(connection_id, bytes(payload), trusted)
        if not self.paused:
            return self._dispatcher.dispatch(message)
        if len(payload) > MAX_MESSAGE:
            self.refusals.refuse("message-size", f"{len(payload)} bytes")
            return PostResult.OK
        if len(self._inbox) >= MAX_INBOX:
            return PostResult.RETRY
        self._inbox.append(message)
        return PostResult.OK

    def can_acknowledge_early(self, payload: bytes) -> bool:
        """Return whether a message may be answered with success before :meth:`handle_acknowledged` acts on it.

        The processor that posted it then need not wait for what the message causes. False for messages that may have
        to be retried: when the guest does not take its answers, or when the answers go elsewhere than those of the
        connection.
        """
        return int.from_bytes(payload[:4], "little") in EARLY_ACKNOWLEDGED and self.acknowledgeable > 0

    @property
    def acknowledgeable(self) -> int:
        """How many messages may be acknowledged early before the guest takes an answer; 0 while paused."""
        if self.paused:
            return 0
        return max(0, MAX_UNDELIVERED - self.outbox.undelivered(self.connection.target))

    def handle_acknowledged(self, connection_id: int, payload: bytes) -> None:
        """Handle a message after it was acknowledged early, before any later one; a paused bus keeps it."""
        message = PostedMessage(connection_id, payload, acknowledged=True)
        if self.paused:
            self._inbox.append(message)
        else:
            self._dispatcher.dispatch(message)

    def reset(self) -> None:
        """Forget the guest, after a reset of the machine; all offers stay."""
        self._inbox.clear()
        self.channel_list.forget_restored()
        self.synic.discard_messages()
        self.outbox.clear()
        self.connection.target = HOME
        self._disconnect(NextAction.NONE, reserved_too=True)

    # --- for devices ---

    @property
    def channels(self) -> tuple[Channel, ...]:
        """All channels in the order of their offers, revoked ones that the guest has not released included."""
        return tuple(self.channel_list.channels)

    @property
    def version(self) -> Version | None:
        """The agreed version, None while disconnected."""
        return self.connection.version if self.connection.phase is Phase.CONNECTED else None

    def offer(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """Offer a channel, now or when the guest asks for offers.

        Raises :class:`DeviceError`: a device with that interface and instance is offered already, another
        interface uses the instance, or a sub-channel has no primary.
        """
        return self.channel_list.add(offer, endpoint)

    @property
    def messages_waiting(self) -> int:
        """The number of messages that wait until the guest has taken those before them."""
        return self.outbox.undelivered(self.connection.target)

    def revoke(self, channel: Channel) -> None:
        """Take a channel away from the guest, its sub-channels first. No effect on a channel that is gone."""
        self.channel_list.revoke(channel)

    def refuse_socket(self, request: SocketRequest) -> None:
        """Answer a socket request that a listener accepted, and could not serve, with a failure."""
        connection = self.connection
        if connection.phase is not Phase.CONNECTED or not connection.at_least(Version.WIN10_RS3_0):
            return
        result = TlConnectResult(request.endpoint_id, request.service_id, STATUS_CONNECTION_REFUSED)
        self.send(TL_CONNECT_RESULT.build(result))

    # --- pausing, saving, and reports ---

    def pause(self) -> None:
        """Handle no messages of the guest and send none: both wait, in order. See also :meth:`Channel.pause`."""
        self.paused = True
        self.outbox.pause("bus")

    def resume(self) -> None:
        """Undo :meth:`pause`. After :meth:`restore` this continues where the saved bus stood.

        Guest memory must be complete then, and all devices offered: a saved channel without a device is rescinded.
        """
        if not self.paused:
            return
        if self.channel_list.restoring:
            self.channel_list.resume_restored()
            self._monitor.update()
            self._finish_disconnect()
        self.paused = False
        self.outbox.resume("bus")
        while self._inbox and not self.paused:
            message = self._inbox.popleft()
            self._dispatcher.dispatch(dataclasses.replace(message, acknowledged=True))

    def save(self) -> BusState:
        """Return everything that another bus needs to continue for this guest; changes nothing.

        Pause the channels and the bus first: later changes are not in the state.
        """
        return BusState(
            connection=capture_connection(self.connection),
            channels=self.channel_list.save(),
            assemblies=tuple(capture_assembly(each) for each in self.gpadl_assembler.assemblies.values()),
            inbox=tuple(
                WaitingMessage(each.connection_id, each.payload, each.trusted) for each in self._inbox
            ),
            outbox=self.outbox.waiting,
        )

    def restore(self, state: BusState, *, checked: bool = False) -> None:
        """Take over ``state``, and pause; devices may be offered before and after. Then call :meth:`resume`.

        ``checked``: ``check_state`` has accepted this very state for this bus. Raises :class:`BusStateRefused`, and
        then has changed nothing.
        """
        if self.connection.phase is not Phase.DISCONNECTED or not self.channel_list.fresh:
            raise BusStateRefused("not-fresh", f"the bus is {self.connection.phase.value}")
        if not checked:
            check_state(state, self.limits, self.memory, self.synic.vp_count)
        self.pause()
        self.connection = restored_connection(state.connection)
        self.channel_list.restore(state.channels)
        for each in state.assemblies:
            self.gpadl_assembler.restore(restored_assembly(each))
        self._inbox.extend(
            PostedMessage(each.connection_id, each.payload, each.trusted) for each in state.inbox
        )
        self.outbox.restore(state.outbox)
        if self.connection.paused:
            self.outbox.pause("guest")

    def status(self) -> dict[str, object]:
        """Return the bus's part of ``vmbus status``: plain values for JSON."""
        connection = self.connection
        return {
            "state": connection.phase.value,
            "version": str(connection.version) if connection.version is not None else None,
            "features": int(connection.features),
            "message_vp": connection.target.vp,
            "offers_sent": connection.offers_sent,
            "paused": self.paused,
            "gpadls": self.gpadl_assembler.quota.gpadls,
            "gpadls_in_progress": len(self.gpadl_assembler.assemblies),
            "memory": self.budget.status(),
            "messages_waiting": self.messages_waiting,
            "refusals": dict(self.refusals.counts),
            "channels": [channel.status() for channel in self.channels],
        }

    # --- for the message dispatcher ---

    def contact(self, request: ContactRequest, *, acknowledged: bool) -> PostResult:
        """Handle INITIATE_CONTACT."""
        target = request.target
        if request.vtl:
            self.refusals.refuse("contact-vtl", f"{request.vtl}")
            return PostResult.OK
        if target.sint != MESSAGE_SINT:
            self.refusals.refuse("contact-sint", f"{target.sint}")
            if target.sint < SINT_COUNT and target.vp < self.synic.vp_count:
                if not acknowledged and self._dispatcher.flooded(target, lasting=True):
                    return PostResult.RETRY
                self.send(answer_failure(UNSUPPORTED), target)
            return PostResult.OK
        self._disconnect(NextAction.CONTACT, contact=request)
        return PostResult.OK

    def unload(self) -> None:
        """Handle UNLOAD."""
        self._disconnect(NextAction.UNLOAD_RESPONSE)

    def request_offers(self) -> None:
        """Handle REQUESTOFFERS."""
        if self.connection.offers_sent:
            self.refusals.refuse("offers-requested-twice")
            return
        self.connection.offers_sent = True
        self.channel_list.offer_all()
        self.send(ALLOFFERS_DELIVERED.build(HeaderOnly()))

    def modify_connection(self, parent_to_child: int, child_to_parent: int) -> None:
        """Handle MODIFY_CONNECTION."""
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
        """Handle PAUSE."""
        self.send(PAUSE_RESPONSE.build(HeaderOnly()))
        self.connection.paused = True
        self.outbox.pause("guest")

    def resume_for_guest(self) -> None:
        """Handle RESUME."""
        self.connection.paused = False
        self.outbox.resume("guest")

    def connect_socket(self, request: SocketRequest) -> None:
        """Handle TL_CONNECT_REQUEST."""
        try:
            accepted = self.listener.connect(request)
        except Exception:
            _logger.exception("the socket listener failed; its request is refused")
            accepted = False
        if not accepted:
            self.refuse_socket(request)

    def find(self, relid: int) -> Channel | None:
        """Return the channel with that id, or None."""
        return self.channel_list.by_relid.get(relid)

    # --- for channels ---

    def send(self, payload: bytes, target: Target | None = None) -> None:
        """Send a message to the guest; with a target, to the client of a reserved channel."""
        if target is None:
            self.outbox.post(Outgoing(self.connection.target, payload))
        else:
            self.outbox.post(Outgoing(target, payload, lasting=True))

    def signal_through_page(self, relid: int) -> bool:
        """Signal through the interrupt page of versions below 2.4; return False if this connection has none."""
        if not self.connection.interrupt_page:
            return False
        set_interrupt_bit(self.memory, self.connection.interrupt_page, relid)
        self.synic.signal_event(0, MESSAGE_SINT, 0)
        return True

    def monitor_changed(self) -> None:
        """Start or stop polling the monitor page: a channel with a monitor bit was opened or closed."""
        self._monitor.update()

    def close(self) -> None:
        """Stop reading guest memory by itself: it is about to be unmapped."""
        self._monitor.stop()

    # --- connecting and disconnecting ---

    def _disconnect(
        self, action: NextAction, contact: ContactRequest | None = None, *, reserved_too: bool = False
    ) -> None:
        """End the connection, if there is one; when every channel is released, take ``action``."""
        connection = self.connection
        connection.next_action, connection.next_contact = action, contact
        self.outbox.drop()
        self.outbox.resume("guest")
        if connection.phase is Phase.CONNECTED or reserved_too:
            connection.phase = Phase.DISCONNECTING
            connection.offers_sent = connection.paused = False
            connection.interrupt_page = 0
            connection.monitor_pages = None
            self.channel_list.waiting.clear()
            self.gpadl_assembler.abandon_all()
            self._abandoning = True
            for channel in self.channel_list.subchannels_first():
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
            if not self.channel_list.all_released:
                return
            connection.phase = Phase.DISCONNECTED
            connection.version = connection.client_id = None
            connection.features = NO_FEATURES
            connection.trusted = False
        if connection.phase is Phase.DISCONNECTED:
            self._take_next_action()

    def _take_next_action(self) -> None:
        """Send what was to follow the disconnection."""
        connection = self.connection
        action, contact = connection.next_action, connection.next_contact
        connection.next_action, connection.next_contact = NextAction.NONE, None
        if action is NextAction.UNLOAD_RESPONSE:
            self.send(UNLOAD_RESPONSE.build(HeaderOnly()))
        elif action is NextAction.CONTACT and contact is not None:
            self._answer_contact(contact)

    def _answer_contact(self, request: ContactRequest) -> None:
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

    # --- signals ---

    def _shared_doorbell(self) -> None:
        """Handle HvSignalEvent on the shared connection, which versions below 2.4 use."""
        connection = self.connection
        if connection.phase is not Phase.CONNECTED or connection.at_least(Version.WIN8):
            return
        if connection.interrupt_page:
            relids = take_interrupt_bits(self.memory, connection.interrupt_page)
        else:
            relids = set(self.channel_list.by_relid)
        for relid in sorted(relids):
            channel = self.channel_list.by_relid.get(relid)
            if channel is not None and channel.is_open:
                channel.doorbell()

    def _ignore_signal(self) -> None:
        """Ignore HvSignalEvent on the hypervisor's own monitor port."""

    def _monitor_page(self) -> int:
        pages = self.connection.monitor_pages
        return pages.child_to_parent if pages is not None else 0
