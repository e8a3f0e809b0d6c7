"""A guest that follows a script, and an endpoint that records its calls: for tests of the bus.

    guest = ScriptedGuest.on_fakes()
    channel = guest.bus.offer(an_offer("echo"), endpoint := RecordingEndpoint())
    guest.connect()                         # contact and offers
    guest.open_channel(channel.relid)       # GPADL, OPENCHANNEL
    assert endpoint.calls[-1] == "opened"

Every call returns the host's answers, parsed, in order; ``take`` returns the messages that answer no call.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vmbus.bus.channel.endpoint import EndpointChannel
from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.contact import MESSAGE_SINT, MULTICLIENT_CONNECTION_ID
from vmbus.bus.messages import PostResult
from vmbus.bus.offers import Offer
from vmbus.bus.saved_state.values import BusState
from vmbus.bus.server import Bus
from vmbus.errors import InternalError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeMemory, FakeSynic, FakeTimers
from vmbus.wire.gpadl import (
    GPADL_TEARDOWN,
    GpadlCreated,
    GpadlTeardown,
    GpadlTorndown,
    GpaRange,
    split_gpadl,
)
from vmbus.wire.header import STATUS_SUCCESS, MessageType
from vmbus.wire.messages import (
    CLOSE_RESERVED_CHANNEL,
    CLOSECHANNEL,
    INITIATE_CONTACT,
    INITIATE_CONTACT_WITH_CLIENT,
    MESSAGES,
    MODIFYCHANNEL,
    OPEN_RESERVED_CHANNEL,
    OPENCHANNEL,
    OPENCHANNEL_EXTENDED,
    RELID_RELEASED,
    REQUESTOFFERS,
    TARGET_INFO,
    UNLOAD,
    ChannelOnly,
    CloseReservedChannel,
    HeaderOnly,
    InitiateContact,
    InitiateContactWithClient,
    ModifyChannel,
    OpenChannel,
    OpenChannelExtended,
    OpenReservedChannel,
    OpenResult,
    TargetInfo,
)
from vmbus.wire.offer import OfferChannel
from vmbus.wire.version import NO_FEATURES, Feature, Version

T = TypeVar("T")

FIRST_GPADL_ID = 0xE1E10


@dataclass(frozen=True, slots=True)
class Answer:
    """A message from the host: its target, its number and its parsed body."""

    vp: int
    sint: int
    number: MessageType
    message: Any
    payload: bytes


def parse_host_message(payload: bytes) -> tuple[MessageType, Any]:
    """Return number and body of a host's message, in the longest form that its length allows."""
    number = MessageType(int.from_bytes(payload[:4], "little"))
    rule = MESSAGES[number]
    forms = [rule.record, *(record for _, record in rule.longer)]
    fitting = [form for form in forms if form.size <= len(payload)]
    return number, max(fitting, key=lambda form: form.size).parse(payload)


def an_offer(name: str = "device", *, interface: int = 1, instance: int | None = None, **more: Any) -> Offer:
    """Return an offer with small numbers for GUIDs; the default instance is derived from the name."""
    if instance is None:
        instance = int.from_bytes(name.encode()[:8], "big")
    return Offer(uuid.UUID(int=interface), uuid.UUID(int=instance), name=name, **more)


