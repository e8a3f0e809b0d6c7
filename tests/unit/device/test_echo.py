"""The echo device against a scripted guest (emulator/vmbus/wire/echo.py)."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.bus.budget import SAVED_PACKET_BYTES, MemoryBudget
from vmbus.bus.channel.gpadl import Gpadl, GpadlState
from vmbus.bus.io.device import DeviceEnvironment
from vmbus.errors import DeviceError
from vmbus.testing.loopback import TRANSFER_PAGES, GuestPacket, LoopbackGuest, guest_packet
from vmbus.wire.echo import EchoOperation, EchoStatus
from vmbus.wire.gpadl import GpaRange as GpadlRange
from vmbus_devices.echo import Echo

PAGE = 4096
Ranges = Sequence[tuple[int, int, Sequence[int]]]


@pytest.fixture
def guest() -> LoopbackGuest:
    guest = LoopbackGuest(Echo(), ring_pages=16)
    guest.open()
    return guest


def device(guest: LoopbackGuest) -> Echo:
    assert isinstance(guest.device, Echo)
    return guest.device


def request(operation: int, data: bytes = b"", sequence: int = 1, *, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(data) if checksum is None else checksum
    return struct.pack("<HHIQII", operation, 0, len(data), sequence, crc, 0) + data


def take_apart(packet: GuestPacket) -> tuple[int, int, int, bytes]:
    """Operation, status, sequence, data."""
    operation, status, length, sequence, checksum, _ = struct.unpack_from("<HHIQII", packet.payload)
    data = packet.payload[24 : 24 + length]
    assert len(data) == length
    assert zlib.crc32(data) == checksum
    return operation, status, sequence, data


def ask(guest: LoopbackGuest, operation: int, data: bytes = b"", ranges: Ranges = ()) -> tuple[int, bytes]:
    """Status and data of the answer."""
    assert guest.send(
        request(operation, data, 77), transaction_id=0xABC, completion_requested=True, ranges=ranges
    )
    [packet] = guest.receive()
    assert (packet.kind, packet.transaction_id) == (11, 0xABC)
    answered, status, sequence, found = take_apart(packet)
    assert (answered, sequence) == (operation, 77)
    return status, found


def range_list(*ranges: tuple[int, int, int]) -> bytes:
    return struct.pack("<II", len(ranges), 0) + b"".join(struct.pack("<QII", *each) for each in ranges)


def test_offer() -> None:
    offer = Echo().offer()
    assert str(offer.interface_id) == "1db72679-86d6-4f61-b61a-d7c1e85d20ff"
    assert str(offer.instance_id) == "361fb128-28d1-4c0f-baf6-f5d6f82b002b"
    other = uuid.uuid4()
    assert Echo(instance=other).offer().instance_id == other


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4000, 20000])
def test_data_comes_back_by_completion_and_in_band(guest: LoopbackGuest, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    data = data[:size]
    guest.send(request(EchoOperation.ECHO, data, 5), transaction_id=1 << 63, completion_requested=True)
    guest.send(request(EchoOperation.ECHO, data, 6), transaction_id=9)
    first, second = guest.receive()
    assert (first.kind, first.transaction_id, second.kind, second.transaction_id) == (11, 1 << 63, 6, 9)
    assert take_apart(first) == (EchoOperation.ECHO, 0, 5, data)
    assert take_apart(second) == (EchoOperation.ECHO, 0, 6, data)


def test_fill_writes_the_ranges_of_a_gpa_direct_packet(guest: LoopbackGuest) -> None:
    ranges = [(6, PAGE - 2, [300, 200]), (5, 0, [250])]
    assert ask(guest, EchoOperation.FILL, b"abcdefghijk", ranges) == (0, b"")
    memory = guest.memory
    assert memory.read(300 * PAGE + PAGE - 3, 3) == b"\0ab"
    assert memory.read(200 * PAGE, 5) == b"cdef\0"
    assert memory.read(250 * PAGE, 6) == b"ghijk\0"


def test_fill_repeats_what_is_too_short(guest: LoopbackGuest) -> None:
    assert ask(guest, EchoOperation.FILL, b"xyz", [(2 * PAGE + 1, 0, [300, 301, 302])])[0] == 0
    assert guest.memory.read(300 * PAGE, 2 * PAGE + 2) == (b"xyz" * PAGE)[: 2 * PAGE + 1] + b"\0"


def test_fill_takes_ranges_by_address_and_by_gpadl(guest: LoopbackGuest) -> None:
    pfns = (400, 410, 405)
    guest.channel.gpadls[9] = Gpadl(9, (GpadlRange(3 * PAGE, 0, pfns),))
    ranges = range_list((300 * PAGE + 5, 3, 0), (PAGE - 1, 4, 9))
    assert ask(guest, EchoOperation.FILL, ranges + b"1234567") == (0, b"")
    assert guest.memory.read(300 * PAGE + 4, 5) == b"\x00123\x00"
    assert guest.memory.read(400 * PAGE + PAGE - 2, 2) == b"\x004"
    assert guest.memory.read(410 * PAGE, 4) == b"567\0"


def test_checksum_reads_what_fill_wrote(guest: LoopbackGuest) -> None:
    data = bytes(range(256)) * 20
    ask(guest, EchoOperation.FILL, data, [(len(data), 100, [300, 301])])
    status, found = ask(guest, EchoOperation.CHECKSUM, b"", [(len(data), 100, [300, 301])])
    assert (status, found) == (0, struct.pack("<II", zlib.crc32(data), len(data)))
    status, found = ask(guest, EchoOperation.CHECKSUM, range_list((300 * PAGE + 100, 10, 0)))
    assert (status, found) == (0, struct.pack("<II", zlib.crc32(data[:10]), 10))


@pytest.mark.parametrize(
    ("operation", "data", "ranges", "status"),
    [
        (99, b"", (), EchoStatus.UNKNOWN_OPERATION),
        (EchoOperation.GENERATED, b"", (), EchoStatus.UNKNOWN_OPERATION),
        (EchoOperation.FILL, b"x", [(8, 0, [1 << 40])], EchoStatus.NOT_RAM),
        (EchoOperation.FILL, b"x", [(8, 0, [300]), (8, 4090, [301, 1 << 50])], EchoStatus.NOT_RAM),
        (EchoOperation.FILL, b"x", [(2 << 20, 0, range(512))], EchoStatus.TOO_LARGE),
        (EchoOperation.FILL, b"x", [(0, 0, [300])], EchoStatus.MALFORMED),
        (EchoOperation.FILL, b"x", [(8, 4096, [300])], EchoStatus.MALFORMED),
        (EchoOperation.FILL, b"", [(8, 0, [300])], EchoStatus.MALFORMED),
        (EchoOperation.FILL, b"", (), EchoStatus.MALFORMED),
        (EchoOperation.FILL, range_list(), (), EchoStatus.TOO_LARGE),
        (EchoOperation.FILL, range_list(*[(0, 1, 0)] * 65), (), EchoStatus.TOO_LARGE),
        (EchoOperation.FILL, struct.pack("<IIQ", 2, 0, 0), (), EchoStatus.MALFORMED),
        (EchoOperation.FILL, range_list((300 * PAGE, 0, 0)) + b"x", (), EchoStatus.TOO_LARGE),
        (EchoOperation.FILL, range_list((300 * PAGE, 1 << 31, 0)) + b"x", (), EchoStatus.TOO_LARGE),
        (EchoOperation.FILL, range_list((0, 1 << 20, 0), (0, 1, 0)) + b"x", (), EchoStatus.TOO_LARGE),
        (EchoOperation.FILL, range_list(((1 << 64) - 1, 8, 0)) + b"x", (), EchoStatus.NOT_RAM),
        (EchoOperation.FILL, range_list((0, 8, 8)) + b"x", (), EchoStatus.MALFORMED),
        (EchoOperation.FILL, range_list((PAGE - 4, 8, 9)) + b"x", (), EchoStatus.MALFORMED),
        (EchoOperation.FILL, range_list(((1 << 64) - 1, 8, 9)) + b"x", (), EchoStatus.MALFORMED),
        (EchoOperation.FILL, range_list((0, 8, 10)) + b"x", (), EchoStatus.MALFORMED),
        (EchoOperation.CHECKSUM, b"", [(8, 0, [1 << 52])], EchoStatus.NOT_RAM),
        (EchoOperation.GENERATE, b"1234", (), EchoStatus.MALFORMED),
        (EchoOperation.GENERATE, struct.pack("<IIII", 1, 16385, 0, 0), (), EchoStatus.TOO_LARGE),
        (EchoOperation.GENERATE, struct.pack("<IIII", (1 << 24) + 1, 1, 0, 0), (), EchoStatus.TOO_LARGE),
    ],
)
def test_wrong_request_is_answered_with_its_status(
    guest: LoopbackGuest, operation: int, data: bytes, ranges: Ranges, status: EchoStatus
) -> None:
    guest.channel.gpadls[9] = Gpadl(9, (GpadlRange(PAGE, 0, (400,)),))
    guest.channel.gpadls[10] = Gpadl(10, (GpadlRange(PAGE, 0, (400,)),), GpadlState.TEARING_DOWN)
    before = bytes(guest.memory.ram[200 * PAGE :])
    assert ask(guest, operation, data, ranges) == (status, b"")
    assert guest.io.refusals.total == 1
    assert bytes(guest.memory.ram[200 * PAGE :]) == before, "a refused request writes nothing"
    assert ask(guest, EchoOperation.ECHO, b"still there") == (0, b"still there")


@pytest.mark.parametrize("completion_requested", [True, False])
@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (b"", EchoStatus.MALFORMED),
        (bytes(16), EchoStatus.MALFORMED),
        (struct.pack("<HHIQII", 1, 0, 9, 1, 0, 0) + bytes(8), EchoStatus.MALFORMED),
        (request(EchoOperation.ECHO, b"abc", checksum=1), EchoStatus.BAD_CHECKSUM),
    ],
)
def test_damaged_packet_is_answered(
    guest: LoopbackGuest, payload: bytes, status: EchoStatus, completion_requested: bool
) -> None:
    guest.send(payload, transaction_id=4, completion_requested=completion_requested)
    [packet] = guest.receive()
    assert (packet.kind, packet.transaction_id) == (11 if completion_requested else 6, 4)
    assert take_apart(packet)[1] == status


def test_transfer_page_packet_is_refused(guest: LoopbackGuest) -> None:
    extension = struct.pack("<HHIII", 1, 0, 1, 8, 0)
    guest.put(guest_packet(request(EchoOperation.ECHO), kind=TRANSFER_PAGES, extension=extension))
    assert take_apart(guest.receive()[0])[1] == EchoStatus.MALFORMED


def generated(guest: LoopbackGuest, count: int, size: int, burst: int = 0) -> None:
    assert guest.send(
        request(EchoOperation.GENERATE, struct.pack("<IIII", count, size, burst, 0)),
        transaction_id=3,
        completion_requested=True,
    )


def check_generated(packet: GuestPacket, number: int, size: int) -> None:
    assert (packet.kind, packet.transaction_id) == (6, 0)
    expected = bytes((167 * (number % 251 + at) + 13) % 256 for at in range(size))
    assert take_apart(packet) == (EchoOperation.GENERATED, 0, number, expected)


@pytest.mark.parametrize("burst", [0, 1, 7, 1000])
def test_generate_fills_the_ring_and_goes_on_as_room_comes(guest: LoopbackGuest, burst: int) -> None:
    count, size = 300, 1000
    generated(guest, count, size, burst)
    guest.advance(1)
    [answer] = guest.receive(1)
    assert take_apart(answer)[:2] == (EchoOperation.GENERATE, 0)
    number = 0
    while number < count:
        packets = guest.receive(5)
        assert packets, f"stuck after {number}"
        for packet in packets:
            check_generated(packet, number, size)
            number += 1
        guest.advance(0.001)
    assert guest.receive() == []
    assert device(guest).status()["generated"] == count
    assert guest.io.status()["ring_full"] > 0
    assert ask(guest, EchoOperation.ECHO) == (0, b"")


def test_generate_waits_while_other_channels_use_up_what_a_saved_state_has_room_for() -> None:
    budget = MemoryBudget()
    echo = Echo()
    guest = LoopbackGuest(echo, ring_pages=16, start=False)
    echo.start(DeviceEnvironment(guest.memory, guest.timers, guest.timers.now, budget=budget))
    guest.open()
    budget.count_saved_packets(SAVED_PACKET_BYTES + 1)
    count, size = 300, 1000
    generated(guest, count, size)
    received = guest.receive()
    for _ in range(count):
        guest.advance(0.001)
        received += guest.receive()
    assert guest.io.status().get("failure") is None
    assert len(received) == 1 + count


def test_burst_of_one_costs_an_interrupt_each(guest: LoopbackGuest) -> None:
    generated(guest, 3, 8, burst=1)
    interrupts = guest.interrupts
    received = []
    for _ in range(20):
        received += guest.receive()
        guest.advance(0.0001)
    assert len(received) >= 3
    assert guest.interrupts >= interrupts


def test_one_generation_at_a_time(guest: LoopbackGuest) -> None:
    generated(guest, 1000, 4000)
    guest.run()
    guest.receive(1)
    generated(guest, 1, 1)
    for _ in range(2000):
        for packet in guest.receive(1):
            if packet.kind == 11:
                assert take_apart(packet)[1] == EchoStatus.BUSY
                return
        guest.advance(0.001)
    pytest.fail("the second request was never answered")


def test_close_ends_a_generation(guest: LoopbackGuest) -> None:
    generated(guest, 1000, 4000)
    guest.run()
    guest.close()
    sent = device(guest).status()["generated"]
    guest.open()
    guest.advance(1)
    assert guest.receive() == []
    assert device(guest).status()["generated"] == sent
    assert ask(guest, EchoOperation.ECHO) == (0, b"")


def test_statistics_count_everything(guest: LoopbackGuest) -> None:
    ask(guest, EchoOperation.ECHO, b"12345")
    ask(guest, EchoOperation.FILL, b"x", [(100, 0, [300])])
    ask(guest, EchoOperation.CHECKSUM, b"", [(50, 0, [300])])
    ask(guest, 99)
    status, data = ask(guest, EchoOperation.STATISTICS)
    assert status == 0
    assert struct.unpack("<6Q", data) == (5, 1, 5, 100, 50, 0)
    assert list(device(guest).status().values()) == [5, 1, 5, 100, 50, 0]


def test_counters_and_a_generation_survive_a_restore(guest: LoopbackGuest) -> None:
    generated(guest, 200, 1000)
    guest.run()
    guest.io.pause()
    guest.advance(1)
    later = Echo()
    later.restore(device(guest).save())
    other = LoopbackGuest(later, ring_pages=16, memory=guest.memory, timers=guest.timers)
    other.io.restore(guest.io.save())
    other.io.restored(other.channel)
    other.run()
    [answer] = other.receive(1)
    assert answer.kind == 11
    number = 0
    while number < 200:
        packets = other.receive(3)
        assert packets, f"stuck after {number}"
        for packet in packets:
            check_generated(packet, number, 1000)
            number += 1
        other.advance(0.001)
    assert later.status()["generated"] == 200


def test_damaged_state_is_refused(guest: LoopbackGuest) -> None:
    state = device(guest).save()
    for damaged in (b"", state[:-1], state + b"\0", b"\x09\0" + state[2:]):
        with pytest.raises(DeviceError):
            Echo().restore(damaged)


@settings(deadline=None, max_examples=150)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 8),
            st.binary(max_size=80),
            st.booleans(),
            st.lists(
                st.tuples(
                    st.integers(0, 9000),
                    st.integers(0, 5000),
                    st.lists(st.integers(0, 1100), min_size=1, max_size=4),
                ),
                max_size=3,
            ),
        ),
        max_size=10,
    )
)
def test_every_request_is_answered_once_whatever_it_is(
    requests: list[tuple[int, bytes, bool, Ranges]],
) -> None:
    guest = LoopbackGuest(Echo(), ring_pages=16)
    guest.open()
    for number, (operation, data, completion_requested, ranges) in enumerate(requests, 1):
        sent = guest.send(
            request(operation, data),
            transaction_id=number,
            completion_requested=completion_requested,
            ranges=ranges,
        )
        assert sent
        if any(pfn < 60 for each in ranges for pfn in each[2]):
            return  # the guest lets its own rings be overwritten: anything may follow, but no exception
        answers = [packet for packet in guest.receive() if packet.transaction_id]
        assert [packet.transaction_id for packet in answers] == [number]
        assert guest.io.status()["state"] == "running"
