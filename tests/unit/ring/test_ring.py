"""The rings from the host's side: signals, room, borders, and a guest that breaks every rule."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from vmbus.bus.io import ring as ring_module
from vmbus.bus.io.ring import BULK, IncomingRing, OutgoingRing
from vmbus.errors import InternalError, RingError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeMemory
from vmbus.testing.loopback import RacingPages, RingReader, RingWriter, guest_packet
from vmbus.wire.packet import PacketType, TransferRange, build_packet, build_transfer_pages
from vmbus.wire.ring import (
    FEATURE_BITS,
    INTERRUPT_MASK,
    PENDING_SEND_SIZE,
    READ_INDEX,
    WRITE_INDEX,
    RingControl,
)


def in_band(payload: bytes = b"", **fields: int) -> bytes:
    return build_packet(PacketType.IN_BAND, payload, **fields)  # type: ignore[arg-type]


class Side:
    """One ring with both of its sides."""

    def __init__(self, data_pages: int = 1) -> None:
        self.memory = FakeMemory(1 << 20)
        self.pages = self.memory.pages([3, *range(20 + data_pages, 20, -1)])
        self.pages.store_u32(FEATURE_BITS, 1)
        self.size = self.pages.size - PAGE_SIZE

    def set(self, offset: int, value: int) -> None:
        self.pages.store_u32(offset, value)

    def get(self, offset: int) -> int:
        return self.pages.load_u32(offset)


class Incoming(Side):
    def __init__(self, data_pages: int = 1, start: int = 0) -> None:
        super().__init__(data_pages)
        self.set(WRITE_INDEX, start)
        self.set(READ_INDEX, start)
        self.ring = IncomingRing(self.pages, self.memory)
        self.ring.initialize()
        self.writer = RingWriter(self.pages)

    def drain(self) -> list[bytes]:
        """Payloads of all packets, in batches, all committed."""
        found = []
        while batch := self.ring.read_batch(7):
            found += [packet.payload for packet in batch]
            self.ring.commit()
        return found


class Outgoing(Side):
    def __init__(self, data_pages: int = 1, start: int = 0) -> None:
        super().__init__(data_pages)
        self.set(WRITE_INDEX, start)
        self.set(READ_INDEX, start)
        self.ring = OutgoingRing(self.pages, self.memory)
        self.ring.initialize()
        self.reader = RingReader(self.pages, 1 << 20)


# --- opening ---


def test_opening_masks_signals_and_offers_pending_send_size() -> None:
    incoming, outgoing = Incoming(), Outgoing()
    outgoing.set(PENDING_SEND_SIZE, 77)
    outgoing.set(FEATURE_BITS, 0)
    outgoing.ring.initialize()
    assert incoming.ring.control() == RingControl(0, 0, 1, 0, 1)
    assert outgoing.ring.control() == RingControl(0, 0, 0, 0, 1)
    assert (incoming.ring.size, outgoing.ring.size) == (4096, 4096)


def test_making_a_ring_stores_nothing() -> None:
    side = Side()
    side.set(WRITE_INDEX, 64)
    before = bytes(side.memory.ram)
    IncomingRing(side.pages, side.memory)
    OutgoingRing(side.pages, side.memory)
    assert side.memory.ram == before


def test_reopened_rings_continue_where_their_indices_are() -> None:
    side = Incoming(start=512)
    side.writer.write(guest_packet(b"12345678"))
    again = IncomingRing(side.pages, side.memory)
    [packet] = again.read_batch(9)
    assert packet.payload == b"12345678"


@pytest.mark.parametrize("size", [0, 4096, 4095, 8191, 8200])
def test_memory_that_is_no_ring_is_refused(size: int) -> None:
    class Odd:
        def __init__(self) -> None:
            self.size = size

    for kind in (IncomingRing, OutgoingRing):
        with pytest.raises(RingError) as caught:
            kind(Odd(), FakeMemory(4096))  # type: ignore[arg-type]
        assert caught.value.reason == "invalid-ring-memory"


def test_a_ring_beyond_32_bits_is_refused() -> None:
    class Huge:
        size = (1 << 32) + 2 * PAGE_SIZE

    with pytest.raises(RingError) as caught:
        IncomingRing(Huge(), FakeMemory(4096))  # type: ignore[arg-type]
    assert caught.value.reason == "ring-too-large"


# --- borders ---

ALL_OFFSETS = range(0, 4096, 8)


@pytest.mark.conformance(60)
def test_packets_from_the_guest_wrap_at_every_offset() -> None:
    for start in ALL_OFFSETS:
        side = Incoming(start=start)
        payloads = [bytes([n]) * 8 * n for n in range(1, 9)]
        assert side.writer.write(*[guest_packet(payload) for payload in payloads]) is False
        assert side.drain() == payloads
        assert side.get(READ_INDEX) == side.get(WRITE_INDEX)


@pytest.mark.conformance(60)
def test_packets_to_the_guest_wrap_at_every_offset() -> None:
    for start in ALL_OFFSETS:
        side = Outgoing(start=start)
        payloads = [bytes([n]) * 8 * n for n in range(1, 9)]
        count, signal = side.ring.write([in_band(payload, transaction_id=start) for payload in payloads])
        assert (count, signal) == (8, True)
        packets, _ = side.reader.read()
        assert [packet.payload for packet in packets] == payloads
        assert {packet.transaction_id for packet in packets} == {start}


@pytest.mark.conformance(60)
def test_transfer_pages_across_a_page_border_name_the_right_bytes() -> None:
    side = Outgoing(start=4096 - 24)
    buffer = side.memory.pages([200, 100, 150])
    buffer.write(4000, bytes(range(200)))
    ranges = [TransferRange(200, 4000), TransferRange(4, 8190)]
    buffer.write(8190, b"edge")
    side.ring.write(
        [build_packet(PacketType.TRANSFER_PAGES, b"received", extension=build_transfer_pages(9, ranges))]
    )
    [packet], _ = side.reader.read()
    set_id, _, count, *numbers = struct.unpack("<HHI4I", packet.extension)
    assert (packet.kind, set_id, count, packet.payload) == (7, 9, 2, b"received")
    assert buffer.read(numbers[1], numbers[0]) == bytes(range(200))
    assert buffer.read(numbers[3], numbers[2]) == b"edge"


def test_a_batch_takes_no_more_than_asked_and_loses_nothing() -> None:
    side = Incoming(2)
    side.writer.write(*[guest_packet(bytes([n])) for n in range(100)])
    sizes = []
    taken = []
    while batch := side.ring.read_batch(3):
        sizes.append(len(batch))
        taken += [packet.payload[0] for packet in batch]
    assert taken == list(range(100))
    assert set(sizes) == {3, 1}


def test_packets_longer_than_one_copy_are_read_whole() -> None:
    side = Incoming(64)
    payloads = [b"a" * 40, bytes(BULK) + b"12345678", b"b" * 40, bytes(5 * BULK), b"c" * 40]
    for payload in payloads:
        assert side.writer.write(guest_packet(payload)) is not None
    assert side.drain() == payloads


@pytest.mark.parametrize("bulk", [16, 24, 32, 40, 64, 1000])
def test_a_copy_may_end_anywhere_in_a_packet(bulk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "BULK", bulk)
    side = Incoming(start=4000)
    payloads = [bytes([n]) * 8 * (n % 5) for n in range(60)]
    side.writer.write(*[guest_packet(payload) for payload in payloads])
    assert side.drain() == payloads


def test_the_longest_packet_of_all_is_read() -> None:
    side = Incoming(129)
    payload = bytes(0xFFFF * 8 - 16)
    side.writer.write(guest_packet(payload))
    assert side.drain() == [payload]


# --- what is taken and given back ---


def test_room_is_given_back_only_by_commit() -> None:
    side = Incoming()
    side.writer.write(guest_packet(b"1"), guest_packet(b"2"))
    side.ring.read_batch(1)
    side.ring.read_batch(1)
    assert side.get(READ_INDEX) == 0
    side.ring.commit()
    assert side.get(READ_INDEX) == side.get(WRITE_INDEX) == 64


@pytest.mark.parametrize("start", [0, 4096 - 32, 4096 - 64])
def test_packets_put_back_come_again(start: int) -> None:
    side = Incoming(start=start)
    side.writer.write(*[guest_packet(bytes([n])) for n in range(5)])
    batch = side.ring.read_batch(5)
    side.ring.untake(batch[2:])
    side.ring.commit()
    assert side.get(READ_INDEX) == (start + 64) % 4096
    again = side.ring.read_batch(9)
    assert again == batch[2:]
    side.ring.commit()
    assert side.ring.available == 0


def test_packets_put_back_that_are_not_in_the_copy_any_more_are_copied_again() -> None:
    side = Incoming()
    side.writer.write(guest_packet(b"first"))
    first = side.ring.read_batch(1)
    side.writer.write(guest_packet(b"second"))
    second = side.ring.read_batch(1)
    side.ring.untake([*first, *second])
    assert [packet.payload[:5] for packet in side.ring.read_batch(9)] == [b"first", b"secon"]


def test_committed_packets_cannot_be_put_back() -> None:
    side = Incoming()
    side.writer.write(guest_packet(b"x"))
    batch = side.ring.read_batch(1)
    side.ring.commit()
    with pytest.raises(InternalError):
        side.ring.untake(batch)


# --- signals for data ---


@pytest.mark.conformance(56)
def test_a_reader_that_masks_is_not_signalled() -> None:
    side = Outgoing()
    side.reader.mask(True)
    assert side.ring.write([in_band(b"quiet")]) == (1, False)
    side.reader.read()
    side.reader.mask(False)
    assert side.ring.write([in_band(b"loud")]) == (1, True)


@pytest.mark.conformance(56)
def test_any_value_but_zero_is_a_mask() -> None:
    side = Outgoing()
    side.set(INTERRUPT_MASK, 0x80000000)
    assert side.ring.write([in_band()]) == (1, False)


def test_only_the_first_packet_in_an_empty_ring_is_signalled() -> None:
    side = Outgoing()
    assert side.ring.write([in_band(b"1")]) == (1, True)
    assert side.ring.write([in_band(b"2")]) == (1, False)
    assert side.ring.write([in_band(b"3"), in_band(b"4")]) == (2, False)
    side.reader.read(3)
    assert side.ring.write([in_band(b"5")]) == (1, False)
    side.reader.read()
    assert side.ring.write([in_band(b"6")]) == (1, True)


@pytest.mark.conformance(56)
def test_the_host_masks_while_it_works_and_unmasks_to_sleep() -> None:
    side = Incoming()
    assert side.writer.write(guest_packet(b"1")) is False
    assert side.ring.unmask() is True
    side.ring.mask()
    assert side.drain() == [b"1" + bytes(7)]
    assert side.ring.unmask() is False
    assert side.writer.write(guest_packet(b"2")) is True
    assert side.writer.write(guest_packet(b"3")) is False
    side.ring.mask()
    assert side.get(INTERRUPT_MASK) == 1


def test_a_mask_that_the_guest_sets_is_noticed() -> None:
    side = Incoming()
    side.ring.unmask()
    side.set(INTERRUPT_MASK, 1)
    with pytest.raises(RingError) as caught:
        side.ring.mask()
    assert caught.value.reason == "interrupts-externally-masked"


# --- signals for room ---


def full_incoming() -> Incoming:
    """A ring with 127 packets of 32 bytes: 4064 of 4096 bytes, 24 free."""
    side = Incoming()
    side.writer.write(*[guest_packet(bytes([n])) for n in range(127)])
    assert side.writer.write(guest_packet(b"more")) is None
    return side


@pytest.mark.conformance(57)
def test_a_writer_that_waits_is_signalled_exactly_once() -> None:
    side = full_incoming()
    side.writer.wait_for_room(100)
    signals = []
    for _ in range(10):
        side.ring.read_batch(1)
        signals.append(side.ring.commit())
    # 24 + 32 n bytes are free after n packets: 100 of them after the third.
    assert signals == [False, False, True] + [False] * 7


@pytest.mark.conformance(57)
def test_a_batch_that_makes_the_room_signals_once() -> None:
    side = full_incoming()
    side.writer.wait_for_room(500)
    while side.ring.read_batch(50):
        pass
    assert side.ring.commit() is True
    assert side.ring.commit() is False


@pytest.mark.conformance(57)
def test_without_a_waiting_side_there_is_no_signal() -> None:
    side = full_incoming()
    side.ring.read_batch(127)
    assert side.ring.commit() is False


def test_a_wait_for_one_byte_less_than_the_ring_means_an_empty_ring() -> None:
    side = full_incoming()
    side.writer.wait_for_room(side.size - 1)
    side.ring.read_batch(126)
    assert side.ring.commit() is False
    side.ring.read_batch(1)
    assert side.ring.commit() is True


def test_the_wait_of_a_writer_without_the_feature_is_not_honoured() -> None:
    side = full_incoming()
    side.set(FEATURE_BITS, 0xFFFFFFFE)
    side.writer.wait_for_room(100)
    side.ring.read_batch(127)
    assert side.ring.commit() is False


@pytest.mark.conformance(60)
def test_a_full_ring_blocks_the_host_until_the_guest_makes_room() -> None:
    side = Outgoing()
    packets = [in_band(bytes([n]) * 100, transaction_id=n) for n in range(40)]
    total = len(packets[0]) + 8
    count, signal = side.ring.write(packets)
    assert (count, signal) == (4088 // total, True)
    assert side.ring.write(packets[count:]) == (0, False)
    assert side.ring.wait_for_room(len(packets[count])) is False
    assert side.get(PENDING_SEND_SIZE) == total
    signalled = []
    for _ in range(4):
        _, signal = side.reader.read(1)
        signalled.append(signal)
    assert signalled.count(True) == 1
    again, _ = side.ring.write(packets[count:])
    assert again == 4
    assert side.get(PENDING_SEND_SIZE) == 0
    rest, _ = side.reader.read()
    assert [packet.transaction_id for packet in rest] == list(range(4, count + again))


def test_room_that_appears_while_the_host_begins_to_wait_is_seen() -> None:
    side = Outgoing()
    packets = [in_band(bytes(1000))] * 4
    assert side.ring.write(packets)[0] == 3
    side.reader.read()
    assert side.ring.wait_for_room(len(packets[0])) is True
    assert side.ring.write(packets[3:]) == (1, True)
    assert side.get(PENDING_SEND_SIZE) == 0


def test_the_ring_never_gets_quite_full() -> None:
    side = Outgoing()
    assert side.ring.free == 4088
    side.ring.write([in_band(bytes(2048 - 24)), in_band(bytes(2048 - 24 - 8))])
    assert side.ring.free == 0
    assert side.get(WRITE_INDEX) == 4088
    assert len(side.reader.read()[0]) == 2
    assert side.ring.free == 4088


def test_a_packet_that_can_never_fit_is_refused() -> None:
    side = Outgoing()
    assert side.ring.write([bytes(side.ring.largest)])[0] == 1
    side.set(READ_INDEX, side.get(WRITE_INDEX))
    with pytest.raises(RingError) as caught:
        side.ring.write([bytes(side.ring.largest + 8)])
    assert caught.value.reason == "invalid-message-length"
    assert side.ring.write([in_band(), bytes(side.ring.largest + 8)])[0] == 1


# --- a guest that breaks the rules ---

BAD_INDICES = [4, 1, 4095, 4096, 8192, 0xFFFFFFFF, 0xFFFFFFF8, 0x80000000]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RingError) as caught:
        call()
    return caught.value.reason


@pytest.mark.parametrize("index", BAD_INDICES)
def test_indices_outside_the_data_are_refused(index: int) -> None:
    for offset in (WRITE_INDEX, READ_INDEX):
        side = Side()
        side.set(offset, index)
        assert refused(partial(IncomingRing, side.pages, side.memory)) == "invalid-ring-pointer"
        assert refused(partial(OutgoingRing, side.pages, side.memory)) == "invalid-ring-pointer"
    side = Incoming()
    side.set(WRITE_INDEX, index)
    assert refused(lambda: side.ring.read_batch(1)) == "invalid-ring-pointer"
    assert refused(lambda: side.ring.available) == "invalid-ring-pointer"
    assert refused(lambda: side.ring.unmask()) == "invalid-ring-pointer"
    out = Outgoing()
    out.set(READ_INDEX, index)
    assert refused(lambda: out.ring.free) == "invalid-ring-pointer"
    assert refused(lambda: out.ring.write([in_band()])) == "invalid-ring-pointer"
    assert refused(lambda: out.ring.wait_for_room(16)) == "invalid-ring-pointer"


def test_a_bad_write_index_during_commit_is_refused() -> None:
    side = full_incoming()
    side.writer.wait_for_room(64)
    side.ring.read_batch(9)
    side.set(WRITE_INDEX, 4096)
    assert refused(side.ring.commit) == "invalid-ring-pointer"


@pytest.mark.parametrize("available", [8, 4096 - 4088])
def test_less_than_a_descriptor_is_refused(available: int) -> None:
    side = Incoming()
    side.set(WRITE_INDEX, available)
    assert refused(lambda: side.ring.read_batch(1)) == "invalid-data-available"


def test_a_descriptor_without_a_trailer_is_refused() -> None:
    side = Incoming()
    side.pages.write(PAGE_SIZE, guest_packet())
    side.set(WRITE_INDEX, 16)
    assert refused(lambda: side.ring.read_batch(1)) == "invalid-descriptor-lengths"


def test_packets_before_a_damaged_one_are_delivered_first() -> None:
    side = Incoming()
    side.writer.write(guest_packet(b"good"), guest_packet(b"bad", kind=0), guest_packet(b"never"))
    assert [packet.payload[:4] for packet in side.ring.read_batch(9)] == [b"good"]
    for _ in range(3):
        assert refused(lambda: side.ring.read_batch(9)) == "invalid-descriptor-type"
    side.ring.commit()
    assert side.get(READ_INDEX) == 32


def test_the_guest_cannot_move_the_indices_that_the_host_owns() -> None:
    side = Incoming()
    side.writer.write(guest_packet(b"1"), guest_packet(b"2"))
    side.ring.read_batch(1)
    side.set(READ_INDEX, 4000)
    side.ring.commit()
    assert side.get(READ_INDEX) == 32
    out = Outgoing()
    out.ring.write([in_band(b"1")])
    out.set(WRITE_INDEX, 2048)
    out.ring.write([in_band(b"2")])
    assert out.get(WRITE_INDEX) == 64


def test_a_write_index_that_goes_backwards_does_no_harm() -> None:
    side = Incoming()
    side.writer.write(*[guest_packet(bytes([n])) for n in range(10)])
    assert len(side.ring.read_batch(5)) == 5
    side.set(WRITE_INDEX, 64)
    # What was copied is delivered; then nearly a whole ring of old bytes seems to be there.
    assert len(side.ring.read_batch(50)) == 5
    assert side.ring.available == 4096 - 320 + 64
    with pytest.raises(RingError):
        while side.ring.read_batch(50):
            pass


def test_bytes_that_change_after_they_were_copied_have_no_effect() -> None:
    side = Incoming()
    side.writer.write(*[guest_packet(bytes([n]) * 16) for n in range(10)])

    def scribble(access: str, offset: int) -> None:
        if access == "read":
            side.pages.write(PAGE_SIZE, b"\xff" * side.size)

    ring = IncomingRing(RacingPages(side.pages, scribble), side.memory)
    payloads = [packet.payload for _ in range(5) for packet in ring.read_batch(2)]
    assert payloads == [bytes([n]) * 16 for n in range(10)]


def test_an_index_that_changes_after_it_was_loaded_has_no_effect() -> None:
    side = Incoming()
    side.writer.write(guest_packet(b"12345678"))

    def scribble(access: str, offset: int) -> None:
        if access == "load" and offset == WRITE_INDEX:
            side.pages.store_u32(WRITE_INDEX, 0xFFFFFFFF)

    side.set(WRITE_INDEX, 0)
    ring = IncomingRing(RacingPages(side.pages, scribble), side.memory)
    side.set(WRITE_INDEX, 32)
    assert [packet.payload for packet in ring.read_batch(9)] == [b"12345678"]
    assert refused(lambda: ring.read_batch(9)) == "invalid-ring-pointer"


def test_a_packet_that_grows_while_it_is_copied_anew_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "BULK", 64)
    side = Incoming()
    side.writer.write(guest_packet(bytes(200)), guest_packet(bytes(2000)))
    lengths: Iterator[int] = iter(range(30, 200, 10))

    def grow(access: str, offset: int) -> None:
        if access == "read":
            side.pages.write(PAGE_SIZE + 4, struct.pack("<H", next(lengths)))

    ring = IncomingRing(RacingPages(side.pages, grow), side.memory)
    assert refused(lambda: ring.read_batch(9)) == "invalid-descriptor-lengths"


@pytest.mark.parametrize("copies", [1, 2])
def test_a_ring_that_empties_while_a_long_packet_is_copied_is_refused(
    monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    monkeypatch.setattr(ring_module, "BULK", 64)
    side = Incoming()
    side.writer.write(guest_packet(bytes(200)))
    reads: list[int] = []

    def take_back(access: str, offset: int) -> None:
        if access == "read":
            reads.append(offset)
            if len(reads) == copies:
                side.pages.store_u32(WRITE_INDEX, 0)

    ring = IncomingRing(RacingPages(side.pages, take_back), side.memory)
    assert refused(lambda: ring.read_batch(9)) == "invalid-data-available"


def test_a_reader_that_juggles_its_index_cannot_make_the_host_overwrite_more_than_the_ring() -> None:
    side = Outgoing()
    positions = iter([8, 4088, 16, 2048, 0] * 100)

    def juggle(access: str, offset: int) -> None:
        if offset == READ_INDEX:
            side.pages.store_u32(READ_INDEX, next(positions))

    outside = bytes(side.memory.ram[: 3 * PAGE_SIZE])
    ring = OutgoingRing(RacingPages(side.pages, juggle), side.memory)
    for _ in range(50):
        ring.write([in_band(bytes(400))] * 12)
        ring.wait_for_room(416)
        assert side.get(WRITE_INDEX) < side.size
    assert bytes(side.memory.ram[: 3 * PAGE_SIZE]) == outside


def test_each_store_that_the_other_side_races_with_is_followed_by_a_fence() -> None:
    side = Incoming()
    order: list[str] = []

    class Memory(FakeMemory):
        def fence(self) -> None:
            order.append("fence")

    def note(access: str, offset: int) -> None:
        if access in ("store", "load"):
            names = {0: "write", 4: "read", 8: "mask", 12: "pending", 64: "feature"}
            order.append(f"{access} {names[offset]}")

    memory = Memory(4096)
    ring = IncomingRing(RacingPages(side.pages, note), memory)
    side.writer.write(guest_packet(b"1"))
    side.writer.wait_for_room(4000)
    ring.read_batch(1)
    order.clear()
    ring.commit()
    assert order == ["store read", "fence", "load pending", "load feature", "load write"]
    order.clear()
    ring.unmask()
    assert order == ["store mask", "fence", "load write"]
    out = Outgoing()
    outgoing = OutgoingRing(RacingPages(out.pages, note), memory)
    order.clear()
    outgoing.write([in_band()])
    assert order == ["load read", "store write", "fence", "load mask", "load read"]
    order.clear()
    outgoing.wait_for_room(100)
    assert order == ["store pending", "fence", "load read"]
