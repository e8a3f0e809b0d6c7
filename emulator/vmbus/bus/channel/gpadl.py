"""GPADLs: lists of guest pages that a guest shares with a channel.

Source: docs/protocol/messages.md#gpadl.

    (none) --HEADER--> in progress --last BODY--> accepted --TEARDOWN--> tearing down --device finished--> (none)

Range data arrives in one HEADER and any number of BODY messages, in whole 8-byte words, never beyond the length
that the header declared; surplus bytes of a message are ignored. A GPADL in progress (an *assembly*) is known by
its id alone, because BODY names no channel; a complete GPADL by its id and its channel. Page numbers are checked to
be RAM once, when the list is complete: guest RAM does not come and go.

The way of a GPADL from the message to the channel that keeps it:

    MessageDispatcher._gpadl_header → GpadlAssembler.begin     the assembly, charged to the quota
    MessageDispatcher._gpadl_body   → Assembly.append
    Channel.accept_gpadl            → GpadlList.accept         the endpoint is notified, GPADL_CREATED is sent
                                        → GpadlAssembler.finish   ranges parsed and checked, the list charged
    Channel.teardown                → GpadlList                the endpoint gives the pages back, GPADL_TORNDOWN

A guest can ask for many and large lists. A page costs the host 8 bytes, a run of pages 12, a range about as much as
``RANGE_WEIGHT`` pages, a list some hundred bytes; so the limits below bound what a guest can make the host hold to
some 32 MiB, which count against the guest's budget of memory (:mod:`vmbus.bus.budget`): the budget never refuses a
list. What the lists take in a saved state is bounded, too: a list that does not fit any more is refused. Real guests
fit with room: the largest user known, a uio network device, shares 31 + 16 MiB and 4 MiB of rings (13 056 pages) on
its first channel, and 4 MiB of rings on each of up to 64 sub-channels.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from vmbus.bus.budget import SAVED_GPADL_BYTES, MemoryBudget
from vmbus.errors import GuestAddressError, ProtocolError
from vmbus.ports import PAGE_SIZE, GuestMemory
from vmbus.wire.gpadl import GpadlHeader, GpaRange, parse_ranges

MAX_CHANNEL_PAGES = 131_072
"""Pages in all GPADLs of one channel: 512 MiB."""
MAX_CONNECTION_PAGES = 1_048_576
"""Pages in all GPADLs of a connection: 4 GiB."""
MAX_CHANNEL_GPADLS = 1024
MAX_CONNECTION_GPADLS = 8192
RANGE_WEIGHT = 32
"""What a range counts for besides its pages; no known guest uses lists of many ranges, but they are legal."""
_WEIGHT_BYTES = 28
"""Bytes of memory for each page, at most: in the list, in its runs, and in a mapping of it (a ring)."""
_LIST_BYTES = 512
_SAVED_LIST_BYTES = 32
"""Bytes of a list in a saved state, besides its ranges: here 8, in its channel's record 8, numbers of elements."""
_SAVED_RANGE_BYTES = 12
"""The same of a range, besides its pages."""
MAX_ASSEMBLIES = 256
"""GPADLs in progress at a time, of all channels; each holds at most 64 KiB of range data."""


class GpadlState(enum.Enum):
    """States of a complete GPADL; one in progress is an :class:`Assembly`."""

    ACCEPTED = "accepted"
    TEARING_DOWN = "tearing down"


