"""Threads for devices' blocking work: files, mostly.

    event loop --run--> queue --> a thread: work() --> finished --> event loop: done(), for all that have finished

To pass one piece of work to a thread costs more than a small read, so the costs are shared: threads are started when
there is work for them, and the event loop is woken once for all work that has finished since.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
"""Seconds for a running event loop to stop watching a socket."""
THREADS = 16
"""Number of threads: pieces of work that are done at the same time."""


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
        self._settling: set[asyncio.Future[None]] = set()
        self._uring: Uring | None = None
        self._uring_tried = False
        self.engines: NativeEngines | None = None
        """Compiled code; its transfers count as work."""

    @property
    def unfinished(self) -> int:
        """Pieces of work whose ``done`` was not called yet."""
        return self._unfinished + (self.engines.in_flight if self.engines else 0)

    def run(self, work: Work, done: Done, /) -> None:
        self._unfinished += 1
        if self._unfinished > len(self._threads) < self._limit:
            thread = threading.Thread(
                target=self._serve, name=f"vmbus-worker-{len(self._threads)}", daemon=True
            )
            try:
                thread.start()
            except (
                RuntimeError
            ) as error:  # the host has no room for one: the threads that there are do the work
                if not self._threads:
                    self._finish(done, OSError(errno.EAGAIN, f"no thread for a device's work: {error}"))
                    return
            else:
                self._threads.append(thread)
        self._queue.put((work, done))

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

            with contextlib.suppress(RuntimeError):  # the loop is closed and calls nothing any more
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
            for done in self._settling:
                if not done.done():
                    done.set_result(None)

    def _serve(self) -> None:
        get = self._queue.get
        while (job := get()) is not None:
            work, done = job
            error: Exception | None = None
            try:
                work()
            except Exception as found:  # noqa: BLE001 - passed to done()
                error = found
            self._finish(done, error)
            job = work = done = error = None  # type: ignore[assignment]  # keep no reference while waiting

    def _finish(self, done: Done, error: Exception | None) -> None:
        self._finished.append((done, error))
        with self._lock:
            wake, self._woken = not self._woken, True
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop is closed
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
                _logger.exception("internal error at the end of a device's work; please report this")
        self.ended()

    async def settle(self, timeout: float) -> bool:
        """Wait until all work is done and reported; return False on timeout (seconds).

        Several tasks may wait at the same time, each with its own timeout. If more work has begun when a task is
        woken (work that leads to other work, or another task's), it waits on.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.unfinished:
                    done: asyncio.Future[None] = self._loop.create_future()
                    self._settling.add(done)
                    try:
                        await done
                    finally:
                        self._settling.discard(done)
        return not self.unfinished

    def close(self) -> None:
        """End the threads when they have done the work that waits. No more work may be requested."""
        for _ in self._threads:
            self._queue.put(None)
        self._threads.clear()
        if self._uring is not None:
            self._uring.close()
            self._uring = None
        if self.engines is not None:
            self.engines.close()
            self.engines = None
