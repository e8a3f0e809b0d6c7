"""Writes a journal: values by key, in memory that outlives this process.

    journal = Journal.create(memory)          the first process
    journal.commit({b"a": b"1", b"b": None})  all of it is stored, or nothing
    journal = Journal.resume(memory, read(memory))    the next one, after a death

The order of the stores is all that makes the memory readable at every moment (x86: another process sees them in the
order of the program, whenever this one is killed). A commit

1. stores zero where the mark of the *next* record will be,
2. stores the record without its mark, behind the last one,
3. stores the mark, one aligned word: the transaction is complete.

When the log has grown, a commit stores a snapshot of all values in the other half instead: it first makes that half
invalid by a mark of zero, and then does the same. Until the mark is stored, the present half counts. What earlier
rounds left in a half is never taken for a record: there is a mark of zero behind the last record at all times. Should
there be none, the record would have a sequence number that is not the next, or a checksum of another incarnation.
"""

from __future__ import annotations

import mmap
import secrets
import struct
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from vmbus.errors import InternalError, VmbusError
from vmbus.machine.journal.reading import Contents, JournalRefused, read
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
    JournalHeader,
    half_size,
    incarnation_sum,
    mark_of,
)

__all__ = ["Contents", "Journal", "JournalFull", "JournalRefused", "read"]

MIN_LOG = 256 << 10
"""Bytes of changes behind a snapshot before there is another snapshot; four times the snapshot, if that is more."""

_PADDING = tuple(bytes(-length % 8) for length in range(8))
"""By a record's length modulo eight: what is behind its last entry."""


class JournalFull(VmbusError):
    """A transaction that does not fit into the journal, which is unchanged and stays usable."""


