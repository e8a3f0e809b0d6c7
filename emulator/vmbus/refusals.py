"""Counters of refused guest input, one object for each part that refuses.

A reason is a short name that never changes (``gpadl-unknown-relid``), never text that a guest can choose, so there
are few counters. A hostile guest can cause refusals at any rate; the log gets at most one line per second and reason,
which tells how many were not logged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LOG_INTERVAL = 1.0
"""Minimum seconds between two log lines of one reason."""


class Refusals:
    """Counts and logs the refusals of ``owner`` (``"bus"``, ``"channel 3 (heartbeat)"``).

    ``clock`` returns seconds and never goes backwards.
    """

    def __init__(
        self, owner: str, logger: logging.Logger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.owner = owner
        self.counts: dict[str, int] = {}
        self._logger = logger
        self._clock = clock
        self._last_line: dict[str, float] = {}
        self._unlogged: dict[str, int] = {}

    def refuse(self, reason: str, detail: str = "") -> None:
        """Count one refusal for ``reason``; log it unless a line of this reason is less than a second old."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        now = self._clock()
        last = self._last_line.get(reason)
        if last is not None and now - last < LOG_INTERVAL:
            self._unlogged[reason] = self._unlogged.get(reason, 0) + 1
            return
        self._last_line[reason] = now
        more = self._unlogged.pop(reason, 0)
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
