"""Reads a journal that another process wrote, whenever that process ended.

A half is valid if the snapshot at its beginning is complete; the valid half with the higher sequence number counts,
up to its last transaction. A mark of zero ends it. A writer that is killed leaves a mark of zero, or, on a machine
that does not store a word at once, some of the mark's bytes: the transaction was not complete. Any other mark that
its record does not match was not left by a writer: the memory was damaged, and is refused.

The memory may be written by anybody who has it. Each record is copied once, checked, and only the copy is used. All
lengths are checked before memory is allocated: a copy of both halves at most, and some 200 bytes for each key.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

from vmbus.errors import MalformedError, VmbusError
from vmbus.wire.journal import (
    ENTRY_SIZE,
    ENTRY_STRUCT,
    JOURNAL_HEADER,
    MAGIC,
    MARK_SIZE,
    MAX_CHANGES,
    MAX_KEY,
    MAX_KEYS,
    MAX_SIZE,
    MAX_VALUE,
    MIN_SIZE,
    PAGE,
    RECORD_SIZE,
    REMOVED,
    SUMMED_STRUCT,
    VERSION,
    JournalHeader,
    half_size,
    incarnation_sum,
    mark_of,
)


class JournalRefused(VmbusError):
    """A memory whose journal cannot be used. ``reason``: a stable name; ``detail``: a sentence.

    ``empty``: there is no journal; ``foreign``: something else is there; ``version``: it is of another version;
    ``truncated``: the memory is shorter than its journal; ``size``: it is longer, or of an impossible size;
    ``damaged``: its contents are not what a writer leaves, wherever it was killed.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal has: ``values`` after the transaction number ``sequence``, and where a writer goes on."""

    values: Mapping[bytes, bytes]
    sequence: int
    incarnation: int
    half: int
    """The half that counts: 0 or 1."""
    snapshot: int
    """Bytes of its snapshot."""
    end: int
    """Offset in the memory, in bytes, of the first mark that is not of a complete record."""


def read(memory: mmap.mmap | memoryview) -> Contents:
    """Return the contents of a journal after its last complete transaction. Raises :class:`JournalRefused`."""
    with memoryview(memory) as given, given.cast("B") as view:
        header = _header(view)
        return _Reader(view, header).contents()


def _header(view: memoryview) -> JournalHeader:
    size = len(view)
    if size < JOURNAL_HEADER.size:
        raise JournalRefused("truncated", f"the memory has {size} bytes, which is less than a header")
    raw = bytes(view[: JOURNAL_HEADER.size])
    if not any(raw[: len(MAGIC)]):
        raise JournalRefused("empty", "the memory has no journal: its first eight bytes are zero")
    try:
        header = JOURNAL_HEADER.parse(raw)
    except MalformedError as error:
        raise JournalRefused(
            "foreign", f"the memory has no journal: it begins with {raw[: len(MAGIC)]!r}, not with {MAGIC!r}"
        ) from error
    if header.version != VERSION:
        raise JournalRefused("version", f"the journal has version {header.version}, expected {VERSION}")
    if header.summed() != header:
        raise JournalRefused("damaged", "the checksum of the journal's header is wrong")
    if header.size > size:
        raise JournalRefused("truncated", f"the memory has {size} bytes, its journal {header.size}")
    if header.size != size or not MIN_SIZE <= size <= MAX_SIZE:
        raise JournalRefused("size", f"the memory has {size} bytes, but its header says {header.size}")
    return header


class _Reader:
    """The reading of one journal."""

    def __init__(self, view: memoryview, header: JournalHeader) -> None:
        self._view = view
        self._incarnation = header.incarnation
        self._sum = incarnation_sum(header.incarnation)
        self._half_size = half_size(header.size)
        self._values: dict[bytes, bytes] = {}

    def contents(self) -> Contents:
        """Return what is stored. Raises :class:`JournalRefused`."""
        snapshots = [self._record(start, start + self._half_size) for start in map(self._start, (0, 1))]
        half = max((0, 1), key=lambda each: _sequence(snapshots[each]))
        newest = snapshots[half]
        if newest is None:
            raise JournalRefused("damaged", "neither half of the journal has a complete snapshot")
        snapshots.clear()  # the other one is not needed: as much memory as a half
        self._apply(newest, self._start(half), MAX_KEYS)
        sequence, length = _sequence(newest), MARK_SIZE + len(newest)
        del newest
        at, end = self._start(half) + length, self._start(half) + self._half_size
        while (record := self._record(at, end)) is not None and _sequence(record) == sequence + 1:
            self._apply(record, at, MAX_CHANGES)
            sequence += 1
            at += MARK_SIZE + len(record)
        return Contents(self._values, sequence, self._incarnation, half, length, at)

    def _start(self, half: int) -> int:
        return PAGE + half * self._half_size

    def _record(self, at: int, end: int) -> bytes | None:
        """Return the bytes behind the mark of the record at ``at``; ``None`` if there is no complete one.

        Between it and ``end`` there is always room for the next mark. Raises :class:`JournalRefused`.
        """
        head = bytes(self._view[at : min(at + RECORD_SIZE, end)])
        mark = head[:MARK_SIZE]
        if not any(mark):
            return None
        length = SUMMED_STRUCT.unpack_from(head, MARK_SIZE)[1] if len(head) == RECORD_SIZE else 0
        if not RECORD_SIZE <= length <= end - MARK_SIZE - at or length % 8:
            raise JournalRefused("damaged", f"the record at {at:#x} has an impossible length")
        record = bytes(self._view[at + MARK_SIZE : at + length])
        expected = mark_of(record, self._sum).to_bytes(MARK_SIZE, "little")
        if mark == expected:
            return record
        if all(found in (0, right) for found, right in zip(mark, expected, strict=True)):
            return None
        raise JournalRefused("damaged", f"the checksum of the record at {at:#x} is wrong")

    def _apply(self, record: bytes, start: int, limit: int) -> None:
        """Apply the entries of a record, ``limit`` at most. Raises :class:`JournalRefused`."""
        count = SUMMED_STRUCT.unpack_from(record)[2]
        if count > limit:
            raise _malformed(start, f"{count} entries")
        values = self._values
        at, end = SUMMED_STRUCT.size, len(record)
        for _ in range(count):
            if end - at < ENTRY_SIZE:
                raise _malformed(start, "an entry beyond its end")
            key_size, flags, value_size = ENTRY_STRUCT.unpack_from(record, at)
            at += ENTRY_SIZE
            if not 0 < key_size <= MAX_KEY or value_size > MAX_VALUE or key_size + value_size > end - at:
                raise _malformed(start, f"a key of {key_size} and a value of {value_size} bytes")
            key = record[at : at + key_size]
            at += key_size
            if flags == 0:
                values[key] = record[at : at + value_size]
            elif flags == REMOVED and value_size == 0:
                values.pop(key, None)
            else:
                raise _malformed(start, f"an entry with the flags {flags:#x}")
            at += value_size
        if end - at >= 8 or any(record[at:]):
            raise _malformed(start, "bytes behind its last entry")
        if len(values) > MAX_KEYS:
            raise _malformed(start, f"{len(values)} keys after it")


def _sequence(record: bytes | None) -> int:
    """Return the sequence number of a record; -1 for none."""
    return -1 if record is None else int(SUMMED_STRUCT.unpack_from(record)[0])


def _malformed(at: int, what: str) -> JournalRefused:
    return JournalRefused("damaged", f"the record at {at:#x} has {what}")
