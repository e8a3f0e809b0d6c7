"""Pages of guest memory in a machine's state: number and order are checked, and an invalid one changes nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError, MalformedError
from vmbus.saving import ChannelSaver, Reason, Restore, StateRefused, read_machine, save_machine
from vmbus.saving.pages import MAX_CARRIED, collect, whole
from vmbus.wire.chunk import ChunkKind
from vmbus.wire.pfn_runs import PFN_LIMIT
from vmbus.wire.saved import SAVED_PAGES, SavedChannelRecords, SavedMemory, SavedPages, parse_record

from tests.unit.saving.model_channel import ModelChannel, chunks, identity, split
from tests.unit.saving.test_stream import (
    BUS,
    HYPERVISOR,
    Target,
    machine,
    new_machine,
    refused,
    saved,
    stream,
)

ONE = SavedPages((5, 9), (b"five", b""))


class Memory:
    """Guest memory of a new process; ``order``: the parts in the order in which they were applied."""

    def __init__(self, order: list[str], says: str | None = None) -> None:
        self.order = order
        self.says = says
        self.pages: dict[int, bytes] = {}

    def check_pages(self, pages: Sequence[SavedPages]) -> str | None:
        return self.says

    def apply_pages(self, pages: Sequence[SavedPages]) -> None:
        self.order.append("pages")
        for each in pages:
            self.pages.update(zip(each.pfns, map(whole, each.contents), strict=True))


class Ordered(Target):
    """A section that records when it is applied."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order

    def apply_restore(self, section: object) -> None:
        self.order.append("part")


def carried(pages: Sequence[SavedPages], **others: object) -> bytes:
    return save_machine(ChannelSaver(), [], pages=pages, **others).data  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.integers(0, PFN_LIMIT - 1), st.binary(max_size=100), max_size=80),
    st.integers(0, 4096),
)
def test_any_pages_come_back_as_they_were(found: dict[int, bytes], zeros: int) -> None:
    contents = {pfn: (bytes(zeros) + data)[:4096].ljust(4096, b"\0") for pfn, data in found.items()}
    memory = Memory([])
    state = read_machine(carried(collect(list(contents), contents.__getitem__)))
    Restore(ChannelSaver(), [], memory=memory).apply(state)
    assert memory.pages == contents


def test_so_many_go_along_and_no_more() -> None:
    content = random.Random(1).randbytes(4096)
    pages = collect(range(MAX_CARRIED + 50, 0, -1), lambda pfn: content)
    result = save_machine(ChannelSaver(), [], pages=pages)
    assert result.pages == tuple(range(1, MAX_CARRIED + 1))
    chunk_sizes = [len(chunk) for chunk in split(result.data)[1:-1]]
    assert max(chunk_sizes) < 16 * 4096 + 100  # a chunk stays small
    assert len(result.data) < 1 << 20


def test_pages_take_only_the_room_that_is_left() -> None:
    content = random.Random(1).randbytes(4096)
    pages = collect(range(1, 49), lambda pfn: content)
    alone = len(save_machine(ChannelSaver(), []).data)
    chunk = len(split(carried(pages))[1])
    assert save_machine(ChannelSaver(), [], pages=pages, limit=alone).pages == ()
    for count in (1, 2):
        for limit, wanted in (
            (alone + count * chunk, 16 * count),
            (alone + count * chunk - 1, 16 * count - 16),
        ):
            result = save_machine(ChannelSaver(), [], pages=pages, limit=limit)
            assert result.pages == tuple(range(1, wanted + 1))
            assert len(result.data) <= limit
            read_machine(result.data)
    with pytest.raises(StateRefused, match=f"{alone} bytes of state, at most {alone - 1}"):
        save_machine(ChannelSaver(), [], pages=pages, limit=alone - 1)


def test_pages_are_applied_before_anything_else() -> None:
    order: list[str] = []
    source, saver = machine(), ChannelSaver()
    data = save_machine(ChannelSaver(), source, hypervisor=HYPERVISOR, bus=BUS, pages=[ONE]).data
    memory = Memory(order)
    Restore(saver, new_machine(source, saver), Ordered(order), Ordered(order), memory).apply(
        read_machine(data)
    )
    assert order == ["pages", "part", "part"]
    assert memory.pages == {5: whole(b"five"), 9: bytes(4096)}


