"""Opening, closing, modifying, stopping; reserved channels; endpoints that misbehave.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#channel-states.
"""

from __future__ import annotations

import pytest
from vmbus.bus.channel.signals import RESIGNAL_DELAY
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.messages import MAX_UNDELIVERED, PostResult
from vmbus.bus.saved_state.values import MAX_INBOX
from vmbus.errors import DeviceError, GuestError, ProtocolError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import GpadlCreated, GpadlTorndown, GpaRange, split_gpadl
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL, MessageType
from vmbus.wire.messages import (
    CLOSE_RESERVED_CHANNEL,
    CLOSECHANNEL,
    NO_INTERRUPTS_VP,
    OPEN_RESERVED_CHANNEL,
    OPENCHANNEL,
    PAUSE,
    RESUME,
    ChannelOnly,
    CloseReservedChannel,
    HeaderOnly,
    ModifyChannelResponse,
    OpenChannel,
    OpenReservedChannel,
    OpenResult,
)
from vmbus.wire.offer import OfferFlags
from vmbus.wire.version import ALL_FEATURES, Feature, Version


@pytest.fixture
def endpoint() -> RecordingEndpoint:
    return RecordingEndpoint()


@pytest.fixture
def connected(guest: ScriptedGuest, endpoint: RecordingEndpoint) -> ScriptedGuest:
    """One channel is offered, its id is 1."""
    guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    return guest


def messages(guest: ScriptedGuest) -> list[object]:
    return [answer.message for answer in guest.take()]


def numbers_of(guest: ScriptedGuest) -> list[MessageType]:
    return [answer.number for answer in guest.take()]


@pytest.mark.conformance(31)
def test_open_answers_with_the_open_id(connected: ScriptedGuest, endpoint: RecordingEndpoint) -> None:
    ring = connected.share(1)
    assert connected.open(1, ring, open_id=0xABCD) == [OpenResult(1, 0xABCD, STATUS_SUCCESS)]
    assert endpoint.is_open
    channel = connected.bus.channels[0]
    assert channel.state is ChannelState.OPEN
    incoming, outgoing = channel.ring_pages()
    assert (incoming.size, outgoing.size) == (4 * PAGE_SIZE, 4 * PAGE_SIZE)


def test_rings_may_be_of_unequal_size_and_begin_where_the_guest_says(connected: ScriptedGuest) -> None:
    pfns = connected.pages(7)
    ring = connected.new_gpadl_id()
    connected.post_ranges(1, [GpaRange(7 * PAGE_SIZE, 0, pfns)], ring)
    connected.open(1, ring, downstream=2)
    incoming, outgoing = connected.bus.channels[0].ring_pages()
    assert (incoming.size, outgoing.size) == (2 * PAGE_SIZE, 5 * PAGE_SIZE)
    outgoing.store_u32(0, 0x1234)
    assert connected.memory.read(pfns[2] * PAGE_SIZE, 4) == b"\x34\x12\0\0"


@pytest.mark.parametrize("downstream", [0, 1, 7, 8, 9, 0xFFFFFFFF])
def test_ring_without_a_data_page_fails(connected: ScriptedGuest, downstream: int) -> None:
    ring = connected.share(1)
    assert connected.open(1, ring, downstream=downstream) == [OpenResult(1, 1, STATUS_UNSUCCESSFUL)]
    assert connected.bus.channels[0].state is ChannelState.CLOSED
    assert connected.open(1, ring)[0].status == STATUS_SUCCESS


@pytest.mark.parametrize(
    "ranges",
    [
        [GpaRange(8 * PAGE_SIZE, 8, list(range(100, 109)))],
        [GpaRange(8 * PAGE_SIZE - 8, 0, list(range(100, 108)))],
        [GpaRange(4 * PAGE_SIZE, 0, [100, 101, 102, 103]), GpaRange(PAGE_SIZE, 0, [104])],
    ],
)
def test_ring_must_be_one_range_of_whole_pages(connected: ScriptedGuest, ranges: list[GpaRange]) -> None:
    connected.post_ranges(1, ranges, 5)
    assert connected.open(1, 5)[0].status == STATUS_UNSUCCESSFUL


