"""A lock on the source of a guest that left with its memory: QEMU refuses ``cont`` there.

    in the pause     QEMU gets a block node of its own, inactive, for an image in memory
    guest has left   the emulator takes that image's write lock: one system call
    ``cont``         QEMU activates all its images first, does not get the lock, and runs no virtual processor
    taken back       the lock is released and the node removed

The target maps the same memory, so an instruction at the source is one too many. Without the lock the emulator hears
of a ``cont`` only when the virtual processors run. QEMU itself refuses ``cont`` until it has ended the migration that
it reports as completed, and the emulator takes the lock when it reads that report.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct

from vmbus.errors import QemuError
from vmbus.machine.migration.ports import Monitor

_logger = logging.getLogger(__name__)

FENCE_NODE = "vmbus-fence"
"""Name of the block node."""

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_MAGIC = 0x514649FB
_WRITE_IS_NOT_SHARED = 201
"""Byte that a program locks whose images nobody else may write (QEMU: block/file-posix.c)."""
_OFD_SETLK = 37  # not in Python's fcntl of 3.11
_FLOCK = "hhqqi4x"


def _empty_image() -> int:
    """Return a descriptor of a qcow2 image (version 2) of one cluster: QEMU needs to write a format's metadata."""
    header = struct.pack(
        ">IIQIIQIIQQIIQ", _MAGIC, 2, 0, 0, _CLUSTER_BITS, _CLUSTER, 0, 1, 3 * _CLUSTER, _CLUSTER, 1, 0, 0
    )
    image = os.memfd_create(FENCE_NODE, os.MFD_CLOEXEC)
    os.ftruncate(image, 4 * _CLUSTER)
    os.pwrite(image, header, 0)
    os.pwrite(image, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)  # the table of reference count blocks
    os.pwrite(image, struct.pack(">4H", 1, 1, 1, 1), 2 * _CLUSTER)
    return image


class SourceFence:
    """The lock of one QEMU."""

    def __init__(self, qmp: Monitor) -> None:
        self._qmp = qmp
        self._image: int | None = None
        self._set: int | None = None

    async def prepare(self) -> None:
        """Give QEMU the block node. Without one (QEMU before 10.0) the guest is stopped again after a ``cont``."""
        await self.lift()
        self._image = image = _empty_image()
        theirs = os.open(f"/proc/self/fd/{image}", os.O_RDWR | os.O_CLOEXEC)  # a lock is of an open file
        try:
            self._set = await self._qmp.lend([theirs])
            await self._qmp.execute(
                "blockdev-add",
                {
                    "driver": "qcow2",
                    "node-name": FENCE_NODE,
                    "active": False,
                    "file": {"driver": "file", "filename": f"/dev/fdset/{self._set}", "locking": "on"},
                },
            )
        except QemuError as error:
            _logger.warning("if this guest is resumed after it has left, it runs for a moment: %s", error)
            await self.lift()
        finally:
            os.close(theirs)

    def close(self) -> None:
        """Have QEMU refuse ``cont`` from now on."""
        self._lock(fcntl.F_RDLCK)

    def open(self) -> None:
        """Have QEMU accept ``cont`` again."""
        self._lock(fcntl.F_UNLCK)

    def _lock(self, kind: int) -> None:
        if self._image is not None:
            fcntl.fcntl(
                self._image, _OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, _WRITE_IS_NOT_SHARED, 1, 0)
            )

    def leave(self) -> None:
        """Close the image: this process serves the guest no more. QEMU keeps its node, and accepts ``cont`` again."""
        image, self._image = self._image, None
        if image is not None:
            os.close(image)

    async def lift(self) -> None:
        """Remove everything, if there is anything."""
        self.leave()
        of_qemu, self._set = self._set, None
        if of_qemu is not None:
            with contextlib.suppress(QemuError):  # it was not added
                await self._qmp.execute("blockdev-del", {"node-name": FENCE_NODE})
            with contextlib.suppress(QemuError):
                await self._qmp.execute("remove-fd", {"fdset-id": of_qemu})
