"""What a guest makes the host hold with the worst packets of each device is bounded, and no packet is lost."""

from __future__ import annotations

import gc
import struct
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vmbus.bus.budget import MemoryBudget
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.io.ring import BULK
from vmbus.bus.io.state import IoState
from vmbus.bus.offers import Offer
from vmbus.testing.fakes import FakeMemory
from vmbus.testing.loopback import LoopbackGuest, gpa_direct_extension, guest_packet
from vmbus.wire.packet import MAX_PFNS, Packet
from vmbus_devices.echo import Echo
from vmbus_devices.heartbeat import Heartbeat
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.controller import MAX_DEPTH
from vmbus_devices.scsi.saved import parse_packet_state
from vmbus_devices.shutdown import Shutdown
from vmbus_devices.timesync import TimeSync

from tests.unit.scsi.scsi_guest import BUFFER_PFN, Answer, ScsiGuest, controller, memory_disk

RING_PAGES = 280
"""1.1 MiB: two of the largest packets."""
PACKETS = 30
LIMIT = 8 << 20
"""Bytes of the budget in these tests."""
SLACK = 6 << 20
"""Bytes beyond the limit: one packet of the channel, what is being parsed, and the ring's private copy."""
LARGEST = 0xFFFF * 8 - 64
"""Bytes of payload of the largest packet."""


class Keeper(Device):
    """Keeps every packet, as a device does whose work takes long."""

    name = "keeper"

    def __init__(self) -> None:
        self.kept: list[Packet] = []

    def offer(self) -> Offer:
        return Echo().offer()

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        self.kept.append(packet)


def write(guest: LoopbackGuest, packet: bytes) -> bool:
    """Write a packet like ``RingWriter.write``, page by page instead of word by word: these packets are large."""
    writer = guest.writer
    total = len(packet) + 8
    if writer.raw_free() <= total:
        return False
    at = writer.pages.load_u32(0)
    data = packet + struct.pack("<Q", at << 32)
    tail = writer.length - at
    writer.pages.write(4096 + at, data[:tail])
    writer.pages.write(4096, data[tail:])
    writer.pages.store_u32(0, (at + total) % writer.length)
    guest.doorbell()
    return True


@contextmanager
def growth() -> Iterator[Callable[[], int]]:
    """Return a function for the most bytes that were allocated at a time since."""
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def flood(guest: LoopbackGuest, packet: Callable[[int], bytes], count: int = PACKETS) -> int:
    """Send up to ``count`` packets until the ring stays full; return how many."""
    for sent in range(count):
        if not write(guest, packet(sent)):
            return sent
    return count


def payload_and_pages(payload: bytes, pages: int, length: int, number: int) -> bytes:
    extension = gpa_direct_extension([(length, 0, [BUFFER_PFN + each % 64 for each in range(pages)])])
    return guest_packet(
        payload, kind=9, extension=extension, transaction_id=number, completion_requested=True
    )


def largest(number: int, payload: bytes = b"") -> bytes:
    """The largest packet: as many pages as possible, and as many bytes as fit behind them."""
    room = LARGEST - 8 * MAX_PFNS
    return payload_and_pages(payload.ljust(room, b"\xee"), MAX_PFNS, MAX_PFNS * 4096, number)


def started(device: Device, budget: MemoryBudget) -> LoopbackGuest:
    guest = LoopbackGuest(device, ring_pages=RING_PAGES, memory=FakeMemory(12 << 20), start=False)
    device.start(
        DeviceEnvironment(guest.memory, guest.timers, guest.timers.now, workers=guest.workers, budget=budget)
    )
    guest.open()
    return guest


@pytest.mark.parametrize("make", [Echo, Heartbeat, Shutdown, TimeSync, Keeper, controller])
def test_the_largest_packets_of_a_guest_occupy_no_more_than_its_budget(make: Callable[[], Device]) -> None:
    budget = MemoryBudget(LIMIT)
    guest = started(make(), budget)
    filled = largest(0)
    with growth() as most:
        flood(guest, lambda number: filled)
        assert most() < LIMIT + SLACK
    guest.close()
    assert budget.held == 0


