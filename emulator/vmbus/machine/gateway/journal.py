"""The memory that outlives emulators: mapped only if nobody can take it away again (docs/gateway.md#the-journal)."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from vmbus.errors import GatewayError
from vmbus.wire import gateway as wire

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_RESTART = "restart QEMU with this emulator's own gateway"


def map_journal(reply: wire.Reply, descriptors: Sequence[int]) -> mmap.mmap:
    """Map what came with ``reply`` to JOURNAL; the descriptors stay the caller's.

    QEMU runs the guest, so neither its word for the size is taken nor a file that it could truncate later: an access
    beyond the end would kill this process (SIGBUS). Raises :class:`~vmbus.errors.GatewayError`.
    """
    if reply.status == wire.Status.REFUSED:
        why = os.strerror(reply.argument) if reply.argument in errno.errorcode else f"error {reply.argument}"
        raise GatewayError(
            f"QEMU cannot make the journal ({why}): free memory or raise its limits, and attach again"
        )
    if reply.status != wire.Status.OK:
        raise GatewayError(f"the trap gateway refused the journal with status {reply.status}: {_RESTART}")
    if len(descriptors) != 1:
        raise GatewayError(
            f"{len(descriptors)} descriptors came for the journal, expected 1: raise the limit of open files "
            f"(ulimit -n) if this process has as many, else {_RESTART}"
        )
    (memory,) = descriptors
    try:
        seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
    except OSError as error:
        raise GatewayError(f"the journal is no memory file ({error.strerror}): {_RESTART}") from error
    if seals & _SEALS != _SEALS:
        raise GatewayError(f"the journal could change its size (seals {seals:#x}): {_RESTART}")
    size = os.fstat(memory).st_size  # and stays so
    if not reply.argument == size == wire.JOURNAL_SIZE:
        raise GatewayError(
            f"the journal has {size} bytes, and {reply.argument} were announced, expected {wire.JOURNAL_SIZE}: "
            f"{_RESTART}"
        )
    try:
        return mmap.mmap(memory, size, mmap.MAP_SHARED)
    except OSError as error:
        raise GatewayError(
            f"the journal cannot be mapped ({error.strerror}): free memory, and attach again"
        ) from error
