"""A second writer of the journal's layout, which also writes what the first one never does."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from vmbus.wire import journal as wire

INCARNATION = 0x0123456789ABCDEF


def entry(key: bytes, value: bytes | None, *, flags: int = 0, sizes: tuple[int, int] | None = None) -> bytes:
    """Return an entry. ``sizes``: what it says about its key and its value."""
    body = key + (value or b"")
    key_size, value_size = sizes or (len(key), len(value or b""))
    head = {"key": key_size, "flags": flags or (value is None), "value": value_size}
    return bytes(wire.ENTRY.build(head)) + body


def record(
    sequence: int,
    *entries: bytes,
    count: int | None = None,
    length: int | None = None,
    padding: bytes | None = None,
    incarnation: int = INCARNATION,
) -> bytes:
    """Return a record with a right checksum, whatever it says."""
    body = b"".join(entries)
    body += bytes(-len(body) % 8) if padding is None else padding
    head = {
        "tag": wire.TAG,
        "checksum": 0,
        "sequence": sequence,
        "length": wire.RECORD_SIZE + len(body) if length is None else length,
        "count": len(entries) if count is None else count,
    }
    summed = (bytes(wire.RECORD.build(head)) + body)[wire.MARK_SIZE :]
    checksum = zlib.crc32(incarnation.to_bytes(8, "little") + summed)
    return wire.TAG.to_bytes(4, "little") + checksum.to_bytes(4, "little") + summed


def memory_with(
    *halves: Sequence[bytes], size: int = wire.MIN_SIZE, says: int | None = None, version: int = wire.VERSION
) -> bytearray:
    """Return a memory whose halves begin with these records. ``says``: its size, according to the header."""
    memory = bytearray(size)
    header = wire.JournalHeader(size if says is None else says, INCARNATION, version)
    memory[: wire.JOURNAL_HEADER.size] = wire.JOURNAL_HEADER.build(header.summed())
    for half, records in enumerate(halves):
        at = wire.PAGE + half * wire.half_size(size)
        for each in records:
            memory[at : at + len(each)] = each
            at += len(each)
    assert len(memory) == size
    return memory
