"""A journal has, at every moment of its writer, the values of before a transaction or those of after it."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError
from vmbus.machine.journal.store import MIN_LOG, Journal, JournalFull, JournalRefused, read
from vmbus.wire import journal as wire

from tests.unit.machine.journal.recorded import (
    SMALL,
    Changes,
    Store,
    applied,
    recorded,
    some_session,
    state,
    steps_of,
    torn,
)

ROOT = Path(__file__).parents[4]
MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """A sparse file in memory, 32 MiB."""
    descriptor = os.memfd_create("journal")
    try:
        os.ftruncate(descriptor, 32 * MIB)
        with mmap.mmap(descriptor, 32 * MIB) as mapping:
            yield mapping
    finally:
        os.close(descriptor)


def test_values_are_read_by_a_successor(memory: mmap.mmap) -> None:
    journal = Journal.create(memory)
    assert (dict(journal.values), journal.sequence) == ({}, 1)
    journal.commit({b"a": b"1", b"b": b"", b"k" * 64: bytes(MIB)})
    journal.commit({b"a": None, b"absent": None, b"c": b"3"})
    journal.commit({})
    journal.close()
    found = read(memory)
    assert dict(found.values) == {b"b": b"", b"c": b"3", b"k" * 64: bytes(MIB)}
    assert found.sequence == 3


def test_every_store_leaves_what_was_before_or_what_is_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a store was done when the writer was killed."""
    stores = recorded(monkeypatch)
    memory = bytearray(SMALL)
    journal = Journal.create(memoryview(memory))
    image = bytearray(memory)
    halves = set()
    for number, step in enumerate(steps_of(journal, stores, some_session(60, 1))):
        start, data = step.store.offset, step.store.data
        before, after = (step.before, step.sequence - 1), (step.after, step.sequence)
        assert state(image) == before
        kept = bytes(image[start : start + len(data)])
        for order in torn(step.store, number):
            image[start : start + len(data)] = kept
            for index in order:
                image[start + index] = data[index]
                found = state(image)
                assert found == before or (step.last and step.store.word and found == after)
        assert image[start : start + len(data)] == data
        assert state(image) == (after if step.last else before)
        halves.add(read(memoryview(image)).half)
    assert image == memory
    assert halves == {0, 1}


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_every_store_of_the_creation(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    stores = recorded(monkeypatch)
    memory = bytearray(SMALL)
    if used:
        steps_of(Journal.create(memoryview(memory)), stores, some_session(100, 2))
        assert state(memory) != ({}, 1)
    image = bytearray(memory)
    stores.clear()
    Journal.create(memoryview(memory))
    for done in stores:
        for offset, byte in enumerate(done.data):
            image[done.offset + offset] = byte
            if done is stores[-1] and offset == len(done.data) - 1:
                assert state(image) == ({}, 1)
                break
            with pytest.raises(JournalRefused) as refused:
                read(memoryview(image))
            assert refused.value.reason in ("empty", "foreign")
    assert image == memory


def test_a_successor_goes_on_after_a_death_at_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the predecessor left unfinished, or in an earlier round, is ever taken for a record."""
    stores = recorded(monkeypatch)
    memory = bytearray(SMALL)
    journal = Journal.create(memoryview(memory))
    image = bytearray(memory)
    for number, step in enumerate(steps_of(journal, stores, some_session(50, 3))):
        data = step.store.data
        for part in {0, 1, len(data) // 2, len(data) - 1, len(data)}:
            left = bytearray(image)
            left[step.store.offset : step.store.offset + part] = data[:part]
            found = read(memoryview(left))
            values = dict(found.values)
            second = bytearray(left)
            stores.clear()
            resumed = Journal.resume(memoryview(left), found)
            assert state(left) == (values, found.sequence)
            for count, changes in enumerate(some_session(12, number), 1):
                resumed.commit(changes)
                if count == 1:  # this one may die in it, too
                    for done in stores:
                        assert state(second) == (values, found.sequence)
                        middle = len(done.data) // 2
                        second[done.offset : done.offset + middle] = done.data[:middle]
                        assert state(second) == (values, found.sequence)
                        second[done.offset : done.offset + len(done.data)] = done.data
                    assert second == left
                values = applied(values, changes)
                assert state(left) == (values, found.sequence + count)
        image[step.store.offset : step.store.offset + len(data)] = data


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[list[Changes], int, int]]:
    """Return writers that follow each other: transactions, and the store and the part of it at which one dies."""
    keys = st.sampled_from([b"a", b"b", b"c", b"a long key" * 6])
    values = st.one_of(st.none(), st.binary(max_size=40), st.integers(0, 1500).map(bytes))
    changes: st.SearchStrategy[Changes] = st.dictionaries(keys, values, max_size=4)
    life = st.tuples(st.lists(changes, max_size=25), st.integers(0, 120), st.integers(0, 1 << 32))
    return draw(st.lists(life, min_size=1, max_size=5))


@given(lives=lives(), leftovers=st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=150)
def test_any_lives_and_deaths(lives: list[tuple[list[Changes], int, int]], leftovers: int) -> None:
    """In memory that had anything in it before, writers die at any store; a full journal changes nothing."""
    memory = bytearray(random.Random(leftovers).randbytes(SMALL))
    with pytest.MonkeyPatch.context() as monkeypatch:
        stores = recorded(monkeypatch)
        Journal.create(memoryview(memory))
        model: dict[bytes, bytes] = {}
        sequence = 1
        for session, death, part in lives:
            found = read(memoryview(memory))
            assert (dict(found.values), found.sequence) == (model, sequence)
            journal = Journal.resume(memoryview(memory), found)
            for changes in session:
                before = bytearray(memory)
                stores.clear()
                after = applied(model, changes)
                try:
                    journal.commit(changes)
                except JournalFull:
                    assert memory == before
                    needed = sum(wire.ENTRY_SIZE + len(key) + len(value) for key, value in after.items())
                    assert needed + wire.RECORD_SIZE > wire.half_size(SMALL) - wire.MARK_SIZE
                    continue
                if not stores:
                    assert not changes
                    continue
                if death < len(stores):
                    memory[:] = before
                    for done in stores[:death]:
                        memory[done.offset : done.offset + len(done.data)] = done.data
                    _store_some(memory, stores[death], part)
                    found = read(memoryview(memory))
                    assert (found.values, found.sequence) in (
                        [(model, sequence), (after, sequence + 1)]
                        if death == len(stores) - 1
                        else [(model, sequence)]
                    )
                    model, sequence = dict(found.values), found.sequence
                    break
                death -= len(stores)
                model, sequence = after, sequence + 1
                assert journal.values == model
                assert state(memory) == (model, sequence)


def _store_some(memory: bytearray, done: Store, seed: int) -> None:
    """Store any bytes of a store."""
    rng = random.Random(seed)
    for offset, byte in enumerate(done.data):
        if rng.random() < 0.5:
            memory[done.offset + offset] = byte


def test_a_record_of_an_earlier_round_is_not_the_next_one() -> None:
    """Even where the zero behind the last record is lost: its sequence number is too low."""
    memory = bytearray(SMALL)
    journal = Journal.create(memoryview(memory))
    count = 0
    while read(memoryview(memory)).half == 0:
        count += 1
        journal.commit({b"key": b"%08d" % count})
    earlier = bytes(memory)
    while read(memoryview(memory)).half == 1:
        journal.commit({b"key": b"changed!"})
    journal.commit({b"key": b"12345678"})
    found = read(memoryview(memory))
    assert found.half == 0
    # The first snapshot was empty, so the records of this round are further behind.
    shift = found.snapshot - wire.RECORD_SIZE
    old = next(
        earlier[at:]
        for at in range(found.end - shift - 64, found.end, 8)
        if int.from_bytes(earlier[at : at + 4], "little") == wire.TAG
    )
    length = wire.SUMMED_STRUCT.unpack_from(old, wire.MARK_SIZE)[1]
    memory[found.end : found.end + length] = old[:length]
    assert state(memory) == ({b"key": b"12345678"}, found.sequence)
    Journal.resume(memoryview(memory), read(memoryview(memory))).commit({b"key": b"next"})
    assert state(memory) == ({b"key": b"next"}, found.sequence + 1)


def test_a_record_of_another_incarnation_is_never_taken() -> None:
    memory = bytearray(SMALL)
    journal = Journal.create(memoryview(memory))
    journal.commit({b"key": b"of the first"})
    old = bytes(memory)
    Journal.create(memoryview(memory))
    end = read(memoryview(memory)).end
    memory[end : end + 64] = old[end : end + 64]
    with pytest.raises(JournalRefused, match="checksum") as refused:
        read(memoryview(memory))
    assert refused.value.reason == "damaged"


def test_a_snapshot_is_written_when_the_log_has_grown(memory: mmap.mmap) -> None:
    """After 256 KiB of changes, or four times the snapshot."""
    journal = Journal.create(memory)
    journal.commit({b"base": bytes(100)})

    def log_before_the_switch() -> int:
        half, last = read(memory).half, 0
        while (found := read(memory)).half == half:
            last = found.end - wire.PAGE - half * wire.half_size(len(memory)) - found.snapshot
            for _ in range(20):
                journal.commit({b"key": bytes(1000)})
        return last

    assert MIN_LOG - 21 * 1100 < log_before_the_switch() <= MIN_LOG + 1100
    journal.commit({b"base%d" % each: bytes(MIB // 8) for each in range(2)})
    log_before_the_switch()
    snapshot = read(memory).snapshot
    assert snapshot > MIB // 4
    assert 4 * snapshot - 21 * 1100 < log_before_the_switch() <= 4 * snapshot + 1100
    assert len(read(memory).values) == 4


def test_only_pages_that_are_needed_are_touched() -> None:
    descriptor = os.memfd_create("journal")
    try:
        os.ftruncate(descriptor, 32 * MIB)
        with mmap.mmap(descriptor, 32 * MIB) as mapping:
            journal = Journal.create(mapping)
            assert os.fstat(descriptor).st_blocks * 512 == 3 * wire.PAGE
            read(mapping)
            assert os.fstat(descriptor).st_blocks * 512 == 3 * wire.PAGE
            for number in range(10_000):
                journal.commit({b"key%d" % (number % 10): bytes(200)})
            assert os.fstat(descriptor).st_blocks * 512 < 2 * MIN_LOG + 16 * wire.PAGE
            journal.close()
    finally:
        os.close(descriptor)


def test_a_full_journal_stays_usable() -> None:
    memory = bytearray(4 * MIB)
    journal = Journal.create(memoryview(memory))
    for number in range(100):
        before = bytes(memory)
        values = dict(journal.values)
        try:
            journal.commit({b"%d" % number: bytes(200_000), b"last": b"%d" % number})
        except JournalFull:
            break
    else:
        pytest.fail("the journal was never full")
    assert number > 8  # 2 MiB less two pages
    assert memory == before
    assert journal.values == values
    assert state(memory) == (values, journal.sequence)
    journal.commit({b"0": None})
    journal.commit({b"100": bytes(200_000), b"last": b"!"})
    assert journal.values == read(memoryview(memory)).values
    assert journal.values[b"last"] == b"!"


def test_what_never_fits_is_refused(memory: mmap.mmap) -> None:
    journal = Journal.create(memory)
    journal.commit({b"key": b"value"})
    with pytest.raises(JournalFull, match="1048577 bytes"):
        journal.commit({b"key": None, b"large": bytes(MIB + 1)})
    for key in (b"", bytes(65)):
        with pytest.raises(InternalError, match="a key of the journal"):
            journal.commit({key: b"value"})
    with pytest.raises(JournalFull, match="65536 keys"):
        journal.commit({each.to_bytes(3, "big"): b"" for each in range(wire.MAX_KEYS)})
    assert journal.values == read(memory).values == {b"key": b"value"}
    for size in (0, SMALL - 1, wire.MAX_SIZE + 1):
        with pytest.raises(JournalFull, match="of memory, not"):
            Journal.create(mmap.mmap(-1, size) if size else memoryview(b""))


def test_as_many_keys_as_there_may_be_can_be_replaced_by_others(memory: mmap.mmap) -> None:
    journal = Journal.create(memory)
    first: Changes = {each.to_bytes(3, "big"): b"1" for each in range(wire.MAX_KEYS)}
    second: Changes = {each.to_bytes(4, "big"): b"2" for each in range(wire.MAX_KEYS)}
    journal.commit(first)
    with pytest.raises(JournalFull, match="65536 keys"):
        journal.commit({b"one more": b""})
    journal.commit({**second, **dict.fromkeys(first)})
    assert journal.values == read(memory).values == second
    with pytest.raises(JournalFull, match="131072 changes"):
        journal.commit({each.to_bytes(4, "big"): None for each in range(wire.MAX_CHANGES + 1)})


WRITER = """
    import mmap, os, sys
    from vmbus.machine.journal.store import Journal, read
    with mmap.mmap(int(sys.argv[1]), 0) as memory:
        found = read(memory)
        journal = Journal.resume(memory, found)
        number = int.from_bytes(found.values.get(b"a", b""), "little")
        while True:
            number += 1
            word = number.to_bytes(8, "little")
            fill = word * (number % 500)
            journal.commit({b"a": word, b"b": word, b"x%d" % (number % 3): fill if number % 5 else None})
            os.write(1, word)
"""


def test_a_process_that_is_killed_loses_nothing_that_it_had_committed() -> None:
    descriptor = os.memfd_create("journal")
    try:
        os.ftruncate(descriptor, 64 << 10)
        memory = mmap.mmap(descriptor, 64 << 10)
        Journal.create(memory).close()
        rng = random.Random(1)
        last = 0
        for _ in range(8):
            with subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(WRITER), str(descriptor)],
                cwd=ROOT / "emulator",
                stdout=subprocess.PIPE,
                pass_fds=[descriptor],
            ) as process:
                assert process.stdout is not None
                for _ in range(rng.randrange(1, 400)):
                    told = process.stdout.read(8)
                    assert len(told) == 8, "the writer ended by itself"
                process.kill()
                process.wait(timeout=20)
                rest = process.stdout.read()
            told = rest[len(rest) // 8 * 8 - 8 :][:8] if len(rest) >= 8 else told
            found = read(memory)
            number = int.from_bytes(found.values[b"a"], "little")
            assert found.values[b"b"] == found.values[b"a"]
            assert int.from_bytes(told, "little") <= number <= int.from_bytes(told, "little") + 1
            assert number > last
            assert found.sequence == number + 1
            for each in range(max(1, number - 2), number + 1):
                expected = each.to_bytes(8, "little") * (each % 500) if each % 5 else None
                assert found.values.get(b"x%d" % (each % 3)) == expected
            last = number
        memory.close()
    finally:
        os.close(descriptor)
