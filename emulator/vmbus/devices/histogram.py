"""A few numbers about many durations, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

STEPS_PER_OCTAVE = 4
"""Buckets between a duration and its double: the median is off by at most a tenth."""


class Histogram:
    """Statistics of durations in seconds: extremes are exact, quantiles come from logarithmic buckets."""

    def __init__(self) -> None:
        self.count = 0
        self.least = 0.0
        self.greatest = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, seconds: float) -> None:
        """Count one duration; a negative one (a clock that was set) counts as 0."""
        seconds = max(seconds, 1e-9)
        self.least = min(self.least, seconds) if self.count else seconds
        self.greatest = max(self.greatest, seconds)
        self.count += 1
        bucket = math.floor(math.log2(seconds) * STEPS_PER_OCTAVE)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def merge(self, buckets: Mapping[int, int], least: float, greatest: float) -> None:
        """Add what was counted elsewhere, in the same buckets: ``floor(log2(seconds) * STEPS_PER_OCTAVE)``."""
        self.least = min(self.least, least) if self.count else least
        self.greatest = max(self.greatest, greatest)
        for bucket, count in buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + count
            self.count += count

    def figures(self) -> dict[str, Any]:
        """Return all that was counted, for :meth:`add_figures`: plain values."""
        return {"least": self.least, "greatest": self.greatest, "buckets": list(self._buckets.items())}

    def add_figures(self, figures: Mapping[str, Any]) -> None:
        """Add what :meth:`figures` returned of another histogram."""
        if figures and figures["buckets"]:
            buckets = {int(bucket): int(count) for bucket, count in figures["buckets"]}
            self.merge(buckets, float(figures["least"]), float(figures["greatest"]))

    @property
    def median(self) -> float:
        """The median in seconds; 0 if nothing was counted."""
        return self.quantile(0.5)

    def quantile(self, share: float) -> float:
        """Return the seconds that ``share`` (0 to 1) of the durations do not exceed, within a tenth; 0 for none."""
        left = max(1, math.ceil(self.count * share))
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                middle: float = 2.0 ** ((bucket + 0.5) / STEPS_PER_OCTAVE)
                return min(max(middle, self.least), self.greatest)
        return 0.0

    def status(self) -> dict[str, float | int]:
        """Return the count, and minimum, median and maximum in microseconds."""
        return {
            "count": self.count,
            "min_us": round(self.least * 1e6, 1),
            "median_us": round(self.median * 1e6, 1),
            "max_us": round(self.greatest * 1e6, 1),
        }
