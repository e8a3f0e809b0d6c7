"""GPADLs: assembly, checks, limits, teardown (docs/protocol/messages.md#gpadl)."""

from __future__ import annotations

import pytest
from vmbus.bus.channel import gpadl as gpadl_module
from vmbus.bus.channel.state import ChannelState
from vmbus.errors import DeviceError, MalformedError, ProtocolError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import (
    GPADL_BODY,
    GPADL_HEADER,
    GpadlBody,
    GpadlCreated,
    GpadlHeader,
    GpadlTorndown,
    GpaRange,
    build_ranges,
    parse_ranges,
    split_gpadl,
)
from vmbus.wire.header import MAX_MESSAGE, STATUS_SUCCESS, STATUS_UNSUCCESSFUL, MessageType
from vmbus.wire.messages import ChannelOnly

ID = 0xE1E10


@pytest.fixture
def endpoint() -> RecordingEndpoint:
    return RecordingEndpoint()


@pytest.fixture
def connected(guest: ScriptedGuest, endpoint: RecordingEndpoint) -> ScriptedGuest:
    """One channel is offered, its id is 1."""
    guest.bus.offer(an_offer(), endpoint)
    guest.connect()
    return guest


def whole(count: int, first: int = 100) -> list[GpaRange]:
    return [GpaRange(count * PAGE_SIZE, 0, list(range(first, first + count)))]


def ok(relid: int = 1, gpadl_id: int = ID) -> list[GpadlCreated]:
    return [GpadlCreated(relid, gpadl_id, STATUS_SUCCESS)]


def failed(relid: int = 1, gpadl_id: int = ID) -> list[GpadlCreated]:
    return [GpadlCreated(relid, gpadl_id, STATUS_UNSUCCESSFUL)]


@pytest.mark.parametrize(
    ("pages", "messages"), [(8, 1), (26, 1), (27, 2), (54, 2), (55, 3), (514, 19), (1026, 37)]
)
def test_split_as_linux_splits(connected: ScriptedGuest, pages: int, messages: int) -> None:
    parts = split_gpadl(1, ID, whole(pages))
    assert len(parts) == messages
    for part in parts[:-1]:
        assert connected.ask(part) == []
    assert connected.ask(parts[-1]) == ok()
    (gpadl,) = connected.bus.find(1).gpadls.values()  # type: ignore[union-attr]
    assert list(gpadl.aligned_pfns()) == list(range(100, 100 + pages))


def test_largest_gpadl_of_65528_bytes_is_accepted() -> None:
    guest = ScriptedGuest.on_fakes(memory_size=40 << 20)
    guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    assert guest.post_ranges(1, whole(8190), ID) == ok()
    assert guest.bus.gpadl_assembler.assemblies == {}


@pytest.mark.conformance(24)
def test_gpadl_for_an_unknown_channel_is_unsuccessful(connected: ScriptedGuest) -> None:
    assert connected.post_ranges(2, whole(8), ID) == failed(2)
    connected.release(1)
    assert connected.post_ranges(1, whole(8), ID) == failed()


@pytest.mark.conformance(25)
def test_bad_offset_in_one_message_is_unsuccessful_and_the_id_is_free(connected: ScriptedGuest) -> None:
    assert connected.post_ranges(1, [GpaRange(PAGE_SIZE, 4096, [100, 101])], ID) == failed()
    assert connected.post_ranges(1, whole(8), ID) == ok()


@pytest.mark.conformance(25)
def test_bad_offset_in_many_messages_is_answered_after_the_last_body(connected: ScriptedGuest) -> None:
    parts = split_gpadl(1, ID, [GpaRange(99 * PAGE_SIZE, 5000, list(range(101)))])
    assert len(parts) > 2
    for part in parts[:-1]:
        assert connected.ask(part) == []
    assert connected.ask(parts[-1]) == failed()
    assert connected.post_ranges(1, whole(60), ID) == ok()


@pytest.mark.conformance(26)
@pytest.mark.parametrize("how", ["unload", "contact", "reset"])
def test_disconnection_in_the_middle_forgets_the_half_built(connected: ScriptedGuest, how: str) -> None:
    parts = split_gpadl(1, ID, whole(60))
    connected.ask(parts[0])
    if how == "unload":
        assert len(connected.unload()) == 1
    elif how == "reset":
        connected.bus.reset()
    connected.connect()
    assert connected.bus.gpadl_assembler.assemblies == {}
    assert (connected.bus.gpadl_assembler.quota.pages, connected.bus.gpadl_assembler.quota.gpadls) == (0, 0)
    assert connected.ask(parts[1]) == []
    assert connected.post_ranges(1, whole(60), ID) == ok()


