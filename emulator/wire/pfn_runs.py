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

from emulator.wire.codec import PlainAdapter

PFN_LIMIT = 1 << 52
"""Page frame numbers of a 64-bit address space are less."""

MAX_PAGES = 131_072
"""Most pages that one list (or one packet's lists together) may name: 512 MiB."""

_VARINT_BYTES = 10


class _VarUint(c.Construct):  # type: ignore[misc]
    """An unsigned number below 2**64, least significant 7 bits first; bit 7 says that more follow."""

    plain = True

    def _parse(self, stream: Any, context: Any, path: str) -> int:
        value: int = 0
        for place in range(_VARINT_BYTES):
            byte = int(c.stream_read(stream, 1, path)[0])
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if value >> 64 or (place and not byte):
                    raise c.ValidationError("a varint that is too large or too long", path)
                return value
        raise c.ValidationError("a varint of more than 10 bytes", path)

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        if not isinstance(obj, int) or obj < 0 or obj >> 64:
            raise c.IntegerError(f"{obj!r} is no unsigned 64-bit number", path)
        encoded = bytearray()
        _append(encoded, obj)
        c.stream_write(stream, bytes(encoded), len(encoded), path)
        return obj


def _append(encoded: bytearray, value: int) -> None:
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)


VarUint = _VarUint()


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


class _RawRuns(c.Construct):  # type: ignore[misc]
    """``PrefixedArray(VarUint, Struct("step" / VarUint, "more" / VarUint))``, which a unit test holds it against.

    A storage driver under load names ten thousands of scattered pages while its guest stands still, and that
    declaration takes 30 us for each.
    """

    plain = True

    def _parse(self, stream: Any, context: Any, path: str) -> list[Run]:
        count = VarUint._parse(stream, context, path)
        start = c.stream_tell(stream, path)
        data = stream.read(2 * _VARINT_BYTES * min(count, MAX_PAGES))
        found, at, size = [], 0, len(data)
        for _ in range(count):
            pair = []
            for _ in range(2):
                value = shift = 0
                while True:
                    if at == size:
                        raise c.StreamError("the list of runs ends early", path)
                    byte = data[at]
                    at += 1
                    value |= (byte & 0x7F) << shift
                    if byte < 0x80:
                        break
                    shift += 7
                    if shift == 7 * _VARINT_BYTES:
                        raise c.ValidationError("a varint of more than 10 bytes", path)
                if value >> 64 or (shift and not byte):
                    raise c.ValidationError("a varint that is too large or too long", path)
                pair.append(value)
            found.append(Run(*pair))
        c.stream_seek(stream, start + at, 0, path)
        return found

    def _build(self, obj: Sequence[Run], stream: Any, context: Any, path: str) -> Any:
        encoded = bytearray()
        _append(encoded, len(obj))
        for step, more in obj:
            _append(encoded, step)
            _append(encoded, more)
        c.stream_write(stream, bytes(encoded), len(encoded), path)
        return obj


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