@dataclass(slots=True)
class Assembly:
    """A GPADL whose range data is still arriving. ``capacity``: bytes of range data (whole words) when complete."""

    relid: int
    gpadl_id: int
    capacity: int
    range_count: int
    data: bytearray = field(default_factory=bytearray)

    @property
    def weight(self) -> int:
        """What the assembly counts for, in pages: at least what the finished list will."""
        return self.capacity // 8 + RANGE_WEIGHT * self.range_count

    @property
    def saved_bytes(self) -> int:
        """Bytes of saved state, at most: at least what the finished list will have."""
        return _SAVED_LIST_BYTES + self.capacity + self.capacity // 8 + _SAVED_RANGE_BYTES * self.range_count

    @property
    def complete(self) -> bool:
        return len(self.data) >= self.capacity

    def append(self, data: bytes) -> None:
        """Append the whole words of ``data``, up to :attr:`capacity`."""
        room = self.capacity - len(self.data)
        self.data += data[: min(room, len(data) // 8 * 8)]


@dataclass(slots=True)
class Gpadl:
    """A complete list. ``device_notified``: the endpoint was notified of it, and has not given it back."""

    gpadl_id: int
    ranges: tuple[GpaRange, ...]
    state: GpadlState = GpadlState.ACCEPTED
    device_notified: bool = False

    @property
    def page_count(self) -> int:
        return sum(len(each.pfns) for each in self.ranges)

    @property
    def weight(self) -> int:
        """What the list counts for, in pages."""
        return self.page_count + RANGE_WEIGHT * len(self.ranges)

    @property
    def saved_bytes(self) -> int:
        """Bytes of saved state: of the bus's list, and of the channel's reference to it."""
        size = _SAVED_LIST_BYTES
        for each in self.ranges:
            size += _SAVED_RANGE_BYTES
            for first, count in each.runs:
                size += (first.bit_length() + 6) // 7 + (count.bit_length() + 6) // 7 + (not first)
        return size

    @property
    def byte_count(self) -> int:
        return sum(each.byte_count for each in self.ranges)

    def aligned_pfns(self) -> Sequence[int]:
        """Return the page frame numbers of a list that is one range of whole pages (rings, network buffers).

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
        for first, count in each.runs:
            if not memory.is_ram(first * PAGE_SIZE, count * PAGE_SIZE):
                _find_hole(first, count, memory)


def _find_hole(first: int, count: int, memory: GuestMemory) -> None:
    """Check page by page: a run is RAM, too, if it crosses the border of two adjacent pieces of RAM."""
    for pfn in range(first, first + count):
        if not memory.is_ram(pfn * PAGE_SIZE, PAGE_SIZE):
            raise GuestAddressError(pfn * PAGE_SIZE, PAGE_SIZE)


class GpadlQuota:
    """What the GPADLs of a connection count for, assemblies included, against the limits above."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.pages = 0
        self.gpadls = 0
        self._channel_pages: dict[int, int] = {}
        self._channel_gpadls: dict[int, int] = {}

    def check(self, relid: int, weight: int, saved: int) -> None:
        """Raise :class:`ProtocolError` if one more list of that weight would pass a limit."""
        if (
            self._channel_pages.get(relid, 0) + weight > MAX_CHANNEL_PAGES
            or self.pages + weight > MAX_CONNECTION_PAGES
        ):
            raise ProtocolError("gpadl-too-many-pages", f"channel {relid}, {weight} more")
        if self._channel_gpadls.get(relid, 0) >= MAX_CHANNEL_GPADLS or self.gpadls >= MAX_CONNECTION_GPADLS:
            raise ProtocolError("gpadl-too-many", f"channel {relid}")
        if self._budget.saved_gpadls + saved > SAVED_GPADL_BYTES:
            raise ProtocolError("gpadl-too-scattered", f"channel {relid}, {saved} bytes of saved state more")

    def charge(self, relid: int, weight: int, saved: int) -> None:
        """Count one more list of channel ``relid``; ``saved``: bytes that it has in a saved state."""
        self._count(relid, weight, 1)
        self._budget.charge(_WEIGHT_BYTES * weight + _LIST_BYTES)
        self._budget.saved_gpadls += saved

    def refund(self, relid: int, weight: int, saved: int) -> None:
        """Undo :meth:`charge`."""
        self._count(relid, -weight, -1)
        self._budget.refund(_WEIGHT_BYTES * weight + _LIST_BYTES)
        self._budget.saved_gpadls -= saved

    def _count(self, relid: int, pages: int, gpadls: int) -> None:
        self.pages += pages
        self.gpadls += gpadls
        for counts, change in ((self._channel_pages, pages), (self._channel_gpadls, gpadls)):
            left = counts.get(relid, 0) + change
            if left:
                counts[relid] = left
            else:
                counts.pop(relid, None)


class GpadlAssembler:
    """The GPADLs in progress of a connection."""

    def __init__(self, memory: GuestMemory, budget: MemoryBudget | None = None) -> None:
        self.assemblies: dict[int, Assembly] = {}
        """By GPADL id."""
        self.quota = GpadlQuota(budget or MemoryBudget())
        self._memory = memory

    def begin(self, header: GpadlHeader, data: bytes) -> Assembly:
        """Begin a list with the header's part of its range data.

        Raises :class:`ProtocolError`: the id is being assembled already, or a limit would be passed.
        """
        if header.gpadl_id in self.assemblies:
            raise ProtocolError("gpadl-id-in-progress", f"{header.gpadl_id:#x}")
        if len(self.assemblies) >= MAX_ASSEMBLIES:
            raise ProtocolError("gpadl-too-many-in-progress", f"{MAX_ASSEMBLIES}")
        assembly = Assembly(
            header.relid, header.gpadl_id, header.range_buffer_length // 8 * 8, header.range_count
        )
        self.quota.check(assembly.relid, assembly.weight, assembly.saved_bytes)
        assembly.append(data)
        self.restore(assembly)
        return assembly

    def finish(self, assembly: Assembly) -> Gpadl:
        """Make a list of a complete assembly, which ends; its channel keeps the list, and refunds its weight later.

        Raises :class:`MalformedError` or :class:`GuestAddressError` for bad ranges; the id is free again either way.
        """
        self.abandon(assembly)
        ranges = parse_ranges(assembly.data, assembly.range_count)
        check_ram(ranges, self._memory)
        gpadl = Gpadl(assembly.gpadl_id, ranges)
        self.quota.charge(assembly.relid, gpadl.weight, gpadl.saved_bytes)
        return gpadl

    def abandon(self, assembly: Assembly) -> None:
        """Forget an assembly."""
        del self.assemblies[assembly.gpadl_id]
        self.quota.refund(assembly.relid, assembly.weight, assembly.saved_bytes)

    def abandon_all(self, relid: int | None = None) -> None:
        """Forget the assemblies of one channel, or of all."""
        for each in list(self.assemblies.values()):
            if relid is None or each.relid == relid:
                self.abandon(each)

    def restore(self, assembly: Assembly) -> None:
        """Continue an assembly, a saved one for instance."""
        self.quota.charge(assembly.relid, assembly.weight, assembly.saved_bytes)
        self.assemblies[assembly.gpadl_id] = assembly
