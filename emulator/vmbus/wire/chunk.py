"""The chunk: the unit in which saved state is written and read; a chunk is never split over two buffers.

Source: docs/protocol/saving.md#silent-cases, docs/saved-state.md#the-chunk; the layout is this project's own.
Little-endian:

    | Off | Size | Field                                                                          |
    |   0 |    4 | magic ``VMBc``                                                                 |
    |   4 |    1 | format version of this header: 1                                               |
    |   5 |    1 | version of the record                                                          |
    |   6 |    2 | kind of the record                                                             |
    |   8 |    8 | save id: random, the same in all chunks of one save run                        |
    |  16 |    4 | index: 0, 1, 2 ... within the save run                                         |
    |  20 |    4 | flags: bit 0 the last chunk, bit 1 may be skipped if the kind is unknown       |
    |  24 |    4 | length of the record in bytes                                                  |
    |  28 |    4 | CRC-32 (zlib) of bytes 0 to 27 and the record                                  |
    |  32 |    n | record                                                                         |
"""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record, derive_struct

MAGIC = b"VMBc"
FORMAT_VERSION = 1


class ChunkKind(enum.IntEnum):
    """Kind of a chunk's record: below 0x100 part of one channel's state, from 0x100 part of a machine's state."""

    CHANNEL = 0x01
    OUTSTANDING = 0x02
    UNSENT = 0x03
    COMPLETION = 0x04
    TAKEN = 0x05
    DEVICE = 0x06
    MACHINE = 0x100
    HYPERVISOR = 0x101
    BUS = 0x102
    CHANNEL_RECORDS = 0x103
    MEMORY = 0x104
    PAGES = 0x105
    REFUSAL = 0x1FE
    END = 0x1FF


class ChunkFlags(enum.IntFlag):
    """Bits of a chunk's flags word; a chunk with any other bit is of a later release and is refused."""

    LAST = 1
    IGNORABLE = 2


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """The header of a chunk, 32 bytes, without the magic; see the module's table."""

    format_version: int
    version: int
    kind: int
    save_id: int
    index: int
    flags: int
    length: int
    crc: int


CHUNK_HEADER = Record(
    ChunkHeader,
    "_magic" / c.Const(MAGIC),
    "format_version" / c.Int8ul,
    "version" / c.Int8ul,
    "kind" / c.Int16ul,
    "save_id" / c.Int64ul,
    "index" / c.Int32ul,
    "flags" / c.Int32ul,
    "length" / c.Int32ul,
    "crc" / c.Int32ul,
)
HEADER_SIZE = CHUNK_HEADER.size

_LAYOUT = derive_struct(
    c.Struct("magic" / c.Bytes(4), *(sub for sub in CHUNK_HEADER.struct.subcons if sub.name != "_magic"))
)


def build_chunk(
    kind: int, record: bytes, *, save_id: int, index: int, flags: int = 0, version: int = 1
) -> bytes:
    """Return one chunk; ``flags`` are :class:`ChunkFlags`."""
    fields = (MAGIC, FORMAT_VERSION, version, kind, save_id, index, flags, len(record))
    start = _LAYOUT.pack(*fields, 0)[:-4]
    return start + zlib.crc32(record, zlib.crc32(start)).to_bytes(4, "little") + record


def chunk_crc(data: bytes | memoryview) -> int:
    """Return the CRC-32 that the whole chunk ``data`` should have in its header."""
    return zlib.crc32(data[HEADER_SIZE:], zlib.crc32(data[: HEADER_SIZE - 4]))
