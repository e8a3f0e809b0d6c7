"""Both rings against a model: any order of writes, reads, masks and waits keeps every packet, once, in order.

The guest's sides are ``RingWriter`` and ``RingReader``, which share no code with the host's. Besides the packets
the model checks that no side sleeps for ever: a side that may sleep while there is something for it to do must
have been signalled.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vmbus.bus.io.ring import IncomingRing, OutgoingRing
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeMemory
from vmbus.testing.loopback import RingReader, RingWriter, guest_packet
from vmbus.wire.packet import Packet, PacketType, build_packet

PAYLOADS = (
    st.integers(0, 900)
    .map(lambda length: bytes(range(256)) * 3 + bytes(length))
    .flatmap(lambda data: st.integers(0, 600).map(lambda length: data[:length]))
)
IDS = st.integers(0, 2**64 - 1)


def padded(payload: bytes) -> bytes:
    return payload + bytes(-len(payload) % 8)


class Rings(RuleBasedStateMachine):
    @initialize(pages=st.integers(1, 3), up=st.integers(0, 511), down=st.integers(0, 511))
    def open(self, pages: int, up: int, down: int) -> None:
        self.memory = FakeMemory(64 * PAGE_SIZE)
        up_pages = self.memory.pages([*range(1, 2 + 2 * pages, 2)])
        down_pages = self.memory.pages([*range(2 + 2 * pages, 1, -2)])
        for ring_pages, start in ((up_pages, up * 8), (down_pages, down * 8)):
            ring_pages.store_u32(0, start)
            ring_pages.store_u32(4, start)
            ring_pages.store_u32(64, 1)
        self.host_in = IncomingRing(up_pages, self.memory)
        self.host_out = OutgoingRing(down_pages, self.memory)
        self.host_in.initialize()
        self.host_out.initialize()
        self.guest_out = RingWriter(up_pages)
        self.guest_in = RingReader(down_pages, 1 << 20)
        self.size = pages * PAGE_SIZE
        self.up: deque[tuple[bytes, int, bool]] = deque()
        self.down: deque[tuple[bytes, int, bool]] = deque()
        self.taken: list[Packet] = []
        self.host_masked = True
        self.guest_masked = False
        self.host_signalled = self.guest_signalled = False
        self.guest_waits = self.host_waits = 0

    # --- guest to host

    @rule(packets=st.lists(st.tuples(PAYLOADS, IDS, st.booleans()), min_size=1, max_size=4))
    def guest_writes(self, packets: list[tuple[bytes, int, bool]]) -> None:
        built = [guest_packet(p, transaction_id=i, completion_requested=c) for p, i, c in packets]
        total = sum(len(each) + 8 for each in built)
        signal = self.guest_out.write(*built)
        if signal is None:
            if total < self.size - 8:
                self.guest_waits = total
                self.guest_out.wait_for_room(total)
                if self.guest_out.raw_free() > total:
                    self.guest_waits = 0
            return
        self.guest_waits = 0
        self.guest_out.wait_for_room(0)
        self.up.extend(packets)
        self.host_signalled |= signal

    @rule(limit=st.integers(1, 6))
    def host_reads(self, limit: int) -> None:
        self.host_in.mask()
        self.host_masked = True
        batch = self.host_in.read_batch(limit)
        assert len(batch) <= limit
        assert bool(batch) == (len(self.up) > len(self.taken))
        self.taken += batch

    @rule(back=st.integers(1, 4))
    def host_puts_back(self, back: int) -> None:
        back = min(back, len(self.taken))
        if back:
            self.host_in.untake(self.taken[-back:])
            del self.taken[-back:]

    @rule()
    def host_commits(self) -> None:
        for packet in self.taken:
            payload, transaction_id, completion_requested = self.up.popleft()
            assert (packet.kind, packet.payload) == (PacketType.IN_BAND, padded(payload))
            assert packet.completion_requested == completion_requested
            assert packet.transaction_id == transaction_id
        had_room = self.guest_waits and self.guest_out.raw_free() > self.guest_waits
        signal = self.host_in.commit()
        has_room = self.guest_waits and self.guest_out.raw_free() > self.guest_waits
        assert signal == bool(has_room and not had_room)
        if signal:
            self.guest_waits = 0
            self.guest_out.wait_for_room(0)
        self.taken.clear()

    @precondition(lambda self: not self.taken)
    @rule()
    def host_sleeps(self) -> None:
        if self.host_in.unmask():
            assert self.up
            self.host_in.mask()
            self.host_masked = True
        else:
            assert not self.up
            self.host_masked = False
            self.host_signalled = False

    # --- host to guest

    @rule(packets=st.lists(st.tuples(PAYLOADS, IDS, st.booleans()), min_size=1, max_size=6))
    def host_writes(self, packets: list[tuple[bytes, int, bool]]) -> None:
        built = [
            build_packet(PacketType.IN_BAND, p, transaction_id=i, completion_requested=c)
            for p, i, c in packets
        ]
        empty = not self.down
        free = self.host_out.free
        count, signal = self.host_out.write(built)
        assert signal == bool(count and empty and not self.guest_masked)
        used = sum(len(each) + 8 for each in built[:count])
        assert used <= free
        assert self.host_out.free == free - used
        self.down.extend(packets[:count])
        self.guest_signalled |= signal
        self.host_waits = 0
        if count < len(built):
            total = len(built[count]) + 8
            assert total > free - used
            assert self.host_out.wait_for_room(len(built[count])) is False
            self.host_waits = total

    @rule(limit=st.integers(1, 6))
    def guest_reads(self, limit: int) -> None:
        packets, signal = self.guest_in.read(limit)
        assert len(packets) == min(limit, len(self.down))
        for packet in packets:
            payload, transaction_id, completion_requested = self.down.popleft()
            assert (packet.kind, packet.payload) == (6, padded(payload))
            assert (packet.transaction_id, packet.flags) == (transaction_id, int(completion_requested))
        if self.host_waits and packets:
            assert signal == (self.host_out.free >= self.host_waits)
        if signal:
            self.host_waits = 0
            self.guest_in.pages.store_u32(12, 0)

    @rule(masked=st.booleans())
    def guest_masks(self, masked: bool) -> None:
        self.guest_in.mask(masked)
        self.guest_masked = masked
        if not masked and self.down:
            self.guest_signalled = True  # it looks again after unmasking, and finds them

    # --- always

    @invariant()
    def the_host_never_sleeps_over_packets(self) -> None:
        if not self.host_masked and len(self.up) > len(self.taken):
            assert self.host_signalled

    @invariant()
    def the_guest_never_sleeps_over_packets(self) -> None:
        if not self.guest_masked and self.down:
            assert self.guest_signalled

    @invariant()
    def the_rings_count_alike(self) -> None:
        assert self.host_out.free == self.guest_in.length - self.guest_in.available() - 8
        left = list(self.up)[len(self.taken) :]
        assert self.host_in.available == sum(len(padded(p)) + 24 for p, _, _ in left)


Rings.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=60)
TestRings = Rings.TestCase