class ForgetfulEndpoint:
    """An endpoint that records its calls, and refuses or defers them on request. It cannot be restored."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.gpadls: list[int] = []
        self.is_open = False
        self.defer_open = False
        self.defer_close = False
        self.defer_teardown = False
        self.refuse_open: Exception | None = None
        self.refuse_gpadl: Exception | None = None
        self.fail_everywhere: Exception | None = None

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.fail_everywhere is not None:
            raise self.fail_everywhere

    def opened(self, channel: EndpointChannel) -> None:
        self._note("opened")
        if self.refuse_open is not None:
            raise self.refuse_open
        if self.is_open:
            raise InternalError("opened twice")
        channel.ring_pages()
        self.is_open = True
        if self.defer_open:
            channel.defer_open()

    def closed(self, channel: EndpointChannel) -> None:
        self.is_open = False
        self._note("closed")
        if self.defer_close:
            channel.defer_close()

    def signalled(self, channel: EndpointChannel) -> None:
        self._note("signalled")

    def gpadl_created(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        self._note(f"gpadl_created {gpadl.gpadl_id:#x}")
        if self.refuse_gpadl is not None:
            raise self.refuse_gpadl
        self.gpadls.append(gpadl.gpadl_id)

    def gpadl_torn_down(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        self.gpadls = [each for each in self.gpadls if each != gpadl.gpadl_id]
        self._note(f"gpadl_torn_down {gpadl.gpadl_id:#x}")
        if self.defer_teardown:
            channel.defer_teardown(gpadl)

    def retargeted(self, channel: EndpointChannel, vp: int) -> None:
        self._note(f"retargeted {vp}")


class RecordingEndpoint(ForgetfulEndpoint):
    """A :class:`ForgetfulEndpoint` that can be restored."""

    def restored(self, channel: EndpointChannel) -> None:
        self._note("restored")
        channel.ring_pages()
        self.is_open = True
        self.gpadls = list(channel.gpadls)


class ScriptedGuest:
    """A guest that posts messages to a bus over fakes."""

    def __init__(self, bus: Bus, synic: FakeSynic, memory: FakeMemory, timers: FakeTimers) -> None:
        self.bus = bus
        self.synic = synic
        self.memory = memory
        self.timers = timers
        self.connection_id = MULTICLIENT_CONNECTION_ID
        self.version = Version.IRON
        self.features = NO_FEATURES
        self.answers: list[Answer] = []
        self._gpadl_ids = itertools.count(FIRST_GPADL_ID)
        self._next_page = memory.base // PAGE_SIZE + 16

    @classmethod
    def on_fakes(cls, *, vp_count: int = 4, memory_size: int = 16 << 20, **options: Any) -> ScriptedGuest:
        """Return a guest and a :class:`Bus`, made with ``options``, over new fakes."""
        memory, synic, timers = FakeMemory(memory_size), FakeSynic(vp_count), FakeTimers()
        bus = Bus(memory=memory, synic=synic, timers=timers, **options)
        return cls(bus, synic, memory, timers)

    def save(self) -> BusState:
        """Pause the bus and save it."""
        self.bus.pause()
        return self.bus.save()

    def another_bus(self, **options: Any) -> Bus:
        """Return a bus as in another process: with the same memory and SynIC, and new timers."""
        self.synic.ports.clear()
        self.timers = FakeTimers()
        return Bus(memory=self.memory, synic=self.synic, timers=self.timers, **options)

    # --- messages ---

    def post(self, payload: bytes, *, connection_id: int | None = None, **more: Any) -> PostResult:
        """Post a message as the machine does, acknowledged early where the bus allows it; take no answers."""
        connection = self.connection_id if connection_id is None else connection_id
        if not more and self.bus.can_acknowledge_early(payload):
            self.bus.handle_acknowledged(connection, payload)
            return PostResult.OK
        return self.bus.handle_message(0, connection, payload, **more)

    def take(self) -> list[Answer]:
        """Return the messages of the host since the last call."""
        taken = []
        while self.synic.messages:
            vp, sint, payload = self.synic.messages.popleft()
            taken.append(Answer(vp, sint, *parse_host_message(payload), payload))
        self.answers += taken
        return taken

    def ask(self, payload: bytes, **more: Any) -> list[Any]:
        """Post a message; return the bodies of the messages that the host sends."""
        result = self.post(payload, **more)
        if result is not PostResult.OK:
            raise InternalError(f"the host answered {result}")
        return [answer.message for answer in self.take()]

    def pages(self, count: int) -> list[int]:
        """Return page frame numbers that were not used before; the last 16 pages of RAM are never used."""
        first = self._next_page
        self._next_page += count
        if not self.memory.is_ram(first * PAGE_SIZE, (count + 16) * PAGE_SIZE):
            raise InternalError("the fake memory is too small for this script")
        return list(range(first, first + count))

    def new_gpadl_id(self) -> int:
        """Return a GPADL id as Linux chooses them."""
        return next(self._gpadl_ids)

    # --- the connection ---

    def contact(
        self,
        version: int = Version.IRON,
        *,
        vp: int = 0,
        sint: int = MESSAGE_SINT,
        vtl: int = 0,
        features: Feature = NO_FEATURES,
        interrupt_page: int | None = None,
        monitor_pages: tuple[int, int] = (0, 0),
        client_id: uuid.UUID | None = None,
        **more: Any,
    ) -> list[Any]:
        """Send INITIATE_CONTACT; return the answers."""
        info = TARGET_INFO.build(TargetInfo(sint, vtl, int(features)))
        if version < Version.WIN10_RS3_1:
            info = (interrupt_page or 0).to_bytes(8, "little")
        if client_id is None:
            payload = INITIATE_CONTACT.build(InitiateContact(version, vp, info, *monitor_pages))
        else:
            payload = INITIATE_CONTACT_WITH_CLIENT.build(
                InitiateContactWithClient(version, vp, info, *monitor_pages, client_id)
            )
        if version in Version.__members__.values():
            self.version = Version(version)
        answers = self.ask(payload, **more)
        self.features = self.bus.connection.features
        return answers

    def request_offers(self) -> list[OfferChannel]:
        """Send REQUESTOFFERS; return the offers, without ALLOFFERS_DELIVERED."""
        return [
            each for each in self.ask(REQUESTOFFERS.build(HeaderOnly())) if isinstance(each, OfferChannel)
        ]

    def connect(self, version: int = Version.IRON, **more: Any) -> list[OfferChannel]:
        """Send INITIATE_CONTACT and REQUESTOFFERS; return the offers."""
        self.contact(version, **more)
        return self.request_offers()

    def unload(self) -> list[Any]:
        """Send UNLOAD; return the answers."""
        return self.ask(UNLOAD.build(HeaderOnly()))

    # --- GPADLs ---

    def post_ranges(self, relid: int, ranges: Sequence[GpaRange], gpadl_id: int | None = None) -> list[Any]:
        """Share ``ranges``; return the answers."""
        gpadl_id = self.new_gpadl_id() if gpadl_id is None else gpadl_id
        answers = []
        for message in split_gpadl(relid, gpadl_id, ranges):
            answers += self.ask(message)
        return answers

    def share(self, relid: int, count: int = 8, gpadl_id: int | None = None) -> int:
        """Share ``count`` new pages, which must succeed; return the GPADL id."""
        gpadl_id = self.new_gpadl_id() if gpadl_id is None else gpadl_id
        answers = self.post_ranges(relid, [GpaRange(count * PAGE_SIZE, 0, self.pages(count))], gpadl_id)
        if answers != [GpadlCreated(relid, gpadl_id, STATUS_SUCCESS)]:
            raise InternalError(f"sharing {count} pages: {answers}")
        return gpadl_id

    def share_raw(self, relid: int, count: int = 8) -> int:
        """Share ``count`` new pages, whatever the host answers; return the GPADL id."""
        gpadl_id = self.new_gpadl_id()
        self.post_ranges(relid, [GpaRange(count * PAGE_SIZE, 0, self.pages(count))], gpadl_id)
        return gpadl_id

    def teardown(self, relid: int, gpadl_id: int) -> list[GpadlTorndown]:
        """Send GPADL_TEARDOWN; return the answers."""
        return self.ask(GPADL_TEARDOWN.build(GpadlTeardown(relid, gpadl_id)))

    # --- channels ---

    def open(
        self,
        relid: int,
        gpadl_id: int,
        *,
        open_id: int | None = None,
        vp: int = 0,
        downstream: int = 4,
        connection_id: int = 0,
        event_flag: int = 0,
        open_flags: int = 0,
    ) -> list[OpenResult]:
        """Send OPENCHANNEL in the form of the agreed features; return the answers."""
        message = (relid, relid if open_id is None else open_id, gpadl_id, vp, downstream, bytes(120))
        long = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS | Feature.CHANNEL_INTERRUPT_REDIRECTION
        if self.features & long:
            extended = OpenChannelExtended(*message, connection_id, event_flag, open_flags)
            return self.ask(OPENCHANNEL_EXTENDED.build(extended))
        return self.ask(OPENCHANNEL.build(OpenChannel(*message)))

    def open_channel(self, relid: int, **more: Any) -> int:
        """Share 8 pages and open with them, which must succeed; return the GPADL id."""
        gpadl_id = self.share(relid)
        answers = self.open(relid, gpadl_id, **more)
        if [answer.status for answer in answers] != [STATUS_SUCCESS]:
            raise InternalError(f"opening channel {relid}: {answers}")
        return gpadl_id

    def close(self, relid: int) -> list[Any]:
        """Send CLOSECHANNEL; return what the host sends (usually nothing)."""
        return self.ask(CLOSECHANNEL.build(ChannelOnly(relid)))

    def release(self, relid: int) -> list[Any]:
        """Send RELID_RELEASED; return what the host sends."""
        return self.ask(RELID_RELEASED.build(ChannelOnly(relid)))

    def modify(self, relid: int, vp: int) -> list[Any]:
        """Send MODIFYCHANNEL; return the answers."""
        return self.ask(MODIFYCHANNEL.build(ModifyChannel(relid, vp)))

    def open_reserved(self, relid: int, gpadl_id: int, *, vp: int = 0, sint: int = 5) -> list[Any]:
        """Send OPEN_RESERVED_CHANNEL; return the answers."""
        return self.ask(OPEN_RESERVED_CHANNEL.build(OpenReservedChannel(relid, vp, sint, gpadl_id, 4)))

    def close_reserved(self, relid: int, *, vp: int = 0, sint: int = 5) -> list[Any]:
        """Send CLOSE_RESERVED_CHANNEL; return the answers."""
        return self.ask(CLOSE_RESERVED_CHANNEL.build(CloseReservedChannel(relid, vp, sint)))
