"""Saving and restoring the bus (docs/protocol/saving.md#bus-state)."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import pytest
from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.endpoint import Endpoint, RestorableEndpoint
from vmbus.bus.channel.gpadl import MAX_ASSEMBLIES
from vmbus.bus.channel.signals import UNSTICK_DELAY
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import DEFAULT_FEATURES, MonitorPages, NextAction, Phase
from vmbus.bus.outbox import Outgoing, Target
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.restore import BusStateRefused
from vmbus.bus.saved_state.values import (
    MAX_INBOX,
    MAX_OUTBOX,
    AssemblyRecord,
    BusState,
    GpadlRecord,
    RangeRecord,
    WaitingMessage,
)
from vmbus.bus.server import Bus
from vmbus.errors import DeviceError, InternalError, MalformedError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.scripted import ForgetfulEndpoint, RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import GpadlTorndown, GpaRange, split_gpadl
from vmbus.wire.header import STATUS_SUCCESS, MessageType
from vmbus.wire.messages import (
    OPENCHANNEL,
    PAUSE,
    REQUESTOFFERS,
    RESUME,
    ChannelOnly,
    HeaderOnly,
    ModifyChannelResponse,
    OpenChannel,
    OpenResult,
)
from vmbus.wire.offer import OfferFlags
from vmbus.wire.plain import encode_varint
from vmbus.wire.version import ALL_FEATURES, Feature, Version

NAMES = ("a", "b", "c")


def messages(guest: ScriptedGuest) -> list[Any]:
    return [answer.message for answer in guest.take()]


def numbers(guest: ScriptedGuest) -> list[MessageType]:
    return [answer.number for answer in guest.take()]


class Move:
    """The scripted guest's bus is saved; the state is restored in another bus with these devices."""

    def __init__(self, guest: ScriptedGuest) -> None:
        self.guest = guest

    def __call__(self, *endpoints: Endpoint, early: bool = False, **options: Any) -> list[Channel]:
        state = self.guest.save()
        bus = self.guest.another_bus(**options)
        offered = list(zip(NAMES, endpoints, strict=False))
        channels = []
        if early:
            channels = [bus.offer(an_offer(name), endpoint) for name, endpoint in offered]
        bus.restore(state)
        if not early and all(channel.relid for channel in state.channels):
            assert bus.save() == state
        if not early:
            channels = [bus.offer(an_offer(name), endpoint) for name, endpoint in offered]
        self.guest.bus = bus
        bus.resume()
        return channels


@pytest.fixture
def move(guest: ScriptedGuest) -> Move:
    return Move(guest)


def offer(guest: ScriptedGuest, *endpoints: Endpoint) -> list[Channel]:
    """Devices a, b, c get the ids 1, 2, 3."""
    return [
        guest.bus.offer(an_offer(name), endpoint) for name, endpoint in zip(NAMES, endpoints, strict=False)
    ]


def test_recording_endpoint_can_be_restored_and_the_forgetful_one_not() -> None:
    assert isinstance(RecordingEndpoint(), RestorableEndpoint)
    assert not isinstance(ForgetfulEndpoint(), RestorableEndpoint)


@pytest.mark.conformance(46)
@pytest.mark.parametrize("early", [False, True])
def test_state_without_a_connection_restores_disconnected(
    guest: ScriptedGuest, move: Move, early: bool
) -> None:
    offer(guest, RecordingEndpoint())
    move(RecordingEndpoint(), RecordingEndpoint(), early=early)
    assert guest.take() == []
    assert guest.bus.connection.phase is Phase.DISCONNECTED
    assert [each.relid for each in guest.connect()] == [1, 2]
    guest.open_channel(1)


