"""Pages that the emulator wrote behind QEMU's back, in a migration that copies memory: marked, or carried along.

A page is marked by writing one of its bytes back through QEMU, which then sends it. What the guest writes to that
byte between the reading and the writing would be lost, so the byte has to be one that only the host may write at
that moment:

=======================  ===================================================================================
page                     a byte of the host's
=======================  ===================================================================================
buffer of a transfer     any that was stored, until the guest is told of its completion
ring to the guest        the write index, on its first page; any byte of its data
ring from the guest      the read index, on its first page
SynIC message page       a reserved byte of the first message slot
SynIC event flags page   flags of a SINT that is masked: the host sets none there, and the guest clears none
monitor page             the reserved end
reference TSC page       any
=======================  ===================================================================================

Buffers are marked as soon as they are full while a migration is under way (:class:`DirtyPageTracker`): they are what
a guest that reads from disks has most of, and afterwards they have no byte of the host's any more. Everything else
waits for the pause (:class:`WrittenPages`). Pages of the guest's own without any such byte (answers of small
devices) are read then, and go along in the emulator's state (:mod:`vmbus.saving.pages`): nothing is written to
them here, so whoever lets the guest go on has lost nothing. Only when they are more than a state carries are the
others marked, while the guest is known to stand still.

The flags of what is marked are cleared, those of what is carried stay set until the next migration begins, which
sends all of memory: a state that was made and not used has taken nothing away from the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmbus.bus.channel.opening import split_rings
from vmbus.errors import ProtocolError
from vmbus.machine.io.workers import WorkerThreads
from vmbus.machine.memory import MappedMemory
from vmbus.machine.qemu.qtest import Qtest
from vmbus.ports import PAGE_SIZE
from vmbus.wire.msr import PAGE_REGISTER
from vmbus.wire.ring import READ_INDEX, WRITE_INDEX
from vmbus.wire.synic import EVENT_AREA_SIZE

if TYPE_CHECKING:
    from vmbus.machine.host import Host

VIDEO_MEMORY = range(0xA0000, 0x100000)
"""Addresses below 1 MiB that are not RAM where a guest sees them."""

_RESERVED_IN_SLOT = 6
_RESERVED_IN_MONITOR_PAGE = PAGE_SIZE - 1

_OWNED_AT_ONCE = 256
_GUESTS_AT_ONCE = 16
"""Pages between two looks at whether the guest stands still: some 0.1 ms."""


class DirtyPageTracker:
    """Marks the buffers of transfers before the guest is told of their completion, while a migration is under way."""

    def __init__(self, memory: MappedMemory, qtest: Qtest, workers: WorkerThreads) -> None:
        self._memory = memory
        self._qtest = qtest
        self._workers = workers
        self.pages = 0
        """Marked since :meth:`begin`."""

    def begin(self) -> None:
        """A migration has begun, or is about to; calling it again changes nothing."""
        if self._memory.filled is None:
            self.pages = 0
            self._memory.filled = self._filled
            self._tell(True)

    def end(self) -> None:
        """It has come to its pause, or to its end."""
        if self._memory.filled is not None:
            self._memory.filled = None
            self._tell(False)

    def _tell(self, on: bool) -> None:
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


def owned_bytes(host: Host) -> dict[int, int]:
    """Page number (of guest physical memory) → offset of a byte in it that only the host writes now."""
    return dict(_owned(host))


def _owned(host: Host) -> Iterator[tuple[int, int]]:
    monitor = host.bus.connection.monitor_pages
    if monitor is not None:
        yield monitor.child_to_parent // PAGE_SIZE, _RESERVED_IN_MONITOR_PAGE
    for channel in host.bus.channels:
        if not channel.is_open or channel.request is None:
            continue
        try:
            pfns, downstream = split_rings(channel.request, channel.gpadls)
        except ProtocolError:  # its guest has taken the rings back meanwhile
            continue
        yield pfns[0], READ_INDEX
        for pfn in pfns[downstream + 1 :]:
            yield pfn, 0
        yield pfns[downstream], WRITE_INDEX
    for vp in host.partition.synic.vps:
        if vp.simp.pages is not None:
            yield _gpn(vp.simp.value), _RESERVED_IN_SLOT
        masked = [number for number, sint in enumerate(vp.sints) if sint.masked]
        if vp.siefp.pages is not None and masked:
            yield _gpn(vp.siefp.value), masked[-1] * EVENT_AREA_SIZE
    if host.partition.reference_tsc.pages is not None:
        yield _gpn(host.partition.reference_tsc.value), 0


def _gpn(register: int) -> int:
    return int(PAGE_REGISTER.parse(register).gpn)


@dataclass(frozen=True, slots=True)
class WrittenPages:
    """What was written since the migration began, as guest physical addresses."""

    ours: Sequence[int]
    """Of a byte of the host's, one a page."""
    theirs: Sequence[int]
    """Of pages without any."""

    @classmethod
    def of(cls, host: Host) -> WrittenPages:
        """What is there now: the guest is stopped and the host stands still. Nothing is changed."""
        memory = host.memory
        owned = owned_bytes(host)
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
        """The same but for ``carried``, which are page frame numbers of ``theirs``."""
        there = frozenset(carried)
        return WrittenPages(self.ours, [gpa for gpa in self.theirs if gpa // PAGE_SIZE not in there])

    async def mark(self, host: Host, stopped: Callable[[], bool]) -> int:
        """Make QEMU send them all. How many were marked.

        ``stopped``: whether the guest is known to stand still. It is asked before every few pages.
        """
        memory = host.memory
        marked = 0
        for addresses, at_once in ((self.ours, _OWNED_AT_ONCE), (self.theirs, _GUESTS_AT_ONCE)):
            for start in range(0, len(addresses), at_once):
                await asyncio.sleep(0)  # events come in
                if not stopped():
                    return marked
                some = addresses[start : start + at_once]
                host.qtest.mark([_there(memory, gpa) for gpa in some])
                for gpa in some:
                    memory.dirty[memory.page_of_gpa(gpa)] = 0
                marked += len(some)
        return marked


def remember(memory: MappedMemory, pages: Sequence[int]) -> None:
    """Count ``pages`` as written after all, once they were taken."""
    for page in pages:
        memory.dirty[page] = 1
