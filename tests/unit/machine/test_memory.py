"""Guest memory: the layout, bounds, what happens to code and to dirty pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import GuestAddressError
from vmbus.machine.engine.library import EngineLibrary
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.ports import PAGE_SIZE

LOW = 8 * PAGE_SIZE
HIGH_GPA = 1 << 32


class NotedPages:
    """Code notes as the gateway keeps them."""

    def __init__(self, *pfns: int) -> None:
        self.noted = set(pfns)

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        found = sorted(self.noted & set(range(first_pfn, first_pfn + count)))
        self.noted.difference_update(found)
        return found

    def native(self) -> tuple[int, int]:
        raise NotImplementedError("no test of this module writes from compiled code")


class Through:
    """Writes through QEMU, recorded."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []

    def write_memory(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.writes.append((gpa, bytes(data)))


def make(code: NotedPages | None = None, through: Through | None = None) -> tuple[MappedMemory, bytearray]:
    ram = bytearray(16 * PAGE_SIZE)
    regions = [RamRegion(0, LOW, 0), RamRegion(HIGH_GPA, 8 * PAGE_SIZE, LOW)]
    return MappedMemory(memoryview(ram), regions, code_pages=code, through=through), ram


def test_memory_above_four_gib_follows_the_low_part_in_the_file() -> None:
    memory, ram = make()
    memory.write(HIGH_GPA + 5, b"high")
    assert ram[LOW + 5 : LOW + 9] == b"high"
    assert memory.read(HIGH_GPA + 5, 4) == b"high"


@pytest.mark.parametrize("gpa", [LOW, LOW - 3, HIGH_GPA - 1, HIGH_GPA + 8 * PAGE_SIZE - 3, 1 << 60])
def test_a_range_that_leaves_ram_is_refused_and_nothing_is_written(gpa: int) -> None:
    memory, ram = make()
    with pytest.raises(GuestAddressError):
        memory.write(gpa, b"1234")
    with pytest.raises(GuestAddressError):
        memory.read(gpa, 4)
    assert not memory.is_ram(gpa, 4)
    assert not any(ram)


def test_pages_in_any_order_read_as_one_run() -> None:
    memory, _ = make()
    pages = memory.pages([3, 4, (HIGH_GPA >> 12) + 1, 2])
    data = bytes(range(256)) * (pages.size // 256)
    pages.write(0, data)
    assert pages.read(0, pages.size) == data
    assert memory.read(2 * PAGE_SIZE, PAGE_SIZE) == data[3 * PAGE_SIZE :]
    assert memory.read(HIGH_GPA + PAGE_SIZE, PAGE_SIZE) == data[2 * PAGE_SIZE : 3 * PAGE_SIZE]


def test_words_are_where_the_bytes_are() -> None:
    memory, _ = make()
    pages = memory.pages([7, 1])
    pages.store_u32(PAGE_SIZE + 8, 0x12345678)
    assert memory.read(PAGE_SIZE + 8, 4) == b"\x78\x56\x34\x12"
    assert pages.load_u32(PAGE_SIZE + 8) == 0x12345678
    with pytest.raises(IndexError):
        pages.load_u32(2)


@pytest.mark.parametrize("native", [True, False])
def test_bits_are_set_beside_those_that_are_there(native: bool) -> None:
    library = EngineLibrary.open() if native else None
    ram = bytearray(4 * PAGE_SIZE)
    memory = MappedMemory(
        memoryview(ram), [RamRegion(0, len(ram), 0)], set_bits=library.set_bits if library else None
    )
    pages = memory.pages([2, 1])
    pages.store_u32(PAGE_SIZE + 8, 0x80000001)
    memory.take_dirty()
    assert pages.set_bits_u32(PAGE_SIZE + 8, 0x10) == 0x80000001
    assert pages.set_bits_u32(PAGE_SIZE + 8, 0x30) == 0x80000011
    assert pages.load_u32(PAGE_SIZE + 8) == 0x80000031
    assert ram[PAGE_SIZE + 8 : PAGE_SIZE + 13] == bytes((0x31, 0, 0, 0x80, 0))
    assert memory.take_dirty() == [1]
    with pytest.raises(IndexError):
        pages.set_bits_u32(2, 1)


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, 2 * PAGE_SIZE + 1), (2 * PAGE_SIZE, 1)])
def test_pages_outside_the_run_are_refused(offset: int, length: int) -> None:
    memory, _ = make()
    pages = memory.pages([1, 2])
    with pytest.raises(IndexError):
        pages.read(offset, length)
    with pytest.raises(IndexError):
        pages.write(offset, bytes(length))


