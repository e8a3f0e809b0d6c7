"""Lists of page frame numbers, stored as runs of consecutive numbers to keep saved state small.

Source: docs/saved-state.md; the layout is this project's own.

Buffers of guest drivers are mostly contiguous. Order and repetition are preserved. A list is

    varint number of runs, then for each run: varint zigzag(first - end of the previous run), varint (pages - 1)

where the end is one past the last number, and 0 before the first run. A varint is little-endian base 128, at most 10
bytes. A contiguous network buffer of 31 MiB takes 8 bytes, the worst case (no consecutive pages) about four bytes per
page.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import construct as c

from vmbus.wire.plain import CustomField, PlainAdapter, VarUint, append_varint, decode_varint

PFN_LIMIT = 1 << 52
"""Number of page frames of a 64-bit address space."""

MAX_PAGES = 131_072
"""Pages that one list, or all lists of a packet together, may have: 512 MiB."""


Run = tuple[int, int]
"""A run as it is stored: zigzag(first - end of the previous run), pages - 1."""


def runs(pfns: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of consecutive numbers in ``pfns`` as (first, count)."""
    first, count = 0, 0
    for pfn in pfns:
        if count and pfn == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = pfn, 1
    if count:
        yield first, count


class PageRuns:
    """The runs of a list of page frame numbers, to be kept beside it: 12 bytes for each run."""

    __slots__ = ("_counts", "_firsts")

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Keep ``pairs`` of (first number, count), each count below 2**32."""
        self._firsts, self._counts = array("Q"), array("I")
        for first, count in pairs:
            self._firsts.append(first)
            self._counts.append(count)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._firsts, self._counts, strict=True)

    def __len__(self) -> int:
        return len(self._firsts)


def steps(pfns: Sequence[int]) -> list[Run]:
    """Return ``pfns`` as stored runs: the inverse of :func:`expand`."""
    if not pfns:
        return []
    found: list[Run] = []
    before = 0  # the end of the previous run
    first = end = pfns[0]
    for pfn in pfns:
        if pfn == end:
            end += 1
            continue
        step = first - before
        found.append((step << 1 if step >= 0 else (-step << 1) - 1, end - first - 1))
        before, first, end = end, pfn, pfn + 1
    step = first - before
    found.append((step << 1 if step >= 0 else (-step << 1) - 1, end - first - 1))
    return found


def fit_in_space(pfns: Sequence[int]) -> bool:
    """Return whether every number is one of a page of the address space."""
    return not pfns or (min(pfns) >= 0 and max(pfns) < PFN_LIMIT)


class _RawRuns(CustomField):
    """``PrefixedArray(VarUint, Struct("step" / VarUint, "more" / VarUint))``; a unit test compares the two.

    A storage driver under load has tens of thousands of scattered pages in its packets, which are saved and restored
    while the guest is paused. That declaration takes 30 us per page.
    """

    longest = 2 * VarUint.longest * (MAX_PAGES + 1)

    def decode(self, data: bytes, at: int) -> tuple[list[Run], int]:
        count, at = decode_varint(data, at)
        if count > MAX_PAGES:  # a run takes two bytes here, and a hundred in memory
            raise c.ValidationError(f"{count} runs, at most {MAX_PAGES}")
        found: list[Run] = []
        for _ in range(count):
            step = data[at]
            at += 1
            if step >= 0x80:
                step, at = decode_varint(data, at - 1)
            more = data[at]
            at += 1
            if more >= 0x80:
                more, at = decode_varint(data, at - 1)
            found.append((step, more))
        return found, at

    def encode(self, value: Sequence[Run]) -> bytes:
        encoded = bytearray()
        append_varint(encoded, len(value))
        append = encoded.append
        for step, more in value:
            if step < 0x80:
                append(step)
            else:
                append_varint(encoded, step)
            if more < 0x80:
                append(more)
            else:
                append_varint(encoded, more)
        return bytes(encoded)


RawRuns = _RawRuns()
"""A list of :class:`Run`; :func:`expand` returns its page frame numbers."""


def expand(raw: Sequence[Run], path: str, room: int = MAX_PAGES) -> tuple[int, ...]:
    """Return the page frame numbers of ``RawRuns``. Raises ``construct.ValidationError`` for more than ``room``."""
    pages = sum([more for _, more in raw]) + len(raw)
    if pages > room:
        raise c.ValidationError(f"{pages} pages, at most {room}", path)
    pfns: list[int] = []
    end = 0
    for step, more in raw:
        first = end + ((step + 1) // -2 if step & 1 else step // 2)
        end = first + more + 1
        if first < 0 or end > PFN_LIMIT:
            raise c.ValidationError(f"pages {first:#x} to {end:#x} are outside the address space", path)
        if more:
            pfns.extend(range(first, end))
        else:
            pfns.append(first)
    return tuple(pfns)


class PfnList(PlainAdapter):
    """A tuple of at most ``limit`` page frame numbers."""

    def __init__(self, limit: int = MAX_PAGES) -> None:
        super().__init__(RawRuns)
        self._limit = limit

    def _decode(self, obj: Any, context: Any, path: str) -> tuple[int, ...]:
        return expand(obj, path, self._limit)

    def _encode(self, obj: Sequence[int], context: Any, path: str) -> list[Run]:
        if len(obj) > self._limit or not fit_in_space(obj):
            raise c.ValidationError(
                f"{len(obj)} pages (at most {self._limit}), or page frame numbers of more than 52 bits", path
            )
        return steps(obj)


PfnRuns = PfnList()
"""A list of at most ``MAX_PAGES`` page frame numbers, as a field of a record."""