def test_packets_beyond_the_budget_stay_in_the_ring_and_come_in_order() -> None:
    budget = MemoryBudget(1 << 20)
    keeper = Keeper()
    guest = started(keeper, budget)
    sent = flood(
        guest,
        lambda number: guest_packet(bytes(60_000), transaction_id=number, completion_requested=True),
        count=100,
    )
    assert 16 < sent < 100, "the ring is full"
    assert len(keeper.kept) <= 18
    done = 0
    while done < len(keeper.kept):
        guest.io.complete(keeper.kept[done].transaction_id)
        done += 1
        guest.run()
        guest.receive()
    assert [each.transaction_id for each in keeper.kept] == list(range(sent))
    assert budget.held == 0


def test_a_channel_that_holds_nothing_takes_a_packet_whatever_others_hold() -> None:
    budget = MemoryBudget(1000)
    first, second = Keeper(), Keeper()
    one, other = started(first, budget), started(second, budget)
    for number in range(3):
        for guest in (one, other):
            write(guest, guest_packet(bytes(800), transaction_id=number, completion_requested=True))
    assert (len(first.kept), len(second.kept)) == (1, 1)
    one.io.complete(0)
    one.run()
    assert (len(first.kept), len(second.kept)) == (2, 1)


def test_room_that_one_channel_gives_back_wakes_the_others() -> None:
    budget = MemoryBudget(3000)
    first, second = Keeper(), Keeper()
    one, other = started(first, budget), started(second, budget)
    for guest in (one, other, other):
        write(guest, guest_packet(bytes(1500), transaction_id=len(second.kept), completion_requested=True))
    assert (len(first.kept), len(second.kept)) == (1, 1)
    one.close()
    other.run()
    assert len(second.kept) == 2


def test_the_copy_of_a_long_packet_is_not_kept() -> None:
    keeper = Keeper()
    keeper.needed = lambda packet: packet._replace(payload=b"", ranges=())  # type: ignore[method-assign]
    type(keeper).max_owed = 1
    try:
        guest = started(keeper, MemoryBudget())
        for number in range(2):
            assert write(guest, largest(number))
        assert len(keeper.kept) == 1
        incoming = guest.io._turns.incoming
        assert incoming is not None
        assert len(incoming._buffer) <= BULK
    finally:
        del type(keeper).max_owed


# --- storage ---


def storage(budget: MemoryBudget, **disk: Any) -> ScsiGuest:
    unit = memory_disk(4096, max_transfer=1 << 20, **disk)
    unit.backend.immediate = False
    device: Scsi = controller(unit, transfer=1024)
    guest = ScsiGuest(device, memory=FakeMemory(12 << 20), ring_pages=RING_PAGES, budget=budget)
    guest.open()
    guest.negotiate()
    guest.workers.paused = True
    return guest


def finish(guest: ScsiGuest) -> list[Answer]:
    """Do all work, and return all answers."""
    answers: list[Answer] = []
    guest.workers.paused = False
    while guest.workers.waiting:
        guest.workers.release()
        guest.run()
        answers += guest.answers()
    return answers


def read_10(
    guest: ScsiGuest, *, size: int = 64, opcode: int = 0x28, blocks: int = 8, flags: int = 0
) -> bytes:
    direction = 0 if flags else 1
    cdb = struct.pack(">BBIBHB", opcode, flags, 0, 0, blocks, 0)
    return guest.srb(cdb, length=blocks * 512, direction=direction).ljust(size, b"\xee")


def test_of_a_storage_request_only_what_it_needs_is_kept() -> None:
    budget = MemoryBudget(64 << 20)
    guest = storage(budget)
    payload = read_10(guest)
    packets = [largest(number, payload) for number in range(PACKETS)]
    with growth() as most:
        assert flood(guest, packets.__getitem__) == PACKETS
        assert most() < 8 << 20, "30 packets with half a megabyte and 8192 pages each"
    packet = parse_packet_state("scsi", guest.device.save_packets(guest.io)[0].state)
    assert len(packet.payload) == 64
    assert sum(len(each.pfns) for each in packet.ranges) == 512
    answers = finish(guest)
    assert len(answers) == PACKETS, "none is lost"
    assert all(each.good and each.transferred == 4096 for each in answers)
    assert budget.held == 0


def test_a_channel_has_hundreds_of_commands_under_way_and_the_others_stay_in_its_ring() -> None:
    guest = storage(MemoryBudget())
    payload = read_10(guest)
    count = MAX_DEPTH + 100
    assert flood(guest, lambda number: payload_and_pages(payload, 1, 4096, number), count) == count
    assert len(guest.device.save_packets(guest.io)) == MAX_DEPTH
    assert len(finish(guest)) == count


