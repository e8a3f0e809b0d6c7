"""The most that a guest can bring about in its saved state fits into what QEMU carries: no guest can stay by that."""

from __future__ import annotations

import struct
import uuid
import zlib

import pytest
from vmbus.api import Channel, Packet
from vmbus.bus.budget import (
    SAVED_FIRST_BYTES,
    SAVED_GPADL_BYTES,
    SAVED_LIMIT_BYTES,
    SAVED_PACKET_BYTES,
    MemoryBudget,
)
from vmbus.bus.channel.gpadl import MAX_CHANNEL_GPADLS, Gpadl, GpadlAssembler
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import Connection
from vmbus.bus.io.held import READ_TIMEOUT
from vmbus.bus.io.state import IoState
from vmbus.bus.saved_state.layout import SAVED_BUS
from vmbus.bus.saved_state.values import (
    BusState,
    ChannelRecord,
    capture_assembly,
    capture_connection,
    capture_gpadl,
)
from vmbus.errors import ProtocolError
from vmbus.saving import ChannelSaver, save_machine
from vmbus.saving.device_channel import DeviceChannel
from vmbus.saving.stream import STREAM_LIMIT
from vmbus.testing.fakes import FakeMemory
from vmbus.testing.loopback import LoopbackGuest, gpa_direct_extension, guest_packet
from vmbus.wire.echo import EchoOperation, build_header
from vmbus.wire.gpadl import GpadlHeader
from vmbus.wire.saved import SAVED_GPADL
from vmbus_devices.echo import Echo

from tests.unit.device.test_memory_growth import payload_and_pages, read_10, started, storage, write
from tests.unit.saving.test_device_channel import RestorableChannel
from tests.unit.scsi.scsi_guest import BUFFER_PFN

RELID = 7
PAGES_OF_A_LIST = 8190
FIXED = 1024
"""Bytes of a channel with its device."""


def test_the_parts_leave_room_for_what_is_not_the_guests() -> None:
    assert SAVED_PACKET_BYTES + SAVED_FIRST_BYTES < SAVED_LIMIT_BYTES
    assert STREAM_LIMIT - SAVED_GPADL_BYTES - SAVED_LIMIT_BYTES >= 112 << 10


class AllRam(FakeMemory):
    """A guest whose RAM is larger than any: only its page lists are looked at."""

    def __init__(self) -> None:
        super().__init__(4096)

    def is_ram(self, gpa: int, length: int) -> bool:
        return True


def scattered(assembler: GpadlAssembler, number: int, count: int, top: int) -> Gpadl:
    """A list of ``count`` pages up to ``top``, of which no two are neighbours."""
    pfns = [top - 2 * page for page in range(count)]
    data = struct.pack("<II", count * 4096, 0) + struct.pack(f"<{count}Q", *pfns)
    return assembler.finish(assembler.begin(GpadlHeader(RELID, number, len(data), 1), data))


@pytest.mark.parametrize("top", [1 << 18, (1 << 28) - 1, (1 << 52) - 1])
def test_page_lists_that_do_not_fit_are_refused(top: int) -> None:
    budget = MemoryBudget()
    assembler = GpadlAssembler(AllRam(), budget)
    gpadls: list[Gpadl] = []
    with pytest.raises(ProtocolError, match="gpadl-too-scattered"):
        for number in range(MAX_CHANNEL_GPADLS):
            gpadls.append(scattered(assembler, number, PAGES_OF_A_LIST, top))
    with pytest.raises(ProtocolError, match="gpadl-too-scattered"):
        for number in range(1000, 1256):  # lists in progress take what is left
            assembler.begin(GpadlHeader(RELID, number, 1024, 1), bytes(1000))
    record = ChannelRecord(
        uuid.UUID(int=1), uuid.UUID(int=2), 0, ChannelState.CLOSED, gpadls=tuple(map(capture_gpadl, gpadls))
    )
    assemblies = tuple(map(capture_assembly, assembler.assemblies.values()))
    built = SAVED_BUS.build(BusState(capture_connection(Connection()), (record,), assemblies))
    size = len(built) + len(gpadls) * SAVED_GPADL.size
    assert (
        budget.saved_gpadls - (100 << 10) < size <= budget.saved_gpadls + FIXED <= SAVED_GPADL_BYTES + FIXED
    )
    for each in list(assembler.assemblies.values()):
        assembler.abandon(each)
    for gpadl in gpadls:
        assembler.quota.refund(RELID, gpadl.weight, gpadl.saved_bytes)
    assert (budget.saved_gpadls, budget.held) == (0, 0)


