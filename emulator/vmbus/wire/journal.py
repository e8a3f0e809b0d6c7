"""The journal in the memory that outlives an emulator.

Source: the layout is this project's own. All words are little-endian; a record begins at a multiple of eight bytes.

    JournalHeader, in a page | half 0 | half 1      each half begins and ends with a page
    half:    snapshot | changes | changes | ... | 0 (8 bytes)
    record:  RECORD | (ENTRY | key | value) * count | zeros up to a multiple of eight bytes

A snapshot and changes are records of the same form: a snapshot has all values, changes have those of one transaction.
Each transaction adds one to ``sequence``. ``tag`` and ``checksum`` are one word of eight bytes, the *mark*, which is
stored last: where it is zero, there is no record, and where it is not, the record is complete. The checksum is CRC-32
(zlib) over the incarnation and all bytes of the record behind the mark.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import construct as c

from vmbus.wire.codec import Record, derive_struct

MAGIC = b"VMBusJn1"
VERSION = 1
PAGE = 4096
"""Bytes of the page of the header; the size of a half is a multiple of it."""
MIN_SIZE = 3 * PAGE
"""Bytes of the smallest memory."""
MAX_SIZE = 1 << 30
"""Bytes of the largest memory."""
MAX_KEY = 64
"""Bytes of a key; the shortest has one."""
MAX_VALUE = 1 << 20
"""Bytes of a value; it may be empty."""
MAX_KEYS = 1 << 16
MAX_CHANGES = 2 * MAX_KEYS
"""Entries of one record."""
TAG = int.from_bytes(b"Jrec", "little")
"""What every mark has in its low half."""
REMOVED = 1
"""Flag of an entry: the key is removed, and there is no value."""


@dataclass(frozen=True, slots=True)
class JournalHeader:
    """The header, 32 bytes. ``size``: bytes of the whole memory; ``incarnation``: a random number of this journal."""

    size: int
    incarnation: int
    version: int = VERSION
    checksum: int = 0
    """CRC-32 of the header with zero here."""

    def summed(self) -> JournalHeader:
        """Return this header with the checksum that it should have."""
        blank = replace(self, checksum=0)
        return replace(blank, checksum=zlib.crc32(JOURNAL_HEADER.build(blank)))


JOURNAL_HEADER = Record(
    JournalHeader,
    "_magic" / c.Const(MAGIC),
    "version" / c.Int32ul,
    "checksum" / c.Int32ul,
    "size" / c.Int64ul,
    "incarnation" / c.Int64ul,
)

RECORD = c.Struct(
    "tag" / c.Int32ul,
    "checksum" / c.Int32ul,
    "sequence" / c.Int64ul,
    "length" / c.Int32ul,
    "count" / c.Int32ul,
)
"""The head of a record, 24 bytes. ``length``: bytes of the whole record; ``count``: its entries."""

ENTRY = c.Struct("key" / c.Int16ul, "flags" / c.Int16ul, "value" / c.Int32ul)
"""The head of an entry, 8 bytes: the lengths of its two parts in bytes."""

MARK_SIZE = 8
"""Bytes of ``tag`` and ``checksum``."""
SUMMED_STRUCT = derive_struct(c.Struct(*RECORD.subcons[2:]))
"""The head of a record behind the mark."""
ENTRY_STRUCT = derive_struct(ENTRY)
RECORD_SIZE, ENTRY_SIZE = RECORD.sizeof(), ENTRY.sizeof()


def half_size(size: int) -> int:
    """Return the bytes of a half in a memory of ``size`` bytes."""
    return (size - PAGE) // 2 // PAGE * PAGE


def mark_of(summed: bytes, incarnation: int) -> int:
    """Return the mark of a record. ``summed``: its bytes behind the mark; ``incarnation``: CRC-32 of that number."""
    return TAG | zlib.crc32(summed, incarnation) << 32


def incarnation_sum(incarnation: int) -> int:
    """Return the checksum of the number of a journal, with which that of each of its records begins."""
    return zlib.crc32(incarnation.to_bytes(8, "little"))
