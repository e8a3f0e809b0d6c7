"""What was refused, how often, and why: one object for each thing that refuses guest input.

A reason is a short name that never changes (``gpadl-unknown-relid``), never text that a guest can choose, so
the counters stay few. A hostile guest can cause a refusal at any rate; the log gets at most one line a second
for each reason, which says how many were left out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LOG_INTERVAL = 1.0
"""Seconds between two lines of one reason."""


class Refusals:
    """Counts and logs the refusals of ``owner`` (``"bus"``, ``"channel 3 (heartbeat)"``).

    ``clock`` gives seconds and never goes back.
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
        """How many refusals there were, of all reasons."""
        return sum(self.counts.values())