def test_the_largest_user_of_page_lists_fits_in_the_worst_case() -> None:
    """A network device for a program in user space: no two of its pages are neighbours, in a guest of 1 TiB."""
    assembler = GpadlAssembler(AllRam(), MemoryBudget())
    for number, pages in enumerate([7936, 4096, 1024, *[1024] * 64]):
        scattered(assembler, number, pages, (1 << 28) - 1)


def one_range_a_page(payload: bytes, pages: int, number: int) -> bytes:
    ranges = [(4096, 0, [BUFFER_PFN + each % 64]) for each in range(pages)]
    return guest_packet(
        payload,
        kind=9,
        extension=gpa_direct_extension(ranges),
        transaction_id=number,
        completion_requested=True,
    )


def saved_size(guest: LoopbackGuest) -> int:
    """Bytes of the state of a guest with one channel, which is paused for it."""
    guest.io.pause()
    channel = RestorableChannel(guest.device.offer(), guest.channel)
    channel.gpadls[0xE1E10] = Gpadl(0xE1E10, ())
    saver = ChannelSaver()
    return len(save_machine(saver, [DeviceChannel(saver, channel, guest.io)], limit=64 << 20).data)


@pytest.mark.parametrize("shape", ["no pages", "one page", "256 pages", "256 ranges"])
def test_requests_that_do_not_fit_stay_in_the_rings(shape: str) -> None:
    """Of several channels of one guest, whose disks have not answered yet."""
    budget = MemoryBudget()
    guests = [storage(budget) for _ in range(4)]
    payload = read_10(guests[0], opcode=0x2F, blocks=2048, flags=2)
    pages = 256 if "256" in shape else 1 if "one" in shape else 0
    for guest in guests:
        for number in range(600):
            if shape == "256 ranges":
                packet = one_range_a_page(payload, pages, number)
            elif pages:
                packet = payload_and_pages(payload, pages, pages * 4096, number)
            else:
                packet = guest_packet(payload, transaction_id=number, completion_requested=True)
            while not write(guest, packet):
                taken = guest.io.counters.packets_in
                guest.run()
                if guest.io.counters.packets_in == taken:
                    break
        guest.run()
    counted, saved = budget.saved_packets, sum(map(saved_size, guests))
    assert saved <= counted + len(guests) * FIXED
    assert counted < SAVED_PACKET_BYTES + SAVED_FIRST_BYTES
    for guest in guests:
        guest.close()
        guest.workers.release()
        guest.run()
    assert (budget.saved_packets, budget.held) == (0, 0)


def test_a_guest_that_does_not_read_large_answers_loses_the_channel_and_not_its_migration() -> None:
    budget = MemoryBudget()
    guests = [started(Echo(), budget) for _ in range(6)]
    data = bytes(300 << 10)
    for guest in guests:
        for number in range(40):
            header = build_header(EchoOperation.ECHO, 0, len(data), number, zlib.crc32(data))
            packet = guest_packet(header + data, transaction_id=number)
            if not write(guest, packet):
                guest.run()
        guest.run()
    assert budget.saved_packets > SAVED_LIMIT_BYTES
    assert all(guest.io.state is not IoState.FAILED for guest in guests), "they had no time to read"
    for guest in guests:
        guest.advance(READ_TIMEOUT)
    assert budget.saved_packets <= SAVED_LIMIT_BYTES
    assert sum(map(saved_size, guests)) <= SAVED_LIMIT_BYTES + len(guests) * FIXED
    states = [guest.io.state for guest in guests]
    assert states[-1] is not IoState.FAILED, "the others have made room"
    assert IoState.FAILED in states


class Late(Echo):
    """Keeps requests, and answers all of them at once."""

    def packet(self, io: Channel, packet: Packet) -> None:
        self.kept.append(packet)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Packet] = []


@pytest.mark.parametrize("reads", [True, False])
def test_answers_of_a_device_that_was_late_are_read_in_time_or_cost_the_channel(reads: bool) -> None:
    device = Late()
    guest = started(device, MemoryBudget())
    for number in range(20):
        assert write(guest, guest_packet(b"?", transaction_id=number, completion_requested=True))
    guest.run()
    for packet in device.kept:
        guest.io.complete(packet.transaction_id, bytes(100 << 10))
    guest.run()
    assert guest.io.budget.saved_packets > SAVED_LIMIT_BYTES
    guest.advance(READ_TIMEOUT - 1)
    guest.io.pause()
    guest.advance(2)
    guest.io.resume()  # the time in which it stood still does not count
    guest.advance(READ_TIMEOUT - 1)
    assert guest.io.state is IoState.RUNNING
    answers = 0
    while reads and (received := guest.receive()):
        answers += len(received)
        guest.run()
    guest.advance(2)
    assert (guest.io.state, answers) == ((IoState.RUNNING, 20) if reads else (IoState.FAILED, 0))
    assert guest.io.failure == ("" if reads else "answers-not-read")