def test_open_with_an_unknown_or_foreign_gpadl_fails(connected: ScriptedGuest) -> None:
    connected.bus.offer(an_offer("second"), RecordingEndpoint())
    connected.take()
    foreign = connected.share(2)
    assert connected.open(1, foreign)[0].status == STATUS_UNSUCCESSFUL
    assert connected.open(1, 12345)[0].status == STATUS_UNSUCCESSFUL


def test_open_for_a_vp_that_does_not_exist_fails(connected: ScriptedGuest) -> None:
    ring = connected.share(1)
    assert connected.open(1, ring, vp=4)[0].status == STATUS_UNSUCCESSFUL
    assert connected.bus.channels[0].refusals.counts == {"open-target-vp": 1}


def test_open_of_an_unknown_open_or_revoked_channel_is_ignored(connected: ScriptedGuest) -> None:
    ring = connected.open_channel(1)
    assert connected.open(1, ring) == []
    assert connected.open(9, ring) == []
    connected.bus.revoke(connected.bus.channels[0])
    connected.take()
    assert connected.open(1, ring) == []


def test_close_has_no_answer_and_is_ignored_when_not_open(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    ring = connected.open_channel(1)
    assert connected.close(1) == []
    assert connected.close(1) == []
    assert connected.close(7) == []
    assert endpoint.calls.count("closed") == 1
    assert connected.open(1, ring)[0].status == STATUS_SUCCESS, "the GPADL outlives the close"


def test_device_may_refuse_to_open(connected: ScriptedGuest, endpoint: RecordingEndpoint) -> None:
    ring = connected.share(1)
    for error in (DeviceError("no"), ProtocolError("not-now"), RuntimeError("a bug")):
        endpoint.refuse_open = error
        assert connected.open(1, ring)[0].status == STATUS_UNSUCCESSFUL
    endpoint.refuse_open = None
    assert connected.open(1, ring)[0].status == STATUS_SUCCESS
    assert "closed" not in endpoint.calls


def test_open_may_take_time(connected: ScriptedGuest, endpoint: RecordingEndpoint) -> None:
    endpoint.defer_open = True
    channel = connected.bus.channels[0]
    ring = connected.share(1)
    assert connected.open(1, ring) == []
    assert channel.state is ChannelState.OPENING
    assert connected.close(1) == connected.release(1) == connected.open(1, ring) == []
    channel.finish_open()
    assert messages(connected) == [OpenResult(1, 1, STATUS_SUCCESS)]
    connected.close(1)
    assert connected.open(1, ring) == []
    channel.finish_open(DeviceError("lost"))
    assert messages(connected) == [OpenResult(1, 1, STATUS_UNSUCCESSFUL)]
    with pytest.raises(DeviceError):
        channel.finish_open()


def test_unload_waits_for_a_slow_open_and_closes_it(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_open = True
    ring = connected.share(1)
    connected.open(1, ring)
    assert connected.unload() == []
    connected.bus.channels[0].finish_open()
    assert endpoint.calls[-2:] == ["closed", f"gpadl_torn_down {ring:#x}"]
    assert [answer.number for answer in connected.take()] == [MessageType.UNLOAD_RESPONSE]


def test_revoke_while_opening_gives_no_open_result(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_open = True
    channel = connected.bus.channels[0]
    connected.open(1, connected.share(1))
    connected.bus.revoke(channel)
    assert connected.take() == []
    channel.finish_open()
    assert [answer.number for answer in connected.take()] == [MessageType.RESCIND_CHANNELOFFER]
    assert endpoint.calls[-2] == "closed"


def test_teardown_of_the_ring_while_opening_gets_both_answers(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_open = True
    ring = connected.share(1)
    connected.open(1, ring)
    assert connected.teardown(1, ring) == []
    connected.bus.channels[0].finish_open()
    assert messages(connected) == [OpenResult(1, 1, STATUS_SUCCESS), GpadlTorndown(ring)]
    assert not endpoint.is_open


def test_open_while_closing_happens_when_the_close_is_done(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    channel = connected.bus.channels[0]
    ring = connected.open_channel(1)
    connected.close(1)
    assert connected.open(1, ring, open_id=77) == []
    assert channel.state is ChannelState.CLOSING_REOPEN
    assert connected.open(1, ring, open_id=78) == connected.release(1) == connected.close(1) == []
    channel.finish_close()
    assert messages(connected) == [OpenResult(1, 77, STATUS_SUCCESS)]
    assert endpoint.is_open


def test_release_while_closing_frees_the_id_afterwards(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    channel = connected.bus.channels[0]
    ring = connected.open_channel(1)
    connected.close(1)
    assert connected.release(1) == []
    assert connected.open(1, ring) == [], "given up"
    channel.finish_close()
    assert channel.state is ChannelState.RELEASED
    assert connected.bus.gpadl_assembler.quota.gpadls == 0


@pytest.mark.parametrize("why", ["released", "revoked"])
def test_nothing_opens_while_the_channel_gives_its_gpadls_back(
    connected: ScriptedGuest, endpoint: RecordingEndpoint, why: str
) -> None:
    endpoint.defer_teardown = True
    channel = connected.bus.channels[0]
    ring = connected.share(1)
    if why == "released":
        connected.release(1)
    else:
        connected.bus.revoke(channel)
    assert connected.open(1, ring) == []
    assert channel.state is ChannelState.CLOSING
    channel.finish_teardown(channel.gpadls[ring])
    assert numbers_of(connected) == ([] if why == "released" else [MessageType.RESCIND_CHANNELOFFER])
    assert "opened" not in endpoint.calls


@pytest.mark.conformance(32)
def test_guests_choice_of_signals_is_honoured_only_when_negotiated(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer(), endpoint)
    guest.connect(Version.COPPER, features=Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    guest.open_channel(1, vp=1, connection_id=0x4321, event_flag=99)
    channel.signal_guest()
    assert guest.synic.events == [(1, 2, 99)]
    guest.synic.ports[0x4321]()
    assert endpoint.calls[-1] == "signalled"
    guest.close(1)
    assert 0x4321 not in guest.synic.ports
    guest.connect(Version.COPPER)
    guest.synic.events.clear()
    guest.open_channel(1, vp=1, connection_id=0x4321, event_flag=99)
    channel.signal_guest()
    assert guest.synic.events == [(1, 2, 1)]
    assert 0x4321 not in guest.synic.ports


def test_a_connection_id_of_a_channel_that_waits_to_open_is_taken(guest: ScriptedGuest) -> None:
    channels = [guest.bus.offer(an_offer(name), RecordingEndpoint()) for name in ("a", "b")]
    guest.connect(Version.COPPER, features=Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    rings = [guest.share(relid) for relid in (1, 2)]
    for channel in channels:
        channel.pause()
    assert guest.open(1, rings[0], connection_id=0x4321, event_flag=1) == []
    assert [each.status for each in guest.open(2, rings[1], connection_id=0x4321, event_flag=2)] == [
        STATUS_UNSUCCESSFUL
    ]
    guest.another_bus().restore(guest.save())  # which refuses a state with one id twice


@pytest.mark.parametrize(
    ("connection_id", "event_flag", "accepted"),
    [
        (0x2001, 2047, True),
        (0x2002, 1, False),
        (0, 1, False),
        (4, 1, False),
        (1 << 24, 1, False),
        (0x777, 1, False),
        (0x778, 2048, False),
    ],
)
def test_signals_that_a_guest_may_choose(
    guest: ScriptedGuest, connection_id: int, event_flag: int, accepted: bool
) -> None:
    for name in ("a", "b"):
        guest.bus.offer(an_offer(name), RecordingEndpoint())
    guest.connect(Version.COPPER, features=Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    guest.open_channel(2, connection_id=0x777, event_flag=5)
    (answer,) = guest.open(1, guest.share(1), connection_id=connection_id, event_flag=event_flag)
    assert (answer.status == STATUS_SUCCESS) is accepted


def test_short_open_is_ignored_when_the_long_form_was_agreed(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect(Version.COPPER, features=Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS)
    ring = guest.share(1)
    assert guest.ask(OPENCHANNEL.build(OpenChannel(1, 1, ring, 0, 4, bytes(120)))) == []


@pytest.mark.conformance(33)
@pytest.mark.parametrize("supported", [False, True])
def test_unknown_open_flags_are_ignored(supported: bool) -> None:
    guest = ScriptedGuest.on_fakes(supported_flags=ALL_FEATURES)
    channel = guest.bus.offer(an_offer(), RecordingEndpoint())
    features = Feature.GUEST_SPECIFIED_SIGNAL_PARAMETERS
    if supported:
        features |= Feature.CHANNEL_INTERRUPT_REDIRECTION
    guest.connect(Version.COPPER, features=features)
    guest.open_channel(1, connection_id=0x2001, event_flag=1, open_flags=0xFFFF)
    assert channel.request is not None
    assert channel.request.redirect_interrupt is supported


@pytest.mark.conformance(34)
def test_monitor_is_not_used_by_a_channel_without_interrupts(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    offer = an_offer(flags=OfferFlags.REQUEST_MONITORED_NOTIFICATION, monitor_latency=20_000)
    channel = guest.bus.offer(offer, endpoint)
    pages = [pfn * PAGE_SIZE for pfn in guest.pages(2)]
    guest.connect(monitor_pages=(pages[0], pages[1]))
    guest.open_channel(1, vp=NO_INTERRUPTS_VP)
    guest.memory.write(pages[1] + 8, b"\x01")
    guest.timers.advance(1)
    assert "signalled" not in endpoint.calls
    channel.signal_guest()
    assert guest.synic.events == []
    guest.close(1)
    guest.open_channel(1)
    guest.timers.advance(0.0021)
    assert endpoint.calls[-1] == "signalled"
    assert guest.memory.read(pages[1] + 8, 8) == bytes(8)


@pytest.mark.conformance(35)
@pytest.mark.parametrize("version", [Version.WIN10_RS3_0, Version.WIN10_RS5, Version.IRON])
def test_modify_channel_moves_interrupts_and_is_answered_from_5_3(
    connected: ScriptedGuest, endpoint: RecordingEndpoint, version: Version
) -> None:
    connected.connect(version)
    connected.open_channel(1, vp=0)
    answers = connected.modify(1, 3)
    assert answers == ([ModifyChannelResponse(1, STATUS_SUCCESS)] if version >= Version.IRON else [])
    assert endpoint.calls[-1] == "retargeted 3"
    assert connected.synic.events == [(3, 2, 1)], "what the old VP had not seen is not lost"
    connected.bus.channels[0].signal_guest()
    assert connected.synic.events[-1] == (3, 2, 1)


def test_modify_channel_does_not_exist_below_4_1(connected: ScriptedGuest) -> None:
    connected.connect(Version.WIN10)
    connected.open_channel(1)
    assert connected.modify(1, 3) == []
    assert connected.bus.channels[0].target_vp == 0


def test_modify_channel_errors(connected: ScriptedGuest) -> None:
    wrong = [ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)]
    assert connected.modify(1, 1) == wrong, "not open"
    connected.open_channel(1)
    assert connected.modify(1, NO_INTERRUPTS_VP) == wrong
    assert connected.modify(1, 4) == wrong
    assert connected.modify(9, 1) == [ModifyChannelResponse(9, STATUS_UNSUCCESSFUL)]
    connected.close(1)
    connected.open_channel(1, vp=NO_INTERRUPTS_VP)
    assert connected.modify(1, 1) == wrong, "opened without interrupts"


@pytest.mark.conformance(37)
def test_open_and_modify_wait_while_the_channel_is_paused(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    channel = connected.bus.channels[0]
    channel.pause()
    ring = connected.share(1)
    assert connected.open(1, ring) == []
    assert endpoint.calls == [f"gpadl_created {ring:#x}"]
    channel.resume()
    assert messages(connected) == [OpenResult(1, 1, STATUS_SUCCESS)]
    channel.pause()
    assert connected.modify(1, 2) == []
    assert connected.modify(1, 3) == [], "a second one is dropped"
    connected.synic.ports[0x2001]()
    assert endpoint.calls[-1] == "signalled"
    calls = list(endpoint.calls)
    connected.synic.ports[0x2001]()
    assert endpoint.calls == calls, "a doorbell waits too"
    assert connected.post_ranges(1, [GpaRange(PAGE_SIZE, 0, [50])], 9) == [GpadlCreated(1, 9, 0)]
    assert connected.teardown(1, 9) == [GpadlTorndown(9)]
    channel.resume()
    assert messages(connected) == [ModifyChannelResponse(1, STATUS_SUCCESS)]
    assert endpoint.calls[-2:] == ["retargeted 2", "signalled"]
    channel.pause()
    assert connected.close(1) == []
    assert endpoint.calls[-1] == "closed"
    channel.resume()
    assert channel.state is ChannelState.CLOSED


def test_paused_channel_below_5_3_gets_the_latest_modification(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    connected.connect(Version.WIN10_RS5)
    connected.open_channel(1)
    channel = connected.bus.channels[0]
    channel.pause()
    connected.modify(1, 2)
    connected.modify(1, 3)
    channel.resume()
    assert [call for call in endpoint.calls if call.startswith("retargeted")] == ["retargeted 3"]
    assert connected.take() == []


def test_close_answers_a_modification_that_waited(connected: ScriptedGuest) -> None:
    connected.open_channel(1)
    connected.bus.channels[0].pause()
    connected.modify(1, 2)
    assert connected.close(1) == [ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)]


def test_ring_torn_down_while_an_open_waits_fails_the_open(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    connected.bus.channels[0].pause()
    ring = connected.share(1)
    connected.open(1, ring)
    assert connected.teardown(1, ring) == [OpenResult(1, 1, STATUS_UNSUCCESSFUL), GpadlTorndown(ring)]
    connected.bus.channels[0].resume()
    assert "opened" not in endpoint.calls


def test_unload_and_revoke_of_a_paused_channel_that_was_to_open(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    channel = connected.bus.channels[0]
    channel.pause()
    connected.open(1, connected.share(1))
    assert connected.unload() == [HeaderOnly()]
    connected.connect()
    connected.open(1, connected.share(1))
    connected.bus.revoke(channel)
    assert [answer.number for answer in connected.take()] == [MessageType.RESCIND_CHANNELOFFER]
    assert "opened" not in endpoint.calls


@pytest.mark.conformance(38)
def test_reserved_channel_is_answered_where_its_client_says_and_survives_unload(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    ring = connected.share(1)
    assert connected.open_reserved(1, ring, vp=2, sint=5) == [OpenResult(1, 0, STATUS_SUCCESS)]
    assert (connected.answers[-1].vp, connected.answers[-1].sint) == (2, 5)
    assert connected.close(1) == []
    assert endpoint.is_open, "a plain close is refused"
    assert connected.post_ranges(1, [GpaRange(PAGE_SIZE, 0, [50])], 9)[0].status == STATUS_UNSUCCESSFUL
    assert connected.teardown(1, ring) == []
    assert connected.modify(1, 1) == [ModifyChannelResponse(1, STATUS_UNSUCCESSFUL)]
    assert connected.unload() == [HeaderOnly()]
    assert endpoint.is_open
    assert connected.bus.gpadl_assembler.quota.gpadls == 1
    assert connected.close_reserved(1, vp=3, sint=6) == [ChannelOnly(1)]
    assert (connected.answers[-1].vp, connected.answers[-1].sint) == (3, 6)
    assert not endpoint.is_open
    assert connected.bus.channels[0].state is ChannelState.RELEASED
    assert connected.bus.gpadl_assembler.quota.gpadls == 0


@pytest.mark.conformance(38)
def test_close_response_of_a_reserved_channel_comes_after_unload(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    connected.open_reserved(1, connected.share(1))
    assert connected.close_reserved(1) == []
    assert connected.unload() == [HeaderOnly()]
    connected.bus.channels[0].finish_close()
    assert messages(connected) == [ChannelOnly(1)]
    assert [offer.relid for offer in connected.connect()] == [1]


def test_answers_of_a_reserved_channel_cannot_flood_all_sints(connected: ScriptedGuest) -> None:
    ring = connected.share(1)
    results = [
        connected.post(payload)
        for vp in range(connected.synic.vp_count)
        for sint in range(16)
        for _ in range(4)
        for payload in (
            OPEN_RESERVED_CHANNEL.build(OpenReservedChannel(1, vp, sint, ring, 2)),
            CLOSE_RESERVED_CHANNEL.build(CloseReservedChannel(1, vp, sint)),
        )
    ]
    assert results[MAX_UNDELIVERED - 1 : MAX_UNDELIVERED + 1] == [PostResult.OK, PostResult.RETRY]
    assert len(connected.synic.messages) == MAX_UNDELIVERED


@pytest.mark.conformance(38)
def test_undelivered_answer_of_a_reserved_channel_is_not_dropped_by_unload(connected: ScriptedGuest) -> None:
    connected.open_reserved(1, connected.share(1))
    connected.post(bytes.fromhex("1300000000000000010000000200000005000000"))
    connected.ask(bytes.fromhex("1000000000000000"))
    assert [answer.number for answer in connected.answers[-2:]] == [
        MessageType.CLOSE_RESERVED_RESPONSE,
        MessageType.UNLOAD_RESPONSE,
    ]


def test_reserved_channel_is_offered_again_and_stays_open(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    connected.open_reserved(1, connected.share(1))
    connected.bus.offer(an_offer("second"), RecordingEndpoint())
    assert sorted(offer.relid for offer in connected.connect()) == [1, 2]
    assert connected.open(1, 1) == []
    assert connected.close_reserved(1) == [ChannelOnly(1)]
    assert connected.bus.channels[0].state is ChannelState.CLOSED
    connected.open_channel(1)


def test_reserved_channel_of_a_removed_device_goes_without_a_word_while_disconnected(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    connected.open_reserved(1, connected.share(1))
    connected.unload()
    connected.bus.revoke(connected.bus.channels[0])
    assert connected.take() == []
    assert not endpoint.is_open
    assert connected.bus.channels == ()
    assert connected.close_reserved(1) == []


def test_reserved_messages_for_places_that_do_not_exist_are_ignored(connected: ScriptedGuest) -> None:
    ring = connected.share(1)
    assert connected.open_reserved(1, ring, vp=4) == connected.open_reserved(1, ring, sint=16) == []
    connected.open_reserved(1, ring)
    assert connected.close_reserved(1, sint=99) == connected.close_reserved(2) == []
    connected.connect(Version.WIN8_1)
    assert connected.open_reserved(1, ring) == [], "not before 4.0"


def test_machine_reset_closes_reserved_channels_too(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    connected.open_reserved(1, connected.share(1))
    connected.bus.reset()
    assert not endpoint.is_open
    assert connected.take() == []
    assert connected.bus.gpadl_assembler.quota.gpadls == 0


@pytest.mark.conformance(39)
def test_paused_bus_repeats_nothing_and_loses_nothing(connected: ScriptedGuest) -> None:
    parts = split_gpadl(1, 5, [GpaRange(60 * PAGE_SIZE, 0, list(range(100, 160)))])
    opening = OPENCHANNEL.build(OpenChannel(1, 1, 5, 0, 4, bytes(120)))
    connected.post(parts[0])
    connected.bus.pause()
    connected.bus.pause()
    for payload in (*parts[1:], opening):
        assert connected.post(payload) is PostResult.OK
    connected.bus.offer(an_offer("hot added"), RecordingEndpoint())
    assert connected.take() == []
    connected.bus.resume()
    connected.bus.resume()
    assert [answer.number for answer in connected.take()] == [
        MessageType.OFFERCHANNEL,
        MessageType.GPADL_CREATED,
        MessageType.OPENCHANNEL_RESULT,
    ]
    connected.bus.pause()
    connected.bus.resume()
    assert connected.take() == []


def test_paused_bus_tells_a_guest_to_retry_when_it_holds_enough(connected: ScriptedGuest) -> None:
    connected.bus.pause()
    close = CLOSECHANNEL.build(ChannelOnly(1))
    results = [connected.post(close) for _ in range(MAX_INBOX + 3)]
    assert results == [PostResult.OK] * MAX_INBOX + [PostResult.RETRY] * 3
    connected.bus.resume()
    assert connected.bus.channels[0].refusals.counts == {"close-state": MAX_INBOX}


def test_acknowledged_messages_are_handled_even_when_the_guest_takes_none(connected: ScriptedGuest) -> None:
    header = split_gpadl(9, 5, [GpaRange(PAGE_SIZE, 0, [1])])[0]
    while connected.post(header) is PostResult.OK:
        pass
    assert len(connected.synic.messages) == MAX_UNDELIVERED
    connected.bus.pause()
    assert connected.post(header) is PostResult.OK
    connected.bus.resume()
    assert len(connected.synic.messages) == MAX_UNDELIVERED + 1


def test_flooding_guest_is_told_to_retry_until_it_takes_its_messages(connected: ScriptedGuest) -> None:
    header = split_gpadl(9, 5, [GpaRange(PAGE_SIZE, 0, [1])])[0]
    results = [connected.post(header) for _ in range(MAX_UNDELIVERED + 5)]
    assert results == [PostResult.OK] * MAX_UNDELIVERED + [PostResult.RETRY] * 5
    connected.take()
    assert connected.post(header) is PostResult.OK
    connected.post(header)
    assert connected.unload() == [HeaderOnly()], "UNLOAD is never put off"


def test_guest_that_paused_the_host_gets_nothing_until_it_resumes(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer("first"), RecordingEndpoint())
    guest.connect(Version.COPPER, features=Feature.PAUSE_RESUME)
    assert guest.ask(RESUME.build(HeaderOnly())) == []
    assert guest.ask(PAUSE.build(HeaderOnly())) == [HeaderOnly()]
    assert guest.answers[-1].number is MessageType.PAUSE_RESPONSE
    guest.bus.offer(an_offer("second"), RecordingEndpoint())
    assert guest.take() == []
    assert guest.post_ranges(1, [GpaRange(PAGE_SIZE, 0, [50])], 5) == []
    assert guest.ask(PAUSE.build(HeaderOnly())) == []
    assert guest.bus.refusals.counts == {"resume-not-paused": 1, "message-paused": 2}
    (offer,) = guest.ask(RESUME.build(HeaderOnly()))
    assert offer.relid == 2
    guest.ask(PAUSE.build(HeaderOnly()))
    assert guest.unload() == [HeaderOnly()]
    guest.connect(Version.COPPER, features=Feature.PAUSE_RESUME)
    guest.ask(PAUSE.build(HeaderOnly()))
    assert len(guest.connect()) == 2


def test_pause_needs_its_feature(guest: ScriptedGuest) -> None:
    guest.contact(Version.COPPER)
    assert guest.ask(PAUSE.build(HeaderOnly())) == []


def test_guest_is_signalled_once_a_while_after_an_open(connected: ScriptedGuest) -> None:
    ring = connected.open_channel(1, vp=2)
    connected.timers.advance(RESIGNAL_DELAY / 2)
    assert connected.synic.events == []
    connected.timers.advance(RESIGNAL_DELAY)
    connected.timers.advance(10)
    assert connected.synic.events == [(2, 2, 1)]
    connected.close(1)
    connected.open(1, ring)
    connected.close(1)
    connected.timers.advance(10)
    assert connected.synic.events == [(2, 2, 1)]


def test_signals_without_an_open_channel_go_nowhere(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    channel = connected.bus.channels[0]
    connected.synic.ports[0x2001]()
    channel.signal_guest()
    assert endpoint.calls == []
    assert connected.synic.events == []
    connected.release(1)
    assert 0x2001 not in connected.synic.ports
    with pytest.raises(ProtocolError):
        channel.ring_pages()


def test_endpoint_that_raises_everywhere_harms_no_other_channel(connected: ScriptedGuest) -> None:
    broken, sound = RecordingEndpoint(), RecordingEndpoint()
    connected.bus.offer(an_offer("broken"), broken)
    connected.bus.offer(an_offer("sound"), sound)
    connected.take()
    connected.open_channel(2)
    for error in (ZeroDivisionError("bug"), DeviceError("contract"), GuestError("guest")):
        broken.fail_everywhere = error
        connected.synic.ports[0x2002]()
        connected.modify(2, 1)
        connected.close(2)
        assert connected.open(2, connected.share_raw(2))[0].status == STATUS_UNSUCCESSFUL
        broken.fail_everywhere = None
        connected.open_channel(2)
    broken.fail_everywhere = RuntimeError("bug")
    connected.open_channel(3)
    assert sound.is_open
    assert connected.unload() == [HeaderOnly()]
    assert not sound.is_open


def test_deferring_outside_its_call_is_the_devices_fault(connected: ScriptedGuest) -> None:
    connected.open_channel(1)
    channel = connected.bus.channels[0]
    for call in (channel.defer_open, channel.defer_close, channel.finish_close, channel.finish_open):
        with pytest.raises(DeviceError):
            call()


def test_deferring_and_finishing_inside_the_call_is_no_deferral(connected: ScriptedGuest) -> None:
    class Hasty(RecordingEndpoint):
        def opened(self, channel):  # type: ignore[no-untyped-def]
            channel.defer_open()
            channel.finish_open()

        def closed(self, channel):  # type: ignore[no-untyped-def]
            channel.defer_close()
            channel.finish_close()

        def gpadl_torn_down(self, channel, gpadl):  # type: ignore[no-untyped-def]
            channel.defer_teardown(gpadl)
            channel.finish_teardown(gpadl)

    connected.bus.offer(an_offer("hasty"), Hasty())
    connected.take()
    ring = connected.open_channel(2)
    connected.close(2)
    assert connected.teardown(2, ring) == [GpadlTorndown(ring)]


def test_device_may_revoke_itself_from_any_call(guest: ScriptedGuest) -> None:
    class Suicidal(RecordingEndpoint):
        when = ""

        def _note(self, call: str) -> None:
            super()._note(call)
            if call.startswith(self.when):
                guest.bus.revoke(guest.bus.channels[0])

    for when in ("opened", "closed", "signalled", "gpadl_created", "gpadl_torn_down", "retargeted"):
        endpoint = Suicidal()
        endpoint.when = when
        guest.bus.offer(an_offer(), endpoint)
        guest.connect()
        ring = guest.new_gpadl_id()
        guest.post_ranges(1, [GpaRange(8 * PAGE_SIZE, 0, guest.pages(8))], ring)
        guest.open(1, ring)
        guest.synic.ports[0x2001]()
        guest.modify(1, 1)
        guest.close(1)
        guest.teardown(1, ring)
        guest.take()
        assert guest.bus.channels[0].state is ChannelState.REVOKED, when
        assert endpoint.calls.count("opened") == endpoint.calls.count("closed")
        guest.release(1)
        assert guest.bus.channels == ()


def test_status_is_plain_data(connected: ScriptedGuest) -> None:
    import json

    connected.open_channel(1, vp=3)
    status = json.loads(json.dumps(connected.bus.status()))
    assert (status["state"], status["version"]) == ("connected", "5.3")
    (channel,) = status["channels"]
    assert (channel["relid"], channel["state"], channel["target_vp"]) == (1, "open", 3)
    assert (channel["gpadls"], channel["gpadl_pages"], channel["opens"]) == (1, 8, 1)
