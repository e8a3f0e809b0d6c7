"""Waiting for an event: until it comes, until it cannot come any more, or until its timeout.

A wait names the sides on which the event depends: guests, QEMUs, emulators, commands. When one of them has ended, the
wait fails at once; when it fails, it shows what every side has said.

    await until(lambda: guest.output, "output", guest)
    async with while_alive("status active", source, target):
        await coordinator.until(condition, LIMIT)
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

LIMIT = 180.0
"""Seconds within which any guest must have got anywhere; these machines are slow and shared."""
GRACE = 0.5
_POLL = 0.02
_LINES = 40


class Side(Protocol):
    """A guest, a QEMU or an emulator that a test depends on."""

    def gone(self) -> str:
        """Return why nothing can come from this side any more; empty while something can."""

    def report(self) -> str:
        """Return what this side has said and is, for a person who looks for the cause of a failure."""


class NotComing(AssertionError):
    """An event that cannot come any more, or did not come within its timeout."""

    def __init__(self, message: str, sides: tuple[Side, ...]) -> None:
        super().__init__(message)
        self.sides = sides
        """Those whose reports are in the message."""


class _Wait:
    def __init__(self, what: str, sides: tuple[Side, ...], timeout: float) -> None:
        self._what = what
        self._sides = sides
        self._timeout = timeout
        self._end = time.monotonic() + timeout

    def lost_side(self) -> str:
        """Return why the event cannot come any more; empty while it can."""
        return "; ".join(reason for side in self._sides if (reason := side.gone()))

    def out_of_time(self) -> bool:
        return time.monotonic() > self._end

    def failure(self, reason: str) -> NotComing:
        because = reason or f"not within {self._timeout:g} s"
        reports = [side.report() for side in self._sides]
        return NotComing("\n".join([f"no {self._what}: {because}", *reports]), self._sides)


async def until(condition: Callable[[], object], what: str, *sides: Side, timeout: float = LIMIT) -> None:
    """Wait until ``condition()``, or what it returns to be awaited, is true.

    Raises :class:`NotComing` after ``timeout`` seconds, and at once when one of ``sides`` has ended.
    """
    wait = _Wait(what, sides, timeout)

    async def holds() -> object:
        found = condition()
        return await found if inspect.isawaitable(found) else found

    while not await holds():
        reason = wait.lost_side()
        if reason or wait.out_of_time():
            if await holds():  # it came together with the end
                return
            raise wait.failure(reason)
        await asyncio.sleep(_POLL)


def until_blocking(condition: Callable[[], object], what: str, *sides: Side, timeout: float = LIMIT) -> None:
    """Wait as :func:`until` does, in a test without an event loop."""
    wait = _Wait(what, sides, timeout)
    while not condition():
        reason = wait.lost_side()
        if reason or wait.out_of_time():
            if condition():
                return
            raise wait.failure(reason)
        time.sleep(_POLL)


@contextlib.asynccontextmanager
async def while_alive(what: str, *sides: Side, timeout: float = LIMIT) -> AsyncIterator[None]:
    """End what is awaited inside as :func:`until` ends: for awaitables that do not look at the sides themselves.

    When a side has ended, what is inside has :data:`GRACE` seconds to fail with an error of its own.
    """
    wait = _Wait(what, sides, timeout)
    reason = ""

    async def watch(scope: asyncio.Timeout) -> None:
        nonlocal reason
        while not (found := wait.lost_side()):  # noqa: ASYNC110  a process's end is no event of the loop
            await asyncio.sleep(_POLL)
        await asyncio.sleep(GRACE)
        reason = found
        scope.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(timeout) as scope:
            watching = asyncio.ensure_future(watch(scope))
            try:
                yield
            finally:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
    except TimeoutError:
        if not scope.expired():
            raise
        raise wait.failure(reason) from None


@contextlib.contextmanager
def reporting(sides: Callable[[], Iterable[Side]]) -> Iterator[None]:
    """Add the reports of the sides that there are by then to any failure inside, whatever it waited for."""
    try:
        yield
    except BaseException as failure:
        shown = failure.sides if isinstance(failure, NotComing) else ()
        for side in sides():
            if side not in shown:
                failure.add_note(side.report())
        raise


def end_of(path: Path, lines: int = _LINES) -> str:
    """Return the last lines of a log; empty without one."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def section(title: str, text: str) -> str:
    """Return one part of a report."""
    return f"--- {title} ---\n{text.rstrip()}"


class Process:
    """A process that a test started, as a side; ``logs`` are shown in its report."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes] | subprocess.Popen[str], *logs: Path
    ) -> None:
        self.name = name
        self.process = process
        self.logs = logs

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, name: str, line: Sequence[str | Path], *logs: Path, cwd: Path | None = None
    ) -> Iterator[Process]:
        """Start a process; it is killed on the way out."""
        with subprocess.Popen(line, cwd=cwd) as process:
            try:
                yield cls(name, process, *logs)
            finally:
                process.kill()

    def gone(self) -> str:
        status = self.process.poll()
        return (
            "" if status is None else f"{self.name} (process {self.process.pid}) ended with status {status}"
        )

    def report(self) -> str:
        return "\n".join(section(f"{self.name}: {log.name}", end_of(log)) for log in self.logs)
