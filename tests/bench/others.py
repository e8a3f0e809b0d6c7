"""How much of the processors others have while something is measured: programs, virtual machines, the kernel.

Ratios of things that are measured in turn stand a machine with other work, but not work that comes and goes within a
round. A measurement in which others had more than ``LIMIT`` of the processors' time says little.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 0.15
"""Share of all processors' time. The kernel's own threads take up to a tenth of it for a fast disk."""

_TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Seconds so far, of all processors together."""

    wall: float
    """Of one processor."""
    machine: float
    """In which a processor was not idle; those that the host of a virtual machine took away count, too."""
    own: float
    """Of this process and its descendants."""

    @classmethod
    def now(cls) -> ProcessorTimes:
        """Read them."""
        # user, nice, system, idle, iowait, irq, softirq, steal: proc(5)
        times = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        machine = sum(times) - times[3] - times[4]
        return cls(time.monotonic(), machine * _TICK, _own() * _TICK)

    def others_since(self, before: ProcessorTimes) -> float:
        """Return the share of all processors' time that others had since ``before``."""
        others = self.machine - before.machine - (self.own - before.own)
        return max(others, 0.0) / ((self.wall - before.wall) * (os.cpu_count() or 1))


def _own() -> int:
    """Return the clock ticks of this process and its descendants."""
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        number = int(process.name)
        parents[number] = int(fields[1])
        ticks[number] = int(fields[11]) + int(fields[12])
    total = 0
    for number in ticks:
        ancestor = number
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        if ancestor:
            total += ticks[number]
    return total
