"""Writes to a pipe or a terminal that perhaps nobody reads, without waiting for it.

A reader such as ``less`` stops reading for as long as its user likes, and a terminal after Ctrl-S. Who serves a guest
must not wait for that: a thread writes, and what it has not written yet is in a queue of bounded size.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections import deque

_WRITE_SIZE = 1 << 16


class Writer:
    """Writes to ``descriptor`` in a thread, in the order of the calls.

    ``limit``: bytes that may wait. :meth:`offer` leaves out what does not fit; who uses :meth:`put` asks
    :meth:`room` first. What was given after an error of the descriptor is lost; ``error`` has it.
    """

    def __init__(self, descriptor: int, limit: int) -> None:
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._limit = limit
        self._queue: deque[bytes] = deque()
        self._waiting = 0
        self._left_out = 0
        self._changed = threading.Condition()
        self._wanting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._thread: threading.Thread | None = None

    def put(self, data: bytes) -> None:
        """Write ``data``, however much waits already."""
        with self._changed:
            self._put(data)

    def offer(self, data: bytes) -> None:
        """Write ``data``, or leave it out if too much waits; a line says later how many were left out."""
        with self._changed:
            if self._waiting + len(data) > self._limit:
                self._left_out += 1
                return
            self._tell_left_out()
            self._put(data)

    def _tell_left_out(self) -> None:
        if self._left_out:
            self._put(b"[vmbus: %d messages are left out here: nobody read them]\n" % self._left_out)
            self._left_out = 0

    def _put(self, data: bytes) -> None:
        if self.error is not None or not data:
            return
        self._queue.append(data)
        self._waiting += len(data)
        if self._thread is None:
            # A daemon: a write that never ends keeps no process alive.
            self._thread = threading.Thread(target=self._write, name="output", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    async def room(self) -> None:
        """Wait until less than the limit waits, or the descriptor has failed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._has_room():
                return
            self._wanting.append((asyncio.get_running_loop(), future))
        await future

    def lift_limit(self) -> None:
        """Let :meth:`room` wait no more: little will follow, and whoever gives it has to end."""
        with self._changed:
            self._limit = 1 << 62
            self._wake()

    def flush(self, timeout: float | None) -> bool:
        """Wait until all is written or has failed, at most ``timeout`` seconds; return whether that is so."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._tell_left_out()
            while self._waiting and self.error is None:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                # In steps: a signal is handled by Python between them.
                self._changed.wait(0.2 if left is None else min(left, 0.2))
            return True

    def _has_room(self) -> bool:
        return self._waiting < self._limit or self.error is not None

    def _wake(self) -> None:
        if not self._has_room():
            return
        for loop, future in self._wanting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)
        self._wanting.clear()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                data = self._queue.popleft()
            try:
                self._write_all(data)
            except OSError as error:
                with self._changed:
                    self.error = error
                    self._queue.clear()
                    self._waiting = 0
                    self._wake()
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= len(data)
                self._wake()
                self._changed.notify_all()

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view[:_WRITE_SIZE]) :]
            except BlockingIOError:  # who started this process made it so
                select.select((), (self._descriptor,), ())


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
