"""Where the blocks of a disk are: the interface, and two back ends that need no file.

All methods that do I/O may block, and may be called from several threads at a time; they raise ``OSError``. Offsets
and lengths are bytes, multiples of the unit's block size, inside ``size``: whoever calls has checked that.

    | back end | read                 | write      | flush    | discard           |
    | null     | leaves memory alone  | nothing    | nothing  | nothing           |
    | memory   | from a private array |            | nothing  | zeros             |
    | file     | preadv               | pwritev    | fdatasync| punches a hole    |
    | nbd      | asks the server      |            |          |                   |
"""

from __future__ import annotations

# ruff: noqa: B027 - a back end without files has nothing to flush, or to close
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from vmbus.errors import UserError
from vmbus.ports import Workers


class Backend(ABC):
    """The blocks of one disk."""

    size: int
    """Bytes."""
    read_only: bool = False
    immediate: bool = False
    """Never blocks: may be called in the event loop's thread."""
    alignment: int = 1
    """Addresses and lengths of memory have to be multiples of this."""
    write_cache: bool = False
    """Whether a write is safe only after a flush."""
    flush_needed: bool = True
    fd: int = -1
    """A file whose bytes at an offset are those of the disk, if there is one: it can do without a thread."""
    fua_flags: int = 0
    """Flags of pwritev2(2) for a write that is safe on the medium afterwards."""
    """False: flushes are answered without doing anything (cache=unsafe, or nothing to flush)."""
    starts: bool = False
    """:meth:`start` does reads and writes without a thread that waits for each."""
    threads: Executor | None = None
    """Its own threads, if what it does may take as long as somebody else likes: others' work is not held up."""
    block_minimum: int = 1
    """Offsets and lengths have to be multiples of this."""
    can_discard: bool = False
    discard_granularity: int = 0
    """Bytes; 0 where nothing is known."""

    @abstractmethod
    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill ``views`` from ``offset`` on."""

    @abstractmethod
    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        """Store ``views`` at ``offset``; ``fua``: it is safe on the medium afterwards (FUA)."""

    def use(self, workers: Workers) -> None:
        """Before the first request: where its work can be done."""

    def start(
        self,
        offset: int,
        views: list[memoryview],
        length: int,
        write: bool,
        fua: bool,
        ended: Callable[[Exception | None], None],
    ) -> None:
        """Begin a read or a write; never blocks. ``ended`` is called once, in any thread. See :attr:`starts`."""
        raise NotImplementedError

    def flush(self) -> None:
        """All that was written is safe on the medium."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """The data is not needed any more; it reads as zeros, or as it was."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """It reads as zeros from now on; ``unmap``: it should take no room."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """``(offset, length, whether there is data)`` that cover the range, at most 64."""
        return [(offset, length, True)]

    def refresh(self) -> int:
        """Look at the size again; returns it."""
        return self.size

    def grow(self, size: int) -> None:
        """Make it ``size`` bytes large; it is seen by :meth:`refresh`. May block.

        Raises :class:`~vmbus.errors.UserError` where that cannot be done from here.
        """
        raise UserError("this disk cannot be resized")

    def look_again(self) -> None:
        """Somebody else may have resized it: have :meth:`refresh` see that. May block."""

    def lock(self) -> None:
        """A guest begins to use it. Raises :class:`~vmbus.errors.DeviceError` if another one does."""

    def unlock(self) -> None:
        """Another guest may use it."""

    def close(self) -> None:
        """Let go of what is open. Does not wait."""

    def abandon(self) -> None:
        """Requests are under way, and nobody waits for them any more: let them fail, if they might take long."""

    def join(self, limit: float) -> bool:
        """Wait ``limit`` seconds for what :meth:`close` began; whether it is done."""
        return True

    def status(self) -> dict[str, Any]:
        """For reports."""
        return {}


class NullBackend(Backend):
    """Reads nothing and writes nothing, at once: what remains is the way to the disk. Data is not kept."""

    immediate = True
    flush_needed = False
    can_discard = True

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        """Nothing is stored."""

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        """Nothing is read."""

    def discard(self, offset: int, length: int) -> None:
        """Nothing."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Nothing."""

    def status(self) -> dict[str, Any]:
        return {"backend": "null"}


class MemoryBackend(Backend):
    """A disk in this process's memory, empty at first, gone with it."""

    immediate = True
    flush_needed = False
    can_discard = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = bytearray(size)

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        data = memoryview(self.data)
        for view in views:
            length = len(view)
            view[:] = data[offset : offset + length]
            offset += length

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        for view in views:
            length = len(view)
            self.data[offset : offset + length] = view
            offset += length

    def discard(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.data[offset : offset + length] = bytes(length)

    def status(self) -> dict[str, Any]:
        return {"backend": "memory"}
