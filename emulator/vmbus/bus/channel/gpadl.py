"""GPADLs: lists of guest pages that a guest shares with a channel.

Source: docs/protocol/messages.md#gpadl.

    (none) --HEADER--> in progress --last BODY--> accepted --TEARDOWN--> tearing down --device let go--> (none)

Range data arrives in one HEADER and any number of BODY messages, in whole 8-byte words, never beyond the length
that the header declared; what is too much in a message is surplus and ignored. An assembly is known by its id
alone, because BODY names no channel; a complete GPADL by its id and its channel. Page numbers are checked to be
RAM once, when the list is complete: guest RAM does not come and go.

A guest can ask for many and large lists. A page costs the host 8 bytes, a range about as much as ``RANGE_WEIGHT``
pages, a list some hundred bytes; so the limits below bound what a guest can make it hold to some 20 MiB. Real
guests fit with room: the largest user known, a uio network device, shares 31 + 16 MiB and 4 MiB of rings
(13 056 pages) on its first channel, and 4 MiB of rings on each of up to 64 sub-channels.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from vmbus.errors import GuestAddressError, ProtocolError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.wire.gpadl import GpadlHeader, GpaRange, parse_ranges
from vmbus.wire.pfn_runs import runs

MAX_CHANNEL_PAGES = 131_072
"""Pages in all GPADLs of one channel: 512 MiB."""
MAX_CONNECTION_PAGES = 1_048_576
"""Pages in all GPADLs of a connection: 4 GiB."""
MAX_CHANNEL_GPADLS = 1024
MAX_CONNECTION_GPADLS = 8192
RANGE_WEIGHT = 32
"""What a range counts for besides its pages; lists of many ranges are legal, and used by nobody."""
MAX_ASSEMBLIES = 256
"""GPADLs in progress at a time, of all channels; each holds at most 64 KiB of range data."""


class GpadlState(enum.Enum):
    """States of a GPADL."""

    IN_PROGRESS = "in progress"
    ACCEPTED = "accepted"
    TEARING_DOWN = "tearing down"


@dataclass(slots=True)
class Assembly:
    """A GPADL whose range data is still arriving. ``capacity``: bytes of whole words that it will have."""

    relid: int
    gpadl_id: int
    capacity: int
    range_count: int
    data: bytearray = field(default_factory=bytearray)

    @property
    def weight(self) -> int:
        """What it counts for."""
        return self.capacity // 8 + RANGE_WEIGHT * self.range_count

    @property
    def complete(self) -> bool:
        return len(self.data) >= self.capacity

    def append(self, data: bytes) -> None:
        """Take the whole words of ``data`` that are still missing."""
        room = self.capacity - len(self.data)
        self.data += data[: min(room, len(data) // 8 * 8)]


@dataclass(slots=True)
class Gpadl:
    """A complete list. ``device_notified``: the endpoint knows of it."""

    gpadl_id: int
    ranges: tuple[GpaRange, ...]
    state: GpadlState = GpadlState.ACCEPTED
    device_notified: bool = False

    @property
    def page_count(self) -> int:
        return sum(len(each.pfns) for each in self.ranges)

    @property
    def weight(self) -> int:
        """What it counts for."""
        return self.page_count + RANGE_WEIGHT * len(self.ranges)

    @property
    def byte_count(self) -> int:
        return sum(each.byte_count for each in self.ranges)

    def aligned_pfns(self) -> Sequence[int]:
        """The page frame numbers of a list that is one range of whole pages (rings, network buffers).

        Raises :class:`ProtocolError` for any other shape.
        """
        if len(self.ranges) != 1:
            raise ProtocolError("gpadl-not-one-range", f"GPADL {self.gpadl_id:#x} has {len(self.ranges)}")
        only = self.ranges[0]
        if only.byte_offset or only.byte_count % PAGE_SIZE:
            raise ProtocolError(
                "gpadl-not-page-aligned",
                f"GPADL {self.gpadl_id:#x}: {only.byte_count} bytes from offset {only.byte_offset}",
            )
        return only.pfns


def check_ram(ranges: Sequence[GpaRange], memory: GuestMemory) -> None:
    """Raise :class:`GuestAddressError` unless every page is RAM."""
    for each in ranges:
        for first, count in runs(each.pfns):
            if not memory.is_ram(first * PAGE_SIZE, count * PAGE_SIZE):
                _find_hole(first, count, memory)


def _find_hole(first: int, count: int, memory: GuestMemory) -> None:
    """A run may lie over the border of two pieces of RAM; then every page of it must be in one of them."""
    for pfn in range(first, first + count):
        if not memory.is_ram(pfn * PAGE_SIZE, PAGE_SIZE):
            raise GuestAddressError(pfn * PAGE_SIZE, PAGE_SIZE)


class GpadlTable:
    """The assemblies of a connection, and how much its GPADLs count for."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.assemblies: dict[int, Assembly] = {}
        self.pages = 0
        self.gpadls = 0
        self._channel_pages: dict[int, int] = {}
        self._channel_gpadls: dict[int, int] = {}

    def begin(self, header: GpadlHeader, data: bytes) -> Assembly:
        """Begin a list with the header's part of its range data.

        Raises :class:`ProtocolError`: the id is being assembled already, or a limit would be passed.
        """
        if header.gpadl_id in self.assemblies:
            raise ProtocolError("gpadl-id-in-progress", f"{header.gpadl_id:#x}")
        assembly = Assembly(
            header.relid, header.gpadl_id, header.range_buffer_length // 8 * 8, header.range_count
        )
        relid, weight = assembly.relid, assembly.weight
        if len(self.assemblies) >= MAX_ASSEMBLIES:
            raise ProtocolError("gpadl-too-many-in-progress", f"{MAX_ASSEMBLIES}")
        if (
            self._channel_pages.get(relid, 0) + weight > MAX_CHANNEL_PAGES
            or self.pages + weight > MAX_CONNECTION_PAGES
        ):
            raise ProtocolError("gpadl-too-many-pages", f"channel {relid}, {weight} more")
        if self._channel_gpadls.get(relid, 0) >= MAX_CHANNEL_GPADLS or self.gpadls >= MAX_CONNECTION_GPADLS:
            raise ProtocolError("gpadl-too-many", f"channel {relid}")
        self._count(relid, weight, 1)
        assembly.append(data)
        self.assemblies[header.gpadl_id] = assembly
        return assembly

    def finish(self, assembly: Assembly) -> Gpadl:
        """End a complete assembly.

        Raises :class:`MalformedError` or :class:`GuestAddressError` for ranges that are none; the id is free
        again either way.
        """
        self.abandon(assembly)
        ranges = parse_ranges(assembly.data, assembly.range_count)
        check_ram(ranges, self._memory)
        gpadl = Gpadl(assembly.gpadl_id, ranges)
        self.add(assembly.relid, gpadl)
        return gpadl

    def abandon(self, assembly: Assembly) -> None:
        """Forget an assembly."""
        del self.assemblies[assembly.gpadl_id]
        self._count(assembly.relid, -assembly.weight, -1)

    def abandon_all(self, relid: int | None = None) -> None:
        """Forget the assemblies of one channel, or of all."""
        for each in list(self.assemblies.values()):
            if relid is None or each.relid == relid:
                self.abandon(each)

    def restore(self, assembly: Assembly) -> None:
        """Go on with an assembly that was saved."""
        self._count(assembly.relid, assembly.weight, 1)
        self.assemblies[assembly.gpadl_id] = assembly

    def add(self, relid: int, gpadl: Gpadl) -> None:
        """Count a GPADL that a channel holds from now on."""
        self._count(relid, gpadl.weight, 1)

    def remove(self, relid: int, gpadl: Gpadl) -> None:
        """A channel holds it no more."""
        self._count(relid, -gpadl.weight, -1)

    def _count(self, relid: int, pages: int, gpadls: int) -> None:
        self.pages += pages
        self.gpadls += gpadls
        for counts, change in ((self._channel_pages, pages), (self._channel_gpadls, gpadls)):
            left = counts.get(relid, 0) + change
            if left:
                counts[relid] = left
            else:
                counts.pop(relid, None)
