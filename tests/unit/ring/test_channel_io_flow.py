"""The host's end of a channel: fairness, back pressure, races with a guest that runs, polling."""

from __future__ import annotations

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.turns import BATCH_PACKETS, TURN_PACKETS
from vmbus.testing.fakes import FakeTimers
from vmbus.testing.loopback import (
    LoopbackGuest,
    RacingPages,
)
from vmbus.wire.packet import Packet

from tests.unit.ring.recorder import Recorder, ids, ignore, numbered

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
    guest.io._turns.run()
    assert guest.channel.incoming.load_u32(8) == 1
    assert guest.writer.write(*numbered(1, 101)) is False
    guest.io._turns.run()
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
