"""Which bytes of which pages are written back through QEMU, and which pages are carried instead."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from vmbus.bus.channel.gpadl import Gpadl, GpadlState
from vmbus.bus.channel.opening import OpenRequest
from vmbus.bus.contact import MonitorPages
from vmbus.machine.memory import Buffer, MappedMemory, RamRegion
from vmbus.machine.migration.dirty_pages import DirtyPageTracker, WrittenPages, owned_bytes
from vmbus.machine.qemu.qtest import MainLoopWaits
from vmbus.ports import PAGE_SIZE, GuestPages
from vmbus.wire.gpadl import GpaRange
from vmbus.wire.msr import SINT, Sint

SIZE = 4 << 20
RINGS = range(16, 32)
DOWNSTREAM = 8
MONITOR = MonitorPages(0x32000, 0x33000)


class Marks:
    """A qtest socket that records what is written."""

    def __init__(self) -> None:
        self.bytes: list[tuple[int, int]] = []
        self.waits = MainLoopWaits()

    def mark(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        self.bytes += bytes_there

    async def marked(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        self.mark(bytes_there)

    async def settled(self) -> None: ...

    def settle(self) -> None: ...

    loading = contextlib.nullcontext


@dataclass
class Reports:
    """Compiled code whose reports of ranges are switched on and off."""

    switched: list[bool] = field(default_factory=list)

    def report_ranges(self, on: bool) -> None:
        self.switched.append(on)


@dataclass
class Workers:
    """Devices' work, which is done."""

    engines: Reports | None = None

    async def settle(self, timeout: float) -> bool:
        return True


@pytest.fixture
def memory() -> MappedMemory:
    return MappedMemory(memoryview(mmap.mmap(-1, SIZE)), [RamRegion(0, SIZE, 0)])


@dataclass
class Overlay:
    """A page that the guest has placed."""

    value: int
    pages: GuestPages | None


@dataclass
class Processor:
    """The SynIC of a virtual processor."""

    simp: Overlay
    siefp: Overlay
    sints: list[Sint]


@dataclass
class RingChannel:
    """A channel with both rings in one GPADL."""

    is_open: bool
    request: OpenRequest | None
    gpadls: dict[int, Gpadl]


def channel(*, is_open: bool) -> RingChannel:
    gpadl = Gpadl(1, (GpaRange(len(RINGS) * PAGE_SIZE, 0, tuple(RINGS)),), GpadlState.ACCEPTED)
    return RingChannel(is_open, OpenRequest(1, 1, None, DOWNSTREAM), {1: gpadl})


def owned(memory: MappedMemory, *, is_open: bool = True) -> dict[int, int]:
    """A host with everything that the module's table lists."""

    def overlay(gpn: int) -> Overlay:
        return Overlay(gpn << 12 | 1, memory.pages([gpn]))

    sints = [SINT.parse(0x10000 if number != 2 else 0x30) for number in range(16)]
    processor = Processor(overlay(40), overlay(41), sints)
    return owned_bytes(MONITOR, [channel(is_open=is_open)], [processor], overlay(42))


def written_to(memory: MappedMemory, pages: Sequence[int], *, is_open: bool = True) -> WrittenPages:
    for page in pages:
        memory.write(page * 4096 + 2048, b"x")
    return WrittenPages.of(memory, owned(memory, is_open=is_open))


async def marked(
    memory: MappedMemory, written: WrittenPages, stopped: Callable[[], bool] = lambda: True
) -> list[int]:
    """The addresses that are marked."""
    qtest = Marks()
    count = await written.mark(memory, qtest, stopped)
    assert count == len(qtest.bytes)
    return [gpa for gpa, _ in qtest.bytes]


async def test_of_shared_pages_a_byte_of_the_hosts_is_written(memory: MappedMemory) -> None:
    first_in, first_out = RINGS[0], RINGS[DOWNSTREAM]
    written = written_to(memory, [first_in, first_out, first_out + 1, 40, 41, 42, 0x33])
    assert await marked(memory, written) == [
        first_in * 4096 + 4,
        first_out * 4096,
        (first_out + 1) * 4096,
        40 * 4096 + 6,
        41 * 4096 + 15 * 256,
        42 * 4096,
        0x33 * 4096 + 4095,
    ]


