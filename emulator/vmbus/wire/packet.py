"""Packets in a ring buffer: descriptor, extension, payload, trailer.

Source: docs/protocol/rings.md#packet-format, docs/protocol/rings.md#corruption; docs/protocol/messages.md#gpa-ranges.

    | Off             | Size | Field                                                            |
    |               0 |    2 | type                                                             |
    |               2 |    2 | data offset, in units of 8 bytes                                 |
    |               4 |    2 | length in units of 8 bytes: descriptor + extension + payload     |
    |               6 |    2 | flags: bit 0 completion requested                                |
    |               8 |    8 | transaction id                                                   |
    |              16 |      | extension (types 7 and 9), up to the data offset                 |
    | data offset * 8 |      | payload, padded to 8 bytes                                       |
    |      length * 8 |    8 | trailer: u32 zero, u32 write index before this packet            |

Errors of a guest are of two classes. A descriptor from which the place of the next packet cannot be told, or that no
guest may send, raises :class:`~vmbus.errors.RingError`: the channel stops. A packet with a valid descriptor and an
invalid list of ranges (docs/conformance.md#row-59) is returned without ranges, and with the reason in ``error``: the
device answers it, and the channel continues.

    | RingError reason               | found                                                          |
    | invalid-descriptor-lengths     | data offset < 2 (3 for types 7, 9), > length, or the packet    |
    |                                | with its trailer is longer than the committed bytes            |
    | invalid-descriptor-flags       | a bit other than bit 0                                         |
    | invalid-descriptor-type        | not 6, 7, 9, 11                                                |
    | invalid-gpa-direct-range-count | type 9 with no range                                           |

    | reason of ``error``            | found                                                          |
    | gpa-range-empty                | a range of 0 bytes                                             |
    | gpa-range-offset               | an offset outside the first page                               |
    | gpa-range-overrun              | more ranges or page numbers announced than present             |
    | too-many-gpa-ranges, -pages    | more than MAX_RANGES, MAX_PFNS                                 |
    | transfer-range-overrun         | more transfer ranges announced than present                    |
    | too-many-transfer-ranges       | more than MAX_RANGES                                           |

The parser uses ``struct`` objects that are derived from the declarations.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import construct as c

from vmbus.errors import MalformedError, RingError
from vmbus.wire.codec import derive_struct

UNIT = 8
"""Bytes of the unit that offsets and lengths of packets are measured in."""

MAX_RANGES = 1024
"""Ranges that a packet may have. Linux uses 1 (storage) and up to 32 (network)."""

MAX_PFNS = 8192
"""Page frame numbers that a packet may have, in all its ranges together: 32 MiB of data."""


class PacketType(enum.IntEnum):
    """The packet types in use; every other type is refused."""

    IN_BAND = 6
    TRANSFER_PAGES = 7
    GPA_DIRECT = 9
    COMPLETION = 11


COMPLETION_REQUESTED = 1
"""Flag bit 0: the sender waits for a completion packet with the same transaction id."""

DESCRIPTOR = c.Struct(
    "type" / c.Int16ul,
    "data_offset8" / c.Int16ul,
    "length8" / c.Int16ul,
    "flags" / c.Int16ul,
    "transaction_id" / c.Int64ul,
)
"""The first 16 bytes of every packet; see the module's table."""
TRAILER = c.Struct("zero" / c.Int32ul, "start" / c.Int32ul)
"""The last 8 bytes of every packet; ``start``: write index before the packet, in bytes."""
GPA_DIRECT_HEADER = c.Struct("reserved" / c.Int32ul, "range_count" / c.Int32ul)
"""Start of the extension of type 9, 8 bytes."""
GPA_RANGE_HEADER = c.Struct("byte_count" / c.Int32ul, "byte_offset" / c.Int32ul)
"""Header of one GPA range, 8 bytes; 64-bit page frame numbers follow."""
TRANSFER_PAGES_HEADER = c.Struct("set_id" / c.Int16ul, "reserved" / c.Int16ul, "range_count" / c.Int32ul)
"""Start of the extension of type 7, 8 bytes."""
TRANSFER_RANGE = c.Struct("byte_count" / c.Int32ul, "byte_offset" / c.Int32ul)
"""One range of a transfer page set, 8 bytes."""

