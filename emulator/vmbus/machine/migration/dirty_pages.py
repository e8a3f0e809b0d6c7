"""Pages that the emulator wrote through its mapping, in a migration that copies memory: marked, or carried along.

QEMU's dirty log does not see these writes. A page is marked by writing one of its bytes back through QEMU, which then
sends the page. A store of the guest to that byte between the read and the write would be lost, so it must be a byte
that only the host may write at that time:

=======================  ===================================================================================
page                     a byte of the host's
=======================  ===================================================================================
buffer of a transfer     any that was stored, until the guest gets the completion
ring to the guest        the write index, on its first page; any byte of its data
ring from the guest      the read index, on its first page
SynIC message page       a reserved byte of the first message slot
SynIC event flags page   flags of a SINT that is masked: the host sets none there, and the guest clears none
monitor page             the reserved end
reference TSC page       any
=======================  ===================================================================================

Buffers are marked as soon as they are full while a migration is under way (:class:`DirtyPageTracker`): they are most
of what a guest that reads disks has, and after the completion they have no byte of the host's any more. All other
pages wait for the pause (:class:`WrittenPages`). Pages without such a byte (small answers of devices) are then read
and carried in the emulator's state (:mod:`vmbus.saving.pages`): they are not written here, so nothing is lost if the
guest is resumed at the source. Only if there are more of them than a state carries, the rest is marked, while the
guest is known to stand still.

The flags of marked pages are cleared. Those of carried pages stay set until the next migration begins, which sends
all of memory: if a prepared state is not used, the next migration misses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.channel.opening import OpenRequest, split_rings
from vmbus.bus.contact import MonitorPages
from vmbus.errors import ProtocolError
from vmbus.machine.memory import VIDEO_MEMORY, MappedMemory
from vmbus.machine.migration.ports import DeviceWork, PageMarker
from vmbus.ports import PAGE_SIZE, GuestPages
from vmbus.wire.msr import PAGE_REGISTER
from vmbus.wire.ring import READ_INDEX, WRITE_INDEX
from vmbus.wire.synic import EVENT_AREA_SIZE

_RESERVED_IN_SLOT = 6
_RESERVED_IN_MONITOR_PAGE = PAGE_SIZE - 1

_OWNED_AT_ONCE = 256
_GUESTS_AT_ONCE = 16
"""Pages between two checks that the guest stands still: about 0.1 ms."""


class DirtyPageTracker:
    """Marks the buffers of transfers before the guest gets their completions, while a migration is under way."""

    def __init__(self, memory: MappedMemory, qtest: PageMarker, workers: DeviceWork) -> None:
        self._memory = memory
        self._qtest = qtest
        self._workers = workers
        self.pages = 0
        """Pages marked since :meth:`begin`."""

    def begin(self) -> None:
        """Begin to mark: a migration has begun, or is about to. A second call has no effect."""
        if self._memory.filled is None:
            self.pages = 0
            self._memory.filled = self._filled
            self._report_ranges(True)

    def end(self) -> None:
        """Mark no more: the migration has come to its pause, or to its end."""
        if self._memory.filled is not None:
            self._memory.filled = None
            self._report_ranges(False)

    def _report_ranges(self, on: bool) -> None:
        if self._workers.engines is not None:
            self._workers.engines.report_ranges(on)

    def _filled(self, stored: Sequence[tuple[int, int]]) -> None:
        memory = self._memory
        marks = []
        for offset, length in stored:
            first, last = offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE
            for page in range(first, last + 1):
                gpa = memory.gpa_of_page(page)
                if gpa is not None and gpa not in VIDEO_MEMORY:
                    marks.append(_there(memory, gpa + (offset % PAGE_SIZE if page == first else 0)))
                    memory.dirty[page] = 0
        self._qtest.mark(marks)
        self.pages += len(marks)


def _there(memory: MappedMemory, gpa: int) -> tuple[int, int]:
    return gpa, memory.read(gpa, 1)[0]


class RingChannel(Protocol):
    """What is needed of a channel to find its rings; :class:`~vmbus.bus.channel.channel.Channel`."""

    @property
    def is_open(self) -> bool: ...
    @property
    def request(self) -> OpenRequest | None: ...
    @property
    def gpadls(self) -> Mapping[int, Gpadl]: ...


class OverlayPage(Protocol):
    """A page that the guest placed with an MSR; :class:`~vmbus.hypervisor.overlay.PageOverlay`."""

    @property
    def value(self) -> int: ...
    @property
    def pages(self) -> GuestPages | None: ...


class Sint(Protocol):
    """A synthetic interrupt source."""

    @property
    def masked(self) -> bool: ...


class SynicPages(Protocol):
    """The pages of one virtual processor's SynIC; :class:`~vmbus.hypervisor.vp_synic.VpSynic`."""

    @property
    def simp(self) -> OverlayPage: ...
    @property
    def siefp(self) -> OverlayPage: ...
    @property
    def sints(self) -> Sequence[Sint]: ...