@pytest.mark.conformance(47)
@pytest.mark.parametrize("early", [False, True])
def test_open_channel_continues(guest: ScriptedGuest, move: Move, early: bool) -> None:
    offer(guest, RecordingEndpoint(), RecordingEndpoint())
    guest.connect(vp=2)
    ring = guest.open_channel(1, vp=3)
    buffer = guest.share(1)
    guest.timers.advance(1)
    guest.synic.events.clear()
    endpoint = RecordingEndpoint()
    (channel, _) = move(endpoint, RecordingEndpoint(), early=early)
    assert guest.take() == []
    assert endpoint.calls == ["restored", "signalled"]
    assert set(channel.gpadls) == {ring, buffer}
    guest.timers.advance(UNSTICK_DELAY)
    assert guest.synic.events == [(3, 2, 1)]
    guest.synic.ports[0x2001]()
    assert endpoint.calls[-1] == "signalled"
    guest.close(1)
    assert guest.teardown(1, ring) == [GpadlTorndown(ring)]
    assert endpoint.calls[-2:] == ["closed", f"gpadl_torn_down {ring:#x}"]
    assert guest.unload() == [HeaderOnly()]
    assert guest.answers[-1].vp == 2
    assert guest.bus.gpadl_assembler.quota.pages == guest.bus.gpadl_assembler.quota.gpadls == 0


@pytest.mark.conformance(47)
@pytest.mark.parametrize("how", ["slow", "paused"])
def test_open_under_way_is_asked_for_once_more_and_answered_once(
    guest: ScriptedGuest, move: Move, how: str
) -> None:
    slow = RecordingEndpoint()
    slow.defer_open = how == "slow"
    (channel,) = offer(guest, slow)
    guest.connect()
    ring = guest.share(1)
    if how == "paused":
        channel.pause()
    assert guest.open(1, ring, open_id=9) == []
    endpoint = RecordingEndpoint()
    move(endpoint)
    assert messages(guest) == [OpenResult(1, 9, STATUS_SUCCESS)]
    assert endpoint.calls == ["opened"]


@pytest.mark.conformance(47)
def test_close_under_way_is_asked_for_once_more(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow, slow)
    guest.connect()
    ring = guest.open_channel(1)
    guest.close(1)
    guest.teardown(1, ring)
    endpoint = RecordingEndpoint()
    endpoint.defer_close = True
    (channel,) = move(endpoint)
    assert guest.take()[0].message == ChannelOnly(2), "its device is not here"
    assert endpoint.calls == ["closed"]
    channel.finish_close()
    assert messages(guest) == [GpadlTorndown(ring)]
    assert channel.state is ChannelState.CLOSED


@pytest.mark.conformance(47)
def test_close_with_a_reopen_pending_opens_again(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow)
    guest.connect()
    ring = guest.open_channel(1)
    guest.close(1)
    guest.open(1, ring, open_id=5)
    endpoint = RecordingEndpoint()
    move(endpoint)
    assert messages(guest) == [OpenResult(1, 5, STATUS_SUCCESS)]
    assert endpoint.calls == ["closed", "opened"]


