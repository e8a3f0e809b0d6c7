"""Threads for devices' blocking work: files, mostly.

    event loop --run--> queue --> a thread: work() --> finished --> event loop: done(), all that have finished

Handing one piece of work over costs more than a small read does, so both ways are shared: threads are started
when there is work for them, and the event loop is woken once for all that finished since it last looked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from vmbus.machine.io.engines import NativeEngines
from vmbus.machine.io.uring import Uring

_logger = logging.getLogger(__name__)

Work = Callable[[], None]
Done = Callable[[Exception | None], None]

STOP_TIMEOUT = 5.0
"""Seconds in which an event loop that still runs has stopped to watch a socket."""
THREADS = 16
"""Pieces of work that are done side by side."""


class WorkerThreads:
    """:class:`~vmbus.ports.Workers` of an event loop; threads are daemons, :meth:`close` ends idle ones."""

    def __init__(self, loop: asyncio.AbstractEventLoop, threads: int = THREADS) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._limit = threads
        self._queue: queue.SimpleQueue[tuple[Work, Done] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._finished: deque[tuple[Done, Exception | None]] = deque()
        self._lock = threading.Lock()
        self._woken = False
        self._settled = asyncio.Event()
        self._uring: Uring | None = None
        self._uring_tried = False
        self.engines: NativeEngines | None = None
        """Compiled code whose transfers are work too."""

    @property
    def unfinished(self) -> int:
        """Pieces of work whose ``done`` was not called yet."""
        return self._unfinished + (self.engines.in_flight if self.engines else 0)

    def run(self, work: Work, done: Done, /) -> None:
        self._unfinished += 1
        self._queue.put((work, done))
        if self._unfinished > len(self._threads) < self._limit:
            thread = threading.Thread(
                target=self._serve, name=f"vmbus-worker-{len(self._threads)}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def transfer(
        self,
        fd: int,
        offset: int,
        views: Sequence[memoryview],
        write: bool,
        flags: int,
        done: Callable[[int], None],
        /,
    ) -> bool:
        if self._uring is None:
            if self._uring_tried:
                return False
            self._uring_tried = True
            self._uring = Uring.open(self._loop)
            if self._uring is None:
                return False
        self._unfinished += 1

        def ended(result: int) -> None:
            self._unfinished -= 1
            try:
                done(result)
            finally:
                self.ended()

        self._uring.transfer(fd, offset, views, write, flags, ended)
        return True

    def watch(self, fd: int, readable: Callable[[], None], /) -> Callable[[], None]:
        loop = self._loop

        def stop() -> None:
            if threading.get_ident() == self._loop_thread:
                loop.remove_reader(fd)
                return
            stopped = threading.Event()

            def remove() -> None:
                loop.remove_reader(fd)
                stopped.set()

            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is called any more
                loop.call_soon_threadsafe(remove)
                stopped.wait(STOP_TIMEOUT)

        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.add_reader, fd, readable)
        return stop

    def expect(self, done: Done, /) -> Done:
        self._unfinished += 1
        return partial(self._finish, done)

    def submit(self) -> None:
        if self._uring is not None:
            self._uring.submit()

    def ended(self) -> None:
        """Note that work has ended: wake those that wait for all of it."""
        if not self.unfinished:
            self._settled.set()

    def _serve(self) -> None:
        get = self._queue.get
        while (job := get()) is not None:
            work, done = job
            error: Exception | None = None
            try:
                work()
            except Exception as found:  # noqa: BLE001 - it is handed on
                error = found
            self._finish(done, error)
            job = work = done = error = None  # type: ignore[assignment]  # nothing of it is kept while waiting

    def _finish(self, done: Done, error: Exception | None) -> None:
        self._finished.append((done, error))
        with self._lock:
            wake, self._woken = not self._woken, True
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._report)

    def _report(self) -> None:
        with self._lock:
            self._woken = False
        finished = self._finished
        for _ in range(len(finished)):
            done, error = finished.popleft()
            self._unfinished -= 1
            try:
                done(error)
            except Exception:
                _logger.exception("the end of a piece of work failed")
        self.ended()

    async def settle(self, timeout: float) -> bool:
        """Wait until all work is done and reported; return False on timeout (seconds).

        Several tasks may wait at the same time.
        """
        if self.unfinished:
            self._settled.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), timeout)
        return not self.unfinished

    def close(self) -> None:
        """Let the threads end when they have done what waits. Nothing may be asked for any more."""
        for _ in self._threads:
            self._queue.put(None)
        self._threads.clear()
        if self._uring is not None:
            self._uring.close()
            self._uring = None
        if self.engines is not None:
            self.engines.close()
            self.engines = None
