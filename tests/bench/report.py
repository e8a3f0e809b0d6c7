"""Figures of a benchmark: distributions, ratios, and the table that a person reads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Distribution:
    """Many durations, in microseconds; ``count`` 0 when nothing was measured."""

    count: int
    least: float
    median: float
    p90: float
    p99: float
    greatest: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution:
        ordered = sorted(samples)
        if not ordered:
            return cls(0, math.nan, math.nan, math.nan, math.nan, math.nan)
        return cls(
            len(ordered),
            ordered[0],
            quantile(ordered, 0.5),
            quantile(ordered, 0.9),
            quantile(ordered, 0.99),
            ordered[-1],
        )

    def json(self) -> dict[str, float | int]:
        names = ("min", "median", "p90", "p99", "max")
        values = (self.least, self.median, self.p90, self.p99, self.greatest)
        return {"count": self.count} | {
            f"{name}_us": round(value, 2) for name, value in zip(names, values, strict=True)
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The sample below which ``share`` of them lie."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class Result:
    """What one benchmark found: lines for people, values for programs."""

    title: str
    distributions: dict[str, Distribution] = field(default_factory=dict)
    figures: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Name → value and unit."""
    aims: dict[str, str] = field(default_factory=dict)
    """Name of a row → what it should be."""
    notes: list[str] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    """Name → a ratio of each round; they are shown in a note by the part that adds them."""

    def add(self, name: str, samples: Iterable[float], aim: str = "") -> None:
        """A row of durations in microseconds."""
        self.distributions[name] = Distribution.of(samples)
        if aim:
            self.aims[name] = aim

    def figure(self, name: str, value: float, unit: str = "", aim: str = "") -> None:
        self.figures[name] = (value, unit)
        if aim:
            self.aims[name] = aim

    def ratio(self, name: str, rounds: Sequence[float]) -> None:
        """Two things in turn."""
        self.ratios[name] = list(rounds)

    def _ratios(self) -> dict[str, Any]:
        if not self.ratios:
            return {}
        medians = {name: round(statistics.median(found), 3) for name, found in self.ratios.items()}
        spread = {name: [round(min(found), 3), round(max(found), 3)] for name, found in self.ratios.items()}
        return {"ratios": medians, "spread": spread}

    def json(self) -> dict[str, Any]:
        return {
            **self._ratios(),
            **{name: found.json() for name, found in self.distributions.items()},
            **{
                name: {"value": round(value, 4), "unit": unit} for name, (value, unit) in self.figures.items()
            },
        }

    def text(self) -> str:
        lines = [self.title, "-" * len(self.title)]
        if self.distributions:
            lines.append(
                f"{'microseconds':52} {'n':>6} {'min':>8} {'median':>8} {'p90':>8} {'p99':>8} {'max':>9}"
            )
        for name, found in self.distributions.items():
            values = (found.least, found.median, found.p90, found.p99)
            row = " ".join(f"{value:8.1f}" for value in values)
            lines.append(f"{name:52} {found.count:6} {row} {found.greatest:9.1f}{self._aim(name)}")
        for name, (value, unit) in self.figures.items():
            lines.append(f"{name:52} {value:>10.{_digits(value)}f} {unit}{self._aim(name)}")
        lines += self.notes
        return "\n".join(lines)

    def _aim(self, name: str) -> str:
        return f"   (aim: {self.aims[name]})" if name in self.aims else ""


def _digits(value: float) -> int:
    if value == 0 or abs(value) >= 1000:
        return 0
    return 1 if abs(value) >= 100 else 3
