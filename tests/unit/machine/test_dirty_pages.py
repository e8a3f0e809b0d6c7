"""Which bytes of which pages are written back through QEMU, and which pages need not be."""

from __future__ import annotations

import asyncio
import mmap
from types import SimpleNamespace

import pytest
from vmbus.bus.channel.gpadl import GpadlState
from vmbus.bus.contact import MonitorPages
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.machine.migration.dirty_pages import DirtyPageTracker, WrittenPages
from vmbus.wire.msr import SINT

SIZE = 4 << 20
RINGS = range(16, 32)
DOWNSTREAM = 8


class Marks:
    """A qtest socket that remembers."""

    def __init__(self) -> None:
        self.bytes: list[tuple[int, int]] = []

    def mark(self, bytes_there: list[tuple[int, int]]) -> None:
        self.bytes += bytes_there


@pytest.fixture
def memory() -> MappedMemory:
    return MappedMemory(memoryview(mmap.mmap(-1, SIZE)), [RamRegion(0, SIZE, 0)])


def overlay(gpn: int) -> SimpleNamespace:
    return SimpleNamespace(pages=object(), value=gpn << 12 | 1)


def host_of(memory: MappedMemory, *, is_open: bool = True) -> SimpleNamespace:
    gpadl = SimpleNamespace(state=GpadlState.ACCEPTED, aligned_pfns=lambda: list(RINGS))
    channel = SimpleNamespace(
        is_open=is_open,
        request=SimpleNamespace(ring_gpadl_id=1, downstream_offset=DOWNSTREAM),
        gpadls={1: gpadl},
    )
    sints = [SINT.parse(0x10000 if number != 2 else 0x30) for number in range(16)]
    vp = SimpleNamespace(simp=overlay(40), siefp=overlay(41), sints=sints)
    return SimpleNamespace(
        memory=memory,
        qtest=Marks(),
        bus=SimpleNamespace(
            connection=SimpleNamespace(monitor_pages=MonitorPages(0x32000, 0x33000)), channels=[channel]
        ),
        partition=SimpleNamespace(synic=SimpleNamespace(vps=[vp]), reference_tsc=overlay(42)),
    )


def marked(host: SimpleNamespace, pages: list[int]) -> list[int]:
    """The addresses that are marked after a write to each of the pages."""
    for page in pages:
        host.memory.write(page * 4096 + 2048, b"x")
    count = asyncio.run(WrittenPages.of(host).mark(host, lambda: True))
    assert count == len(host.qtest.bytes)
    return [gpa for gpa, _ in host.qtest.bytes]


def test_of_shared_pages_a_byte_of_the_hosts_is_written(memory: MappedMemory) -> None:
    first_in, first_out = RINGS[0], RINGS[DOWNSTREAM]
    assert marked(host_of(memory), [first_in, first_out, first_out + 1, 40, 41, 42, 0x33]) == [
        first_in * 4096 + 4,
        first_out * 4096,
        (first_out + 1) * 4096,
        40 * 4096 + 6,
        41 * 4096 + 15 * 256,
        42 * 4096,
        0x33 * 4096 + 4095,
    ]


def test_what_is_not_the_hosts_comes_last_and_only_while_the_guest_stands_still(memory: MappedMemory) -> None:
    host = host_of(memory)
    guests = list(range(100, 140))
    assert marked(host, [*guests, 42])[0] == 42 * 4096
    looks = iter([True, True, False])
    host.qtest.bytes.clear()
    for page in (*guests, 42):
        memory.write(page * 4096, b"x")
    assert asyncio.run(WrittenPages.of(host).mark(host, lambda: next(looks))) == 1 + 16
    assert memory.take_dirty() == guests[16:], "what was not marked is not forgotten"


def test_what_is_carried_is_not_marked(memory: MappedMemory) -> None:
    host = host_of(memory)
    for page in (100, 101, 102, 42):
        memory.write(page * 4096, b"x")
    written = WrittenPages.of(host)
    assert written == WrittenPages([42 * 4096], [100 * 4096, 101 * 4096, 102 * 4096])
    assert asyncio.run(written.without([100, 102]).mark(host, lambda: True)) == 2
    assert [gpa for gpa, _ in host.qtest.bytes] == [42 * 4096, 101 * 4096]
    assert memory.take_dirty() == [100, 102], "the next migration may begin before this one has ended"


def test_rings_of_a_closed_channel_are_the_guests_again(memory: MappedMemory) -> None:
    page = RINGS[DOWNSTREAM] + 1
    memory.write(page * 4096, b"a")
    host = host_of(memory, is_open=False)
    assert WrittenPages.of(host) == WrittenPages([], [page * 4096])


def test_video_memory_is_not_marked(memory: MappedMemory) -> None:
    assert marked(host_of(memory), [0xA0, 0xFF]) == []


def test_a_buffer_is_marked_inside_of_what_was_stored(memory: MappedMemory) -> None:
    marks = Marks()
    early = DirtyPageTracker(memory, marks, SimpleNamespace(engines=None))  # type: ignore[arg-type]
    early.begin()
    views = memory.writable([(0x64000 + 100, 8000), (0x70000, 4096)])
    for view in views.views:
        view[:] = b"d" * len(view)
    views.finish(8000 + 100)
    assert marks.bytes == [(0x64000 + 100, 0x64), (0x65000, 0x64), (0x70000, 0x64)]
    assert early.pages == 3
    assert memory.take_dirty() == []

    early.end()
    memory.writable([(0x64000, 4096)]).finish(4096)
    assert len(marks.bytes) == 3
    assert memory.take_dirty() == [0x64]


class CodePages:
    """Notes of pages that code was translated from."""

    def __init__(self, *pfns: int) -> None:
        self.noted = set(pfns)

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        found = sorted(self.noted & set(range(first_pfn, first_pfn + count)))
        self.noted -= set(found)
        return found


class Through:
    """Writes through QEMU."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def write_memory(self, gpa: int, data: bytes) -> None:
        self.writes.append((gpa, len(data)))


def test_what_the_kernel_stored_is_marked_too_and_its_code_dropped() -> None:
    through = Through()
    memory = MappedMemory(
        memoryview(mmap.mmap(-1, SIZE)), [RamRegion(0, SIZE, 0)], code_pages=CodePages(0x65), through=through
    )
    marks = Marks()
    told: list[bool] = []
    engines = SimpleNamespace(report_ranges=told.append)
    early = DirtyPageTracker(memory, marks, SimpleNamespace(engines=engines))  # type: ignore[arg-type]
    early.begin()
    early.begin()
    memory.dirty[0x64] = memory.dirty[0x65] = 1
    memory.filled_by_kernel([(0x64200, 512), (0x65000, 4096)])
    assert [gpa for gpa, _ in marks.bytes] == [0x64200, 0x65000]
    assert through.writes == [(0x65000, 4096)]
    assert memory.take_dirty() == []
    early.end()
    early.end()
    assert told == [True, False]
