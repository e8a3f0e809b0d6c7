"""What is not a journal, or was manipulated, is refused with a reason, and costs no more memory than it has."""

from __future__ import annotations

import mmap
import os
import tracemalloc
from collections.abc import Sequence

import pytest
from vmbus.machine.journal.store import Journal, JournalFull, JournalRefused, read
from vmbus.wire import journal as wire

from tests.unit.machine.journal.forged import entry, memory_with, record
from tests.unit.machine.journal.recorded import SMALL, applied, some_session, state

MIB = 1 << 20


def refusal(memory: bytearray | bytes | mmap.mmap) -> JournalRefused:
    with pytest.raises(JournalRefused) as refused:
        read(memory if isinstance(memory, mmap.mmap) else memoryview(memory))
    assert str(refused.value) == f"{refused.value.reason}: {refused.value.detail}"
    return refused.value


def test_the_layout_is_as_another_writer_writes_it() -> None:
    memory = memory_with(
        [record(1)],
        [
            record(7, entry(b"a", b"1"), entry(b"b", b"2")),
            record(8, entry(b"a", None), entry(b"c", b"3")),
            record(9, entry(b"d", b"")),
        ],
    )
    assert state(memory) == ({b"b": b"2", b"c": b"3", b"d": b""}, 9)
    found = read(memoryview(memory))
    assert (found.half, found.end) == (1, wire.PAGE * 2 + 3 * 24 + 24 + 24 + 16)
    Journal.resume(memoryview(memory), found).commit({b"d": b"4"})
    assert memory[found.end :].startswith(record(10, entry(b"d", b"4")) + bytes(8))


def test_the_sizes_of_the_layout_stay() -> None:
    assert (wire.JOURNAL_HEADER.size, wire.RECORD_SIZE, wire.ENTRY_SIZE) == (32, 24, 8)
    assert wire.half_size(32 * MIB) == 16 * MIB - wire.PAGE


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        pytest.param(bytearray(), "truncated", id="nothing"),
        pytest.param(memory_with([record(1)])[:31], "truncated", id="part-of-a-header"),
        pytest.param(bytearray(SMALL), "empty", id="zeros"),
        pytest.param(b"\x7fELF" + bytes(SMALL), "foreign", id="foreign"),
        pytest.param(memory_with([record(1)], version=2), "version", id="version"),
        pytest.param(memory_with([record(1)])[:-1], "truncated", id="one-byte-short"),
        pytest.param(memory_with([record(1)])[: wire.PAGE], "truncated", id="a-page"),
        pytest.param(memory_with([record(1)]) + bytes(1), "size", id="one-byte-more"),
        pytest.param(memory_with([record(1)], says=1 << 63), "truncated", id="says-huge"),
        pytest.param(memory_with([record(1)], says=0), "size", id="says-nothing"),
        pytest.param(memory_with([record(1)], size=SMALL)[:8192], "truncated", id="half"),
        pytest.param(memory_with(size=8192), "size", id="too-small"),
        pytest.param(memory_with(), "damaged", id="no-half"),
        pytest.param(memory_with([], []), "damaged", id="no-half-valid"),
    ],
)
def test_what_is_no_journal_is_refused(memory: bytearray | bytes, reason: str) -> None:
    assert refusal(memory).reason == reason


@pytest.mark.parametrize(
    ("records", "detail"),
    [
        ([record(1, length=16)], "impossible length"),
        ([record(1, length=25)], "impossible length"),
        ([record(1, length=1 << 31)], "impossible length"),
        ([record(1, length=4096)], "impossible length"),
        ([record(1, length=32)], "checksum"),
        ([record(1, incarnation=5)], "checksum"),
        ([record(1, count=1)], "entry beyond its end"),
        ([record(1, count=0xFFFFFFFF)], "4294967295 entries"),
        ([record(1, count=wire.MAX_KEYS + 1)], "65537 entries"),
        ([record(1), record(2, count=wire.MAX_CHANGES + 1)], "131073 entries"),
        ([record(1, entry(b"", b"value"))], "a key of 0"),
        ([record(1, entry(b"k" * 65, b""))], "a key of 65"),
        ([record(1, entry(b"k", b"v", sizes=(1, 0xFFFFFFFF)))], "a value of 4294967295"),
        ([record(1, entry(b"k", b"v", sizes=(1, MIB + 1)))], "a value of 1048577"),
        ([record(1, entry(b"k", b"v", sizes=(1, 9)))], "a value of 9"),
        ([record(1, entry(b"k", b"v", flags=2))], "flags 0x2"),
        ([record(1), record(2, entry(b"k", b"v", flags=1))], "flags 0x1"),
        ([record(1, entry(b"k", b"v"), count=0)], "bytes behind"),
        ([record(1, entry(b"k", b"v"), padding=bytes(14))], "bytes behind"),
        ([record(1, entry(b"k", b"v"), padding=b"\0\0\0\0\0\1")], "bytes behind"),
    ],
)
def test_a_record_that_a_writer_never_makes_is_refused(records: Sequence[bytes], detail: str) -> None:
    for memory in (memory_with(records), memory_with([], records), memory_with([record(0)], records)):
        found = refusal(memory)
        assert found.reason == "damaged"
        assert detail in found.detail


