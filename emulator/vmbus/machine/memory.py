"""Guest RAM, mapped: the only access to it, so that neither QEMU's translations nor its dirty log go stale.

The guest's RAM is a shared file (``memory-backend-file,share=on``) that QEMU and this process both map. A store
through the mapping is invisible to QEMU in two ways, and every write here takes care of both:

* **Stale code.** TCG keeps translations of guest code per page and drops them only when QEMU itself sees a
  write. The gateway notes every page that code was translated from (:class:`CodePages`). A write stores through
  the mapping first and checks the notes after a fence; where a note is set, the note is cleared and the same bytes
  are written once more through QEMU (:class:`WriteThrough`), which drops the translations. In this order the check
  sees a translation that was made before the store, and a translation made after it has read the new bytes.
* **Dirty pages.** Every page written is recorded in ``dirty`` (a byte for each page) for migrations, until
  :meth:`MappedMemory.take_dirty`.

Index words of rings (:meth:`MappedPages.store_u32`) skip the check: no guest executes the words that it shares as
indices, and the page's note stays set for the next write.
"""

from __future__ import annotations

import logging
import mmap
import os
import stat
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmbus.errors import GuestAddressError, QemuUnsuitable
from vmbus.machine import memory_file
from vmbus.machine.io.addresses import address_of
from vmbus.ports import PAGE_SIZE, NativeMemory

_logger = logging.getLogger(__name__)

VIDEO_MEMORY = range(0xA0000, 0x100000)
"""Addresses below 1 MiB at which devices see no RAM: video memory, SMRAM, ROM and its copies."""

Buffer = bytes | bytearray | memoryview


class CodePages(Protocol):
    """The guest pages that code was translated from, as noted by the gateway."""

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        """Return those of the pages ``first_pfn .. first_pfn + count - 1`` that are noted, and clear their notes."""

    def native(self) -> tuple[int, int]:
        """Return the address of the notes in this process (a byte for each page), and their number."""


class WriteThrough(Protocol):
    """Writes of guest memory that QEMU executes."""

    def write_memory(self, gpa: int, data: Buffer) -> None:
        """Store ``data`` at ``gpa``; return when it is stored."""


@dataclass(frozen=True, slots=True)
class RamFile:
    """The file of guest RAM: device and inode number on this host, ``size`` in bytes."""

    device: int
    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class RamRegion:
    """``size`` bytes of RAM at guest physical address ``gpa``, at ``offset`` in the backing file."""

    gpa: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        return self.gpa + self.size


