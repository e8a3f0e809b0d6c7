"""Counters of one unit, for ``vmbus status``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vmbus.devices.histogram import Histogram

from vmbus_devices.scsi.fast.path import FastPath

_COUNTS = ("requests", "reads", "writes", "flushes", "compiled", "bytes_read", "bytes_written")


class UnitStatistics:
    """Counters of a unit. Bytes are of READ and WRITE only; latency is from packet to completion."""

    __slots__ = (
        "_depth",
        "_fast",
        "bytes_read",
        "bytes_written",
        "compiled",
        "errors",
        "flushes",
        "latency",
        "max_depth",
        "reads",
        "requests",
        "writes",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.reads = self.writes = self.flushes = 0
        self.compiled = 0
        """Those of the requests that compiled code has done."""
        self.bytes_read = self.bytes_written = 0
        self._depth = self.max_depth = 0
        self._fast: tuple[FastPath, int] | None = None
        self.errors: Counter[str] = Counter()
        self.latency = Histogram()

    def began(self) -> None:
        """Count a request that has arrived."""
        self.requests += 1
        self._depth += 1
        if self._depth > self.max_depth:
            self.max_depth = self._depth

    @property
    def depth(self) -> int:
        """Requests that have not ended."""
        return self._depth + (self._fast[0].depth(self._fast[1]) if self._fast else 0)

    def attach_fast(self, fast: FastPath, number: int) -> None:
        """Include what compiled code counts for the unit under that number."""
        self._fast = (fast, number)

    def detach_fast(self) -> None:
        """End that; what was counted is kept."""
        self.absorb()
        self._fast = None

    def absorb(self) -> None:
        """Add what compiled code counted since the last call."""
        if self._fast is None:
            return
        fast, number = self._fast
        counts = fast.counts(number)
        self.requests += counts.reads + counts.writes
        self.compiled += counts.reads + counts.writes
        self.reads += counts.reads
        self.writes += counts.writes
        self.bytes_read += counts.bytes_read
        self.bytes_written += counts.bytes_written
        self.max_depth = max(self.max_depth, counts.max_depth)
        if counts.latencies:
            self.latency.merge(counts.latencies, counts.min_latency, counts.max_latency)

    def ended(self, seconds: float) -> None:
        """Count a request that was answered after ``seconds``."""
        self._depth -= 1
        self.latency.add(seconds)

    def error(self, srb_status: int, sense: bytes) -> None:
        """Count a failed request by sense key, code and qualifier, or by SRB status if there is no sense data."""
        name = f"{sense[2] & 0xF:x}/{sense[12]:02x}/{sense[13]:02x}" if sense else f"srb-{srb_status:02x}"
        self.errors[name] += 1

    def figures(self) -> dict[str, Any]:
        """Return all that was counted, for :meth:`add_figures`: plain values."""
        self.absorb()
        counts = {name: getattr(self, name) for name in _COUNTS}
        return counts | {
            "max_depth": self.max_depth,
            "errors": dict(self.errors),
            "latency": self.latency.figures(),
        }

    def add_figures(self, figures: Mapping[str, Any]) -> None:
        """Go on from what :meth:`figures` returned."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + int(figures.get(name, 0)))
        self.max_depth = max(self.max_depth, int(figures.get("max_depth", 0)))
        self.errors.update({str(name): int(count) for name, count in figures.get("errors", {}).items()})
        self.latency.add_figures(figures.get("latency", {}))

    def status(self) -> dict[str, Any]:
        """Return what ``vmbus status`` shows; latencies in microseconds."""
        self.absorb()
        latency: dict[str, Any] = dict(self.latency.status())
        latency |= {
            f"p{percent}_us": round(self.latency.quantile(percent / 100) * 1e6, 1) for percent in (90, 99)
        }
        return {
            "requests": self.requests,
            "reads": self.reads,
            "writes": self.writes,
            "flushes": self.flushes,
            "compiled": self.compiled,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "queue_depth": self.depth,
            "most_queue_depth": self.max_depth,
            "errors": dict(self.errors),
            "latency": latency,
        }
