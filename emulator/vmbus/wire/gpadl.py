"""GPADL messages 8 to 12 and their range data.

Source: docs/protocol/messages.md#gpadl-messages, docs/protocol/messages.md#gpa-ranges.

``GPADL_HEADER`` and ``GPADL_BODY`` are followed by range data up to the end of the message, which begins at ``size``
of their declarations. Sizes of messages include the 8-byte message header.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import construct as c

from vmbus.errors import MalformedError
from vmbus.wire.codec import Record, derive_struct
from vmbus.wire.header import MAX_MESSAGE, MessageType, channel_message
from vmbus.wire.pfn_runs import PageRuns, runs

PAGE_SIZE = 4096
PFN_LIMIT = 1 << 52
"""Number of page frames of a 64-bit physical address space."""


@dataclass(frozen=True, slots=True)
class GpadlHeader:
    """GPADL_HEADER (8), 20 bytes and range data; ``range_buffer_length``: bytes of range data in all messages."""

    relid: int
    gpadl_id: int
    range_buffer_length: int
    range_count: int


GPADL_HEADER = channel_message(
    GpadlHeader,
    MessageType.GPADL_HEADER,
    "relid" / c.Int32ul,
    "gpadl_id" / c.Int32ul,
    "range_buffer_length" / c.Int16ul,
    "range_count" / c.Int16ul,
)


@dataclass(frozen=True, slots=True)
class GpadlBody:
    """GPADL_BODY (9), 16 bytes and range data; ``message_number`` is not reliable, and there is no relid."""

    message_number: int
    gpadl_id: int


GPADL_BODY = channel_message(
    GpadlBody,
    MessageType.GPADL_BODY,
    "message_number" / c.Int32ul,
    "gpadl_id" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class GpadlCreated:
    """GPADL_CREATED (10), 20 bytes."""

    relid: int
    gpadl_id: int
    status: int


GPADL_CREATED = channel_message(
    GpadlCreated,
    MessageType.GPADL_CREATED,
    "relid" / c.Int32ul,
    "gpadl_id" / c.Int32ul,
    "status" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class GpadlTeardown:
    """GPADL_TEARDOWN (11), 16 bytes."""

    relid: int
    gpadl_id: int


GPADL_TEARDOWN = channel_message(
    GpadlTeardown,
    MessageType.GPADL_TEARDOWN,
    "relid" / c.Int32ul,
    "gpadl_id" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class GpadlTorndown:
    """GPADL_TORNDOWN (12), 12 bytes."""

    gpadl_id: int


GPADL_TORNDOWN = channel_message(
    GpadlTorndown,
    MessageType.GPADL_TORNDOWN,
    "gpadl_id" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class RangeHeader:
    """Header of one range, 8 bytes, before its page frame numbers; both fields in bytes."""

    byte_count: int
    byte_offset: int


RANGE_HEADER = Record(RangeHeader, "byte_count" / c.Int32ul, "byte_offset" / c.Int32ul)
_RANGE_HEADER = derive_struct(RANGE_HEADER.struct)


@dataclass(frozen=True, slots=True)
class GpaRange:
    """A range: ``byte_count`` bytes from ``byte_offset`` in the first page; ``pfns``: 64-bit page frame numbers."""

    byte_count: int
    byte_offset: int
    pfns: Sequence[int]
    _runs: PageRuns | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_runs(cls, byte_count: int, byte_offset: int, pairs: Sequence[tuple[int, int]]) -> GpaRange:
        """Return the range whose pages are the runs ``pairs`` of (first number, count)."""
        return cls(byte_count, byte_offset, pfns_of_runs(pairs), PageRuns(pairs))

    @property
    def runs(self) -> PageRuns:
        """The runs of consecutive page frame numbers; found once, because a list of a guest may be long."""
        found = self._runs
        if found is None:
            found = PageRuns(runs(self.pfns))
            object.__setattr__(self, "_runs", found)
        return found


def pages_of_range(byte_count: int, byte_offset: int) -> int:
    """Return the number of pages of ``byte_count`` bytes from ``byte_offset`` in the first page."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) // PAGE_SIZE


def parse_ranges(data: bytes | bytearray, count: int) -> tuple[GpaRange, ...]:
    """Parse the first ``count`` ranges in ``data``; bytes behind them are ignored.

    Raises :class:`MalformedError` for a count of 0, an empty range, a byte offset outside the first page, fewer page
    frame numbers than the range needs, or a number beyond the physical address space.
    """
    if count == 0:
        raise MalformedError("gpadl-no-range")
    ranges = []
    position = 0
    for _ in range(count):
        if len(data) - position < _RANGE_HEADER.size:
            raise MalformedError("gpadl-short-ranges", f"{len(data)} bytes for {count} ranges")
        byte_count, byte_offset = _RANGE_HEADER.unpack_from(data, position)
        position += _RANGE_HEADER.size
        if byte_count == 0:
            raise MalformedError("gpadl-empty-range")
        if byte_offset >= PAGE_SIZE:
            raise MalformedError("gpadl-bad-offset", f"byte offset {byte_offset}")
        end = position + 8 * pages_of_range(byte_count, byte_offset)
        if end > len(data):
            raise MalformedError("gpadl-short-ranges", f"{byte_count} bytes need {end} bytes of {len(data)}")
        pfns = pfns_from_bytes(bytes(data[position:end]))
        if max(pfns) >= PFN_LIMIT:
            raise MalformedError("gpadl-bad-pfn", f"page frame number {max(pfns):#x}")
        ranges.append(GpaRange(byte_count, byte_offset, pfns))
        position = end
    return tuple(ranges)


def build_ranges(ranges: Sequence[GpaRange]) -> bytes:
    """Return the range data of ``ranges``."""
    return b"".join(
        _RANGE_HEADER.pack(each.byte_count, each.byte_offset)
        + b"".join(pfn.to_bytes(8, "little") for pfn in each.pfns)
        for each in ranges
    )


def pfns_from_bytes(data: bytes) -> array[int]:
    """Return an array of the 64-bit little-endian numbers in ``data``; it takes 8 bytes per page."""
    pfns = array("Q")
    pfns.frombytes(data)
    return pfns


def pfns_of_runs(pairs: Sequence[tuple[int, int]]) -> array[int]:
    """Return the page frame numbers of runs: ``pairs`` of (first number, count)."""
    pfns = array("Q")
    for first, count in pairs:
        pfns.extend(range(first, first + count))
    return pfns


def split_gpadl(
    relid: int, gpadl_id: int, ranges: Sequence[GpaRange], *, max_message: int = MAX_MESSAGE
) -> list[bytes]:
    """Return the messages with which a guest creates a GPADL: one header, and as many bodies as are needed."""
    data = build_ranges(ranges)
    first = (max_message - GPADL_HEADER.size) // 8 * 8
    following = (max_message - GPADL_BODY.size) // 8 * 8
    messages = [
        GPADL_HEADER.build(GpadlHeader(relid, gpadl_id, len(data), len(ranges))) + data[:first],
    ]
    for number, start in enumerate(range(first, len(data), following)):
        messages.append(
            GPADL_BODY.build(GpadlBody(number, gpadl_id)) + data[start : start + following],
        )
    return messages
