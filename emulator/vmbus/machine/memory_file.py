"""The file of guest RAM: made before QEMU starts, for this user alone, with all of its room reserved.

A sparse file would be filled while the guest runs. When the file system is full then, whoever touches the next page
is killed by SIGBUS: this guest's QEMU, or that of another guest, or an emulator. Reserved room cannot be used up by
others, and what has no room is refused at start. Who wants a sparse file has to ask for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from vmbus.errors import MissingRequirement, UserError

_STEP = 8 << 20
"""Bytes reserved at a time; between two steps the event loop runs."""


_WORKING_SET = 1 << 30
"""Bytes of room that a guest without reserved memory must have at start, if it has that much memory."""


async def make(places: Iterable[Path], size: int, *, reserve: bool = True) -> Path:
    """Make a file of ``size`` bytes at the first of ``places`` whose file system has room; return its path.

    ``reserve``: take all of the room now. Otherwise the file is sparse.

    Raises :class:`~vmbus.errors.MissingRequirement` when none has.
    """
    reasons = []
    for place in places:
        try:
            await _make(place, size, reserve)
        except OSError as error:
            reasons.append(f"{place.parent}: {error.strerror}")
        else:
            return place
    raise MissingRequirement(
        f"there is no room for {size >> 20} MiB of guest memory ({'; '.join(reasons)}); give the guest less "
        "(--memory), free some space there, set XDG_RUNTIME_DIR to a folder with room, or do without (--no-reserve)"
    )


async def _make(place: Path, size: int, reserve: bool) -> None:
    if (room := available(place.parent)) < (size if reserve else min(size, _WORKING_SET)):
        raise OSError(errno.ENOSPC, f"{room >> 20} MiB are free")
    # A file that exists already is not used: another user may have it open.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(place, flags, 0o600)
    try:
        os.ftruncate(descriptor, size)
        for start in range(0, size if reserve else 0, _STEP):
            os.posix_fallocate(descriptor, start, min(_STEP, size - start))
            await asyncio.sleep(0)
    except BaseException:
        place.unlink()
        raise
    finally:
        os.close(descriptor)


def available(folder: Path) -> int:
    """Return how many bytes a file in ``folder`` can have: free in its file system, and in memory if it is there."""
    found = os.statvfs(folder)
    room = found.f_bavail * found.f_frsize
    if _file_system(folder) == "tmpfs":
        with contextlib.suppress(OSError, ValueError, KeyError):  # no /proc
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            kibibytes = sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
            room = min(room, kibibytes << 10)
    return room


def _file_system(folder: Path) -> str:
    """Return the type of the file system that ``folder`` is in; empty if it is not known."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words, _, kind = line.partition(" - ")
            if words.split()[2] == number:
                return kind.split()[0]
    return ""


def second_name(memory: Path, places: Iterable[Path]) -> Path:
    """Give the memory file ``memory`` one more name, at the first of ``places`` in its file system; return that name.

    Each of two QEMUs that share the file has a name of its own, which is removed when that QEMU ends.

    Raises :class:`~vmbus.errors.UserError` when that is not possible.
    """
    for place in places:
        try:
            place.hardlink_to(memory)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise UserError(f"cannot share the memory file {memory}: {error.strerror}") from error
        else:
            return place
    raise UserError(
        f"cannot share the memory file {memory}: neither the run directory nor /dev/shm is in its file system"
    )
