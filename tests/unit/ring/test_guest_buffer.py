"""The guest memory that a packet names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.bus.io.guest_buffer import GuestBuffer, gpa_runs
from vmbus.errors import GuestAddressError
from vmbus.testing.fakes import FakeMemory
from vmbus.wire.packet import GpaRange


def test_neighbouring_pages_become_one_run() -> None:
    ranges = [GpaRange(10000, 4000, (5, 6, 7, 8)), GpaRange(8, 0, (20,)), GpaRange(4096, 0, (30,))]
    assert gpa_runs(ranges) == [(5 * 4096 + 4000, 10000), (20 * 4096, 8), (30 * 4096, 4096)]


def test_page_numbers_that_are_no_ram_are_refused_before_anything_is_touched() -> None:
    memory = FakeMemory(16 * 4096)
    before = bytes(memory.ram)
    for pfn in (16, 1 << 40, (1 << 52) - 1, (1 << 64) - 1):
        with pytest.raises(GuestAddressError):
            GuestBuffer(memory, [GpaRange(4096, 0, (3,)), GpaRange(1, 0, (pfn,))])
    with pytest.raises(GuestAddressError):
        GuestBuffer(memory, [GpaRange(4097, 0, (15, 16))])
    assert memory.ram == before


@given(data=st.data())
@settings(deadline=None)
def test_a_buffer_is_one_run_of_bytes(data: st.DataObject) -> None:
    memory = FakeMemory(64 * 4096)
    memory.ram[:] = bytes(range(256)) * (64 * 16)
    pfns = data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=8, unique=True))
    offset = data.draw(st.integers(0, 4095))
    count = data.draw(st.integers((len(pfns) - 1) * 4096 + 1 if len(pfns) > 1 else 1, len(pfns) * 4096))
    count = max(1, count - offset)
    need = (offset + count + 4095) // 4096
    buffer = GuestBuffer(memory, [GpaRange(count, offset, tuple(pfns[:need]))])
    flat = b"".join([bytes(memory.ram[pfn * 4096 : pfn * 4096 + 4096]) for pfn in pfns])[
        offset : offset + count
    ]
    assert (buffer.length, buffer.read()) == (count, flat)
    start = data.draw(st.integers(0, count))
    length = data.draw(st.integers(0, count - start))
    assert buffer.read(start, length) == flat[start : start + length]
    assert buffer.read(start) == flat[start:]
    buffer.write(b"\xee" * length, start)
    assert buffer.read() == flat[:start] + b"\xee" * length + flat[start + length :]


def test_offsets_outside_the_buffer_are_the_callers_error() -> None:
    memory = FakeMemory(16 * 4096)
    buffer = GuestBuffer(memory, [GpaRange(100, 4090, (3, 9))])
    for offset, length in ((0, 101), (101, 0), (-1, 1), (100, 1)):
        with pytest.raises(IndexError):
            buffer.read(offset, length)
    with pytest.raises(IndexError):
        buffer.write(bytes(2), 99)
    assert buffer.read(100, 0) == b""
