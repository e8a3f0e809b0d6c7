"""Saving and restoring the bus (docs/protocol/saving.md#bus-state): requests under way, messages, signals."""

from __future__ import annotations

import pytest
from vmbus.bus.channel.endpoint import RestorableEndpoint
from vmbus.bus.channel.signals import RESIGNAL_DELAY
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import Phase
from vmbus.bus.server import Bus
from vmbus.ports import PAGE_SIZE
from vmbus.testing.scripted import ForgetfulEndpoint, RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import GpadlTorndown, GpaRange, split_gpadl
from vmbus.wire.header import STATUS_SUCCESS, MessageType
from vmbus.wire.messages import (
    OPENCHANNEL,
    PAUSE,
    RESUME,
    ChannelOnly,
    HeaderOnly,
    ModifyChannelResponse,
    OpenChannel,
    OpenResult,
)
from vmbus.wire.offer import OfferFlags
from vmbus.wire.version import Feature, Version

from tests.unit.bus.moving import Move, messages, numbers, offer


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
    guest.timers.advance(RESIGNAL_DELAY)
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