@pytest.mark.parametrize("flags", [2, 6])
def test_buffers_of_verify_count_against_the_budget(flags: int) -> None:
    budget = MemoryBudget(LIMIT)
    guest = storage(budget)
    payload = read_10(guest, opcode=0x2F, blocks=2048, flags=flags)
    with growth() as most:
        flood(guest, lambda number: payload_and_pages(payload, 256, 1 << 20, number))
        assert most() < LIMIT + SLACK
    assert len(guest.workers.waiting) <= LIMIT // (2 << 20) + 1
    guest.close()
    guest.workers.release()
    guest.run()
    assert budget.held == 0


@pytest.mark.parametrize("opcode", [0x28, 0x2A])
def test_buffers_for_direct_io_count_against_the_budget(opcode: int) -> None:
    budget = MemoryBudget(LIMIT)
    guest = storage(budget)
    [unit] = guest.device.units.values()
    unit._mask = 4095  # type: ignore[attr-defined]
    payload = guest.srb(
        struct.pack(">BBIBHB", opcode, 0, 0, 0, 1024, 0),
        length=512 << 10,
        direction=1 if opcode == 0x28 else 0,
    )
    extension = gpa_direct_extension([(512 << 10, 8, [BUFFER_PFN + each for each in range(129)])])
    packet = guest_packet(payload, kind=9, extension=extension, transaction_id=1, completion_requested=True)
    flood(guest, lambda number: packet, 100)
    assert 1 < len(guest.workers.waiting) <= LIMIT // (512 << 10) + 1
    assert budget.held < LIMIT + (1 << 20)


def test_requests_of_a_closed_channel_still_count_while_they_are_under_way() -> None:
    budget = MemoryBudget(64 << 20)
    guest = storage(budget)
    payload = read_10(guest)
    flood(guest, lambda number: payload_and_pages(payload, 1, 4096, number), 50)
    held = budget.held
    assert held > 50 * 512
    guest.close()
    assert budget.held >= held - (1 << 10)
    guest.workers.release()
    guest.run()
    assert budget.held == 0


def test_restored_commands_wait_for_the_budget_and_all_are_executed() -> None:
    source = storage(MemoryBudget())
    payload = read_10(source, opcode=0x2F, blocks=2048, flags=2)
    flood(source, lambda number: payload_and_pages(payload, 256, 1 << 20, number), 12)
    source.io.pause()
    device_state, io_state = source.device.save(), source.io.save()
    packets = source.device.save_packets(source.io)
    budget = MemoryBudget(LIMIT)
    target = storage(budget)
    target.io.closed(target.channel)
    target.io.restore(io_state)
    target.device.restore(device_state)
    for packet in packets:
        target.device.restore_packet(target.io, packet)
    target.io.restored(target.channel)
    target.run()
    assert len(target.device.save_packets(target.io)) == 12
    assert len(target.workers.waiting) <= LIMIT // (2 << 20) + 1
    while target.workers.waiting:
        assert budget.held < LIMIT + (4 << 20)
        target.workers.release(1)
        target.run()
    assert sorted(each.transaction_id for each in target.answers()) == list(range(12))
    assert (target.io.state, budget.held) == (IoState.RUNNING, 0)


def test_a_request_with_many_bytes_behind_it_can_be_saved_and_restored() -> None:
    """The controller keeps 64 bytes; a guest that sends more must not be able to stop its migration by that."""
    source = storage(MemoryBudget())
    write(source, payload_and_pages(read_10(source, size=1000), 1, 4096, 7))
    source.io.pause()
    device_state = source.device.save()
    target = controller(memory_disk(4096, max_transfer=1 << 20), transfer=1024)
    target.restore(device_state)
    [packet] = source.device.save_packets(source.io)
    target.restore_packet(source.io, packet)
    assert target.save_packets(source.io) == [packet]


def test_the_budget_keeps_no_channel_that_was_closed_while_it_waited() -> None:
    """Each opening of a primary channel offers new sub-channels: those of before must not stay behind."""
    budget = MemoryBudget(1000)
    hog = started(Keeper(), budget)
    assert write(hog, largest(0))
    closed = []
    for _ in range(3):
        guest = started(Keeper(), budget)
        for number in range(2):
            assert write(guest, largest(number))
        closed.append(weakref.ref(guest.io))
        guest.close()
        assert guest.io.state is IoState.CLOSED
    del guest
    gc.collect()
    assert budget.full
    assert [each() for each in closed] == [None] * 3