@pytest.mark.conformance(47)
def test_gpadl_in_progress_is_completed_by_the_bodies_that_follow(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    parts = split_gpadl(1, 7, [GpaRange(60 * PAGE_SIZE, 0, list(range(100, 160)))])
    guest.ask(parts[0])
    guest.ask(parts[1])
    endpoint = RecordingEndpoint()
    (channel,) = move(endpoint)
    (created,) = guest.ask(parts[2])
    assert created.status == STATUS_SUCCESS
    assert list(channel.gpadls[7].aligned_pfns()) == list(range(100, 160))
    assert guest.unload() == [HeaderOnly()]
    assert guest.bus.gpadl_assembler.quota.pages == 0


@pytest.mark.conformance(29)
def test_teardown_under_way_is_torn_down_once_more(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_teardown = True
    offer(guest, slow)
    guest.connect()
    shared = guest.share(1)
    assert guest.teardown(1, shared) == []
    endpoint = RecordingEndpoint()
    move(endpoint)
    assert messages(guest) == [GpadlTorndown(shared)]
    assert endpoint.calls == [f"gpadl_torn_down {shared:#x}"]
    assert guest.teardown(1, shared) == [], "no crash"


def test_channel_that_was_giving_its_gpadls_back_leaves(guest: ScriptedGuest, move: Move) -> None:
    slow = [RecordingEndpoint(), RecordingEndpoint()]
    for each in slow:
        each.defer_teardown = True
    channel, _ = offer(guest, *slow)
    guest.connect()
    guest.open_channel(1)
    guest.open_channel(2)
    guest.bus.revoke(channel)
    guest.close(2)
    guest.release(2)
    assert guest.take() == []
    move(RecordingEndpoint(), RecordingEndpoint())
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert [each.relid for each in guest.release(1)] == [1], "the device is here again"
    assert guest.bus.gpadl_assembler.quota.gpadls == 0


@pytest.mark.conformance(48)
def test_modification_that_waits_happens_after_the_restore(guest: ScriptedGuest, move: Move) -> None:
    (channel,) = offer(guest, RecordingEndpoint())
    guest.connect()
    guest.open_channel(1, vp=0)
    channel.pause()
    guest.modify(1, 2)
    endpoint = RecordingEndpoint()
    (channel,) = move(endpoint)
    assert messages(guest) == [ModifyChannelResponse(1, STATUS_SUCCESS)]
    assert "retargeted 2" in endpoint.calls
    assert channel.target_vp == 2


@pytest.mark.conformance(48)
@pytest.mark.parametrize("action", ["unload", "contact"])
def test_disconnection_under_way_ends_after_the_restore(
    guest: ScriptedGuest, move: Move, action: str
) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow)
    guest.connect()
    guest.open_channel(1)
    assert (guest.unload() if action == "unload" else guest.contact(Version.WIN10)) == []
    endpoint = RecordingEndpoint()
    move(endpoint)
    wanted = MessageType.UNLOAD_RESPONSE if action == "unload" else MessageType.VERSION_RESPONSE
    assert numbers(guest) == [wanted]
    assert endpoint.calls[0] == "closed"
    assert guest.bus.version is (None if action == "unload" else Version.WIN10)
    assert [each.relid for each in guest.connect()] == [1]


@pytest.mark.conformance(49)
def test_no_offers_until_the_guest_asks(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.contact()
    move(RecordingEndpoint(), RecordingEndpoint())
    assert guest.take() == []
    assert [each.relid for each in guest.request_offers()] == [1, 2]


@pytest.mark.conformance(50)
@pytest.mark.parametrize("early", [False, True])
def test_device_added_while_restoring_gets_exactly_one_offer(
    guest: ScriptedGuest, move: Move, early: bool
) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    move(RecordingEndpoint(), RecordingEndpoint(), early=early)
    (answer,) = guest.take()
    assert (answer.number, answer.message.relid) == (MessageType.OFFERCHANNEL, 2)
    guest.open_channel(2)


def test_device_that_is_gone_is_rescinded(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint(), RecordingEndpoint())
    guest.connect()
    guest.open_channel(2)
    move(RecordingEndpoint())
    (answer,) = guest.take()
    assert (answer.number, answer.message) == (MessageType.RESCIND_CHANNELOFFER, ChannelOnly(2))
    assert guest.release(2) == []
    assert len(guest.bus.channels) == 1
    assert guest.bus.gpadl_assembler.quota.gpadls == 0


def test_endpoint_of_an_open_channel_continues_in_place(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer(), endpoint)
    [offer] = guest.connect()
    channel.continue_endpoint()
    assert endpoint.calls == []
    guest.open_channel(offer.relid)
    endpoint.calls.clear()
    guest.take()
    channel.continue_endpoint()
    assert endpoint.calls == ["restored", "signalled"]
    assert (channel.state, channel.is_open, guest.take()) == (ChannelState.OPEN, True, [])
    endpoint.fail_everywhere = DeviceError("its state is lost")
    channel.continue_endpoint()
    [answer] = guest.take()
    assert (answer.number, channel.state) == (MessageType.RESCIND_CHANNELOFFER, ChannelState.REOFFERED)
    endpoint.fail_everywhere = None
    [again] = guest.release(offer.relid)
    assert (again.relid, channel.state) == (offer.relid, ChannelState.CLOSED)


@pytest.mark.parametrize("fails", [False, True])
def test_channel_that_cannot_be_restored_is_rescinded_and_offered_anew(
    guest: ScriptedGuest, move: Move, fails: bool
) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    ring = guest.open_channel(1)
    endpoint = RecordingEndpoint() if fails else ForgetfulEndpoint()
    endpoint.fail_everywhere = DeviceError("no") if fails else None
    (channel,) = move(endpoint)
    endpoint.fail_everywhere = None
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert guest.close(1) == []
    assert guest.teardown(1, ring) == [GpadlTorndown(ring)]
    assert [each.relid for each in guest.release(1)] == [1]
    guest.open_channel(1)
    assert endpoint.is_open
    assert channel.state is ChannelState.OPEN


@pytest.mark.parametrize("is_open", [False, True])
def test_channel_whose_offer_forces_a_new_one_is_rescinded_and_offered_anew(
    guest: ScriptedGuest, is_open: bool
) -> None:
    forced = an_offer("a", flags=OfferFlags.FORCE_NEW_CHANNEL)
    guest.bus.offer(forced, RecordingEndpoint())
    guest.connect()
    if is_open:
        guest.open_channel(1)
    state = guest.save()
    guest.bus = guest.another_bus()
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(forced, endpoint)
    guest.bus.restore(state)
    assert guest.take() == []
    guest.bus.resume()
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert "restored" not in endpoint.calls
    assert channel.refusals.total == 0
    guest.close(1)
    [again] = guest.release(1)
    assert (again.relid, again.flags) == (1, OfferFlags.FORCE_NEW_CHANNEL)
    guest.open_channel(1)
    assert channel.state is ChannelState.OPEN


def test_state_restored_in_place_forces_a_new_channel_too(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer("a", flags=OfferFlags.FORCE_NEW_CHANNEL), endpoint)
    guest.connect()
    guest.open_channel(1)
    channel.continue_endpoint()
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert endpoint.calls[-1] == "closed"


def test_pages_mapped_for_reading_refuse_writes(guest: ScriptedGuest) -> None:
    channel = guest.bus.offer(an_offer("a"), RecordingEndpoint())
    guest.connect()
    gpadl = guest.share(1, 2)
    pages = channel.gpadl_pages(gpadl)
    pages.write(8, b"contents")
    mapped = channel.gpadl_pages(gpadl, read_only=True)
    assert (mapped.size, mapped.read(8, 8), mapped.address_u32(0)) == (pages.size, b"contents", 0)
    assert mapped.load_u32(8) == int.from_bytes(b"cont", "little")
    with pytest.raises(DeviceError, match="mapped these pages with read_only=True"):
        mapped.write(8, b"other...")
    with pytest.raises(DeviceError, match="mapped these pages with read_only=True"):
        mapped.store_u32(8, 1)
    assert pages.read(8, 8) == b"contents"


def test_offer_that_the_guest_gave_up_stays_given_up(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint(), RecordingEndpoint())
    guest.connect()
    guest.release(1)
    move(RecordingEndpoint(), RecordingEndpoint())
    assert guest.take() == []
    assert [each.relid for each in guest.connect()] == [1, 2]


@pytest.mark.parametrize("back", [False, True])
def test_revoked_channel_stays_revoked_until_released(guest: ScriptedGuest, move: Move, back: bool) -> None:
    (channel,) = offer(guest, RecordingEndpoint())
    guest.connect()
    guest.bus.revoke(channel)
    guest.take()
    endpoints = [RecordingEndpoint()] if back else []
    move(*endpoints)
    assert guest.take() == []
    assert [each.relid for each in guest.release(1)] == ([1] if back else [])
    assert len(guest.bus.channels) == back


def test_channel_that_was_released_before_it_was_rescinded_is_released_again(
    guest: ScriptedGuest, move: Move
) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    (channel,) = offer(guest, slow)
    guest.connect()
    guest.open_channel(1)
    guest.bus.revoke(channel)
    guest.release(1)  # too early: the device has not closed yet
    channel.finish_close()
    assert channel.state is ChannelState.REVOKED
    guest.take()
    move()
    guest.release(1)
    assert guest.bus.channels == ()


def test_reoffered_channel_of_a_device_that_is_gone_is_revoked(guest: ScriptedGuest, move: Move) -> None:
    (channel,) = offer(guest, RecordingEndpoint())
    guest.connect()
    guest.bus.revoke(channel)
    offer(guest, RecordingEndpoint())
    guest.take()
    move()
    assert guest.take() == []
    assert guest.release(1) == []
    assert guest.bus.channels == ()


@pytest.mark.conformance(51)
def test_queued_messages_are_kept_in_order(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    guest.bus.pause()
    (header,) = split_gpadl(1, 7, [GpaRange(8 * PAGE_SIZE, 0, list(range(100, 108)))])
    guest.post(header)
    guest.post(OPENCHANNEL.build(OpenChannel(1, 1, 7, 0, 4, bytes(120))))
    guest.bus.offer(an_offer("b"), RecordingEndpoint())
    move(RecordingEndpoint(), RecordingEndpoint())
    assert numbers(guest) == [
        MessageType.OFFERCHANNEL,
        MessageType.GPADL_CREATED,
        MessageType.OPENCHANNEL_RESULT,
    ]


def test_guests_pause_outlives_the_move(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect(Version.COPPER, features=Feature.PAUSE_RESUME)
    guest.ask(PAUSE.build(HeaderOnly()))
    move(RecordingEndpoint(), RecordingEndpoint())
    assert guest.take() == []
    (late,) = guest.ask(RESUME.build(HeaderOnly()))
    assert late.relid == 2


@pytest.mark.conformance(52)
@pytest.mark.parametrize(
    ("version", "features", "options", "reason"),
    [
        (Version.IRON, Feature(0), {"max_version": Version.WIN10_RS5}, "unsupported-version"),
        (Version.COPPER, Feature(0), {"max_version": Version.IRON}, "unsupported-version"),
        (
            Version.COPPER,
            Feature.PAUSE_RESUME | Feature.MODIFY_CONNECTION,
            {"supported_flags": Feature.PAUSE_RESUME},
            "unsupported-features",
        ),
    ],
)
@pytest.mark.parametrize("only_reserved", [False, True])
def test_less_than_was_agreed_is_refused_with_its_own_reason(
    guest: ScriptedGuest,
    version: Version,
    features: Feature,
    options: dict[str, Any],
    reason: str,
    only_reserved: bool,
) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect(version, features=features)
    if only_reserved:
        guest.open_reserved(1, guest.share(1))
        guest.unload()
    state = guest.save()
    bus = guest.another_bus(**options)
    with pytest.raises(BusStateRefused) as caught:
        bus.restore(state)
    assert caught.value.reason == reason
    assert not bus.paused
    assert bus.channels == ()


@pytest.mark.conformance(52)
@pytest.mark.parametrize("only_reserved", [False, True])
def test_features_before_6_0_are_refused(guest: ScriptedGuest, only_reserved: bool) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect(Version.IRON)
    if only_reserved:
        guest.open_reserved(1, guest.share(1))
        guest.unload()
    state = guest.save()
    if only_reserved:
        (channel,) = state.channels
        assert channel.request is not None and channel.request.reserved is not None
        client = dataclasses.replace(channel.request.reserved, features=Feature.PAUSE_RESUME)
        request = dataclasses.replace(channel.request, reserved=client)
        state = dataclasses.replace(state, channels=(dataclasses.replace(channel, request=request),))
    else:
        agreed = dataclasses.replace(state.connection, features=Feature.PAUSE_RESUME)
        state = dataclasses.replace(state, connection=agreed)
    with pytest.raises(BusStateRefused, match=r"features-before-6\.0"):
        guest.another_bus().restore(state)


@pytest.mark.conformance(53)
def test_reserved_channel_survives_disconnected(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    guest.open_reserved(1, guest.share(1), vp=1)
    guest.unload()
    endpoint = RecordingEndpoint()
    move(endpoint)
    assert endpoint.is_open
    assert guest.close_reserved(1, vp=3, sint=7) == [ChannelOnly(1)]
    assert not endpoint.is_open
    assert [each.relid for each in guest.connect()] == [1]
    guest.open_channel(1)


def test_reserved_channel_that_cannot_be_restored_is_released(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    guest.open_reserved(1, guest.share(1))
    guest.unload()
    (channel,) = move(ForgetfulEndpoint())
    assert guest.take() == []
    assert channel.state is ChannelState.RELEASED
    assert [each.relid for each in guest.connect()] == [1]


def test_close_of_a_reserved_channel_under_way_is_answered(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow)
    guest.connect()
    guest.open_reserved(1, guest.share(1))
    guest.close_reserved(1, vp=2, sint=9)
    guest.unload()
    move(RecordingEndpoint())
    (answer,) = guest.take()
    assert (answer.vp, answer.sint, answer.message) == (2, 9, ChannelOnly(1))


def test_guests_choice_of_signals_and_monitor_bits_are_restored(guest: ScriptedGuest) -> None:
    flags = OfferFlags.REQUEST_MONITORED_NOTIFICATION
    guest.bus.offer(an_offer(flags=flags), RecordingEndpoint())
    pages = [pfn * PAGE_SIZE for pfn in guest.pages(2)]
    features = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    guest.connect(Version.COPPER, features=features, monitor_pages=(pages[0], pages[1]))
    guest.open_channel(1, connection_id=0x4321, event_flag=77)
    state = guest.save()
    guest.bus = guest.another_bus()
    guest.bus.restore(state)
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer(flags=flags), endpoint)
    guest.bus.resume()
    guest.synic.ports[0x4321]()
    assert endpoint.calls[-1] == "signalled"
    guest.synic.events.clear()
    channel.signal_guest()
    assert guest.synic.events == [(0, 2, 77)]
    calls = len(endpoint.calls)
    guest.memory.write(pages[1] + 8, b"\x01")
    guest.timers.advance(0.01)
    assert len(endpoint.calls) == calls + 1


def test_subchannels_are_restored_with_their_primary(guest: ScriptedGuest) -> None:
    def devices(bus: Bus) -> list[RecordingEndpoint]:
        endpoints = [RecordingEndpoint(), RecordingEndpoint()]
        for index, endpoint in enumerate(endpoints):
            bus.offer(an_offer(subchannel_index=index), endpoint)
        return endpoints

    devices(guest.bus)
    guest.connect()
    guest.open_channel(1)
    guest.open_channel(2)
    state = guest.save()
    guest.bus = guest.another_bus()
    guest.bus.restore(state)
    endpoints = devices(guest.bus)
    guest.bus.resume()
    assert all(endpoint.is_open for endpoint in endpoints)
    assert guest.close(1) == [ChannelOnly(2)]


def test_source_resumes_when_the_migration_is_cancelled(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    offer(guest, endpoint)
    guest.connect()
    guest.open_channel(1)
    state = guest.save()
    assert guest.bus.save() == state
    guest.bus.resume()
    assert guest.take() == []
    assert endpoint.calls.count("opened") == 1
    guest.synic.ports[0x2001]()
    assert endpoint.calls[-1] == "signalled"
    assert hash(state) is not None


def test_reset_of_a_bus_that_waits_for_its_devices(guest: ScriptedGuest) -> None:
    offer(guest, RecordingEndpoint(), RecordingEndpoint())
    guest.connect()
    guest.open_channel(1)
    state = guest.save()
    guest.bus = guest.another_bus()
    guest.bus.restore(state)
    endpoint = RecordingEndpoint()
    guest.bus.offer(an_offer("a"), endpoint)
    guest.bus.reset()
    guest.bus.resume()
    assert guest.take() == []
    assert guest.bus.gpadl_assembler.quota.gpadls == 0
    assert [each.relid for each in guest.connect()] == [1]
    assert "restored" not in endpoint.calls


def test_state_for_a_bus_with_a_guest_is_refused(guest: ScriptedGuest) -> None:
    guest.connect()
    state = guest.save()
    with pytest.raises(BusStateRefused, match="not-fresh"):
        guest.bus.restore(state)
    bus = guest.another_bus()
    bus.restore(state)
    with pytest.raises(BusStateRefused, match="not-fresh"):
        bus.restore(state)


def test_server_monitor_pages_must_be_the_same() -> None:
    options: dict[str, Any] = {"supported_flags": ALL_FEATURES}
    guest = ScriptedGuest.on_fakes(server_monitor_pages=MonitorPages(0x5000, 0x6000), **options)
    guest.connect(Version.COPPER, features=Feature.SERVER_SPECIFIED_MONITOR_PAGES)
    state = guest.save()
    with pytest.raises(BusStateRefused, match="monitor-pages"):
        guest.another_bus(server_monitor_pages=MonitorPages(0x5000, 0x7000), **options).restore(state)
    with pytest.raises(BusStateRefused, match="unsupported-features"):
        guest.another_bus(**options).restore(state)
    guest.another_bus(server_monitor_pages=MonitorPages(0x5000, 0x6000), **options).restore(state)


@pytest.fixture
def rich(guest: ScriptedGuest) -> BusState:
    """A state with something of everything."""
    offer(guest, RecordingEndpoint(), RecordingEndpoint(), RecordingEndpoint())
    guest.connect(Version.COPPER, features=DEFAULT_FEATURES & ~Feature.CLIENT_ID)
    guest.open_channel(1, connection_id=0x2001, event_flag=1)
    guest.share(2)
    guest.ask(split_gpadl(2, 7, [GpaRange(60 * PAGE_SIZE, 0, list(range(100, 160)))])[0])
    guest.bus.pause()
    guest.post(REQUESTOFFERS.build(HeaderOnly()))
    guest.bus.send(b"\x02" + bytes(11))
    return guest.save()


def test_rich_state_is_accepted(guest: ScriptedGuest, rich: BusState) -> None:
    bus = guest.another_bus()
    bus.restore(rich)
    assert bus.save() == rich


def changed(what: Any, **fields: Any) -> Any:
    return dataclasses.replace(what, **fields)


def channel_with(number: int, **fields: Any) -> Any:
    def change(state: BusState) -> BusState:
        channels = list(state.channels)
        channels[number] = changed(channels[number], **fields)
        return changed(state, channels=tuple(channels))  # type: ignore[no-any-return]

    return change


def connection_with(**fields: Any) -> Any:
    return lambda state: changed(state, connection=changed(state.connection, **fields))


def request_with(**fields: Any) -> Any:
    return lambda state: channel_with(0, request=changed(state.channels[0].request, **fields))(state)


def ranges(*each: tuple[int, int, tuple[tuple[int, int], ...]]) -> tuple[GpadlRecord, ...]:
    return (GpadlRecord(99, tuple(RangeRecord(*one) for one in each)),)


CONTRADICTIONS = [
    ("inconsistent", connection_with(version=None)),
    ("inconsistent", connection_with(phase=Phase.DISCONNECTED)),
    ("inconsistent", connection_with(target=Target(4, 2))),
    ("inconsistent", connection_with(target=Target(0, 16))),
    ("not-ram", connection_with(monitor_pages=MonitorPages(0x5000, 1 << 40))),
    ("not-ram", connection_with(interrupt_page=0x5001)),
    ("unsupported-features", connection_with(features=ALL_FEATURES)),
    ("inconsistent", connection_with(next_action=NextAction.CONTACT)),
    ("inconsistent", connection_with(next_action=NextAction.UNLOAD_RESPONSE)),
    ("inconsistent", connection_with(phase=Phase.DISCONNECTING)),
    ("inconsistent", channel_with(0, abandoned=True)),
    ("inconsistent", channel_with(0, revoking=True)),
    ("inconsistent", channel_with(0, released_by_guest=True)),
    ("inconsistent", channel_with(1, abandoned=True)),
    ("inconsistent", channel_with(1, revoking=True)),
    ("inconsistent", channel_with(1, released_by_guest=True)),
    ("inconsistent", channel_with(1, relid=1)),
    ("inconsistent", channel_with(1, relid=None)),
    ("inconsistent", channel_with(1, relid=2048)),
    ("inconsistent", channel_with(1, state=ChannelState.RELEASED)),
    ("inconsistent", channel_with(1, state=ChannelState.OPEN)),
    ("inconsistent", channel_with(0, state=ChannelState.CLOSED)),
    ("inconsistent", channel_with(0, gpadls=())),
    ("inconsistent", channel_with(0, target_vp=4)),
    ("inconsistent", channel_with(0, pending_target=-1)),
    ("inconsistent", channel_with(0, monitor_id=128)),
    ("inconsistent", channel_with(0, close_answer=Target(0, 99))),
    ("inconsistent", request_with(downstream_offset=7)),
    ("inconsistent", request_with(event_flag=2048)),
    ("inconsistent", request_with(connection_id=3)),
    ("inconsistent", request_with(target_vp=9)),
    ("inconsistent", channel_with(1, gpadls=ranges())),
    ("inconsistent", channel_with(1, gpadls=ranges((0, 0, ())))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 0, ((1, 2),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 4096, ((1, 2),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((8192, 0, ((1, 3), (5, -1)))))),
    ("inconsistent", channel_with(1, gpadls=ranges((1 << 45, 0, ((0, 1 << 33),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 0, ((1 << 52, 1),))))),
    ("inconsistent", channel_with(1, gpadls=ranges((4096, 0, ((1, 1),))) * 2)),
    ("not-ram", channel_with(1, gpadls=ranges((4096, 0, ((1 << 40, 1),))))),
    ("inconsistent", lambda state: changed(state, channels=state.channels + state.channels[:1])),
    (
        "inconsistent",
        lambda state: changed(state, assemblies=(changed(state.assemblies[0], relid=9),)),
    ),
    (
        "inconsistent",
        lambda state: changed(state, assemblies=(changed(state.assemblies[0], data=bytes(488)),)),
    ),
    (
        "inconsistent",
        lambda state: changed(state, assemblies=(changed(state.assemblies[0], data=bytes(7)),)),
    ),
    ("inconsistent", lambda state: changed(state, assemblies=state.assemblies * 2)),
    ("inconsistent", lambda state: changed(state, inbox=(changed(state.inbox[0], payload=bytes(241)),))),
    ("inconsistent", lambda state: changed(state, outbox=(Outgoing(Target(0, 2), bytes(241)),))),
    ("inconsistent", lambda state: changed(state, outbox=(Outgoing(Target(9, 2), bytes(8)),))),
]


@pytest.mark.parametrize(("reason", "change"), CONTRADICTIONS)
def test_state_that_contradicts_itself_or_the_machine_changes_nothing(
    guest: ScriptedGuest, rich: BusState, reason: str, change: Any
) -> None:
    bus = guest.another_bus()
    with pytest.raises(BusStateRefused) as caught:
        bus.restore(change(rich))
    assert caught.value.reason == reason
    assert (bus.paused, bus.channels, bus.gpadl_assembler.quota.gpadls) == (False, (), 0)
    assert set(guest.synic.ports) == {2, 3}
    assert bus.connection.next_action is NextAction.NONE
    bus.restore(rich)


@pytest.mark.parametrize(
    ("part", "each", "most"),
    [
        ("inbox", WaitingMessage(1, b""), MAX_INBOX),
        ("outbox", Outgoing(Target(0, 2), b"x"), MAX_OUTBOX),
        ("assemblies", AssemblyRecord(1, 2, 8, 1, b""), MAX_ASSEMBLIES),
    ],
)
def test_more_of_anything_than_there_can_be_is_refused_before_it_is_allocated(
    guest: ScriptedGuest, part: str, each: Any, most: int
) -> None:
    """A state of 3 MB had 400,000 messages where 16 are possible, and took a hundred times as much memory."""
    state = changed(guest.bus.save(), **{part: (each,)})
    one = SAVED_BUS.build(state)
    fits = SAVED_BUS.build(changed(state, **{part: (each,) * most}))
    assert len(getattr(SAVED_BUS.parse(fits), part)) == most
    with pytest.raises(InternalError, match="at most"):
        SAVED_BUS.build(changed(state, **{part: (each,) * (most + 1)}))
    empty = SAVED_BUS.build(changed(state, **{part: ()}))
    at = next(index for index in range(len(empty)) if empty[index] != one[index])
    bytes_of_one = one[at + 1 : len(one) - (len(empty) - at - 1)]
    many = empty[:at] + encode_varint(400_000) + bytes_of_one * 400_000 + empty[at + 1 :]
    tracemalloc.start()
    try:
        with pytest.raises(MalformedError, match="at most"):
            SAVED_BUS.parse(many)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < len(many) + (1 << 20)


def test_reopen_of_a_channel_whose_device_is_gone_is_forgotten(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow)
    guest.connect()
    ring = guest.open_channel(1)
    guest.close(1)
    guest.open(1, ring)
    guest.teardown(1, ring)
    move()
    assert messages(guest) == [GpadlTorndown(ring), ChannelOnly(1)]
    (channel,) = guest.bus.channels
    assert (channel.state, channel.reopen) == (ChannelState.REVOKED, None)
    move()
    assert guest.take() == []
