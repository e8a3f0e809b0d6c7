"""A disk on an NBD server.

Data moves between the socket and guest pages without a copy and without a thread that waits. What a server cannot
do is replaced, or not offered to the guest:

    | the server lacks  | instead                                     |
    | FUA               | a flush after the write                     |
    | WRITE_ZEROES      | zeros are written                           |
    | TRIM              | the guest is not offered to discard         |
    | FLUSH             | the guest sees no write cache               |
    | block status      | everything is reported as mapped            |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vmbus.ports import Workers

from vmbus_devices.nbd.client import Client
from vmbus_devices.nbd.connection import Request
from vmbus_devices.nbd.handshake import Export
from vmbus_devices.nbd.wire import Command, CommandFlag, ExportFlag
from vmbus_devices.scsi.backend import Backend
from vmbus_devices.scsi.file import Cache

_THREADS = 4
"""Flushes, discards and the like that are under way at the same time."""
_SLOW = 5.0
"""Seconds that a request has waited for the server when a report says so."""
_STEP = 1 << 30
"""Bytes of one request without data."""
_ZEROS = memoryview(bytes(1 << 20))
MIN_MAXIMUM = 1 << 20
"""Bytes that a server must accept in one request."""


class NbdBackend(Backend):
    """A disk on an NBD server. ``client``: open, or activated later; ``export``: what the server exports."""

    kind = "nbd"
    starts = True

    def __init__(
        self,
        client: Client,
        export: Export,
        *,
        read_only: bool = False,
        cache: Cache = Cache.WRITEBACK,
        can_discard: bool = True,
    ) -> None:
        self.client = client
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"nbd-waiter {client.name}")
        self.threads = self._threads
        flags = export.flags
        self.size = export.size
        self.read_only = read_only
        self.block_minimum = export.minimum
        self.cache = cache
        self._fua = bool(flags & ExportFlag.FUA)
        self._zeroes = bool(flags & ExportFlag.WRITE_ZEROES)
        self._allocation = export.allocation is not None
        self._always_fua = cache in (Cache.WRITETHROUGH, Cache.DIRECTSYNC)
        self._flushes = bool(flags & ExportFlag.FLUSH)
        self.write_cache = self._flushes and not self._always_fua
        self.flush_needed = self.write_cache and cache is not Cache.UNSAFE
        self.can_discard = can_discard and not read_only and bool(flags & ExportFlag.TRIM)
        self.discard_granularity = export.preferred if self.can_discard else 0

    def use(self, workers: Workers) -> None:
        self.client.use(workers)

    # --- without waiting ---

    def start(
        self,
        offset: int,
        views: list[memoryview],
        length: int,
        write: bool,
        fua: bool,
        ended: Callable[[Exception | None], None],
    ) -> None:
        submit = self.client.submit
        if not write:
            # What is plain fails in the queue before it comes here: the error is to be known at once.
            submit(Request(Command.READ, offset, length, ended, views, whole=bool(self.queue)))
            return
        fua = self._needs_fua(fua)
        flags = int(CommandFlag.FUA) if fua and self._fua else 0
        done: Callable[[OSError | None], None] = ended
        if fua and not self._fua and self._flushes:

            def written(error: OSError | None) -> None:
                if error is not None:
                    ended(error)
                else:
                    submit(Request(Command.FLUSH, 0, 0, ended))

            done = written
        submit(Request(Command.WRITE, offset, length, done, views, flags))

    def _needs_fua(self, asked: bool) -> bool:
        return self._always_fua or (asked and self.flush_needed)

    # --- in a thread ---

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self.client.call(Command.READ, offset, sum([len(view) for view in views]), list(views), 0)

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        fua = self._needs_fua(fua)
        flags = int(CommandFlag.FUA) if fua and self._fua else 0
        self.client.call(Command.WRITE, offset, sum([len(view) for view in views]), list(views), flags)
        if fua and not self._fua and self._flushes:
            self.client.call(Command.FLUSH, 0, 0, [], 0)

    def flush(self) -> None:
        if self.flush_needed and not self.read_only:
            self.client.call(Command.FLUSH, 0, 0, [], 0)

    def discard(self, offset: int, length: int) -> None:
        if self.can_discard:
            self._in_steps(Command.TRIM, offset, length, 0)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        if self._zeroes:
            flags = 0 if unmap else int(CommandFlag.NO_HOLE)
            if self._always_fua and self._fua:
                flags |= CommandFlag.FUA
            self._in_steps(Command.WRITE_ZEROES, offset, length, flags)
            return
        while length:
            step = min(length, len(_ZEROS))
            self.write(offset, [_ZEROS[:step]])
            offset += step
            length -= step

    def _in_steps(self, command: Command, offset: int, length: int, flags: int) -> None:
        while length:
            step = min(length, _STEP)
            self.client.call(command, offset, step, [], flags)
            offset += step
            length -= step

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        if not self._allocation:
            return [(offset, length, True)]
        found = self.client.call(Command.BLOCK_STATUS, offset, min(length, _STEP), [], 0).extents
        return found or [(offset, length, True)]

    # --- size and life ---

    def refresh(self) -> int:
        if self.client.export is not None:
            self.size = self.client.export.size
        return self.size

    def reread_size(self) -> None:
        """Connect again: a server reports the size of its export in the negotiation only. May block."""
        self.client.interlude(lambda: None)
        self.client.call(Command.READ, 0, self.block_minimum, [memoryview(bytearray(self.block_minimum))], 0)

    def close(self) -> None:
        self.client.close()
        self._threads.shutdown(wait=False)

    def abandon(self) -> None:
        self.close()

    def wait_closed(self, timeout: float) -> bool:
        return self.client.wait_closed(timeout)

    def status(self) -> dict[str, Any]:
        client = self.client
        report: dict[str, Any] = {
            "backend": self.kind,
            "image": client.name,
            "cache": self.cache.value,
            "connections": client.connections,
            "sessions": client.sessions,
        }
        if (waited := client.waited) >= _SLOW:
            report["waits"] = round(waited, 1)
        if client.trouble:
            report["trouble"] = client.trouble
        return report
