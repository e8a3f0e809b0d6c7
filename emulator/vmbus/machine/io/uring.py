"""Reads and writes of files without threads: Linux's io_uring, through raw system calls.

    transfer() → a submission entry ──(once a turn of the event loop)──▶ io_uring_enter ──▶ kernel
    done(result) ◀── completion entries ◀── eventfd ◀──────────────────────────────────────┘

To pass a small read to a thread and back costs several times as much as the read; here a batch costs one system call
each way, and there is no contention for the interpreter's lock. Source: io_uring(7), linux/io_uring.h.

Containers often forbid io_uring: :meth:`Uring.open` then returns ``None``, and threads do the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence

from vmbus.machine.io.addresses import address_of

_logger = logging.getLogger(__name__)

ENTRIES = 256
"""Transfers that are submitted at once; twice as many may be under way, more wait here."""

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_REGISTER_EVENTFD = 4
_SQ_RING, _CQ_RING, _SQES = 0, 0x8000000, 0x10000000
_READV, _WRITEV, _READ, _WRITE = 1, 2, 22, 23
_PARAMS = struct.Struct("<7I12x" + "8IQ" * 2)
_SQE = struct.Struct("<BBHiQQIIQ24x")
_CQE = struct.Struct("<QiI")

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

Done = Callable[[int], None]


def _call(number: int, *arguments: int) -> int:
    """A system call. Raises ``OSError``."""
    result = int(_syscall(ctypes.c_long(number), *[ctypes.c_long(each) for each in arguments]))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


class Uring:
    """One ring on an event loop. Made by :meth:`open`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, params: tuple[int, ...]) -> None:
        self._loop = loop
        self._fd = fd
        sq_entries, cq_entries = params[:2]
        sq, cq = params[7:16], params[16:25]
        shared, both = mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
        self._maps = [
            mmap.mmap(fd, sq[6] + sq_entries * 4, shared, both, offset=_SQ_RING),
            mmap.mmap(fd, cq[5] + cq_entries * 16, shared, both, offset=_CQ_RING),
            mmap.mmap(fd, sq_entries * 64, shared, both, offset=_SQES),
        ]
        sq_map, self._cq_map, self._sqes = self._maps
        self._sq_words = memoryview(sq_map)[: (len(sq_map) // 4) * 4].cast("I")
        self._cq_words = memoryview(self._cq_map)[: (len(self._cq_map) // 4) * 4].cast("I")
        self._sq_tail_at = sq[1] // 4
        self._cq_head_at, self._cq_tail_at = cq[0] // 4, cq[1] // 4
        self._sq_mask = sq_entries - 1
        self._cq_mask = cq_entries - 1
        self._cqes_at = cq[5]
        for index in range(sq_entries):
            self._sq_words[sq[6] // 4 + index] = index
        self._sq_tail = int(self._sq_words[self._sq_tail_at])
        self._limit = min(cq_entries, 2 * sq_entries)
        self._entries = sq_entries
        self._unsubmitted = 0
        self._scheduled = False
        self._next = 0
        self._pending: dict[int, tuple[Done, object]] = {}
        """Transfers under way, with all buffers whose addresses the kernel has."""
        self._waiting: deque[tuple[int, int, Sequence[memoryview], bool, int, Done]] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        number = ctypes.c_int(self._event)
        _call(_REGISTER, fd, _REGISTER_EVENTFD, ctypes.addressof(number), 1)
        loop.add_reader(self._event, self._completed)

    @classmethod
    def open(cls, loop: asyncio.AbstractEventLoop) -> Uring | None:
        """Return a ring, or ``None`` where the kernel does not allow one."""
        fd = -1
        try:
            buffer = ctypes.create_string_buffer(_PARAMS.size)
            fd = _call(_SETUP, ENTRIES, ctypes.addressof(buffer))
            return cls(loop, fd, _PARAMS.unpack(buffer.raw))
        except (OSError, AttributeError, NotImplementedError) as error:
            _logger.info("io_uring is not available (%s): threads read and write files", error)
            if fd >= 0:
                os.close(fd)
            return None

    def transfer(
        self, fd: int, offset: int, views: Sequence[memoryview], write: bool, flags: int, done: Done
    ) -> None:
        """Read or write at ``offset`` of a file; ``done`` gets the number of bytes, or minus an errno.

        ``flags``: those of preadv2(2). ``views`` are kept until then; 1024 at most.
        """
        if len(self._pending) >= self._limit or self._unsubmitted >= self._entries:
            self._waiting.append((fd, offset, views, write, flags, done))
            return
        if len(views) == 1:
            address, length, kept = address_of(views[0]), len(views[0]), b""
            opcode = _WRITE if write else _READ
        else:
            numbers: list[int] = []
            for view in views:
                numbers += (address_of(view), len(view))
            kept = struct.pack(f"<{len(numbers)}Q", *numbers)
            address, length = address_of(memoryview(kept)), len(views)
            opcode = _WRITEV if write else _READV
        number = self._next
        self._next = number + 1
        self._pending[number] = (done, (list(views), kept))
        tail = self._sq_tail
        _SQE.pack_into(
            self._sqes, (tail & self._sq_mask) * 64, opcode, 0, 0, fd, offset, address, length, flags, number
        )
        self._sq_tail = (tail + 1) & 0xFFFFFFFF
        self._unsubmitted += 1
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._submit_later)

    def _submit_later(self) -> None:
        self._scheduled = False
        self.submit()

    def submit(self) -> None:
        """Submit the transfers that were requested."""
        if not self._unsubmitted or self._fd < 0:
            return
        self._sq_words[self._sq_tail_at] = self._sq_tail
        try:
            self._unsubmitted -= _call(_ENTER, self._fd, self._unsubmitted, 0, 0, 0, 0)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                raise
        if self._unsubmitted and not self._scheduled:
            self._scheduled = True
            self._loop.call_later(0.001, self._submit_later)
        self._refill()

    def _refill(self) -> None:
        waiting = self._waiting
        while waiting and len(self._pending) < self._limit and self._unsubmitted < self._entries:
            self.transfer(*waiting.popleft())

    def _completed(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        words = self._cq_words
        head = int(words[self._cq_head_at])
        finished: list[tuple[Done, int]] = []
        while head != words[self._cq_tail_at]:
            number, result, _ = _CQE.unpack_from(self._cq_map, self._cqes_at + (head & self._cq_mask) * 16)
            head = (head + 1) & 0xFFFFFFFF
            done, _kept = self._pending.pop(number)
            finished.append((done, result))
        words[self._cq_head_at] = head
        del words
        for done, result in finished:
            try:
                done(result)
            except Exception:
                _logger.exception("internal error at the end of a transfer; please report this")
        if self._waiting:
            self._refill()

    @property
    def under_way(self) -> int:
        """Number of transfers that have not ended."""
        return len(self._pending) + len(self._waiting)

    def close(self) -> None:
        """Close the ring. If transfers are under way, leave it open: the kernel still writes to their buffers."""
        if self._fd < 0:
            return
        if self._pending:
            _logger.warning("%d transfers are under way; the ring is left open", len(self._pending))
            return
        self._loop.remove_reader(self._event)
        self._sq_words.release()
        self._cq_words.release()
        for each in self._maps:
            each.close()
        os.close(self._event)
        os.close(self._fd)
        self._fd = -1
