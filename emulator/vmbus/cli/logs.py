"""Where the log of the command line goes: standard error, as text that a terminal cannot execute, at a bounded rate.

What guests, servers and peers choose is in many messages, and a guest can cause many messages. So there is one place
for both: the handler of all loggers.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmbus.cli.output import note
from vmbus.printable import indented

BURST = 50
"""Lines of one place in the source that are written at once."""
RATE = 2.0
"""Lines a second of one place in the source after that."""
ALL_BURST = 500
"""Lines of all places together that are written at once."""
ALL_RATE = 20.0
"""Lines a second of all places together after that."""

_MAX_PLACES = 512
"""Places whose rate is known; a library could make its messages' templates of what a guest sends."""


class HarmlessFormatter(logging.Formatter):
    """Formats records for a terminal: control characters are shown, and no message looks like two."""

    def format(self, record: logging.LogRecord) -> str:
        return indented(super().format(record))


@dataclass(slots=True)
class _Bucket:
    """Lines that may be written now, the time of that figure, and lines that were not written since the last one."""

    left: float
    at: float
    unwritten: int = 0

    def take(self, now: float, rate: float, burst: int) -> bool:
        self.left = min(burst, self.left + (now - self.at) * rate)
        self.at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class RateLimit(logging.Filter):
    """Bounds the lines of each place in the source, and of all together, whatever objects they are about.

    The next line of a place says how many were not written. Lines of ``-v -v`` (DEBUG) always pass: who asks for
    every step gets every step. ``clock`` returns seconds and never goes backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._all = _Bucket(ALL_BURST, clock())
        self._places: dict[tuple[str, str], _Bucket] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        now = self._clock()
        place = self._place((record.name, str(record.msg)), now)
        if not place.take(now, RATE, BURST) or not self._all.take(now, ALL_RATE, ALL_BURST):
            place.unwritten += 1
            return False
        if place.unwritten:
            record.msg, record.args = f"{record.getMessage()} ({place.unwritten} more like this)", None
            place.unwritten = 0
        return True

    def _place(self, key: tuple[str, str], now: float) -> _Bucket:
        found = self._places.get(key)
        if found is None:
            if len(self._places) >= _MAX_PLACES:
                self._places.pop(next(iter(self._places)))
            found = self._places[key] = _Bucket(BURST, now)
        return found


class StandardError(logging.Handler):
    """Writes records to standard error, as it is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - arguments that do not fit their message; handleError reports that
            self.handleError(record)
        else:
            note(line + "\n")


@contextlib.contextmanager
def written(verbose: int) -> Iterator[None]:
    """Write the log to standard error in this block; ``verbose``: how often ``-v`` was given.

    Where the program has handlers of its own for the log, it goes there.
    """
    root = logging.getLogger()
    if root.handlers:
        yield
        return
    handler = StandardError()
    handler.setFormatter(
        HarmlessFormatter("vmbus: %(name)s: %(message)s" if verbose else "vmbus: %(message)s")
    )
    handler.addFilter(RateLimit())
    level = root.level
    root.addHandler(handler)
    root.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