def test_a_page_that_is_not_ram_is_no_page() -> None:
    memory, _ = make()
    with pytest.raises(GuestAddressError):
        memory.pages([1, LOW // PAGE_SIZE])


def test_a_write_to_a_page_with_code_goes_through_qemu_as_well() -> None:
    through = Through()
    code = NotedPages(2, HIGH_GPA >> 12)
    memory, _ = make(code, through)
    data = bytes(range(100)) * 100
    memory.write(PAGE_SIZE + 4000, data)
    start = PAGE_SIZE + 4000
    expected = data[2 * PAGE_SIZE - start : 3 * PAGE_SIZE - start]
    assert through.writes == [(2 * PAGE_SIZE, expected)]
    assert memory.read(start, len(data)) == data
    memory.write(PAGE_SIZE + 4000, data)
    assert len(through.writes) == 1, "the note was cleared"
    memory.pages([(HIGH_GPA >> 12)]).write(10, b"abc")
    assert through.writes[1:] == [(HIGH_GPA + 10, b"abc")]


def test_instructions_always_go_through_qemu() -> None:
    through = Through()
    memory, _ = make(None, through)
    memory.write_code(0x1000, b"\xc3")
    assert through.writes == [(0x1000, b"\xc3")]


def test_views_show_guest_memory_in_place_and_in_order() -> None:
    memory, ram = make()
    memory.write(HIGH_GPA + 3, b"second")
    memory.write(16, b"first")
    views = memory.readable([(16, 5), (HIGH_GPA + 3, 6)])
    assert [bytes(view) for view in views] == [b"first", b"second"]
    assert all(view.readonly for view in views)
    ram[16:21] = b"FIRST"
    assert bytes(views[0]) == b"FIRST"


@pytest.mark.parametrize("gpa", [LOW - 3, HIGH_GPA - 1, 1 << 60])
def test_views_outside_of_ram_are_refused(gpa: int) -> None:
    memory, _ = make()
    for look in (memory.readable, memory.writable):
        with pytest.raises(GuestAddressError):
            look([(0, 16), (gpa, 4)])
    assert memory.take_dirty() == []


def test_what_is_stored_in_views_counts_when_it_is_finished() -> None:
    through = Through()
    memory, _ = make(NotedPages(2, 3, HIGH_GPA >> 12), through)
    target = memory.writable([(2 * PAGE_SIZE + 8, 4), (HIGH_GPA, 8), (3 * PAGE_SIZE, 4)])
    for view, text in zip(target.views, (b"abcd", b"12345678", b"none"), strict=True):
        view[:] = text
    assert memory.take_dirty() == []
    assert through.writes == []
    target.finish(4 + 6)
    assert memory.take_dirty() == [2, 8]
    assert through.writes == [(2 * PAGE_SIZE + 8, b"abcd"), (HIGH_GPA, b"123456")]
    assert target.views == []
    target.finish(16)
    assert memory.take_dirty() == [], "once only"


def test_every_written_page_is_remembered_once() -> None:
    memory, _ = make()
    memory.write(PAGE_SIZE - 1, b"ab")
    memory.pages([HIGH_GPA >> 12]).store_u32(0, 1)
    assert memory.take_dirty() == [0, 1, 8]
    assert memory.take_dirty() == []


@settings(deadline=None)
@given(st.data())
def test_any_access_agrees_with_a_plain_array(data: st.DataObject) -> None:
    memory, _ = make(NotedPages(*range(16)), Through())
    pfns = data.draw(st.permutations(range(8)))
    pages = memory.pages(pfns)
    model = bytearray(pages.size)
    for _ in range(data.draw(st.integers(1, 8))):
        offset = data.draw(st.integers(0, pages.size))
        blob = data.draw(st.binary(max_size=min(64, pages.size - offset)))
        pages.write(offset, blob)
        model[offset : offset + len(blob)] = blob
    assert pages.read(0, pages.size) == model
