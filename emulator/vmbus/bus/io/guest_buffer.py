"""The guest memory that a GPA-direct packet names, checked, as one run of bytes.

Source: docs/protocol/messages.md#gpa-ranges, docs/protocol/rings.md#gpa-direct-packets. The shape of ranges was
checked when the packet was parsed; whether the page numbers are RAM is checked here, before anything is read or
written.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.wire.packet import GpaRange


def gpa_runs(ranges: Iterable[GpaRange]) -> list[tuple[int, int]]:
    """Return ``(guest physical address, bytes)`` of all ranges in order; adjacent ones are merged."""
    runs: list[tuple[int, int]] = []
    gpa = length = 0
    for byte_count, byte_offset, pfns in ranges:
        left = byte_count
        for pfn in pfns:
            start = pfn * PAGE_SIZE + byte_offset
            step = min(PAGE_SIZE - byte_offset, left)
            if length and gpa + length == start:
                length += step
            else:
                if length:
                    runs.append((gpa, length))
                gpa, length = start, step
            left -= step
            byte_offset = 0
    if length:
        runs.append((gpa, length))
    return runs


class GuestBuffer:
    """The buffer that a request reads from or writes to. ``length`` is in bytes; offsets count from the first byte.

    Raises :class:`~vmbus.errors.GuestAddressError` if any of it is not RAM.
    """

    __slots__ = ("_memory", "length", "runs")

    def __init__(self, memory: GuestMemory, ranges: Iterable[GpaRange]) -> None:
        self._memory = memory
        self.runs = gpa_runs(ranges)
        for gpa, length in self.runs:
            if not memory.is_ram(gpa, length):
                raise GuestAddressError(gpa, length)
        self.length = sum([length for _, length in self.runs])

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise IndexError(f"[{offset}, {offset + length}) is outside {self.length} bytes")
        pieces = []
        for gpa, run in self.runs:
            if not length:
                break
            if offset >= run:
                offset -= run
                continue
            step = min(run - offset, length)
            pieces.append((gpa + offset, step))
            length -= step
            offset = 0
        return pieces

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Return a private copy, to the end by default. Raises ``IndexError`` outside the buffer."""
        pieces = self._pieces(offset, self.length - offset if length is None else length)
        if len(pieces) == 1:
            return self._memory.read(*pieces[0])
        return b"".join([self._memory.read(gpa, step) for gpa, step in pieces])

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Store all of ``data``. Raises ``IndexError`` outside the buffer, before anything is stored."""
        done = 0
        for gpa, step in self._pieces(offset, len(data)):
            self._memory.write(gpa, data[done : done + step])
            done += step
