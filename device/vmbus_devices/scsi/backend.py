"""Back ends, which hold the blocks of a disk: the interface, and two that need no file.

All methods that do I/O may block, and may be called from several threads at a time; they raise ``OSError``. Offsets
and lengths are in bytes, multiples of the unit's block size, and inside ``size``: the caller has checked that.

    | back end | read                       | write      | flush    | discard           |
    | null     | leaves memory as it is     | nothing    | nothing  | nothing           |
    | memory   | from an array, and back                 | nothing  | zeros             |
    | file     | preadv                     | pwritev    | fdatasync| punches a hole    |
    | nbd      | a request to the server, for each                                      |
"""

from __future__ import annotations

# ruff: noqa: B027 - a back end without files has nothing to flush or close
import contextlib
import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.errors import DeviceError, UserError
from vmbus.ports import NativeServices, Workers

MAX_VIEWS = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one system call reads or writes. A guest may scatter its data over more of them."""
_CLAIM_AGAIN = 0.05
"""Seconds between two attempts to lock an image."""
_MAP_NORESERVE = 0x4000
"""Of mmap(2) on Linux; the standard library has it from Python 3.12 on."""
_DISCARD_STEP = 16 << 20
"""Bytes that a memory disk gives back in one system call, during which no other thread runs Python."""


class Backend(ABC):
    """The blocks of one disk."""

    size: int
    """Bytes."""
    tail: int = 0
    """Bytes behind the last whole block of an image that :meth:`round_up` completed; 0 once they are a block."""
    read_only: bool = False
    immediate: bool = False
    """No method blocks: all may be called in the event loop's thread, apart from :attr:`immediate_changes`."""
    immediate_changes: bool = True
    """With ``immediate``: so may those that change a range of any length (discards, zeros)."""
    alignment: int = 1
    """Addresses and lengths of memory have to be multiples of this."""
    write_cache: bool = False
    """Whether data is safe on the medium only after a flush."""
    flush_needed: bool = True
    """False: flushes are answered without calling :meth:`flush` (cache=unsafe, or no write cache)."""
    fd: int = -1
    """A file whose bytes at an offset are those of the disk, or -1: reads and writes need no thread then."""
    fua_flags: int = 0
    """Flags of pwritev2(2) for a write to ``fd`` with FUA."""
    bound_to_process: bool = False
    """Whether it has something of the guest's that ends with this process."""
    outlives_process: bool = False
    """Whether all that was acknowledged is there after this process was killed, and nothing of the rest is under way
    once another process has the lock (:meth:`claim`)."""
    queue: int = 0
    """Number of a queue of the engine to the server that has the disk, or 0. It may change at any time."""
    leaves_fua: bool = False
    """Whether writes with FUA go through :meth:`write` or :meth:`start`, and never through :attr:`queue`."""
    starts: bool = False
    """Whether reads and writes go through :meth:`start`, without a thread that waits for each."""
    reconnect: float = 5.0
    """Seconds for which requests wait for an image that somebody else uses."""
    threads: Executor | None = None
    """Threads of its own, for a back end with unbounded latency (a server), so that other devices need not wait."""
    block_minimum: int = 1
    """Offsets and lengths have to be multiples of this."""
    can_discard: bool = False
    discard_granularity: int = 0
    """Bytes; 0 if unknown."""
    snapshot_disk: SnapshotDisk | None = None
    """Its snapshots, in the image itself or copies of it; ``None`` where it cannot have any, or is read-only."""

    @abstractmethod
    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` from ``offset`` on."""

    @abstractmethod
    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        """Store ``views`` at ``offset``. ``fua``: force unit access, the data is safe on the medium afterwards."""

    def use_native(self, native: NativeServices) -> None:
        """Take what the machine has for compiled code, before :meth:`use`."""

    def use(self, workers: Workers) -> None:
        """Take the workers of the machine, before the first request."""

    def start(
        self,
        offset: int,
        views: list[memoryview],
        length: int,
        write: bool,
        fua: bool,
        ended: Callable[[Exception | None], None],
    ) -> None:
        """Begin a read or a write; does not block. ``ended`` is called once, in any thread. See :attr:`starts`."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when all data that was written is safe on the medium."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Deallocate a range, which then reads as zeros or as before."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Have a range read as zeros; ``unmap``: it should be deallocated."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Return ``(offset, length, whether it is allocated)``, which cover the range from its start; at most 64."""
        return [(offset, length, True)]

    def round_up(self, block_size: int) -> None:
        """Have :attr:`size` be a multiple of ``block_size``: what the image lacks of its last block reads as zeros.

        Called once, before the first request. Raises :class:`~vmbus.errors.UserError` where the last block could not
        be written.
        """
        if tail := self.size % block_size:
            raise UserError(
                f"its size, {self.size} bytes, is not a multiple of {block_size} bytes, and its last {tail} bytes "
                "would be missing; change its size, or set another block="
            )

    def refresh(self) -> int:
        """Update :attr:`size` and return it."""
        return self.size

    def grow(self, size: int) -> None:
        """Grow the image to ``size`` bytes, which :meth:`refresh` then returns. May block.

        Raises :class:`~vmbus.errors.UserError` where the image cannot be resized by the emulator.
        """
        raise UserError("this disk cannot be resized")

    def reread_size(self) -> None:
        """Have :meth:`refresh` return the size of an image that another program has resized. May block."""

    def lock(self) -> None:
        """Lock the image for this guest, or go on doing so. Does not wait.

        Raises :class:`~vmbus.errors.DeviceError` if somebody else uses it.
        """

    def claim(self, timeout: float) -> None:
        """Lock the image before the guest uses it; wait at most ``timeout`` seconds for somebody who gives it up.

        Raises :class:`~vmbus.errors.DeviceError` if somebody else uses it. Called in any thread.
        """
        end = time.monotonic() + timeout
        while True:
            try:
                return self.lock()
            except DeviceError:
                if time.monotonic() >= end:
                    raise
            time.sleep(_CLAIM_AGAIN)

    def hand_over(self) -> None:
        """Make data safe before another emulator, perhaps on another machine, uses the image. Raises ``OSError``.

        No request is under way. May block, but must not need the event loop.
        """

    def unlock(self) -> None:
        """Release the lock. Does not wait."""

    def close(self) -> None:
        """Close what is open. Does not wait; see :meth:`wait_closed`."""

    def abandon(self) -> None:
        """Let requests under way fail if their latency is unbounded: the machine is stopped."""

    def wait_closed(self, timeout: float) -> bool:
        """Wait for outstanding work after :meth:`close`; return False on timeout (seconds)."""
        return True

    def status(self) -> dict[str, Any]:
        """Return what ``vmbus status`` shows."""
        return {}


class NullBackend(Backend):
    """A back end that moves no data, for measurements of everything else."""

    immediate = True
    flush_needed = False
    can_discard = True
    outlives_process = True

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Store nothing."""

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        """Read nothing."""

    def discard(self, offset: int, length: int) -> None:
        """Do nothing."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Do nothing."""

    def status(self) -> dict[str, Any]:
        return {"backend": "null"}


class MemoryBackend(Backend):
    """A disk in this process's memory: zeros at first, lost when the process ends. Only what is written takes room.

    Raises :class:`~vmbus.errors.UserError` if this machine has no such range of addresses.
    """

    immediate = True
    immediate_changes = False
    flush_needed = False
    can_discard = True

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self.data = mmap.mmap(-1, max(size, 1), flags=flags)
        except (OSError, OverflowError, ValueError) as error:
            raise UserError(f"no memory for a disk of {size} bytes: {error}; make it smaller") from error
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self.data.madvise(mmap.MADV_NOHUGEPAGE)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        data = memoryview(self.data)
        for view in views:
            length = len(view)
            view[:] = data[offset : offset + length]
            offset += length

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        self.bound_to_process = True
        for view in views:
            length = len(view)
            self.data[offset : offset + length] = view
            offset += length

    def discard(self, offset: int, length: int) -> None:
        """Zero a range; whole pages are given back to the machine."""
        end = offset + length
        first, last = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            self.data[offset:end] = bytes(length)
            return
        self.data[offset:first] = bytes(first - offset)
        self.data[last:end] = bytes(end - last)
        for at in range(first, last, _DISCARD_STEP):
            self.data.madvise(mmap.MADV_DONTNEED, at, min(_DISCARD_STEP, last - at))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.discard(offset, length)

    def status(self) -> dict[str, Any]:
        return {"backend": "memory"}