@pytest.mark.conformance(27)
def test_body_after_the_last_is_refused(connected: ScriptedGuest) -> None:
    parts = split_gpadl(1, ID, whole(60))
    for part in parts:
        connected.ask(part)
    assert connected.ask(parts[-1]) == []
    assert connected.bus.refusals.counts == {"gpadl-body-unknown": 1}
    assert connected.teardown(1, ID) == [GpadlTorndown(ID)]


@pytest.mark.conformance(28)
def test_revoked_channel_answers_gpadls_without_its_device(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    channel = connected.bus.find(1)
    assert channel is not None
    parts = split_gpadl(1, ID + 9, whole(60))
    connected.ask(parts[0])
    shared = connected.share(1)
    connected.bus.revoke(channel)
    connected.take()
    device_notified = list(endpoint.calls)
    assert connected.post_ranges(1, whole(8), ID + 5) == ok(gpadl_id=ID + 5)
    assert connected.teardown(1, ID + 5) == [GpadlTorndown(ID + 5)]
    assert connected.teardown(1, shared) == [GpadlTorndown(shared)]
    connected.ask(parts[1])
    assert connected.ask(parts[2]) == ok(gpadl_id=ID + 9)
    assert endpoint.calls == device_notified
    connected.release(1)
    assert connected.bus.gpadl_assembler.quota.gpadls == 0


@pytest.mark.conformance(30)
def test_same_id_on_two_channels_is_two_gpadls(connected: ScriptedGuest) -> None:
    connected.bus.offer(an_offer("second"), RecordingEndpoint())
    connected.take()
    assert connected.post_ranges(1, whole(8), ID) == ok()
    assert connected.post_ranges(2, whole(8), ID) == ok(2)
    assert connected.open_reserved(1, ID)[0].status == STATUS_SUCCESS
    assert connected.open_reserved(2, ID)[0].status == STATUS_SUCCESS
    assert connected.unload() != []
    assert {channel.relid for channel in connected.bus.channels} == {1, 2}


def test_same_id_on_the_same_channel_is_unsuccessful(connected: ScriptedGuest) -> None:
    assert connected.post_ranges(1, whole(8), ID) == ok()
    assert connected.post_ranges(1, whole(8), ID) == failed()
    assert connected.teardown(1, ID) == [GpadlTorndown(ID)]
    assert connected.teardown(1, ID) == []


def test_id_in_progress_is_unique_over_all_channels(connected: ScriptedGuest) -> None:
    connected.bus.offer(an_offer("second"), RecordingEndpoint())
    connected.take()
    parts = split_gpadl(1, ID, whole(60))
    connected.ask(parts[0])
    assert connected.ask(split_gpadl(2, ID, whole(60))[0]) == failed(2)
    connected.ask(parts[1])
    assert connected.ask(parts[2]) == ok()


def test_surplus_of_maximum_size_messages_is_ignored(connected: ScriptedGuest) -> None:
    parts = [part.ljust(MAX_MESSAGE, b"\xff") for part in split_gpadl(1, ID, whole(30))]
    assert connected.ask(parts[0]) == []
    assert connected.ask(parts[1]) == ok()
    (gpadl,) = connected.bus.find(1).gpadls.values()  # type: ignore[union-attr]
    assert list(gpadl.aligned_pfns()) == list(range(100, 130))


def test_message_with_half_a_word_gives_whole_words_only(connected: ScriptedGuest) -> None:
    data = build_ranges(whole(3))
    header = GPADL_HEADER.build(GpadlHeader(1, ID, len(data), 1))
    assert connected.ask(header + data[:20]) == []
    body = GPADL_BODY.build(GpadlBody(0, ID))
    assert connected.ask(body + data[16:24] + b"abc") == []
    assert connected.ask(body + data[24:]) == ok()


def test_odd_length_counts_as_its_whole_words(connected: ScriptedGuest) -> None:
    data = build_ranges(whole(3))
    header = GPADL_HEADER.build(GpadlHeader(1, ID, len(data) + 7, 1))
    assert connected.ask(header + data + b"1234567") == ok()


def test_several_ranges_with_offsets_are_kept(connected: ScriptedGuest) -> None:
    ranges = [GpaRange(5000, 100, [7, 9]), GpaRange(1, 4095, [3])]
    assert connected.post_ranges(1, ranges, ID) == ok()
    gpadl = connected.bus.find(1).gpadls[ID]  # type: ignore[union-attr]
    assert [(each.byte_count, each.byte_offset, list(each.pfns)) for each in gpadl.ranges] == [
        (5000, 100, [7, 9]),
        (1, 4095, [3]),
    ]
    with pytest.raises(ProtocolError):
        gpadl.aligned_pfns()
    assert gpadl.byte_count == 5001


@pytest.mark.parametrize(
    ("data", "count", "reason"),
    [
        (b"", 0, "gpadl-no-range"),
        (b"", 1, "gpadl-short-ranges"),
        (build_ranges([GpaRange(0, 0, [1])]), 1, "gpadl-empty-range"),
        (build_ranges([GpaRange(4096, 4096, [1, 2])]), 1, "gpadl-bad-offset"),
        (build_ranges([GpaRange(4096, 1, [1])]), 1, "gpadl-short-ranges"),
        (build_ranges([GpaRange(0xFFFFFFFF, 4095, [1])]), 1, "gpadl-short-ranges"),
        (build_ranges([GpaRange(4096, 0, [1 << 52])]), 1, "gpadl-bad-pfn"),
        (build_ranges([GpaRange(4096, 0, [1])]), 2, "gpadl-short-ranges"),
    ],
)
def test_malformed_ranges(connected: ScriptedGuest, data: bytes, count: int, reason: str) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_ranges(data, count)
    assert caught.value.reason == reason
    header = GPADL_HEADER.build(GpadlHeader(1, ID, len(data), count))
    assert connected.ask(header + data) == failed()
    assert connected.bus.gpadl_assembler.quota.gpadls == 0


def test_data_after_the_last_range_is_cut_off() -> None:
    data = build_ranges([GpaRange(4096, 0, [1])]) + b"surplus!"
    assert len(parse_ranges(data, 1)) == 1


@pytest.mark.parametrize("pfn", [4096, 1 << 40, (1 << 52) - 1])
def test_page_that_is_not_ram_is_unsuccessful(
    connected: ScriptedGuest, endpoint: RecordingEndpoint, pfn: int
) -> None:
    assert connected.post_ranges(1, [GpaRange(2 * PAGE_SIZE, 0, [100, pfn])], ID) == failed()
    assert endpoint.calls == []
    assert connected.bus.channels[0].refusals.counts == {"not-ram": 1}


def test_device_may_refuse_pages(connected: ScriptedGuest, endpoint: RecordingEndpoint) -> None:
    endpoint.refuse_gpadl = DeviceError("not mine")
    assert connected.post_ranges(1, whole(8), ID) == failed()
    endpoint.refuse_gpadl = RuntimeError("a bug")
    assert connected.post_ranges(1, whole(8), ID) == failed()
    endpoint.refuse_gpadl = None
    assert connected.post_ranges(1, whole(8), ID) == ok()


def test_pages_of_one_channel_are_bounded(connected: ScriptedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpadl_module, "MAX_CHANNEL_PAGES", 200)
    connected.bus.offer(an_offer("second"), RecordingEndpoint())
    connected.take()
    assert connected.post_ranges(1, whole(150), ID) == ok()
    assert connected.post_ranges(1, whole(150), ID + 1) == failed(gpadl_id=ID + 1)
    assert connected.post_ranges(2, whole(150), ID + 1) == ok(2, ID + 1)
    connected.teardown(1, ID)
    assert connected.post_ranges(1, whole(150), ID + 2) == ok(gpadl_id=ID + 2)


@pytest.mark.parametrize(
    ("limit", "value", "accepted"),
    [("MAX_CONNECTION_PAGES", 200, 2), ("MAX_CHANNEL_GPADLS", 3, 3), ("MAX_CONNECTION_GPADLS", 4, 4)],
)
def test_limits_of_a_connection(
    connected: ScriptedGuest, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, accepted: int
) -> None:
    monkeypatch.setattr(gpadl_module, limit, value)
    answers = [connected.post_ranges(1, whole(50), ID + number)[0].status for number in range(6)]
    assert answers == [STATUS_SUCCESS] * accepted + [STATUS_UNSUCCESSFUL] * (6 - accepted)


def test_gpadls_in_progress_are_bounded(connected: ScriptedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpadl_module, "MAX_ASSEMBLIES", 2)
    for number in range(2):
        assert connected.ask(split_gpadl(1, ID + number, whole(60))[0]) == []
    assert connected.ask(split_gpadl(1, ID + 2, whole(60))[0]) == failed(gpadl_id=ID + 2)


def test_buffers_of_a_uio_network_device_fit_the_limits_well(connected: ScriptedGuest) -> None:
    pages = (31 + 16 + 4) * 256 + 4 * gpadl_module.RANGE_WEIGHT
    assert pages * 8 < gpadl_module.MAX_CHANNEL_PAGES
    assert 64 * (4 * 256 + gpadl_module.RANGE_WEIGHT) + pages < gpadl_module.MAX_CONNECTION_PAGES / 8


def test_teardown_waits_for_the_device(connected: ScriptedGuest, endpoint: RecordingEndpoint) -> None:
    endpoint.defer_teardown = True
    shared = connected.share(1)
    channel = connected.bus.channels[0]
    gpadl = channel.gpadls[shared]
    assert connected.teardown(1, shared) == []
    assert connected.teardown(1, shared) == []
    channel.finish_teardown(gpadl)
    assert [answer.message for answer in connected.take()] == [GpadlTorndown(shared)]
    with pytest.raises(DeviceError):
        channel.finish_teardown(gpadl)


def test_teardown_of_an_unknown_id_or_channel_is_ignored(connected: ScriptedGuest) -> None:
    shared = connected.share(1)
    assert connected.teardown(1, shared + 1) == []
    assert connected.teardown(2, shared) == []
    parts = split_gpadl(1, ID + 50, whole(60))
    connected.ask(parts[0])
    assert connected.teardown(1, ID + 50) == [], "not accepted yet"


def test_teardown_of_the_ring_of_an_open_channel_closes_it_first(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    ring = connected.open_channel(1)
    assert connected.teardown(1, ring) == []
    assert endpoint.calls[-1] == "closed"
    connected.bus.channels[0].finish_close()
    assert [answer.message for answer in connected.take()] == [GpadlTorndown(ring)]
    assert endpoint.calls[-2:] == ["closed", f"gpadl_torn_down {ring:#x}"]


def test_torndown_comes_only_after_a_slow_close(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    ring = connected.open_channel(1)
    buffer = connected.share(1)
    connected.close(1)
    assert connected.teardown(1, ring) == []
    assert connected.teardown(1, buffer) == []
    connected.bus.channels[0].finish_close()
    assert [answer.message for answer in connected.take()] == [GpadlTorndown(ring), GpadlTorndown(buffer)]


def test_device_gets_the_pages_of_a_buffer(connected: ScriptedGuest) -> None:
    shared = connected.share(1, 3)
    channel = connected.bus.channels[0]
    pages = channel.gpadl_pages(shared)
    assert pages.size == 3 * PAGE_SIZE
    with pytest.raises(ProtocolError):
        channel.gpadl_pages(shared + 1)


def test_teardowns_that_wait_for_a_close_are_each_answered_once_when_the_channel_leaves(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    channel = connected.bus.channels[0]
    ring, buffer = connected.open_channel(1), connected.share(1)
    connected.bus.revoke(channel)
    late = connected.share(1)
    for gpadl_id in (ring, buffer, late):
        assert connected.teardown(1, gpadl_id) == []
    channel.finish_close()
    assert [answer.message for answer in connected.take()] == [
        GpadlTorndown(ring),
        GpadlTorndown(buffer),
        GpadlTorndown(late),
        ChannelOnly(1),
    ]


def test_teardowns_that_wait_for_a_close_say_nothing_after_a_disconnection(
    connected: ScriptedGuest, endpoint: RecordingEndpoint
) -> None:
    endpoint.defer_close = True
    channel = connected.bus.channels[0]
    ring, buffer = connected.open_channel(1), connected.share(1)
    connected.close(1)
    for gpadl_id in (ring, buffer):
        assert connected.teardown(1, gpadl_id) == []
    assert connected.unload() == []
    channel.finish_close()
    assert [answer.number for answer in connected.take()] == [MessageType.UNLOAD_RESPONSE]
    assert channel.state is ChannelState.RELEASED
    assert [offer.relid for offer in connected.connect()] == [1]