class Journal:
    """The writer of a journal. One process has it, and uses it in one thread.

    The memory must begin at a multiple of eight bytes, as a mapping does, and stay mapped until :meth:`close`.
    """

    def __init__(self, memory: mmap.mmap | memoryview, incarnation: int) -> None:
        self._bytes, self._words = views(memory)
        self._sum = incarnation_sum(incarnation)
        self._half_size = half_size(len(memory))
        self._values: dict[bytes, bytes] = {}
        self.values: Mapping[bytes, bytes] = MappingProxyType(self._values)
        """What is stored now."""
        self.sequence = 0
        """Number of the last transaction; the creation is number 1."""
        self._half = 1
        self._at = 0
        """Offset of the next record."""
        self._log_end = 0
        """A record that would begin behind it becomes a snapshot in the other half."""
        self._record_end = 0
        """Where a record must end at the latest: the next mark is behind it."""

    @classmethod
    def create(cls, memory: mmap.mmap | memoryview) -> Journal:
        """Format ``memory``, whatever is in it, and return an empty journal.

        Raises :class:`JournalFull` if the memory is too small, or larger than a journal can be.
        """
        size = len(memory)
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise JournalFull(f"a journal needs {MIN_SIZE} to {MAX_SIZE} bytes of memory, not {size}")
        incarnation = secrets.randbits(64)
        header = JOURNAL_HEADER.build(JournalHeader(size, incarnation).summed())
        journal = cls(memory, incarnation)
        journal._words[0] = 0
        journal._words[(PAGE + journal._half_size) >> 3] = 0
        journal._bytes[len(MAGIC) : len(header)] = header[len(MAGIC) :]
        journal._write_snapshot({})
        journal._words[0] = int.from_bytes(MAGIC, "little")
        return journal

    @classmethod
    def resume(cls, memory: mmap.mmap | memoryview, contents: Contents) -> Journal:
        """Go on behind ``contents``, which :func:`~vmbus.machine.journal.reading.read` has found in ``memory``."""
        journal = cls(memory, contents.incarnation)
        journal._values.update(contents.values)
        journal.sequence = contents.sequence
        journal._enter(contents.half, contents.snapshot)
        journal._at = contents.end
        journal._words[contents.end >> 3] = 0  # a part of a mark may be there
        return journal

    def commit(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Store ``changes`` as one transaction: key → value, or ``None`` to remove the key, which may be absent.

        Raises :class:`JournalFull`; then nothing was changed.
        """
        values = self._values
        count = len(changes)
        if not count:
            return
        if count + len(values) > MAX_KEYS:
            self._check_count(changes)
        pieces = [b""]
        size = RECORD_SIZE + count * ENTRY_SIZE
        for key, value in changes.items():
            key_size = len(key)
            if not 0 < key_size <= MAX_KEY:
                raise InternalError(f"a key of the journal has {key_size} bytes, not 1 to {MAX_KEY}")
            if value is None:
                pieces += (ENTRY_STRUCT.pack(key_size, REMOVED, 0), key)
                size += key_size
                continue
            value_size = len(value)
            if value_size > MAX_VALUE:
                raise JournalFull(f"{key!r}: the value has {value_size} bytes, the journal takes {MAX_VALUE}")
            pieces += (ENTRY_STRUCT.pack(key_size, 0, value_size), key, value)
            size += key_size + value_size
        at = self._at
        if at <= self._log_end and at + size <= self._record_end:
            self._write(at, self._record(pieces, size, count))
        else:
            self._write_snapshot(_changed(values, changes))
        for key, value in changes.items():
            if value is None:
                values.pop(key, None)
            else:
                values[key] = value

    def close(self) -> None:
        """Release the memory, which keeps its contents; nothing can be committed any more."""
        self._words.release()
        self._bytes.release()

    def _check_count(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Raise :class:`JournalFull` if there were too many keys after ``changes``, or too many of them."""
        added = sum(value is not None and key not in self._values for key, value in changes.items())
        removed = sum(value is None and key in self._values for key, value in changes.items())
        if len(self._values) + added - removed > MAX_KEYS or len(changes) > MAX_CHANGES:
            raise JournalFull(f"the journal takes {MAX_KEYS} keys, and {MAX_CHANGES} changes at once")

    def _write_snapshot(self, values: Mapping[bytes, bytes]) -> None:
        """Store all ``values`` in the other half, as the next transaction. Raises :class:`JournalFull`."""
        half = 1 - self._half
        start = PAGE + half * self._half_size
        size = RECORD_SIZE + sum(ENTRY_SIZE + len(key) + len(value) for key, value in values.items())
        room = self._half_size - MARK_SIZE
        if size > room:
            raise JournalFull(f"the values need {size} bytes, the journal takes {room}")
        record = self._record([b"", *_entries(values)], size, len(values))
        self._words[start >> 3] = 0
        self._write(start, record)
        self._enter(half, MARK_SIZE + len(record))

    def _record(self, pieces: list[bytes], size: int, count: int) -> bytes:
        """Return the next record without its mark. ``pieces``: the entries, behind an empty one for the head.

        ``size``: bytes of the record without the zeros at its end. Raises :class:`JournalFull`.
        """
        padding = _PADDING[size & 7]
        try:
            pieces[0] = SUMMED_STRUCT.pack(self.sequence + 1, size + len(padding), count)
        except struct.error as error:  # so many were never made: the memory was manipulated before the resume
            raise JournalFull(f"there is no transaction after number {self.sequence}") from error
        pieces.append(padding)
        return b"".join(pieces)

    def _write(self, at: int, record: bytes) -> None:
        """Store a record behind the place of its mark, ``at``, and then the mark."""
        body = at + MARK_SIZE
        end = body + len(record)
        words = self._words
        words[end >> 3] = 0
        self._bytes[body:end] = record
        words[at >> 3] = mark_of(record, self._sum)
        self.sequence += 1
        self._at = end

    def _enter(self, half: int, snapshot: int) -> None:
        """Make ``half``, with a snapshot of so many bytes, the one that records go to."""
        start = PAGE + half * self._half_size
        self._half = half
        self._record_end = start + self._half_size - MARK_SIZE
        self._log_end = start + snapshot + max(MIN_LOG, 4 * snapshot)


def views(memory: mmap.mmap | memoryview) -> tuple[memoryview, memoryview]:
    """Return the memory as bytes, and as words of eight bytes; each assignment to these is one store."""
    every = memoryview(memory).cast("B")
    return every, every[: len(every) & ~7].cast("Q")


def _entries(values: Mapping[bytes, bytes]) -> Iterable[bytes]:
    for key, value in values.items():
        yield ENTRY_STRUCT.pack(len(key), 0, len(value))
        yield key
        yield value


def _changed(values: Mapping[bytes, bytes], changes: Mapping[bytes, bytes | None]) -> dict[bytes, bytes]:
    """Return ``values`` after ``changes``."""
    after = dict(values)
    for key, value in changes.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = value
    return after