def test_pages_that_the_guest_has_not_placed_are_not_the_hosts() -> None:
    none = Overlay(42 << 12, None)
    unmasked = [SINT.parse(0x30)] * 16
    assert owned_bytes(None, [], [Processor(none, none, unmasked)], none) == {}
    placed = MappedMemory(memoryview(bytearray(PAGE_SIZE)), [RamRegion(0, PAGE_SIZE, 0)]).pages([0])
    events = Overlay(42 << 12 | 1, placed)
    assert owned_bytes(None, [], [Processor(none, events, unmasked)], none) == {}, "every SINT may signal"


async def test_pages_of_the_guests_own_come_last_and_only_while_it_stands_still(memory: MappedMemory) -> None:
    guests = list(range(100, 140))
    assert (await marked(memory, written_to(memory, [*guests, 42])))[0] == 42 * 4096
    looks = iter([True, True, False])
    again = written_to(memory, [*guests, 42])
    assert len(await marked(memory, again, lambda: next(looks))) == 1 + 16
    assert memory.take_dirty() == guests[16:], "what was not marked is not forgotten"


async def test_what_is_carried_is_not_marked(memory: MappedMemory) -> None:
    written = written_to(memory, [100, 101, 102, 42])
    assert written == WrittenPages([42 * 4096], [100 * 4096, 101 * 4096, 102 * 4096])
    assert await marked(memory, written.without([100, 102])) == [42 * 4096, 101 * 4096]
    assert memory.take_dirty() == [100, 102], "the next migration may begin before this one has ended"


def test_rings_of_a_closed_channel_are_the_guests_again(memory: MappedMemory) -> None:
    page = RINGS[DOWNSTREAM] + 1
    assert written_to(memory, [page], is_open=False) == WrittenPages([], [page * 4096])


async def test_video_memory_is_not_marked(memory: MappedMemory) -> None:
    assert await marked(memory, written_to(memory, [0xA0, 0xFF])) == []


def test_a_buffer_is_marked_inside_of_what_was_stored(memory: MappedMemory) -> None:
    marks = Marks()
    tracker = DirtyPageTracker(memory, marks, Workers())
    tracker.begin()
    views = memory.writable([(0x64000 + 100, 8000), (0x70000, 4096)])
    for view in views.views:
        view[:] = b"d" * len(view)
    views.finish(8000 + 100)
    assert marks.bytes == [(0x64000 + 100, 0x64), (0x65000, 0x64), (0x70000, 0x64)]
    assert tracker.pages == 3
    assert memory.take_dirty() == []

    tracker.end()
    memory.writable([(0x64000, 4096)]).finish(4096)
    assert len(marks.bytes) == 3
    assert memory.take_dirty() == [0x64]


class NotedPages:
    """Pages that code was translated from."""

    def __init__(self, *pfns: int) -> None:
        self.noted = set(pfns)

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        found = sorted(self.noted & set(range(first_pfn, first_pfn + count)))
        self.noted -= set(found)
        return found

    def native(self) -> tuple[int, int]:
        return 0, 0


class Through:
    """Writes through QEMU."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def write_memory(self, gpa: int, data: Buffer) -> None:
        self.writes.append((gpa, len(data)))


def test_what_the_kernel_stored_is_marked_too_and_its_code_dropped() -> None:
    through = Through()
    memory = MappedMemory(
        memoryview(mmap.mmap(-1, SIZE)), [RamRegion(0, SIZE, 0)], code_pages=NotedPages(0x65), through=through
    )
    marks, reports = Marks(), Reports()
    tracker = DirtyPageTracker(memory, marks, Workers(reports))
    tracker.begin()
    tracker.begin()
    memory.dirty[0x64] = memory.dirty[0x65] = 1
    memory.filled_by_kernel([(0x64200, 512), (0x65000, 4096)])
    assert [gpa for gpa, _ in marks.bytes] == [0x64200, 0x65000]
    assert through.writes == [(0x65000, 4096)]
    assert memory.take_dirty() == []
    tracker.end()
    tracker.end()
    assert reports.switched == [True, False]
