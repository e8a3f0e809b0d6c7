"""Locks on image files: against other guests of this emulator, against QEMU and its tools, and in one guest.

    flock(2)                the whole file: shared for a disk that is read-only, else exclusive
    fcntl(2), F_OFD_SETLK   bytes by which QEMU's programs say what they do with an image, and what others may not do

QEMU's convention (QEMU, block/file-posix.c): a shared lock on byte 100 + n says "I do n", one on byte 200 + n says
"nobody else may do n", with n = 0: read, 1: write, 3: resize. A program takes its locks first, and looks for those
that contradict them then, so that of two programs at most one goes on. The locks are of an open file, and end with
it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import struct
from pathlib import Path

from vmbus.errors import DeviceError

_logger = logging.getLogger(__name__)

_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: type, whence, start, length, process
_TAKEN = (errno.EAGAIN, errno.EACCES)


def lock(fd: int, path: Path, *, read_only: bool) -> None:
    """Lock the open file ``fd``; again for a file that is locked already.

    Raises :class:`~vmbus.errors.DeviceError` if it is used elsewhere. A file system without locks is logged.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise DeviceError(
                f"the image {path} is used by another guest, or by another disk of this one; to share it, give "
                "readonly=on to all of them"
            ) from error
        _logger.info("%s: the file system has no locks: %s", path, error.strerror)
    try:
        _lock_as_qemu(fd, path, read_only=read_only)
    except OSError as error:
        _logger.info("%s: the file system has no locks that QEMU takes: %s", path, error.strerror)
    except DeviceError:
        unlock(fd)
        raise


def unlock(fd: int) -> None:
    """Release the locks on the open file ``fd``."""
    with contextlib.suppress(OSError):  # a file system without locks
        _set(fd, fcntl.F_UNLCK, 0, 0)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)


def _lock_as_qemu(fd: int, path: Path, *, read_only: bool) -> None:
    does = (_READ,) if read_only else (_READ, _WRITE, _RESIZE)
    forbids = (_WRITE, _RESIZE)
    for byte in (*(_DOES + each for each in does), *(_FORBIDS + each for each in forbids)):
        _set(fd, fcntl.F_RDLCK, byte, 1)
    for byte in (*(_FORBIDS + each for each in does), *(_DOES + each for each in forbids)):
        if _is_locked(fd, byte):
            raise DeviceError(
                f"the image {path} is used by a QEMU program (a virtual machine, qemu-img, qemu-nbd), or as the "
                "backing file of another disk; end that first"
            )


def _set(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, start, length, 0))


def _is_locked(fd: int, byte: int) -> bool:
    """Return whether another open file has a lock on ``byte``."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
