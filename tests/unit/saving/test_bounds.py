"""Memory that a short state can make the reader allocate is bounded: a run of many pages takes few bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from vmbus.saving import Reason, StateRefused, chunks, read_machine
from vmbus.saving import state as saving_state
from vmbus.saving.chunks import encode
from vmbus.saving.state import Assembly
from vmbus.wire.chunk import HEADER_SIZE, ChunkFlags, ChunkKind, build_chunk
from vmbus.wire.packet import GpaRange
from vmbus.wire.pfn_runs import MAX_PAGES
from vmbus.wire.saved import (
    SAVED_PACKET,
    ChannelIdentity,
    SavedChannelRecords,
    SavedEnd,
    SavedMachine,
    SavedMemory,
    SavedOutgoing,
    SavedPacket,
)

from tests.unit.saving.test_golden import IDENTITY, MEMORY, STATE

FEW = 2
"""Packets of the largest size that the test allows, so that it is quick."""
MAX_MEMORY = 60 << 20
"""Bytes; each packet alone takes 5 MiB."""
HEADER = replace(STATE.channel, identity=ChannelIdentity(*IDENTITY, 0))
PACKET = SavedPacket(
    9, 1, 0xA2, b"", (GpaRange(MAX_PAGES * 4096, 0, tuple(range(1 << 33, (1 << 33) + MAX_PAGES))),)
)
LARGE = replace(MEMORY, pages=PACKET.ranges[0].pfns)


def run(records: Sequence[tuple[ChunkKind, Any]]) -> bytes:
    """One save run; equal records next to each other are built once."""
    found, last = [], None
    for index, (kind, record) in enumerate(records):
        if last is None or last[0] is not record:
            last = (record, encode(kind, record, save_id=1, index=0, last=False)[HEADER_SIZE:])
        found.append(_chunk(kind, last[1], index, index + 1 == len(records)))
    return b"".join(found)


def _chunk(kind: ChunkKind, record: bytes, index: int, last: bool) -> bytes:
    return build_chunk(kind, record, save_id=1, index=index, flags=ChunkFlags.LAST if last else 0)


def machine(*parts: tuple[ChunkKind, Any]) -> bytes:
    first = [(ChunkKind.MACHINE, SavedMachine("w")), *parts]
    size = len(run([*first, (ChunkKind.END, SavedEnd(0, 0))])) - HEADER_SIZE - 8
    return run([*first, (ChunkKind.END, SavedEnd(len(first), size))])


def channel(number: int, *parts: tuple[ChunkKind, Any]) -> tuple[ChunkKind, Any]:
    identity = ChannelIdentity(*IDENTITY, number)
    header = (ChunkKind.CHANNEL, replace(HEADER, identity=identity))
    return ChunkKind.CHANNEL_RECORDS, SavedChannelRecords(identity, (run([header, *parts]),))


def many_memories() -> bytes:
    return machine(*[(ChunkKind.MEMORY, LARGE)] * 100)


def many_taken() -> bytes:
    return machine(channel(0, *[(ChunkKind.TAKEN, PACKET)] * 100))


def many_sent() -> bytes:
    record = SavedOutgoing(SAVED_PACKET.build(PACKET), b"")
    return machine(channel(0, *[(ChunkKind.OUTSTANDING, record)] * 100))


def many_channels() -> bytes:
    each = [(ChunkKind.TAKEN, PACKET)] * FEW
    return machine(*(channel(number, *each) for number in range(20)))


@pytest.fixture(autouse=True)
def _few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks.MAX_PACKET_PAGES > FEW * MAX_PAGES
    monkeypatch.setattr(chunks, "MAX_PACKET_PAGES", FEW * MAX_PAGES)


@pytest.mark.parametrize("make", [many_memories, many_taken, many_sent, many_channels])
def test_too_many_pages_are_refused_before_they_are_allocated(make: Callable[[], bytes]) -> None:
    data = make()
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(StateRefused) as refused:
            read_machine(data)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.reason is Reason.INCONSISTENT
    assert most < MAX_MEMORY


def test_as_many_pages_as_a_guest_can_name_are_taken() -> None:
    each = [(ChunkKind.TAKEN, PACKET)] * FEW
    state = read_machine(machine(channel(0, *each), (channel(1))))
    assert len(state.channels[0].state.taken) == len(each)


def test_each_chunk_of_a_channel_is_looked_at_once_however_it_is_cut_into_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 MiB of buffers of one chunk each took 105 seconds, four times as long as QEMU waits."""
    seen = 0

    class Places(dict[ChunkKind, int]):
        def __getitem__(self, kind: ChunkKind) -> int:
            nonlocal seen
            seen += 1
            return super().__getitem__(kind)

    monkeypatch.setattr(saving_state, "_PLACES", Places(saving_state._PLACES))
    count = 4000
    header = (ChunkKind.CHANNEL, replace(HEADER, identity=ChannelIdentity(*IDENTITY, 0)))
    taken = (ChunkKind.TAKEN, SavedPacket(6, 1, 0xA2, b""))
    data = run([header, *[taken] * count])
    size = (len(data) - len(run([header]))) // count
    first = len(data) - size * count
    records = (data[:first], *(data[at : at + size] for at in range(first, len(data), size)))
    identity = ChannelIdentity(*IDENTITY, 0)
    state = read_machine(machine((ChunkKind.CHANNEL_RECORDS, SavedChannelRecords(identity, records))))
    assert len(state.channels[0].state.taken) == count
    assert seen < 4 * count


def test_a_refused_buffer_has_no_effect_on_those_before_it() -> None:
    whole = run([(ChunkKind.CHANNEL, HEADER), *[(ChunkKind.TAKEN, SavedPacket(6, 1, 0xA2, b""))] * 3])
    size = (len(whole) - len(run([(ChunkKind.CHANNEL, HEADER)]))) // 3
    begin, *rest = whole[: -3 * size], *(whole[len(whole) - at * size :][:size] for at in (3, 2, 1))
    assembly = Assembly().take(begin).take(rest[0])
    longer = assembly.take(rest[1])
    with pytest.raises(StateRefused):
        assembly.take(rest[2])
    again = assembly.take(rest[1]).take(rest[2])
    assert longer.take(rest[2]).state() == again.state() == Assembly().take(whole).state()
    assert not assembly.complete


def test_one_file_may_be_named() -> None:
    assert isinstance(LARGE, SavedMemory)
    assert read_machine(machine((ChunkKind.MEMORY, LARGE))).memory == LARGE