@pytest.mark.parametrize("refuses", ["memory", "no memory", "bus", "channel"])
def test_a_state_that_is_refused_writes_no_page(refuses: str) -> None:
    order: list[str] = []
    source, saver = machine(), ChannelSaver()
    data = save_machine(ChannelSaver(), source, hypervisor=HYPERVISOR, bus=BUS, pages=[ONE]).data
    channels = new_machine(source, saver)
    if refuses == "channel":
        channels[2].veto = "no such disk"
    memory = None if refuses == "no memory" else Memory(order, "no RAM" if refuses == "memory" else None)
    bus = Target("another version" if refuses == "bus" else None)
    with pytest.raises(StateRefused) as caught:
        Restore(saver, channels, Target(), bus, memory).apply(read_machine(data))
    assert not caught.value.changed
    assert order == [] and bus.applied == []


def test_a_state_without_pages_needs_no_memory() -> None:
    source, saver = machine(), ChannelSaver()
    Restore(saver, new_machine(source, saver), Target(), Target()).apply(read_machine(saved(source)))


@pytest.mark.parametrize(
    "pages",
    [
        pytest.param([SavedPages((), ())], id="none"),
        pytest.param([SavedPages((5,), ())], id="no content"),
        pytest.param([SavedPages((5,), (b"a", b"b"))], id="too much content"),
        pytest.param([SavedPages((5, 5), (b"a", b"a"))], id="one page twice"),
        pytest.param([SavedPages((6, 5), (b"a", b"b"))], id="not in order"),
        pytest.param([ONE, SavedPages((9,), (b"a",))], id="twice over two chunks"),
        pytest.param([ONE, SavedPages((6,), (b"a",))], id="chunks not in order"),
        pytest.param(
            [SavedPages(tuple(range(at, at + 43)), (b"",) * 43) for at in range(0, MAX_CARRIED + 1, 43)],
            id="too many",
        ),
    ],
)
def test_pages_that_contradict_each_other_are_refused(pages: list[SavedPages]) -> None:
    error = refused(stream(*((ChunkKind.PAGES, each) for each in pages)))
    assert error.reason == Reason.INCONSISTENT


def varint_list(*pages: int) -> bytes:
    """Return a page list with one run per page; pages must be less than 64 apart."""
    found, end = bytes([len(pages)]), 0
    for page in pages:
        found += bytes([(page - end) * 2, 0])
        end = page + 1
    return found


@pytest.mark.parametrize(
    ("record", "why"),
    [
        pytest.param(varint_list(1) + b"\1\4abc", "not a valid SavedPages", id="cut off"),
        pytest.param(varint_list(1) + b"\2\1a", "not a valid SavedPages", id="a content missing"),
        pytest.param(varint_list(1) + b"\1\1a!", "not the canonical form", id="something after it"),
        pytest.param(varint_list(1) + b"\1\2a\0", "without the zeros", id="zeros at the end"),
        pytest.param(varint_list(1) + b"\1\1\0", "without the zeros", id="a zero"),
        pytest.param(
            varint_list(1) + b"\1\x81\x20" + b"a" * 4097, "without the zeros", id="more than a page"
        ),
        pytest.param(b"\1\0\x40" + b"\1\1a", "65 pages, at most 64", id="more pages than a record has"),
        pytest.param(
            b"\1\0\xff\xff\xff\xff\xff\xff\x03\0", "at most 64", id="a run of thousands of millions of pages"
        ),
        pytest.param(
            b"\1\0\0" + b"\xff\xff\xff\xff\x0f", "not a valid SavedPages", id="millions of contents"
        ),
        pytest.param(b"\2\0\0\0\0" + b"\2\1a\1b", "not the canonical form", id="neighbours as two runs"),
    ],
)
def test_an_invalid_record_is_malformed(record: bytes, why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        parse_record(SAVED_PAGES, record)


@pytest.mark.parametrize("content", [bytes(4097), b"a" * 4097, b"a\0"])
def test_no_such_record_is_built(content: bytes) -> None:
    with pytest.raises(InternalError):
        SAVED_PAGES.build(SavedPages((1,), (content,)))


def test_pages_come_last_and_not_beside_memory_that_stays() -> None:
    pages = (ChunkKind.PAGES, ONE)
    records = SavedChannelRecords(identity(3), tuple(chunks(ModelChannel(identity(3)))))
    channel, bus = (ChunkKind.CHANNEL_RECORDS, records), (ChunkKind.BUS, BUS)
    stays = (ChunkKind.MEMORY, SavedMemory(identity().instance_id, 1, 2, 4096, (), 0, 1, b"digest"))
    read_machine(stream(bus, channel, pages))
    for parts in ((pages, bus), (pages, channel), (pages, stays), (stays, pages)):
        assert refused(stream(*parts)).reason == Reason.INCONSISTENT


def test_every_damaged_byte_of_pages_is_refused() -> None:
    data = carried([ONE])
    for at in range(len(data)):
        for bit in (1, 0x80):
            refused(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
    for size in range(len(data)):
        refused(data[:size])
