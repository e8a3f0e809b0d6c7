"""What a channel goes on from after its emulator was killed."""

from __future__ import annotations

import pytest
from vmbus.bus.io.output import Output
from vmbus.bus.io.ring import IncomingRing
from vmbus.errors import RingError
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeMemory

PACKETS = [bytes(16), bytes(24), bytes(40)]
"""24, 32 and 48 bytes in the ring, with their trailers."""


@pytest.mark.parametrize(("size", "left"), [(0, 3), (24, 2), (56, 1), (104, 0)])
def test_packets_that_are_in_the_ring_are_not_written_again(size: int, left: int) -> None:
    output = Output(PACKETS)
    output.forget_written(size)
    assert output.packets == PACKETS[3 - left :]
    assert output.bytes == sum(len(each) for each in output.packets)


@pytest.mark.parametrize("size", [8, 32, 112])
def test_an_index_within_a_packet_or_behind_all_is_refused(size: int) -> None:
    with pytest.raises(RingError):
        Output(PACKETS).forget_written(size)


@pytest.mark.parametrize("index", [4, -8, 2 * PAGE_SIZE, 1 << 31])
def test_a_read_index_that_cannot_be_is_refused(index: int) -> None:
    memory = FakeMemory()
    ring = IncomingRing(memory.pages([1, 2, 3]), memory)
    with pytest.raises(RingError):
        ring.continue_at(index)


def test_the_room_of_what_was_taken_is_freed() -> None:
    memory = FakeMemory()
    pages = memory.pages([1, 2, 3])
    ring = IncomingRing(pages, memory)
    ring.continue_at(64)
    assert (pages.load_u32(4), ring.taken) == (64, 64)
