"""The host's end of a channel: batches, fairness, back pressure, pauses, and devices that break."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vmbus.bus.io import channel_io
from vmbus.bus.io.channel_io import BATCH_PACKETS, TURN_PACKETS, ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.io.state import ChannelIoState, IoState
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError, GuestError, InternalError, MalformedError, ProtocolError, RingError
from vmbus.testing.fakes import FakeTimers
from vmbus.testing.loopback import (
    COMPLETION,
    IN_BAND,
    FakeChannel,
    LoopbackGuest,
    RacingPages,
    gpa_direct_extension,
    guest_packet,
)
from vmbus.wire.packet import Packet, PacketType, TransferRange

INTERFACE = uuid.UUID("7ad3ffb0-3b2c-4d8e-a8e6-0d4cbf0e8a11")
INSTANCE = uuid.UUID("0b1a4c4e-97aa-4f87-8bd1-2a9f5a1e0c22")


class Recorder(Device):
    """A device that records its calls; ``react`` handles a packet."""

    name = "recorder"

    def __init__(self, react: Callable[[ChannelIo, Packet], None] | None = None) -> None:
        self.react = react or (lambda io, packet: io.answer(packet, packet.payload))
        self.calls: list[str] = []
        self.packets: list[Packet] = []
        self.completions: list[Packet] = []
        self.refusals: list[str] = []
        self.on_open: Callable[[ChannelIo], None] = lambda io: None
        self.on_writable: Callable[[ChannelIo], None] = lambda io: None

    def offer(self) -> Offer:
        return Offer(INTERFACE, INSTANCE, name=self.name)

    def opened(self, io: ChannelIo) -> None:
        self.calls.append("opened")
        self.on_open(io)

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        self.packets.append(packet)
        self.react(io, packet)

    def completed(self, io: ChannelIo, packet: Packet) -> None:
        self.completions.append(packet)

    def refused(self, io: ChannelIo, packet: Packet, error: GuestError) -> None:
        self.refusals.append(error.reason)
        super().refused(io, packet, error)

    def writable(self, io: ChannelIo) -> None:
        self.calls.append("writable")
        self.on_writable(io)

    def closed(self, io: ChannelIo) -> None:
        self.calls.append("closed")

    def restored(self, io: ChannelIo) -> None:
        self.calls.append("restored")


def ignore(io: ChannelIo, packet: Packet) -> None:
    """A device that takes packets and answers none."""


def numbered(count: int, first: int = 0, *, completion_requested: bool = True, size: int = 8) -> list[bytes]:
    return [
        guest_packet(bytes(size), transaction_id=first + n, completion_requested=completion_requested)
        for n in range(count)
    ]


def ids(packets: list[Any]) -> list[int]:
    return [packet.transaction_id for packet in packets]


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def guest(device: Recorder) -> Iterator[LoopbackGuest]:
    with LoopbackGuest(device) as guest:
        yield guest


# --- one packet, many packets ---


def test_a_request_is_answered_by_a_completion_with_its_id(guest: LoopbackGuest) -> None:
    guest.send(b"payload!", transaction_id=0xFFFF_FFFF_FFFF_FFFF, completion_requested=True)
    [answer] = guest.receive()
    assert (answer.kind, answer.flags, answer.payload) == (COMPLETION, 0, b"payload!")
    assert answer.transaction_id == 0xFFFF_FFFF_FFFF_FFFF


def test_a_request_that_wants_no_completion_is_answered_in_band(guest: LoopbackGuest) -> None:
    guest.send(b"payload!", transaction_id=5)
    [answer] = guest.receive()
    assert (answer.kind, answer.transaction_id, answer.payload) == (IN_BAND, 5, b"payload!")


def test_a_batch_is_answered_with_one_interrupt(guest: LoopbackGuest) -> None:
    assert guest.put(*numbered(30))
    assert (guest.doorbells, guest.interrupts) == (1, 1)
    assert ids(guest.receive()) == list(range(30))
    assert guest.io.counters.turns == 2  # the one at the open, and this one


def test_a_masked_guest_is_not_interrupted(guest: LoopbackGuest) -> None:
    guest.reader.mask(True)
    guest.put(*numbered(3))
    assert guest.interrupts == 0
    assert len(guest.receive()) == 3


def test_packets_of_all_kinds_arrive_with_what_they_carry(guest: LoopbackGuest, device: Recorder) -> None:
    guest.send(b"read it", ranges=[(5000, 100, [7, 8])], completion_requested=True, transaction_id=1)
    guest.send(b"in band")
    [direct, in_band] = device.packets
    assert (direct.kind, direct.ranges[0].pfns) == (PacketType.GPA_DIRECT, (7, 8))
    assert (in_band.kind, in_band.ranges) == (PacketType.IN_BAND, ())


def test_nothing_is_sent_for_a_packet_that_a_device_keeps(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(2))
        assert guest.receive() == []
        assert guest.io.owes(0)
        guest.io.complete(1, b"second")
        guest.io.complete(0)
        guest.run()
        assert [(p.transaction_id, p.payload) for p in guest.receive()] == [(1, b"second\0\0"), (0, b"")]
        assert guest.interrupts == 1
        assert not guest.io.owes(0)


def test_flush_sends_at_once_and_signals_once(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(5))
        for n in range(5):
            guest.io.complete(n)
        guest.io.flush()
        assert guest.interrupts == 1
        assert len(guest.receive()) == 5
        guest.io.flush()
        assert guest.interrupts == 1


def test_a_device_may_speak_first(device: Recorder) -> None:
    device.on_open = lambda io: io.send(b"welcome!", transaction_id=3)
    with LoopbackGuest(device) as guest:
        [hello] = guest.receive()
        assert (hello.kind, hello.payload, hello.transaction_id) == (IN_BAND, b"welcome!", 3)


def test_transfer_page_packets_are_sent(guest: LoopbackGuest) -> None:
    guest.io.send(
        b"x", transfer_set=0xCAFE, transfer_ranges=[TransferRange(60, 0)], completion_requested=True
    )
    guest.run()
    [packet] = guest.receive()
    assert (packet.kind, packet.flags, len(packet.extension)) == (7, 1, 16)


def test_packets_that_lie_in_the_ring_at_the_open_are_taken(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    for pages in (guest.channel.incoming, guest.channel.outgoing):
        pages.store_u32(64, 1)
    guest.writer.write(*numbered(2))
    guest.io.opened(guest.channel)
    guest.run()
    assert ids(device.packets) == [0, 1]


# --- completions the other way ---


def test_the_guest_completes_what_the_host_asked_for(guest: LoopbackGuest, device: Recorder) -> None:
    guest.io.send(b"question", transaction_id=9, completion_requested=True)
    guest.run()
    [question] = guest.receive()
    assert (question.flags, question.transaction_id) == (1, 9)
    guest.send(b"answered", kind=COMPLETION, transaction_id=9)
    [answer] = device.completions
    assert (answer.transaction_id, answer.payload) == (9, b"answered")
    assert device.packets == []


def test_completions_that_were_not_requested_are_refused(guest: LoopbackGuest, device: Recorder) -> None:
    guest.send(kind=COMPLETION, transaction_id=9)
    guest.io.send(b"", transaction_id=9, completion_requested=True)
    guest.run()
    for _ in range(3):
        guest.send(kind=COMPLETION, transaction_id=9)
    assert len(device.completions) == 1
    assert guest.io.refusals.counts == {"unexpected-completion": 3}
    assert guest.io.state is IoState.RUNNING


# --- what a device does wrong ---


def test_a_second_completion_is_the_devices_error(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1))
        guest.io.complete(0)
        with pytest.raises(DeviceError, match="no completion is owed"):
            guest.io.complete(0)
        with pytest.raises(DeviceError):
            guest.io.complete(1)


def test_packets_without_the_flag_are_owed_nothing(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1, 77, completion_requested=False))
        with pytest.raises(DeviceError):
            guest.io.complete(77)


def test_an_id_used_twice_is_completed_twice(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1, 5), *numbered(1, 5))
        guest.io.complete(5)
        guest.io.complete(5)
        with pytest.raises(DeviceError):
            guest.io.complete(5)


def test_longer_packets_than_the_driver_takes_are_the_devices_error(guest: LoopbackGuest) -> None:
    guest.io.send(bytes(4096 - 16))
    with pytest.raises(DeviceError, match="at most 4096"):
        guest.io.send(bytes(4096 - 16 + 1))


@pytest.mark.parametrize("error", [ValueError("oops"), DeviceError("gives up"), KeyError(3)])
def test_a_device_that_raises_costs_its_channel_only(
    error: Exception, device: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet)
        if packet.transaction_id == 2:
            raise error

    device.react = react
    with caplog.at_level(logging.ERROR), LoopbackGuest(device) as guest:
        guest.put(*numbered(5))
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "device-error")
        assert ids(device.packets) == [0, 1, 2]
        guest.put(*numbered(5))
        guest.doorbell()
        assert len(device.packets) == 3
        assert guest.io.refusals.counts == {"device-error": 1}
    assert device.calls == ["opened", "closed"]
    assert any(record.exc_info for record in caplog.records)


def test_a_failed_channel_works_again_when_it_is_opened_anew(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(guest_packet(kind=0))
    failed = guest.io.state
    guest.close()
    assert (failed, guest.io.state) == (IoState.FAILED, IoState.CLOSED)
    guest.open()
    guest.put(*numbered(2))
    assert (guest.io.failure, ids(guest.receive())) == ("", [0, 1])


def test_an_open_that_the_device_refuses_leaves_nothing_behind(device: Recorder) -> None:
    def refuse(io: ChannelIo) -> None:
        io.send(b"never")
        raise ProtocolError("too-early")

    device.on_open = refuse
    guest = LoopbackGuest(device)
    with pytest.raises(ProtocolError):
        guest.open()
    guest.run()
    assert (guest.io.state, guest.receive(), guest.interrupts) == (IoState.CLOSED, [], 0)


def test_an_unexpected_error_in_an_open_is_a_device_error(device: Recorder) -> None:
    def fail(io: ChannelIo) -> None:
        raise ZeroDivisionError

    device.on_open = fail
    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        LoopbackGuest(device).open()


def test_a_device_that_was_not_started_says_so(device: Recorder) -> None:
    guest = LoopbackGuest(device, start=False)
    with pytest.raises(DeviceError, match="not started"):
        guest.open()


def test_a_device_that_raises_when_it_closes_is_contained(device: Recorder) -> None:
    class Bad(Recorder):
        def closed(self, io: ChannelIo) -> None:
            raise ValueError("no")

    guest = LoopbackGuest(Bad())
    guest.open()
    guest.close()
    assert guest.io.state is IoState.CLOSED


def test_a_device_that_floods_is_stopped(guest: LoopbackGuest) -> None:
    with pytest.raises(DeviceError, match="faster than the guest reads"):
        for _ in range(100_000):
            guest.io.send(bytes(64))
    assert guest.io.backlog <= channel_io.OUTPUT_BYTES
    guest.run()
    assert guest.io.state is IoState.RUNNING


def test_a_device_cannot_wait_for_any_number_of_completions(
    guest: LoopbackGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_io, "AWAITED_LIMIT", 3)
    for _ in range(3):
        guest.io.send(b"", completion_requested=True)
    with pytest.raises(DeviceError, match="waits for"):
        guest.io.send(b"", completion_requested=True)


def test_what_is_sent_on_a_closed_channel_is_dropped(device: Recorder) -> None:
    device.react = ignore
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(*numbered(1))
    guest.close()
    guest.io.send(b"late")
    guest.io.complete(0)
    guest.run()
    assert guest.io.counters.dropped == 2
    assert guest.receive() == []


def test_a_channel_that_the_device_closes_from_inside_is_not_touched_any_more(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    device.react = lambda io, packet: io.closed(guest.channel)
    guest.open()
    guest.put(*numbered(3))
    assert ids(device.packets) == [0]
    assert guest.channel.incoming.load_u32(4) == 0
    assert guest.io.state is IoState.CLOSED


# --- what a guest does wrong ---


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (guest_packet(kind=0), "invalid-descriptor-type"),
        (guest_packet(flags=4), "invalid-descriptor-flags"),
        (guest_packet(kind=9, extension=bytes(8)), "invalid-gpa-direct-range-count"),
        (guest_packet(kind=9), "invalid-descriptor-lengths"),
    ],
)
@pytest.mark.conformance(58)
def test_a_corrupt_ring_stops_the_channel_after_what_came_before(
    bad: bytes, reason: str, guest: LoopbackGuest, device: Recorder
) -> None:
    guest.put(*numbered(2), bad, *numbered(2))
    assert ids(device.packets) == [0, 1]
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, reason)
    assert guest.io.refusals.counts == {reason: 1}
    guest.doorbell()
    assert guest.io.refusals.counts == {reason: 1}


@pytest.mark.parametrize("index", [4, 0x10000, 0xFFFFFFFF])
def test_bad_indices_stop_the_channel(index: int, guest: LoopbackGuest) -> None:
    guest.channel.incoming.store_u32(0, index)
    guest.doorbell()
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-ring-pointer")


def test_a_bad_read_index_stops_the_channel(device: Recorder, guest: LoopbackGuest) -> None:
    guest.channel.outgoing.store_u32(4, 12)
    guest.put(*numbered(1))
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-ring-pointer")


def test_rings_that_are_none_are_refused_at_the_open(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    guest.channel.incoming = guest.memory.pages([3])
    with pytest.raises(RingError):
        guest.open()
    assert (guest.io.state, device.calls) == (IoState.CLOSED, [])


def test_a_packet_that_fits_the_driver_but_not_the_guests_ring_stops_the_channel(device: Recorder) -> None:
    with LoopbackGuest(device, ring_pages=1) as guest:
        guest.io.send(bytes(4096 - 16))
        guest.run()
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-message-length")


@pytest.mark.conformance(59)
def test_an_empty_range_is_an_error_on_that_packet_only(guest: LoopbackGuest, device: Recorder) -> None:
    empty = guest_packet(
        b"request",
        kind=9,
        extension=gpa_direct_extension([(0, 0, [])]),
        transaction_id=1,
        completion_requested=True,
    )
    guest.put(*numbered(1), empty, *numbered(1, 2))
    assert ids(device.packets) == [0, 2]
    assert device.refusals == ["gpa-range-empty"]
    assert [(p.kind, p.transaction_id, len(p.payload)) for p in guest.receive()] == [
        (COMPLETION, 0, 8),
        (COMPLETION, 1, 0),
        (COMPLETION, 2, 8),
    ]
    assert guest.io.refusals.counts == {"gpa-range-empty": 1}
    assert guest.io.state is IoState.RUNNING


def test_an_empty_range_in_a_packet_that_wants_no_completion_is_only_counted(guest: LoopbackGuest) -> None:
    guest.put(guest_packet(kind=9, extension=gpa_direct_extension([(0, 0, [])])))
    assert guest.receive() == []
    assert guest.io.refusals.counts == {"gpa-range-empty": 1}


def test_a_request_that_the_device_finds_malformed_costs_that_packet_only(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        if packet.transaction_id == 1:
            raise MalformedError("bad-cdb")
        io.answer(packet, b"fine....")

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        assert [(p.transaction_id, p.payload) for p in guest.receive()] == [
            (0, b"fine...."),
            (1, b""),
            (2, b"fine...."),
        ]
        assert device.refusals == ["bad-cdb"]


def test_a_device_that_answers_and_then_raises_is_not_answered_for_again(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet, b"answered")
        raise MalformedError("bad-tail")

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1))
        assert [p.payload for p in guest.receive()] == [b"answered"]
        assert guest.io.state is IoState.RUNNING


def test_a_protocol_error_stops_the_channel(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        raise ProtocolError("unknown-operation")

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "unknown-operation")
        assert len(device.packets) == 1


def test_a_guest_that_never_reads_its_completions_is_not_served_without_end(device: Recorder) -> None:
    device.react = lambda io, packet: io.answer(packet, bytes(1000))
    with LoopbackGuest(device) as guest:
        sent = 0
        while sent < 10_000 and guest.put(*numbered(8, sent)):
            sent += 8
        assert sent < 1000
        assert guest.io.backlog < TURN_PACKETS * 1100
        got = []
        while packets := guest.receive():
            got += ids(packets)
        assert got == list(range(sent))
        assert guest.io.backlog == 0


def test_no_more_is_owed_than_the_limit(device: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(device), "max_owed", 40)
    monkeypatch.setattr(channel_io, "BATCH_PACKETS", 10)
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(100))
        assert len(device.packets) == 40
        guest.io.complete(0)
        guest.run()
        assert 40 < len(device.packets) <= 51
        for n in range(1, 100):
            guest.io.complete(n)
            guest.run()
        assert ids(device.packets) == list(range(100))


# --- fairness ---


def test_one_channel_does_not_starve_the_others() -> None:
    timers = FakeTimers()
    order: list[str] = []

    def named(name: str) -> LoopbackGuest:
        device = Recorder(lambda io, packet: order.append(name))
        device.name = name
        guest = LoopbackGuest(device, ring_pages=8, timers=timers)
        guest.open()
        return guest

    busy, quiet = named("busy"), named("quiet")
    busy.writer.write(*numbered(4 * TURN_PACKETS, completion_requested=False))
    quiet.writer.write(*numbered(1, completion_requested=False))
    busy.io.signalled(busy.channel)
    quiet.io.signalled(quiet.channel)
    timers.advance(0)
    assert order.index("quiet") == TURN_PACKETS
    assert order.count("busy") == 4 * TURN_PACKETS


def test_room_is_given_back_batch_by_batch(device: Recorder) -> None:
    seen: list[int] = []
    with LoopbackGuest(device) as guest:
        device.react = lambda io, packet: seen.append(guest.channel.incoming.load_u32(4))
        guest.put(*numbered(2 * BATCH_PACKETS, completion_requested=False))
    assert seen == [0] * BATCH_PACKETS + [BATCH_PACKETS * 32] * BATCH_PACKETS


# --- blocked and paused input ---


@pytest.mark.conformance(57)
@pytest.mark.conformance(60)
def test_output_that_does_not_fit_goes_out_when_the_guest_makes_room(guest: LoopbackGuest) -> None:
    for n in range(60):
        guest.io.send(bytes(1000), transaction_id=n)
    guest.run()
    assert guest.io.congested
    assert guest.io.counters.ring_full == 1
    got: list[int] = []
    while packets := guest.receive(2):
        got += ids(packets)
    assert got == list(range(60))
    assert not guest.io.congested
    assert guest.channel.outgoing.load_u32(12) == 0


@pytest.mark.conformance(57)
def test_a_guest_that_waits_for_room_is_signalled(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device, ring_pages=1) as guest:
        guest.io.pause_input()
        assert guest.put(*numbered(127, completion_requested=False))
        assert not guest.put(*numbered(1))
        guest.writer.wait_for_room(1000)
        assert guest.interrupts == 0
        guest.io.resume_input()
        guest.run()
        assert guest.interrupts == 1
        guest.writer.wait_for_room(0)
        assert guest.put(*numbered(1))
        assert guest.interrupts == 1


def test_a_device_without_end_sends_as_fast_as_the_guest_reads(device: Recorder) -> None:
    sent = 0

    def pump(io: ChannelIo) -> None:
        nonlocal sent
        while sent < 1000 and not io.congested:
            io.send(bytes(200), transaction_id=sent)
            sent += 1
        if sent < 1000:
            io.notify_room()

    device.on_open = device.on_writable = pump
    with LoopbackGuest(device) as guest:
        got: list[int] = []
        while packets := guest.receive(20):
            got += ids(packets)
        assert got == list(range(1000))


def test_writable_comes_once_for_each_wish(guest: LoopbackGuest, device: Recorder) -> None:
    guest.io.notify_room()
    guest.io.notify_room()
    guest.run()
    guest.doorbell()
    assert device.calls.count("writable") == 1


def test_packets_wait_in_the_ring_while_input_is_paused(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        if packet.transaction_id == 3:
            io.pause_input()

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(10))
        assert ids(device.packets) == [0, 1, 2, 3]
        assert guest.channel.incoming.load_u32(4) == 4 * 32
        guest.io.send(b"still speaking")
        guest.run()
        assert len(guest.receive()) == 1
        guest.doorbell()
        guest.io.resume_input()
        guest.run()
        assert ids(device.packets) == list(range(10))


# --- races with a guest that runs ---


def test_a_packet_that_comes_just_before_the_host_sleeps_is_taken(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    pages = guest.channel.incoming
    late = iter(range(3))

    def act(access: str, offset: int) -> None:
        # The host has loaded the write index, and the guest still sees the mask: it writes without a signal.
        if (access, offset) == ("store", 8) and pages.load_u32(8) == 0:
            pages.store_u32(8, 1)
            for n in late:
                assert guest.writer.write(*numbered(1, n)) is False
                break
            pages.store_u32(8, 0)

    guest.channel.incoming = RacingPages(pages, act)
    guest.open()
    assert ids(device.packets) == [0, 1, 2]
    assert guest.doorbells == 0


def test_room_that_comes_just_when_the_host_begins_to_wait_is_used(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    pages = guest.channel.outgoing
    got: list[int] = []

    def act(access: str, offset: int) -> None:
        # The guest read before it could see that the host waits: it does not signal.
        if (access, offset) == ("store", 12) and pages.load_u32(12):
            got.extend(ids(guest.reader.read()[0]))

    guest.channel.outgoing = RacingPages(pages, act)
    guest.open()
    for n in range(200):
        guest.io.send(bytes(1000), transaction_id=n)
    guest.run()
    assert guest.doorbells == 0
    assert guest.io.backlog == 0
    assert got + ids(guest.receive()) == list(range(200))


# --- paused, saved, restored ---


@pytest.mark.conformance(39)
def test_a_paused_channel_touches_no_ring_and_loses_nothing(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        guest.io.pause()
        before = bytes(guest.memory.ram)
        guest.io.complete(1)
        guest.io.send(b"news", transaction_id=99)
        guest.io.flush()
        guest.doorbell()
        guest.advance(10)
        assert guest.memory.ram == before
        guest.writer.write(*numbered(2, 3))
        guest.io.resume()
        guest.run()
        assert ids(device.packets) == [0, 1, 2, 3, 4]
        assert ids(guest.receive()) == [1, 99]
        guest.io.resume()
        guest.run()
        assert ids(device.packets) == [0, 1, 2, 3, 4]


def test_a_pause_in_the_middle_of_a_batch_leaves_the_rest_in_the_ring(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet)
        if packet.transaction_id == 4:
            io.pause()

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(10))
        assert ids(device.packets) == [0, 1, 2, 3, 4]
        assert guest.channel.incoming.load_u32(4) == 5 * 32
        assert guest.receive() == []
        state = guest.io.save()
        assert (len(state.output), state.owed) == (5, ())
        guest.io.resume()
        guest.run()
        assert ids(guest.receive()) == list(range(10))


def test_a_saved_channel_is_restored_elsewhere(device: Recorder) -> None:
    device.react = ignore
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(*numbered(4))
    for _ in range(14):
        guest.io.send(bytes(1000), completion_requested=True, transaction_id=7)
    guest.run()
    guest.io.complete(2, b"done")
    guest.writer.write(*numbered(2, 4))
    guest.io.pause()
    state = guest.io.save()
    assert dict(state.owed) == {0: 1, 1: 1, 3: 1}
    assert dict(state.awaited) == {7: 14}

    heir = Recorder(ignore)
    heir.start(DeviceEnvironment(guest.memory, guest.timers, guest.timers.now))
    io = ChannelIo(heir, guest.timers, poll_window=0)
    io.restore(state)
    interrupts = guest.interrupts
    io.restored(guest.channel)
    assert guest.interrupts == interrupts + 1
    guest.io = io
    guest.run()
    assert (heir.calls, ids(heir.packets)) == (["restored"], [])  # blocked until the guest reads
    got = []
    while packets := guest.receive():
        got += [(packet.kind, packet.transaction_id) for packet in packets]
    assert got == [(IN_BAND, 7)] * 14 + [(COMPLETION, 2)]
    assert ids(heir.packets) == [4, 5]
    io.complete(0)
    with pytest.raises(DeviceError):
        io.complete(2)


def test_a_failed_channel_is_restored_failed(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(guest_packet(kind=0))
    state = guest.io.save()
    guest.close()
    guest.io.restore(state)
    guest.io.restored(guest.channel)
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-descriptor-type")


def test_only_a_paused_channel_is_saved_and_only_a_closed_one_takes_a_state(guest: LoopbackGuest) -> None:
    with pytest.raises(InternalError):
        guest.io.save()
    with pytest.raises(InternalError):
        guest.io.restore(ChannelIoState())


# --- timers ---


def test_timers_of_a_channel_end_with_it_and_wait_while_it_is_paused(device: Recorder) -> None:
    fired: list[str] = []
    guest = LoopbackGuest(device)
    guest.open()
    guest.io.call_later(1, lambda: fired.append("first"))
    guest.io.call_later(1, lambda: fired.append("never")).cancel()
    guest.advance(1)
    guest.io.pause()
    guest.io.call_later(1, lambda: fired.append("late"))
    cancelled = guest.io.call_later(1, lambda: fired.append("never"))
    guest.advance(5)
    assert fired == ["first"]
    cancelled.cancel()
    guest.io.resume()
    assert fired == ["first", "late"]
    guest.io.call_later(1, lambda: fired.append("never"))
    guest.close()
    guest.open()
    guest.advance(5)
    assert fired == ["first", "late"]


def test_a_timer_that_raises_fails_its_channel_only(guest: LoopbackGuest) -> None:
    def broken() -> None:
        raise ValueError

    guest.io.call_later(1, broken)
    guest.advance(1)
    assert guest.io.failure == "device-error"


# --- polling before sleeping ---


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def looking_guest(device: Recorder) -> tuple[LoopbackGuest, Clock]:
    guest = LoopbackGuest(device)
    clock = Clock()
    guest.io = ChannelIo(device, guest.timers, clock=clock, poll_window=100e-6)
    guest.open()
    return guest, clock


def test_a_quiet_channel_is_never_looked_at_twice(device: Recorder) -> None:
    guest, clock = looking_guest(device)
    for n in range(20):
        clock.now += 1.0
        guest.put(*numbered(1, n))
    assert guest.io.counters.turns == 21
    assert guest.timers._queue == []


def test_a_busy_channel_is_looked_at_for_a_while_and_saves_doorbells(device: Recorder) -> None:
    guest, _ = looking_guest(device)
    for n in range(5):
        guest.put(*numbered(1, n))
    assert guest.io.counters.turns > 20
    guest.timers.advance(0)
    # While it looks, a packet is found without a doorbell.
    guest.writer.write(*numbered(1, 100))
    guest.io.signalled(guest.channel)
    turn = guest.timers._queue[0][2]
    turn.cancel()
    guest.io._turn()
    assert guest.channel.incoming.load_u32(8) == 1
    assert guest.writer.write(*numbered(1, 101)) is False
    guest.io._turn()
    assert ids(device.packets)[-2:] == [100, 101]
    assert guest.io.status()["looks_hit"] == 1
    guest.run()
    assert guest.channel.incoming.load_u32(8) == 0


def test_polling_that_finds_nothing_ends(device: Recorder) -> None:
    guest, clock = looking_guest(device)
    for n in range(5):
        guest.put(*numbered(1, n))
    for n in range(3):
        clock.now += 1.0
        guest.put(*numbered(1, n))
    turns = guest.io.counters.turns
    clock.now += 1.0
    guest.put(*numbered(1))
    assert guest.io.counters.turns == turns + 1


# --- the rest ---


def test_sub_channels_have_an_io_each(device: Recorder) -> None:
    offered: list[tuple[Offer, ChannelIo]] = []
    guest = LoopbackGuest(device)

    class Bus:
        def offer(self, offer: Offer, endpoint: Any) -> Any:
            offered.append((offer, endpoint))
            return FakeChannel(offer, guest.channel.incoming, guest.channel.outgoing)

        def revoke(self, channel: Any) -> None:
            raise AssertionError

    device.start(DeviceEnvironment(guest.memory, guest.timers, guest.timers.now, Bus()))
    guest.open()
    assert guest.io.subchannel_index == 0
    guest.io.offer_subchannels(2)
    assert [(o.subchannel_index, o.key[:2]) for o, _ in offered] == [
        (n, (INTERFACE, INSTANCE)) for n in (1, 2)
    ]
    assert [io.subchannel_index for io in guest.io.subchannels] == [1, 2]
    with pytest.raises(DeviceError):
        guest.io.offer_subchannels(1)
    with pytest.raises(DeviceError):
        guest.io.subchannels[0].offer_subchannels(1)
    guest.close()
    assert guest.io.subchannels == []


def test_sub_channels_need_an_environment_that_can_offer_them(guest: LoopbackGuest) -> None:
    with pytest.raises(DeviceError, match="no offers"):
        guest.io.offer_subchannels(1)
    assert guest.io.subchannels == []


def test_the_status_is_plain_values(guest: LoopbackGuest) -> None:
    guest.put(*numbered(2), guest_packet(kind=0))
    status = guest.io.status()
    assert status["state"] == "failed"
    assert status["failure"] == "invalid-descriptor-type"
    assert status["packets_in"] == 2
    assert status["refusals"] == {"invalid-descriptor-type": 1}


def test_a_channel_that_was_never_opened_is_not_there(device: Recorder) -> None:
    io = ChannelIo(device, FakeTimers())
    with pytest.raises(DeviceError, match="never opened"):
        _ = io.channel


def test_state_given_to_a_device_without_state_is_refused(device: Recorder) -> None:
    device.restore(device.save())
    with pytest.raises(DeviceError, match="has no saved state"):
        device.restore(b"something")
