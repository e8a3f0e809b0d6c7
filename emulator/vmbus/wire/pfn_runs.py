"""Lists of page frame numbers as runs: how saved state keeps them small.

A buffer that a guest driver allocates is mostly contiguous, so its list of pages is stored as runs of numbers
that follow each other. Order and repetition are kept. A list is

    varint number of runs, then for each run: varint zigzag(first - end of the run before), varint (pages - 1)

where the end is one past the last number, and 0 before the first run. A varint is little-endian base 128, at
most 10 bytes. A 31 MiB network buffer in one piece takes 8 bytes, the worst case (no two neighbours) some four
bytes a page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import construct as c

from vmbus.wire.plain import OwnForm, PlainAdapter, VarUint, append_varint, take_varint

PFN_LIMIT = 1 << 52
"""Page frame numbers of a 64-bit address space are less."""

MAX_PAGES = 131_072
"""Most pages that one list (or one packet's lists together) may name: 512 MiB."""


class Run(NamedTuple):
    """A run as it is stored: zigzag of the distance to the end of the run before, and pages - 1."""

    step: int
    more: int


def runs(pfns: Iterable[int]) -> Iterator[tuple[int, int]]:
    """``pfns`` as (first, count) of numbers that follow each other."""
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


def steps(pfns: Sequence[int]) -> list[Run]:
    """``pfns`` as ``RawRuns`` builds them; the inverse of :func:`expand`."""
    found, end = [], 0
    for first, count in runs(pfns):
        step = first - end
        found.append(Run(step << 1 if step >= 0 else (-step << 1) - 1, count - 1))
        end = first + count
    return found


class _RawRuns(OwnForm):
    """``PrefixedArray(VarUint, Struct("step" / VarUint, "more" / VarUint))``, which a unit test holds it against.

    A storage driver under load names ten thousands of scattered pages while its guest stands still, and that
    declaration takes 30 us for each.
    """

    longest = 2 * VarUint.longest * (MAX_PAGES + 1)

    def take(self, data: bytes, at: int) -> tuple[list[Run], int]:
        count, at = take_varint(data, at)
        found = []
        for _ in range(count):
            step = data[at]
            at += 1
            if step >= 0x80:
                step, at = take_varint(data, at - 1)
            more = data[at]
            at += 1
            if more >= 0x80:
                more, at = take_varint(data, at - 1)
            found.append(Run(step, more))
        return found, at

    def give(self, value: Sequence[Run]) -> bytes:
        encoded = bytearray()
        append_varint(encoded, len(value))
        for step, more in value:
            append_varint(encoded, step)
            append_varint(encoded, more)
        return bytes(encoded)


RawRuns = _RawRuns()
"""The runs as they are stored; see :func:`expand`."""


def expand(raw: Sequence[Run], path: str, room: int = MAX_PAGES) -> tuple[int, ...]:
    """The page frame numbers of parsed ``RawRuns``. Raises ``construct.ValidationError`` for more than ``room``."""
    pages = sum(run.more for run in raw) + len(raw)
    if pages > room:
        raise c.ValidationError(f"{pages} pages, at most {room}", path)
    pfns: list[int] = []
    end = 0
    for run in raw:
        first = end + ((run.step + 1) // -2 if run.step & 1 else run.step // 2)
        end = first + run.more + 1
        if first < 0 or end > PFN_LIMIT:
            raise c.ValidationError(f"pages {first:#x} to {end:#x}", path)
        pfns.extend(range(first, end))
    return tuple(pfns)


class PfnList(PlainAdapter):
    """A tuple of page frame numbers, ``most`` at most."""

    def __init__(self, most: int = MAX_PAGES) -> None:
        super().__init__(RawRuns)
        self._most = most

    def _decode(self, obj: Any, context: Any, path: str) -> tuple[int, ...]:
        return expand(obj, path, self._most)

    def _encode(self, obj: Sequence[int], context: Any, path: str) -> list[Run]:
        if len(obj) > self._most or not all(0 <= pfn < PFN_LIMIT for pfn in obj):
            raise c.ValidationError(f"{len(obj)} pages, or page frame numbers of more than 52 bits", path)
        return steps(obj)


PfnRuns = PfnList()
"""The declaration of a list of pages, for any record that has one."""
