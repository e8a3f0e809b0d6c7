"""What one unit has done: for ``vmbus status``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from device.histogram import Histogram


class UnitStatistics:
    """Counters of a unit. Bytes are of READ and WRITE only; latency is from packet to completion."""

    __slots__ = (
        "bytes_read",
        "bytes_written",
        "depth",
        "errors",
        "flushes",
        "latency",
        "most_depth",
        "reads",
        "requests",
        "writes",
    )

    def __init__(self) -> None:
        self.requests = 0
        self.reads = self.writes = self.flushes = 0
        self.bytes_read = self.bytes_written = 0
        self.depth = self.most_depth = 0
        self.errors: Counter[str] = Counter()
        self.latency = Histogram()

    def began(self) -> None:
        """A request came."""
        self.requests += 1
        self.depth += 1
        if self.depth > self.most_depth:
            self.most_depth = self.depth

    def ended(self, seconds: float) -> None:
        """It was answered, ``seconds`` later."""
        self.depth -= 1
        self.latency.add(seconds)

    def error(self, srb_status: int, sense: bytes) -> None:
        """It failed: counted by sense key, code and qualifier, or by SRB status where there is no sense data."""
        name = f"{sense[2] & 0xF:x}/{sense[12]:02x}/{sense[13]:02x}" if sense else f"srb-{srb_status:02x}"
        self.errors[name] += 1

    def status(self) -> dict[str, Any]:
        """Names and plain values; microseconds."""
        latency: dict[str, Any] = dict(self.latency.status())
        latency |= {
            f"p{percent}_us": round(self.latency.quantile(percent / 100) * 1e6, 1) for percent in (90, 99)
        }
        return {
            "requests": self.requests,
            "reads": self.reads,
            "writes": self.writes,
            "flushes": self.flushes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "queue_depth": self.depth,
            "most_queue_depth": self.most_depth,
            "errors": dict(self.errors),
            "latency": latency,
        }
