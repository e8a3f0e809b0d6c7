"""The bus: one guest's connection and the channels that are offered to it (spec/vmbus.md 5, 8).

``Bus`` is a pure state machine. The hypervisor part calls :meth:`Bus.message` for every HvPostMessage and the
event ports for every HvSignalEvent; devices call :meth:`Bus.offer` and :meth:`Bus.revoke`. It talks to the guest
through :class:`~emulator.ports.Synic` alone. States of the connection are drawn in ``contact``, of a channel in
``channel``.

A disconnection (UNLOAD, another contact, a machine reset) is not over until every device has let its channel go:
UNLOAD_RESPONSE, and the answer to the next contact, wait for that.
"""

from __future__ import annotations

import logging
from collections import deque

from emulator.bus.channel import Channel
from emulator.bus.channel_state import ChannelState
from emulator.bus.contact import (
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
from emulator.bus.endpoint import Endpoint
from emulator.bus.gpadl import GpadlTable
from emulator.bus.monitor import MonitorScan, set_interrupt_bit, take_interrupt_bits
from emulator.bus.offers import (
    CONNECTION_ID_BASE,
    MAX_RELID,
    Offer,
    OfferKey,
    build_offer,
    lowest_free,
    sort_key,
)
from emulator.bus.outbox import Outbox, Outgoing, Target
from emulator.bus.reception import PostResult, Reception
from emulator.bus.restoring import ABSENT, BusStateRefused, adopt, check_state, thaw_assembly
from emulator.bus.sockets import NoSockets, SocketListener, SocketRequest
from emulator.bus.state import (
    BusState,
    ChannelRecord,
    ConnectionRecord,
    HeldMessage,
    assembly_record,
    channel_record,
)
from emulator.errors import DeviceError, InternalError
from emulator.ports import GuestMemory, Synic, Timers
from emulator.refusals import Refusals
from emulator.wire.header import STATUS_CONNECTION_REFUSED
from emulator.wire.messages import (
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
from emulator.wire.monitor import MONITOR_COUNT
from emulator.wire.version import NO_FEATURES, Feature, Version

logger = logging.getLogger(__name__)

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
        self.refusals = Refusals("bus", logger)
        self.paused = False
        self._channels: list[Channel] = []
        self._by_relid: dict[int, Channel] = {}
        self._inbox: deque[tuple[int, bytes, bool]] = deque()
        self._reception = Reception(self)
        self._monitor = MonitorScan(memory, timers, self._monitor_page, lambda: self._by_relid.values())
        self._waiting: list[Channel] = []
        self._abandoning = False
        self._restoring = False
        self._given_up: set[OfferKey] = set()
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
        if len(self._inbox) >= MAX_INBOX:
            return PostResult.RETRY
        self._inbox.append((connection_id, payload, trusted))
        return PostResult.OK

    def reset(self) -> None:
        """The machine was reset: nothing of the guest is left, all offers stay."""
        self._inbox.clear()
        self._restoring = False
        self._given_up.clear()
        self.synic.discard_messages()
        self.outbox.clear()
        self.connection.target = HOME
        self._disconnect(NextAction.NONE, reserved_too=True)

    # ---- for devices

    @property
    def channels(self) -> tuple[Channel, ...]:
        """All channels, in the order of their offers, with those that a guest has not released yet."""
        return tuple(self._channels)

    @property
    def version(self) -> Version | None:
        """The agreed version, None while disconnected."""
        return self.connection.version if self.connection.phase is Phase.CONNECTED else None

    def offer(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """Offer a channel, now or when the guest asks for offers.

        Raises :class:`DeviceError`: a device with that interface and instance is offered already, another
        interface uses the instance, or a sub-channel has no primary.
        """
        for absent in self._channels:
            if absent.endpoint is ABSENT and absent.offer.key == offer.key and not absent.revoking:
                absent.offer, absent.endpoint = offer, endpoint
                return absent
        self._check_offer(offer)
        channel = Channel(self, offer, endpoint)
        self._channels.append(channel)
        predecessor = self._predecessor(channel)
        if predecessor is None:
            if self.connection.offers_sent and not self._restoring:
                self._offer_now(channel)
        elif predecessor.state is ChannelState.REVOKED:
            self._take_over(channel, predecessor)
        return channel

    def revoke(self, channel: Channel) -> None:
        """Take a channel away from the guest, its sub-channels before it. No effect if it is gone already."""
        if channel not in self._channels:
            return
        if channel.state is ChannelState.RELEASED:
            self.leave_subchannels(channel)
            channel.revoking = True
            self._channels.remove(channel)
        else:
            channel.revoke()

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
        if self._restoring:
            self._go_on()
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
            channels=tuple(
                channel_record(channel, waiting=channel in self._waiting) for channel in self._channels
            ),
            assemblies=tuple(assembly_record(each) for each in self.gpadls.assemblies.values()),
            inbox=tuple(HeldMessage(*each) for each in self._inbox),
            outbox=self.outbox.held,
        )

    def import_state(self, state: BusState) -> None:
        """Be in ``state``, paused; devices may be offered before and after. Then :meth:`resume`.

        Raises :class:`BusStateRefused`, and then has changed nothing.
        """
        if self.connection.phase is not Phase.DISCONNECTED or self._by_relid or self._restoring:
            raise BusStateRefused("not-fresh", f"the bus is {self.connection.phase.value}")
        check_state(state, self.limits, self.memory, self.synic.vp_count)
        self.pause()
        self._restoring = True
        self.connection = state.connection.thaw()
        for record in state.channels:
            self._restore_channel(record)
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
            "channels": [_channel_status(channel) for channel in self._channels],
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
        for channel in sorted(self._channels, key=lambda channel: sort_key(channel.offer)):
            self._offer_now(channel)
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
            logger.exception("socket listener failed")
            taken = False
        if not taken:
            self.refuse_socket(request)

    def find(self, relid: int) -> Channel | None:
        """The channel with that id."""
        return self._by_relid.get(relid)

    # ---- for channels

    def send(self, payload: bytes, target: Target | None = None) -> None:
        """To the guest; with a target, to the client of a reserved channel."""
        if target is None:
            self.outbox.post(Outgoing(self.connection.target, payload))
        else:
            self.outbox.post(Outgoing(target, payload, lasting=True))

    def connection_id_taken(self, connection_id: int) -> bool:
        """Whether a signal on that id reaches a channel."""
        return any(channel.signal_port == connection_id for channel in self._channels)

    def leave_subchannels(self, channel: Channel) -> bool:
        """Rescind the sub-channels of ``channel``; whether the guest has been told about all."""
        if channel.offer.subchannel_index:
            return True
        told = True
        for sub in self._subchannels(channel):
            self.revoke(sub)
            told = told and sub.state in (ChannelState.REVOKED, ChannelState.RELEASED)
        return told

    def rescinded(self, channel: Channel) -> None:
        """``channel`` is revoked now: tell the guest."""
        if channel.relid is not None:
            self.send(RESCIND_CHANNELOFFER.build(ChannelOnly(channel.relid)))
        self._departed(channel)

    def left(self, channel: Channel) -> None:
        """``channel`` is released now: its id is free."""
        if channel.relid is not None:
            del self._by_relid[channel.relid]
            self.synic.disconnect_event_port(CONNECTION_ID_BASE | channel.relid)
        channel.relid = channel.monitor_id = None
        if channel.revoking or channel.offer.transient or channel.endpoint is ABSENT:
            channel.revoking = True
            self._channels.remove(channel)
        self._departed(channel)
        self._offer_waiting()
        self._finish_disconnect()

    def offer_again(self, channel: Channel) -> None:
        """The guest released the id of a revoked device that is here again."""
        self._offer_now(channel)

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
            self._waiting.clear()
            self.gpadls.abandon_all()
            self._abandoning = True
            for channel in sorted(self._channels, key=lambda channel: channel.offer.subchannel_index == 0):
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
            if any(
                channel.state is not ChannelState.RELEASED and not channel.reserved
                for channel in self._channels
            ):
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
        logger.info("connected: version %s, features %#x", outcome.version, outcome.features)
        self.send(answer_agreement(outcome))

    # ---- restoring

    def _restore_channel(self, record: ChannelRecord) -> None:
        """Into the channel of its device if that is offered already, else into one that waits for it."""
        if record.relid is None:
            if not record.waiting:
                self._given_up.add(record.key)
            return
        for channel in self._channels:
            if channel.offer.key == record.key and channel.relid is None and not record.revoking:
                break
        else:
            offer = Offer(*record.key[:2], subchannel_index=record.subchannel_index, name="absent")
            channel = Channel(self, offer, ABSENT)
            self._channels.append(channel)
        adopt(channel, record, self.gpadls)
        self._by_relid[record.relid] = channel
        self.synic.connect_event_port(CONNECTION_ID_BASE | record.relid, channel.doorbell)

    def _go_on(self) -> None:
        """All devices that there will be are offered: take up what was under way."""
        self._restoring = False
        for channel in list(self._channels):
            if channel.endpoint is ABSENT and not channel.revoking:
                self.refusals.refuse("restored-without-device", f"{channel.relid}")
                channel.revoking = True
                if channel.state is ChannelState.REOFFERED:
                    channel.state = ChannelState.REVOKED
        for channel in list(self._channels):
            if channel in self._channels:
                channel.go_on()
        if self.connection.offers_sent:
            for channel in sorted(self._channels, key=lambda channel: sort_key(channel.offer)):
                if channel.relid is None and channel.offer.key not in self._given_up:
                    self._offer_now(channel)
        self._given_up.clear()
        self._monitor.update()
        self._finish_disconnect()

    # ---- offering

    def _check_offer(self, offer: Offer) -> None:
        present = [channel.offer for channel in self._channels if not channel.revoking]
        primaries = [each for each in present if not each.subchannel_index]
        if any(each.key == offer.key for each in present):
            raise DeviceError(f"{offer.name!r} is offered already: {offer.instance_id}")
        if offer.subchannel_index:
            if not any(each.key == (offer.interface_id, offer.instance_id, 0) for each in primaries):
                raise DeviceError(f"{offer.name!r}: sub-channel {offer.subchannel_index} has no primary")
        elif any(each.instance_id == offer.instance_id for each in primaries):
            raise DeviceError(f"{offer.name!r}: another interface uses instance {offer.instance_id}")

    def _offer_now(self, channel: Channel) -> None:
        """Send the offer, with an id if it has none yet; without a free one it waits."""
        connection = self.connection
        if self._predecessor(channel) is not None:
            return
        if channel.relid is None:
            relid = lowest_free(self._by_relid, 1, MAX_RELID)
            if relid is None:
                self.refusals.refuse("no-channel-id", repr(channel))
                self._waiting.append(channel)
                return
            self._give_id(channel, relid)
            channel.state = ChannelState.CLOSED
        if channel.relid is None or channel.connection_id is None:
            raise InternalError(f"{channel!r} has no id")
        channel.offered = True
        payload = build_offer(
            channel.offer,
            channel.relid,
            channel.connection_id,
            channel.monitor_id,
            connection.features,
            trusted=connection.trusted,
        )
        self.send(payload)

    def _give_id(self, channel: Channel, relid: int) -> None:
        channel.relid = relid
        self._by_relid[relid] = channel
        if channel.offer.monitored:
            taken = {each.monitor_id for each in self._channels}
            channel.monitor_id = lowest_free(taken, 0, MONITOR_COUNT - 1)
        self.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    def _offer_waiting(self) -> None:
        if self._waiting and self.connection.offers_sent:
            self._offer_now(self._waiting.pop(0))

    def _take_over(self, channel: Channel, old: Channel) -> None:
        """The device of a revoked channel is back before the guest released the id."""
        relid = old.relid
        if relid is None:
            raise InternalError(f"{old!r} has no id")
        self._channels.remove(old)
        channel.pages.by_id, old.pages.by_id = old.pages.by_id, {}
        channel.monitor_id, old.monitor_id = old.monitor_id, None
        old.relid, old.state = None, ChannelState.RELEASED
        channel.relid, channel.state, channel.offered = relid, ChannelState.REOFFERED, True
        self._by_relid[relid] = channel
        self.synic.connect_event_port(CONNECTION_ID_BASE | relid, channel.doorbell)

    def _departed(self, channel: Channel) -> None:
        """``channel`` was rescinded or released: go on with what waited for that."""
        if channel.offer.subchannel_index:
            for primary in self._channels:
                if primary.offer.key == (*channel.offer.key[:2], 0):
                    primary.leave_when_idle()
        for successor in self._channels:
            if successor is not channel and successor.offer.key == channel.offer.key:
                if channel.state is ChannelState.REVOKED:
                    self._take_over(successor, channel)
                elif self.connection.offers_sent:
                    self._offer_now(successor)
                return

    def _predecessor(self, channel: Channel) -> Channel | None:
        """A channel of the same device that has not left yet."""
        for each in self._channels:
            if each is not channel and each.offer.key == channel.offer.key:
                return each
        return None

    def _subchannels(self, primary: Channel) -> list[Channel]:
        same = primary.offer.key[:2]
        return [each for each in self._channels if each.offer.subchannel_index and each.offer.key[:2] == same]

    # ---- signals

    def _shared_doorbell(self) -> None:
        """HvSignalEvent on the shared connection: versions below 2.4."""
        connection = self.connection
        if connection.phase is not Phase.CONNECTED or connection.at_least(Version.WIN8):
            return
        if connection.interrupt_page:
            relids = take_interrupt_bits(self.memory, connection.interrupt_page)
        else:
            relids = set(self._by_relid)
        for relid in sorted(relids):
            channel = self._by_relid.get(relid)
            if channel is not None and channel.is_open:
                channel.doorbell()

    def _ignore_signal(self) -> None:
        """HvSignalEvent on the hypervisor's own monitor port."""

    def _monitor_page(self) -> int:
        pages = self.connection.monitor_pages
        return pages.child_to_parent if pages is not None else 0


def _channel_status(channel: Channel) -> dict[str, object]:
    return {
        "relid": channel.relid,
        "interface": str(channel.offer.interface_id),
        "instance": str(channel.offer.instance_id),
        "subchannel": channel.offer.subchannel_index,
        "device": channel.offer.name,
        "state": channel.state.value,
        "stopped": channel.stopped,
        "target_vp": channel.target_vp,
        "gpadls": len(channel.gpadls),
        "gpadl_pages": sum(gpadl.page_count for gpadl in channel.gpadls.values()),
        "opens": channel.counters.opens,
        "doorbells": channel.counters.doorbells,
        "interrupts": channel.counters.interrupts,
        "refusals": dict(channel.refusals.counts),
    }
