"""Commands of a saved controller as bytes: a header, the payload, and the guest's page lists.

    | Off  | Size | Field                                                                          |
    |    0 |    2 | index of the channel; 0 where the channel saves the command itself             |
    |    2 |    2 | type of the packet, as in its descriptor                                       |
    |    4 |    2 | flags of the packet                                                            |
    |    6 |    8 | transaction id                                                                 |
    |   14 |    2 | bytes of the payload                                                           |
    |   16 |    n | payload                                                                        |
    | 16+n |    2 | number of ranges, then of each: bytes, offset of the first one, pages (4 each),|
    |      |      | and 8 bytes for each page                                                      |

The guest stands still while commands are saved and restored, and a storage driver keeps tens of thousands of pages in
them. So a page list is written and read in one piece, and a range is checked by its numbers of bytes and pages: both
cost the same Python code for one page and for a hundred.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import construct as c
from vmbus.wire.codec import derive_struct
from vmbus.wire.packet import MAX_PFNS, MAX_RANGES, GpaRange, Packet, PacketType
from vmbus.wire.storvsp import PACKET_SIZE

MAX_COMMANDS = 65536
"""Commands that a controller's own record may have."""
MAX_PAYLOAD = 4 * PACKET_SIZE
"""Bytes of a saved packet's payload: the controller keeps ``PACKET_SIZE``."""

PACKET_HEADER = c.Struct(
    "channel" / c.Int16ul,
    "kind" / c.Int16ul,
    "flags" / c.Int16ul,
    "transaction_id" / c.Int64ul,
    "payload_size" / c.Int16ul,
)
RANGE_HEADER = c.Struct("byte_count" / c.Int32ul, "byte_offset" / c.Int32ul, "pages" / c.Int32ul)
"""The header of one range; 64-bit page frame numbers follow."""

_HEADER = derive_struct(PACKET_HEADER)
_RANGES = derive_struct(c.Struct("ranges" / c.Int16ul))
_RANGE = derive_struct(RANGE_HEADER)
_COMMANDS = derive_struct(c.Struct("commands" / c.Int32ul))
_PFN_BYTES = 8

_KINDS = {int(kind): kind for kind in PacketType}


def build_command(channel: int, packet: Packet) -> bytes:
    """Return the bytes of a command of the channel with that index. Raises ``ValueError`` for an impossible one."""
    payload, ranges = packet.payload, packet.ranges
    _check_sizes(len(payload), len(ranges))
    pages = 0
    try:
        header = _HEADER.pack(channel, packet.kind, packet.flags, packet.transaction_id, len(payload))
        parts = [header, payload, _RANGES.pack(len(ranges))]
        for byte_count, byte_offset, pfns in ranges:
            count = len(pfns)
            pages = _check_range(byte_count, byte_offset, count, pages)
            parts += (_RANGE.pack(byte_count, byte_offset, count), struct.pack(f"<{count}Q", *pfns))
    except struct.error as error:
        raise ValueError(str(error)) from error
    return b"".join(parts)


def parse_command(data: bytes, at: int) -> tuple[tuple[int, Packet], int]:
    """Return the channel's index and the command at ``at``, and the offset behind it.

    Raises ``ValueError`` for bytes that are no command which :func:`build_command` accepts.
    """
    try:
        channel, kind, flags, transaction_id, size = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        payload = data[at : at + size]
        at += size
        (count,) = _RANGES.unpack_from(data, at)  # which fails, too, if the payload is cut off
        at += _RANGES.size
        _check_sizes(size, count)
        pages = 0
        ranges: list[GpaRange] = []
        for _ in range(count):
            byte_count, byte_offset, found = _RANGE.unpack_from(data, at)
            at += _RANGE.size
            pages = _check_range(byte_count, byte_offset, found, pages)
            ranges.append(GpaRange(byte_count, byte_offset, struct.unpack_from(f"<{found}Q", data, at)))
            at += _PFN_BYTES * found
    except struct.error as error:
        raise ValueError(str(error)) from error
    if kind not in _KINDS:
        raise ValueError(f"a packet of type {kind}")
    return (channel, Packet(_KINDS[kind], flags, transaction_id, payload, tuple(ranges))), at


def build_commands(commands: Sequence[tuple[int, Packet]]) -> bytes:
    """Return the bytes of a list of commands with their channels' indexes. Raises ``ValueError``."""
    _check_number(len(commands))
    return b"".join((_COMMANDS.pack(len(commands)), *[build_command(*each) for each in commands]))


def parse_commands(data: bytes) -> tuple[list[tuple[int, Packet]], int]:
    """Return the commands in a list at the beginning of ``data``, and the offset behind it. Raises ``ValueError``."""
    if len(data) < _COMMANDS.size:
        raise ValueError(f"{len(data)} bytes of a list of packets")
    (count,) = _COMMANDS.unpack_from(data)
    _check_number(count)
    at = _COMMANDS.size
    found = []
    for _ in range(count):
        packet, at = parse_command(data, at)
        found.append(packet)
    return found, at


def _check_number(commands: int) -> None:
    if commands > MAX_COMMANDS:
        raise ValueError(f"{commands} packets, at most {MAX_COMMANDS}")


def _check_sizes(payload: int, ranges: int) -> None:
    if ranges > MAX_RANGES or payload > MAX_PAYLOAD:
        raise ValueError("a packet that is too large")


def _check_range(byte_count: int, byte_offset: int, count: int, pages: int) -> int:
    """Return how many pages a packet with ``pages`` has with one more range of ``count``."""
    if byte_offset >= 4096 or not byte_count or count != (byte_offset + byte_count + 4095) >> 12:
        raise ValueError("a packet with an impossible range")
    if pages + count > MAX_PFNS:
        raise ValueError("a packet that is too large")
    return pages + count
