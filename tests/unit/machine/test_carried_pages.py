"""Pages of guest memory in a state: read at the source, written at the target, or refused."""

from __future__ import annotations

import random

import pytest
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.machine.migration.carried_pages import CarriedPages, read
from vmbus.ports import PAGE_SIZE
from vmbus.saving import ChannelSaver, Reason, Restore, StateRefused, read_machine, save_machine
from vmbus.saving.pages import MAX_CARRIED
from vmbus.wire.saved import SavedPages

LOW = 512 * PAGE_SIZE
HIGH_GPA = 1 << 32
SIZE = LOW + 8 * PAGE_SIZE
HIGH = HIGH_GPA // PAGE_SIZE


class NoQemu:
    """QEMU waits for ``Load()``: who asks it for anything waits for ever."""

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        return list(range(first_pfn, first_pfn + count))

    def write_memory(self, gpa: int, data: object) -> None:
        raise AssertionError("QEMU was asked in Load()")


def memory_of(content: bytes, regions: list[RamRegion] | None = None) -> MappedMemory:
    nobody = NoQemu()
    return MappedMemory(
        memoryview(bytearray(content)),
        regions or [RamRegion(0, LOW, 0), RamRegion(HIGH_GPA, 8 * PAGE_SIZE, LOW)],
        code_pages=nobody,  # type: ignore[arg-type]
        through=nobody,
    )


def everything(memory: MappedMemory) -> bytes:
    return bytes(memory.readable([(0, LOW)])[0]) + bytes(memory.readable([(HIGH_GPA, 8 * PAGE_SIZE)])[0])


def restore(memory: MappedMemory, pages: list[SavedPages]) -> None:
    data = save_machine(ChannelSaver(), [], pages=pages).data
    Restore(ChannelSaver(), [], memory=CarriedPages(memory)).apply(read_machine(data))


def test_the_target_has_what_the_source_had_wherever_its_file_has_it() -> None:
    content = random.Random(1).randbytes(SIZE)
    source = memory_of(content)
    there = [RamRegion(0, LOW, 8 * PAGE_SIZE), RamRegion(HIGH_GPA, 8 * PAGE_SIZE, 0)]
    target = memory_of(bytes(SIZE), there)
    gpas = [HIGH_GPA + 7 * PAGE_SIZE, 0, 5 * PAGE_SIZE, 511 * PAGE_SIZE, HIGH_GPA]
    restore(target, read(source, gpas))
    for gpa in gpas:
        assert target.read(gpa, PAGE_SIZE) == source.read(gpa, PAGE_SIZE)
    assert sum(map(bool, everything(target))) <= len(gpas) * PAGE_SIZE
    written = sorted(target.page_of_gpa(gpa) for gpa in gpas)
    assert target.take_dirty() == written, "and knows that it wrote it"


def test_a_page_that_became_shorter_has_zeros_again() -> None:
    source, target = memory_of(bytes(SIZE)), memory_of(b"\xff" * SIZE)
    source.put_page(3, b"short".ljust(PAGE_SIZE, b"\0"))
    restore(target, read(source, [3 * PAGE_SIZE]))
    assert target.read(3 * PAGE_SIZE, PAGE_SIZE) == b"short".ljust(PAGE_SIZE, b"\0")
    assert target.read(4 * PAGE_SIZE, 1) == b"\xff"


@pytest.mark.parametrize("pfn", [LOW // PAGE_SIZE, HIGH - 1, HIGH + 8, (1 << 52) - 1, 0xA0, 0xFF])
def test_a_page_that_is_no_ram_here_is_refused_and_nothing_is_written(pfn: int) -> None:
    target = memory_of(bytes(SIZE))
    pages = [SavedPages((1,), (b"first",)), SavedPages(tuple(sorted((2, pfn))), (b"a", b"b"))]
    with pytest.raises(StateRefused, match=f"page {pfn:#x} is not RAM of this machine") as caught:
        restore(target, pages)
    assert caught.value.reason is Reason.NOT_ACCEPTED
    assert not caught.value.changed
    assert everything(target) == bytes(SIZE)


def test_of_too_many_pages_the_first_are_read() -> None:
    pages = read(memory_of(bytes(SIZE)), [pfn * PAGE_SIZE for pfn in range(MAX_CARRIED + 9)])
    assert [pfn for each in pages for pfn in each.pfns] == list(range(MAX_CARRIED))