def owned_bytes(
    monitor: MonitorPages | None,
    channels: Iterable[RingChannel],
    synics: Iterable[SynicPages],
    reference_tsc: OverlayPage,
) -> dict[int, int]:
    """Return, by page number of guest physical memory, the offset of a byte in it that only the host writes now."""
    return dict(_owned(monitor, channels, synics, reference_tsc))


def _owned(
    monitor: MonitorPages | None,
    channels: Iterable[RingChannel],
    synics: Iterable[SynicPages],
    reference_tsc: OverlayPage,
) -> Iterator[tuple[int, int]]:
    if monitor is not None:
        yield monitor.child_to_parent // PAGE_SIZE, _RESERVED_IN_MONITOR_PAGE
    for channel in channels:
        if not channel.is_open or channel.request is None:
            continue
        try:
            pfns, downstream = split_rings(channel.request, channel.gpadls)
        except ProtocolError:  # the guest has torn the GPADL down
            continue
        yield pfns[0], READ_INDEX
        for pfn in pfns[downstream + 1 :]:
            yield pfn, 0
        yield pfns[downstream], WRITE_INDEX
    for synic in synics:
        if synic.simp.pages is not None:
            yield _gpn(synic.simp.value), _RESERVED_IN_SLOT
        masked = [number for number, sint in enumerate(synic.sints) if sint.masked]
        if synic.siefp.pages is not None and masked:
            yield _gpn(synic.siefp.value), masked[-1] * EVENT_AREA_SIZE
    if reference_tsc.pages is not None:
        yield _gpn(reference_tsc.value), 0


def _gpn(register: int) -> int:
    return int(PAGE_REGISTER.parse(register).gpn)


@dataclass(frozen=True, slots=True)
class WrittenPages:
    """What was written since the migration began, as guest physical addresses."""

    ours: Sequence[int]
    """Addresses of a byte of the host's, one for each page."""
    theirs: Sequence[int]
    """Addresses of pages without such a byte."""

    @classmethod
    def of(cls, memory: MappedMemory, owned: Mapping[int, int]) -> WrittenPages:
        """Return what is written now; ``owned``: see :func:`owned_bytes`. Changes nothing.

        The guest is stopped and the host is paused.
        """
        ours, theirs = [], []
        for page in memory.written():
            gpa = memory.gpa_of_page(page)
            if gpa is None or gpa in VIDEO_MEMORY:
                continue
            offset = owned.get(gpa // PAGE_SIZE)
            if offset is None:
                theirs.append(gpa)
            else:
                ours.append(gpa + offset)
        return cls(ours, theirs)

    def without(self, carried: Collection[int]) -> WrittenPages:
        """Return the same but for ``carried``, which are page frame numbers of ``theirs``."""
        there = frozenset(carried)
        return WrittenPages(self.ours, [gpa for gpa in self.theirs if gpa // PAGE_SIZE not in there])

    async def mark(self, memory: MappedMemory, qtest: PageMarker, stopped: Callable[[], bool]) -> int:
        """Make QEMU send all these pages; return how many were marked.

        ``stopped``: returns whether the guest is known to stand still; called before every few pages. Marking ends
        when it is false.
        """
        marked = 0
        for addresses, at_once in ((self.ours, _OWNED_AT_ONCE), (self.theirs, _GUESTS_AT_ONCE)):
            for start in range(0, len(addresses), at_once):
                await asyncio.sleep(0)  # let events be handled
                if not stopped():
                    return marked
                some = addresses[start : start + at_once]
                for gpa in some:  # before the wait: a later write counts again
                    memory.dirty[memory.page_of_gpa(gpa)] = 0
                await qtest.marked([_there(memory, gpa) for gpa in some])
                marked += len(some)
        return marked


def remember(memory: MappedMemory, pages: Sequence[int]) -> None:
    """Count ``pages`` as written after all, once they were taken."""
    for page in pages:
        memory.dirty[page] = 1