def test_a_mark_at_the_very_end_of_a_half_has_no_record() -> None:
    room = wire.half_size(SMALL) - wire.MARK_SIZE - 2 * wire.RECORD_SIZE - wire.ENTRY_SIZE
    memory = memory_with([record(1), record(2, entry(b"k", bytes(room - 1)))])
    found = read(memoryview(memory))
    assert (found.sequence, found.end) == (2, 2 * wire.PAGE - wire.MARK_SIZE)
    memory[found.end : found.end + 4] = wire.TAG.to_bytes(4, "little")
    assert "impossible length" in refusal(memory).detail


def test_there_is_no_transaction_after_the_last_number() -> None:
    last = (1 << 64) - 1
    memory = memory_with([record(last - 1), record(last, entry(b"k", b"v"))])
    before = bytes(memory)
    journal = Journal.resume(memoryview(memory), read(memoryview(memory)))
    with pytest.raises(JournalFull, match="no transaction after number 18446744073709551615"):
        journal.commit({b"k": None})
    assert memory == before
    assert state(memory) == (journal.values, last)


def test_any_byte_that_is_changed_is_noticed_or_has_no_effect() -> None:
    """The values are those of now or, for some bytes of a mark, those of an earlier moment; never any others."""
    memory = bytearray(SMALL)
    journal = Journal.create(memoryview(memory))
    history = [dict(journal.values)]
    for changes in some_session(75, 4, longest=200):
        journal.commit(changes)
        history.append(applied(history[-1], changes))
    now = (history[-1], len(history))
    assert state(memory) == now
    found = read(memoryview(memory))
    start = wire.PAGE + found.half * wire.half_size(SMALL)
    live = [*range(wire.JOURNAL_HEADER.size), *range(start, found.end + 8)]
    marks = set(range(8)) | set(_marks(memory, start, found.end))
    refused = 0
    for offset in range(SMALL):
        for flipped in (0xFF, 1 << offset % 8):
            memory[offset] ^= flipped
            try:
                values, sequence = state(memory)
            except JournalRefused:
                refused += 1
            else:
                assert values == history[sequence - 1]
                assert sequence == now[1] or offset in marks
                assert offset not in live or offset in marks
            memory[offset] ^= flipped
    assert refused > 1.9 * len(live)
    assert state(memory) == now


def _marks(memory: bytearray, start: int, end: int) -> list[int]:
    """Return the offsets of all bytes of marks in the records from ``start`` to ``end``."""
    found: list[int] = []
    at = start
    while at < end:
        found += range(at, at + wire.MARK_SIZE)
        at += wire.SUMMED_STRUCT.unpack_from(memory, at + wire.MARK_SIZE)[1]
    return found


def test_a_lying_memory_costs_no_more_than_its_size() -> None:
    size = 4 * MIB
    half = wire.half_size(size)
    full = [entry(b"%d" % each, bytes(MIB // 2 - wire.PAGE)) for each in range(4)]
    many = [entry(each.to_bytes(3, "little"), b"") for each in range(wire.MAX_KEYS + 1)]
    again = [entry(each.to_bytes(4, "little"), b"") for each in range(wire.MAX_KEYS)]
    for memory, most, accepted in [
        (memory_with([record(1, *full)], [record(2, *full)], size=size), size + MIB, True),
        (memory_with([record(1, length=half + 8)], size=size), MIB // 4, False),
        (memory_with([record(1, *many[:10], count=1 << 31)], size=size), MIB // 4, False),
        (memory_with([record(1, *many)], size=size), MIB, False),
        (memory_with([record(1, *many[1:]), record(2, *again)], size=size), 5 * size, False),
    ]:
        view = memoryview(memory)
        tracemalloc.start()
        try:
            read(view)
        except JournalRefused:
            assert not accepted
        else:
            assert accepted
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < most


def test_a_memory_that_cannot_be_written_is_read() -> None:
    descriptor = os.memfd_create("journal")
    try:
        os.ftruncate(descriptor, SMALL)
        with mmap.mmap(descriptor, SMALL) as memory:
            journal = Journal.create(memory)
            journal.commit({b"key": b"value"})
            journal.close()
        with mmap.mmap(descriptor, SMALL, prot=mmap.PROT_READ) as memory:
            assert dict(read(memory).values) == {b"key": b"value"}
        with mmap.mmap(descriptor, SMALL - wire.PAGE) as memory:
            assert refusal(memory).reason == "truncated"
    finally:
        os.close(descriptor)
