"""Counters of refused guest input, one object for each part that refuses.

A reason is a short name that never changes (``gpadl-unknown-relid``), never text that a guest can choose, so there
are few counters. A hostile guest can cause refusals at any rate, and new parts that refuse, by opening channels; the
log of the process gets at most one line per second and reason, which tells how many were not logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LOG_INTERVAL = 1.0
"""Minimum seconds between two log lines of one reason."""

MAX_REASONS = 1024
"""Reasons whose last line is remembered; those of the source are fewer."""


class LineLimit:
    """Admits one line per :data:`LOG_INTERVAL` and reason, for all :class:`Refusals` that share it.

    ``clock`` returns seconds and never goes backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_line: dict[tuple[str, str], float] = {}
        self._unlogged: dict[tuple[str, str], int] = {}

    def admit(self, logger: str, reason: str) -> int | None:
        """Return the number of lines left out since the last one; ``None``: leave this one out, too."""
        key = (logger, reason)
        now = self._clock()
        last = self._last_line.get(key)
        if last is not None and now - last < LOG_INTERVAL:
            self._unlogged[key] = self._unlogged.get(key, 0) + 1
            return None
        if last is None and len(self._last_line) >= MAX_REASONS:
            oldest = next(iter(self._last_line))
            del self._last_line[oldest]
            self._unlogged.pop(oldest, None)
        self._last_line[key] = now
        return self._unlogged.pop(key, 0)


OF_PROCESS = LineLimit()
"""The limit of this process's log."""


class Refusals:
    """Counts and logs the refusals of ``owner`` (``"bus"``, ``"channel 3 (heartbeat)"``).

    ``limit``: of the log's lines; :data:`OF_PROCESS` by default.
    """

    def __init__(self, owner: str, logger: logging.Logger, *, limit: LineLimit | None = None) -> None:
        self.owner = owner
        self.counts: dict[str, int] = {}
        self._logger = logger
        self._limit = OF_PROCESS if limit is None else limit

    def refuse(self, reason: str, detail: str = "") -> None:
        """Count one refusal for ``reason``; log it unless a line of this reason is less than a second old."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        more = self._limit.admit(self._logger.name, reason)
        if more is None:
            return
        self._logger.warning(
            "%s: refused %s%s%s",
            self.owner,
            reason,
            f": {detail}" if detail else "",
            f" ({more} more)" if more else "",
        )

    @property
    def total(self) -> int:
        """The number of refusals, of all reasons."""
        return sum(self.counts.values())
