"""A disk in a raw file or on a block device.

The modes of the ``cache`` option are those of QEMU:

    | cache        | host page cache | a write is safe        | the guest sees a write cache | flush    |
    | none         | no (O_DIRECT)   | after a flush          | yes                          | yes      |
    | writeback    | yes             | after a flush          | yes                          | yes      |
    | writethrough | yes             | at once (O_DSYNC)      | no                           | nothing  |
    | directsync   | no (O_DIRECT)   | at once (O_DSYNC)      | no                           | nothing  |
    | unsafe       | yes             | perhaps never          | yes                          | nothing  |

``none`` falls back to the page cache, with a line in the log, where the file system has no direct I/O.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmbus.errors import UserError

from vmbus_devices.scsi import locks
from vmbus_devices.scsi.backend import MAX_VIEWS, Backend

_logger = logging.getLogger(__name__)

SECTOR = 512
ZEROS = memoryview(bytes(1 << 20))

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)
_MAX_EXTENTS = 64


class Cache(enum.Enum):
    """How the host caches; see the table above."""

    NONE = "none"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"


class FileBackend(Backend):
    """``path`` as a disk. Raises :class:`~vmbus.errors.UserError` if it cannot be opened as asked."""

    def __init__(
        self, path: Path, *, read_only: bool = False, cache: Cache = Cache.NONE, can_discard: bool = True
    ) -> None:
        self.path = path
        self.read_only = read_only
        # A lock of another process is gone when its last request has ended; a shared one says nothing of others.
        self.outlives_process = not read_only
        self.cache = cache
        self.direct = cache in (Cache.NONE, Cache.DIRECTSYNC)
        self.write_cache = cache in (Cache.NONE, Cache.WRITEBACK, Cache.UNSAFE)
        self.flush_needed = cache in (Cache.NONE, Cache.WRITEBACK)
        self.fua_flags = os.RWF_DSYNC if self.flush_needed else 0
        self.fd = self._open()
        try:
            self._block_device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self.size = self._size()
        except BaseException:
            os.close(self.fd)
            raise
        self._block_size = 1
        self._locked = False
        self.alignment = self._alignment() if self.direct else 1
        self.can_discard = can_discard and not read_only
        self.discard_granularity = 0 if self._block_device else os.fstat(self.fd).st_blksize

    def _open(self) -> int:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.read_only else os.O_RDWR)
        if self.cache in (Cache.WRITETHROUGH, Cache.DIRECTSYNC):
            flags |= os.O_DSYNC
        try:
            if self.direct:
                try:
                    return os.open(self.path, flags | os.O_DIRECT)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self.direct = False
                    _logger.warning(
                        "%s: the file system has no direct I/O; the page cache is used", self.path
                    )
            return os.open(self.path, flags)
        except OSError as error:
            hint = (
                "; with readonly=on it needs no write access"
                if error.errno in (errno.EACCES, errno.EROFS)
                else ""
            )
            raise UserError(f"cannot open the image {self.path}: {error.strerror}{hint}") from error

    def lock(self) -> None:
        """Lock the file: two guests that write to one image destroy it.

        The lock is not taken when the file is opened, since the source of a migration still has it then.
        """
        if not self._locked:  # to look again could find somebody who only looks
            locks.lock(self.fd, self.path, read_only=self.read_only)
            self._locked = True

    def unlock(self) -> None:
        locks.unlock(self.fd)
        self._locked = False

    def round_up(self, block_size: int) -> None:
        if self._block_device:
            super().round_up(block_size)
        self._block_size = block_size
        self.refresh()

    def _size(self) -> int:
        if self._block_device:
            raw = fcntl.ioctl(self.fd, _BLKGETSIZE64, bytes(8))
            return int(struct.unpack("Q", raw)[0])
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise UserError(f"{self.path} is neither a file nor a block device")
        return os.fstat(self.fd).st_size

    def _alignment(self) -> int:
        if self._block_device:
            return max(SECTOR, int(struct.unpack("i", fcntl.ioctl(self.fd, _BLKSSZGET, bytes(4)))[0]))
        return max(SECTOR, _direct_alignment(self.fd))

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        wanted = sum([len(view) for view in views])
        done = os.preadv(self.fd, views[:MAX_VIEWS], offset)
        while done < wanted:
            at = offset + done
            # At the end of the file: direct I/O cannot continue from there, unless it is the end of a block.
            step = os.preadv(self.fd, _behind(views, done)[:MAX_VIEWS], at) if at < self._end() else 0
            if not step:
                if offset + wanted != self.size or wanted - done >= self._block_size:
                    raise OSError(errno.EIO, f"{self.path} ends at byte {at}")
                for view in _behind(views, done):
                    view[:] = bytes(len(view))
                return
            done += step

    def _end(self) -> int:
        """Return the size of a regular file now, in bytes; of a block device the size of the disk."""
        return self.size if self._block_device else os.fstat(self.fd).st_size

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        wanted = sum([len(view) for view in views])
        flags = self.fua_flags if fua else 0
        done = os.pwritev(self.fd, views[:MAX_VIEWS], offset, flags)
        while done < wanted:
            step = os.pwritev(self.fd, _behind(views, done)[:MAX_VIEWS], offset + done, flags)
            if not step:
                raise OSError(errno.ENOSPC, f"{self.path} cannot be written beyond byte {offset + done}")
            done += step

    def flush(self) -> None:
        if self.flush_needed and not self.read_only:
            os.fdatasync(self.fd)

    def hand_over(self) -> None:
        self.flush()

    def discard(self, offset: int, length: int) -> None:
        if not self.can_discard or not length:
            return
        try:
            self._punch(offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise

    def _punch(self, offset: int, length: int) -> None:
        if self._block_device:
            fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("QQ", offset, length))
        else:
            punch_hole(self.fd, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        if not length:
            return
        try:
            if self._block_device:
                fcntl.ioctl(self.fd, _BLKZEROOUT, struct.pack("QQ", offset, length))
            elif unmap:
                self._punch(offset, length)
            else:
                _fallocate(self.fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)  # zeros need no direct I/O
        try:
            while length:
                step = os.pwrite(fd, ZEROS[: min(length, len(ZEROS))], offset)
                offset += step
                length -= step
        finally:
            os.close(fd)

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        end = offset + length
        try:
            while offset < end and len(found) < _MAX_EXTENTS:
                try:
                    data = min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    data = end
                if data > offset:
                    found.append((offset, data - offset, False))
                    offset = data
                elif offset < end:
                    hole = min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
                    found.append((offset, hole - offset, True))
                    offset = hole
        except OSError:  # a file system without SEEK_DATA
            return [*found, (offset, end - offset, True)]
        return found

    def grow(self, size: int) -> None:
        if self._block_device:
            raise UserError(
                f"{self.path} is a block device: resize it with its own tools, then run this command without a size"
            )
        try:
            os.truncate(self.fd, size)
        except OSError as error:
            raise UserError(f"cannot resize {self.path}: {error.strerror}") from error

    def refresh(self) -> int:
        found = self._size()
        self.tail = 0 if self._block_device else found % self._block_size
        self.size = self.rounded(found)
        return self.size

    def rounded(self, size: int) -> int:
        """Return the bytes of a disk in a file of ``size`` bytes: whole blocks."""
        return size if self._block_device else -(-size // self._block_size) * self._block_size

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def status(self) -> dict[str, Any]:
        return {
            "backend": "file",
            "image": str(self.path),
            "cache": self.cache.value,
            "direct": self.direct,
        }


def _behind(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of ``views`` after ``done`` bytes."""
    left = []
    for view in views:
        if done >= len(view):
            done -= len(view)
        else:
            left.append(view[done:] if done else view)
            done = 0
    return left


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), which the standard library offers without its modes. Raises ``OSError``."""
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Deallocate a range of a file, which reads as zeros then. Raises ``OSError``."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_DIOALIGN_AT = 0x98  # stx_dio_mem_align, stx_dio_offset_align in struct statx


def _direct_alignment(fd: int) -> int:
    """Return the alignment of memory and offsets for direct I/O on a file, in bytes; 512 if unknown (before 6.1)."""
    buffer = ctypes.create_string_buffer(256)
    try:
        failed = _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer)
    except AttributeError:  # a C library without it
        return SECTOR
    mask = int.from_bytes(buffer.raw[:4], "little")
    if failed or not mask & _STATX_DIOALIGN:
        return SECTOR
    memory, offset = struct.unpack_from("<II", buffer.raw, _DIOALIGN_AT)
    return int(max(memory, offset))