GPA_RANGE = c.Struct(
    "header" / GPA_RANGE_HEADER,
    "pfns"
    / c.Array(lambda this: (this.header.byte_offset + this.header.byte_count + 4095) // 4096, c.Int64ul),
)
PACKET = c.Struct(
    "descriptor" / DESCRIPTOR,
    "extension"
    / c.Switch(
        c.this.descriptor.type,
        {
            int(PacketType.GPA_DIRECT): c.Struct(
                "header" / GPA_DIRECT_HEADER, "ranges" / c.Array(c.this.header.range_count, GPA_RANGE)
            ),
            int(PacketType.TRANSFER_PAGES): c.Struct(
                "header" / TRANSFER_PAGES_HEADER,
                "ranges" / c.Array(c.this.header.range_count, TRANSFER_RANGE),
            ),
        },
    ),
    "payload"
    / c.Pointer(
        c.this.descriptor.data_offset8 * UNIT,
        c.Bytes((c.this.descriptor.length8 - c.this.descriptor.data_offset8) * UNIT),
    ),
    "trailer" / c.Pointer(c.this.descriptor.length8 * UNIT, TRAILER),
)
"""A whole packet, for documentation, tests and tools; the hot path uses :func:`parse_packet`."""

_DESCRIPTOR = derive_struct(DESCRIPTOR)
_TRAILER = derive_struct(TRAILER)
_GPA_DIRECT_HEADER = derive_struct(GPA_DIRECT_HEADER)
_GPA_RANGE_HEADER = derive_struct(GPA_RANGE_HEADER)
_TRANSFER_PAGES_HEADER = derive_struct(TRANSFER_PAGES_HEADER)
_TRANSFER_RANGE = derive_struct(TRANSFER_RANGE)

DESCRIPTOR_SIZE = _DESCRIPTOR.size
TRAILER_SIZE = _TRAILER.size


class GpaRange(NamedTuple):
    """``byte_count`` bytes of guest memory, from ``byte_offset`` (< 4096) in the page ``pfns[0]`` on.

    The number of pages is checked, whether they are RAM is not: see :mod:`vmbus.bus.io.guest_buffer`.
    """

    byte_count: int
    byte_offset: int
    pfns: tuple[int, ...]


class TransferRange(NamedTuple):
    """``byte_count`` bytes from ``byte_offset`` of the GPADL that the device protocol uses as transfer page set."""

    byte_count: int
    byte_offset: int


class TransferPages(NamedTuple):
    """The extension of a packet of type 7."""

    set_id: int
    ranges: tuple[TransferRange, ...]


class Packet(NamedTuple):
    """A checked private copy of a packet from a ring.

    A named tuple and not a frozen dataclass, because one is created for every packet: 0.15 us instead of 1.1 us.
    """

    kind: PacketType
    flags: int
    transaction_id: int
    """Not meaningful unless a completion is requested, or the packet is a completion."""
    payload: bytes
    """Padded to a multiple of 8 bytes: only the device protocol has its exact length."""
    ranges: tuple[GpaRange, ...] = ()
    """The GPA ranges of a packet of type 9."""
    transfer_pages: TransferPages | None = None
    """The extension of a packet of type 7."""
    error: MalformedError | None = None
    """Why ``ranges`` or ``transfer_pages`` is missing."""
    size: int = 0
    """Bytes in the ring, including the trailer."""

    @property
    def completion_requested(self) -> bool:
        """Whether the sender waits for a completion."""
        return bool(self.flags & COMPLETION_REQUESTED)


_KINDS = {int(kind): kind for kind in PacketType}
_unpack_descriptor = _DESCRIPTOR.unpack_from
_new = tuple.__new__


@functools.lru_cache(maxsize=256)
def _pfn_struct(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


def packet_size(buffer: bytes, at: int) -> int:
    """Return the size in bytes of the packet at ``at``, including the trailer; nothing is checked."""
    return int.from_bytes(buffer[at + 4 : at + 6], "little") * UNIT + TRAILER_SIZE


def parse_packet(buffer: bytes, at: int, available: int) -> Packet | None:
    """Parse the packet at ``at`` of a private copy of ring data.

    ``available``: bytes from ``at`` on that the writer has committed, at least the size of a descriptor. Returns
    ``None`` if ``buffer`` ends within the packet (see :func:`packet_size`). Raises
    :class:`~vmbus.errors.RingError`.
    """
    kind, offset8, length8, flags, transaction_id = _unpack_descriptor(buffer, at)
    if offset8 < 2 or length8 < offset8 or (size := length8 * 8 + 8) > available:
        raise RingError(
            "invalid-descriptor-lengths",
            f"data offset {offset8 * 8}, length {length8 * 8} with {available} bytes available",
        )
    if flags > COMPLETION_REQUESTED:
        raise RingError("invalid-descriptor-flags", f"{flags:#x}")
    end = at + length8 * 8
    data = at + offset8 * 8
    if kind == 6 or kind == 11:
        if end + 8 > len(buffer):
            return None
        return _new(Packet, (_KINDS[kind], flags, transaction_id, buffer[data:end], (), None, None, size))
    if kind != 9 and kind != 7:
        raise RingError("invalid-descriptor-type", f"{kind:#x}")
    if offset8 < 3:
        raise RingError("invalid-descriptor-lengths", f"type {kind} with a data offset of {offset8 * 8}")
    if end + 8 > len(buffer):
        return None
    ranges: tuple[GpaRange, ...] = ()
    transfer_pages = None
    error = None
    try:
        if kind == 9:
            ranges = _parse_gpa_ranges(buffer, at + 16, data)
        else:
            transfer_pages = _parse_transfer_pages(buffer, at + 16, data)
    except MalformedError as found:
        error = found.with_traceback(None)
    return _new(
        Packet, (_KINDS[kind], flags, transaction_id, buffer[data:end], ranges, transfer_pages, error, size)
    )


def _parse_gpa_ranges(buffer: bytes, at: int, end: int) -> tuple[GpaRange, ...]:
    _, count = _GPA_DIRECT_HEADER.unpack_from(buffer, at)
    if count == 0:
        raise RingError("invalid-gpa-direct-range-count", "0")
    if count > MAX_RANGES:
        raise MalformedError("too-many-gpa-ranges", f"{count}, at most {MAX_RANGES}")
    at += 8
    pages = 0
    ranges: list[GpaRange] = []
    for _ in range(count):
        if at + 8 > end:
            raise MalformedError("gpa-range-overrun", f"{count} ranges announced, {len(ranges)} present")
        byte_count, byte_offset = _GPA_RANGE_HEADER.unpack_from(buffer, at)
        at += 8
        if byte_count == 0:
            raise MalformedError("gpa-range-empty", f"range {len(ranges)} of {count}")
        if byte_offset >= 4096:
            raise MalformedError("gpa-range-offset", f"{byte_offset} in range {len(ranges)} of {count}")
        need = (byte_offset + byte_count + 4095) >> 12
        pages += need
        if pages > MAX_PFNS:
            raise MalformedError("too-many-gpa-pages", f"at least {pages}, at most {MAX_PFNS}")
        if at + need * 8 > end:
            raise MalformedError(
                "gpa-range-overrun",
                f"range {len(ranges)} needs {need} page numbers, {(end - at) >> 3} present",
            )
        ranges.append(_new(GpaRange, (byte_count, byte_offset, _pfn_struct(need).unpack_from(buffer, at))))
        at += need * 8
    return tuple(ranges)


def _parse_transfer_pages(buffer: bytes, at: int, end: int) -> TransferPages:
    set_id, _, count = _TRANSFER_PAGES_HEADER.unpack_from(buffer, at)
    if count > MAX_RANGES:
        raise MalformedError("too-many-transfer-ranges", f"{count}, at most {MAX_RANGES}")
    at += 8
    if at + count * 8 > end:
        raise MalformedError("transfer-range-overrun", f"{count} ranges announced, {(end - at) >> 3} present")
    unpack = _TRANSFER_RANGE.unpack_from
    ranges = tuple([_new(TransferRange, unpack(buffer, at + index * 8)) for index in range(count)])
    return TransferPages(set_id, ranges)


def build_packet(
    kind: PacketType,
    payload: bytes | bytearray | memoryview,
    *,
    transaction_id: int = 0,
    completion_requested: bool = False,
    extension: bytes = b"",
) -> bytes:
    """Return a packet without its trailer, padded with zeros to a multiple of 8 bytes.

    The length of ``extension`` must be a multiple of 8 bytes. Raises :class:`~vmbus.errors.RingError` for a packet
    that is too long for a descriptor.
    """
    data = DESCRIPTOR_SIZE + len(extension)
    length8 = (data + len(payload) + 7) >> 3
    if length8 > 0xFFFF:
        raise RingError("invalid-message-length", f"a packet of {length8 * 8} bytes")
    descriptor = _DESCRIPTOR.pack(
        kind, data >> 3, length8, COMPLETION_REQUESTED if completion_requested else 0, transaction_id
    )
    padding = -len(payload) & 7
    return b"".join((descriptor, extension, payload, bytes(padding)))


def build_transfer_pages(set_id: int, ranges: Sequence[TransferRange]) -> bytes:
    """Return the extension of a packet of type 7."""
    header = _TRANSFER_PAGES_HEADER.pack(set_id, 0, len(ranges))
    return header + b"".join([_TRANSFER_RANGE.pack(*item) for item in ranges])


def build_gpa_direct(ranges: Sequence[GpaRange]) -> bytes:
    """Return the extension of a packet of type 9, as a guest builds it."""
    parts = [_GPA_DIRECT_HEADER.pack(0, len(ranges))]
    for byte_count, byte_offset, pfns in ranges:
        parts += (_GPA_RANGE_HEADER.pack(byte_count, byte_offset), _pfn_struct(len(pfns)).pack(*pfns))
    return b"".join(parts)


build_trailer = _TRAILER.pack
"""``build_trailer(0, start)`` returns the trailer of a packet that begins at ring offset ``start``."""