class MappedPages:
    """:class:`~vmbus.ports.GuestPages`: pages of :class:`MappedMemory`, joined to runs where they touch."""

    __slots__ = ("_first", "_memory", "_starts", "_words", "size")

    def __init__(self, memory: MappedMemory, file_offsets: Sequence[int]) -> None:
        self._memory = memory
        self.size = len(file_offsets) * PAGE_SIZE
        # The guest chooses how many pages there are, and how scattered: 8 bytes a page are kept, whatever they are.
        self._starts = array("Q", [offset // 4 for offset in file_offsets])
        first = file_offsets[0] if file_offsets else 0
        in_one_run = all(offset == first + index * PAGE_SIZE for index, offset in enumerate(file_offsets))
        self._first = first if in_one_run else None
        """Offset in the file if the pages are one run there."""
        self._words = memory._words

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return ``(offset in the file, length)`` of each run that ``[offset, offset + length)`` touches."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"[{offset}, {offset + length}) is outside {self.size} bytes")
        if self._first is not None:
            return [(self._first + offset, length)] if length else []
        pieces: list[tuple[int, int]] = []
        start = end = 0
        page, inside = divmod(offset, PAGE_SIZE)
        while length:
            at = (self._starts[page] << 2) + inside
            step = min(length, PAGE_SIZE - inside)
            if at != end:
                if end:
                    pieces.append((start, end - start))
                start = at
            end = at + step
            length -= step
            page, inside = page + 1, 0
        if end:
            pieces.append((start, end - start))
        return pieces

    def read(self, offset: int, length: int) -> bytes:
        ram = self._memory._ram
        if self._first is not None:
            if offset < 0 or length < 0 or offset + length > self.size:
                raise IndexError(f"[{offset}, {offset + length}) is outside {self.size} bytes")
            start = self._first + offset
            return ram[start : start + length].tobytes()
        return b"".join([ram[start : start + step] for start, step in self._pieces(offset, length)])

    def write(self, offset: int, data: Buffer) -> None:
        done = 0
        for start, step in self._pieces(offset, len(data)):
            self._memory._store(start, data[done : done + step] if step != len(data) else data)
            done += step

    def load_u32(self, offset: int) -> int:
        page, inside = divmod(offset, PAGE_SIZE)
        if inside & 3 or offset < 0:
            raise IndexError(f"offset {offset} is not aligned")
        return self._words[self._starts[page] + (inside >> 2)]

    def store_u32(self, offset: int, value: int) -> None:
        page, inside = divmod(offset, PAGE_SIZE)
        if inside & 3 or offset < 0:
            raise IndexError(f"offset {offset} is not aligned")
        word = self._starts[page] + (inside >> 2)
        self._words[word] = value
        self._memory.dirty[word >> 10] = 1

    def set_bits_u32(self, offset: int, bits: int) -> int:
        page, inside = divmod(offset, PAGE_SIZE)
        if inside & 3 or offset < 0:
            raise IndexError(f"offset {offset} is not aligned")
        word = self._starts[page] + (inside >> 2)
        before = self._memory.set_bits(word, bits)
        self._memory.dirty[word >> 10] = 1
        return before

    def address_u32(self, offset: int) -> int:
        page, inside = divmod(offset, PAGE_SIZE)
        return self._memory.address + (self._starts[page] << 2) + inside


class MappedViews:
    """:class:`~vmbus.ports.WritableMemory`: runs of :class:`MappedMemory`, by their place in the file."""

    __slots__ = ("_memory", "_pieces", "views")

    def __init__(self, memory: MappedMemory, pieces: list[tuple[int, int]]) -> None:
        self._memory = memory
        self._pieces = pieces
        ram = memory._ram
        self.views = [ram[offset : offset + length] for offset, length in pieces]

    def finish(self, length: int) -> None:
        pieces, self._pieces = self._pieces, []
        self.views = []
        stored = []
        for offset, step in pieces:
            if length <= 0:
                break
            stored.append((offset, min(step, length)))
            length -= step
        self._memory._stored(stored)
        if stored and self._memory.filled is not None:
            self._memory.filled(stored)


def _check_owner(path: Path, found: os.stat_result) -> None:
    """Refuse a file of another user, who could read and change the guest; warn if others can open it."""
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
        raise QemuUnsuitable(
            f"the guest's memory file {path} belongs to another user (id {found.st_uid}), or is not a file: QEMU "
            "found it there when it started. Give QEMU a mem-path in a folder that only you can enter (mode 0700)"
        )
    folder = path.parent.stat()
    if found.st_mode & 0o066 and folder.st_mode & 0o011:
        _logger.warning(
            "other users can open the guest's memory file %s (mode %04o): put it into a folder of mode 0700, or "
            "start QEMU with umask 077",
            path,
            stat.S_IMODE(found.st_mode),
        )


def _check_room(path: Path, found: os.stat_result) -> None:
    """Warn if the guest can use more memory than its file system has room for."""
    missing = found.st_size - found.st_blocks * 512
    if missing > 0 and missing > (room := memory_file.available(path.parent)):
        _logger.warning(
            "the guest's memory file %s can grow by %d MiB, and its file system has room for %d MiB: when it is "
            "full, QEMU and the emulator are killed by SIGBUS. Free some space there, or use less memory",
            path,
            missing >> 20,
            room >> 20,
        )


class MappedMemory:
    """:class:`~vmbus.ports.GuestMemory` over a mapping of the guest's RAM file."""

    def __init__(
        self,
        ram: memoryview,
        regions: Sequence[RamRegion],
        *,
        code_pages: CodePages | None = None,
        through: WriteThrough | None = None,
        set_bits: Callable[[int, int], int] | None = None,
    ) -> None:
        """``set_bits(address, bits)``: set bits of a 32-bit word atomically, with a full fence; its value before."""
        self._ram = ram
        self._words = ram.cast("I")
        self.regions = tuple(sorted(regions, key=lambda region: region.gpa))
        self._spans = [(region.gpa, region.end, region.offset - region.gpa) for region in self.regions]
        self._code_pages = code_pages
        self._through = through
        self._fence = threading.Lock()
        self._set_bits = set_bits
        self._mapping: mmap.mmap | None = None
        self._descriptor = -1
        """Of the file, for processes that share it."""
        self.address = address_of(ram)
        """Address of the first byte of the file in this process."""
        self.file: RamFile | None = None
        """The file that is mapped; ``None`` for memory without a file."""
        self.filled: Callable[[Sequence[tuple[int, int]]], None] | None = None
        """Called with ``(offset in the file, length)`` of buffers that were filled, before the guest is notified."""
        self.dirty = bytearray(len(ram) // PAGE_SIZE)
        """A byte for each page of the file: 1 where this process wrote since the last ``take_dirty``."""

    @classmethod
    def map_file(
        cls,
        path: Path,
        regions: Sequence[RamRegion],
        *,
        code_pages: CodePages | None,
        through: WriteThrough | None,
        set_bits: Callable[[int, int], int] | None = None,
    ) -> MappedMemory:
        """Map the backing file of a running QEMU. Raises :class:`~vmbus.errors.QemuUnsuitable`."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise QemuUnsuitable(
                f"cannot open the guest's memory file {path}: {error.strerror}; "
                "the emulator must run as the user that QEMU runs as, and see the same files"
            ) from error
        try:
            found = os.fstat(descriptor)
            _check_owner(path, found)
            _check_room(path, found)
            size = found.st_size
            needed = max(region.offset + region.size for region in regions)
            if size < needed:
                raise QemuUnsuitable(f"{path} has {size} bytes, the guest's RAM layout needs {needed}")
            mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
        except BaseException:
            os.close(descriptor)
            raise
        memory = cls(memoryview(mapping), regions, code_pages=code_pages, through=through, set_bits=set_bits)
        memory._mapping = mapping
        memory._descriptor = descriptor
        memory.file = RamFile(found.st_dev, found.st_ino, size)
        return memory

    def close(self) -> None:
        """Unmap; every :class:`MappedPages` is unusable afterwards."""
        self._words.release()
        self._ram.release()
        if self._mapping is not None:
            self._mapping.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_ram(self, gpa: int, length: int) -> bool:
        if length < 0:
            return False
        end = gpa + length
        for start, stop, _ in self._spans:
            if start <= gpa < stop:
                if end <= stop:
                    return True
                gpa = stop
        return False

    def _pieces(self, gpa: int, length: int) -> list[tuple[int, int]]:
        """Return ``(offset in the file, length)`` of the runs of ``[gpa, gpa + length)``, which may cross regions."""
        pieces = []
        at, left = gpa, length
        for start, stop, delta in self._spans:
            if start <= at < stop:
                step = min(left, stop - at)
                pieces.append((at + delta, step))
                at += step
                left -= step
                if not left:
                    return pieces
        raise GuestAddressError(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        for start, stop, delta in self._spans:
            if start <= gpa and gpa + length <= stop and length >= 0:
                offset = gpa + delta
                return self._ram[offset : offset + length].tobytes()
        return b"".join([self._ram[offset : offset + step] for offset, step in self._pieces(gpa, length)])

    def write(self, gpa: int, data: Buffer) -> None:
        done = 0
        for offset, step in self._pieces(gpa, len(data)):
            self._store(offset, data[done : done + step] if step != len(data) else data)
            done += step

    def put_page(self, pfn: int, content: Buffer) -> None:
        """Store a whole page that comes with a saved state, before the guest runs.

        QEMU has no translated code of that guest yet, or drops all of it when it loads a snapshot. QEMU cannot
        execute the write: its main loop waits.
        """
        page = self.page_of_gpa(pfn * PAGE_SIZE)
        self._ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content
        self.dirty[page] = 1

    def readable(self, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        ram = self._ram
        return [
            ram[offset : offset + step].toreadonly()
            for gpa, length in runs
            for offset, step in self._pieces(gpa, length)
        ]

    def writable(self, runs: Sequence[tuple[int, int]]) -> MappedViews:
        return MappedViews(self, [piece for gpa, length in runs for piece in self._pieces(gpa, length)])

    def write_code(self, gpa: int, data: bytes) -> None:
        self.write(gpa, data)
        if self._through is not None:
            self._through.write_memory(gpa, data)

    def pages(self, pfns: Sequence[int]) -> MappedPages:
        offsets = []
        for pfn in pfns:
            gpa = pfn * PAGE_SIZE
            for start, stop, delta in self._spans:
                if start <= gpa and gpa + PAGE_SIZE <= stop:
                    offsets.append(gpa + delta)
                    break
            else:
                raise GuestAddressError(gpa, PAGE_SIZE)
        return MappedPages(self, offsets)

    def fence(self) -> None:
        # An uncontended lock is taken with a lock-prefixed instruction: a full fence on x86.
        with self._fence:
            pass

    def set_bits(self, word: int, bits: int) -> int:
        """Set bits of the 32-bit word number ``word`` of the file; return the word from before."""
        if self._set_bits is not None:
            return self._set_bits(self.address + 4 * word, bits)
        # Not atomic: a flag that the guest clears at this time may be set again, which costs it one read of a ring.
        with self._fence:
            before = int(self._words[word])
            self._words[word] = before | bits
        self.fence()
        return before

    def take_dirty(self) -> list[int]:
        """Return the pages of the file (numbers) written since the last call; they count as clean from now on."""
        found = []
        for page in self.written():
            self.dirty[page] = 0
            found.append(page)
        return found

    def written(self) -> Iterator[int]:
        """Yield the pages of the file (numbers) written since the last :meth:`take_dirty`, in ascending order."""
        at = self.dirty.find(1)
        while at >= 0:
            yield at
            at = self.dirty.find(1, at + 1)

    def gpa_of_page(self, page: int) -> int | None:
        """Return the guest physical address of a page of the file; ``None`` for one that the guest does not see."""
        try:
            return self._gpa_of(page * PAGE_SIZE)
        except GuestAddressError:
            return None

    def page_of_gpa(self, gpa: int) -> int:
        """Return the page of the file that ``gpa`` is in. Raises :class:`~vmbus.errors.GuestAddressError`."""
        return self._pieces(gpa, 1)[0][0] // PAGE_SIZE

    def read_page(self, page: int) -> memoryview:
        """Return a page of the file, whether the guest sees it or not. Do not keep the view."""
        return self._ram[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].toreadonly()

    def _gpa_of(self, offset: int) -> int:
        for region in self.regions:
            if region.offset <= offset < region.offset + region.size:
                return region.gpa + offset - region.offset
        raise GuestAddressError(offset)

    def native(self) -> NativeMemory:
        """Return where the memory is, for compiled code, which takes care of its stores as this class does."""
        notes, note_pages = (0, 0) if self._code_pages is None else self._code_pages.native()
        regions = tuple((region.gpa, region.size, region.offset) for region in self.regions)
        return NativeMemory(
            self.address,
            len(self._ram),
            address_of(self.dirty),
            notes,
            note_pages,
            regions,
            self._descriptor,
        )

    def filled_by_kernel(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Check the notes of ``(gpa, length)``, each within a page, which were stored and logged; call ``filled``."""
        self.fence()
        for gpa, length in ranges:
            if self._code_pages is not None and self._code_pages.test_and_clear(gpa // PAGE_SIZE, 1):
                self.write_through(gpa, length)
        if self.filled is not None:
            self.filled([piece for gpa, length in ranges for piece in self._pieces(gpa, length)])

    def write_through(self, gpa: int, length: int) -> None:
        """Have QEMU drop translations of ``[gpa, gpa + length)``, where a note was found and cleared."""
        if self._through is not None:
            self._through.write_memory(gpa, self.read(gpa, length))

    def _store(self, offset: int, data: Buffer) -> None:
        """Store at ``offset`` of the file (bounds already checked), then record it and check the notes."""
        length = len(data)
        if not length:
            return
        self._ram[offset : offset + length] = data
        self._stored([(offset, length)])

    def _stored(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Record that ``(offset in the file, length)`` were stored, and check their notes."""
        dirty = self.dirty
        for offset, length in pieces:
            first = offset // PAGE_SIZE
            last = (offset + length - 1) // PAGE_SIZE
            if first == last:
                dirty[first] = 1
            else:
                dirty[first : last + 1] = b"\1" * (last + 1 - first)
        if self._code_pages is None or not pieces:
            return
        self.fence()
        for offset, length in pieces:
            gpa = self._gpa_of(offset)
            first_pfn = gpa // PAGE_SIZE
            noted = self._code_pages.test_and_clear(
                first_pfn, (gpa + length - 1) // PAGE_SIZE + 1 - first_pfn
            )
            for pfn in noted:
                start = max(pfn * PAGE_SIZE, gpa)
                self.write_through(start, min((pfn + 1) * PAGE_SIZE, gpa + length) - start)
