"""What a long run may not use more and more of: memory, descriptors, threads, processes, files, tasks, objects.

The emulators of a soak run in the test's own process, one after the other, so whatever one of them leaves behind adds
up here. A sample is taken at rest: everything that can be collected is, and free memory is given back to the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.bus.server import Bus
from vmbus.machine.guest import Guest, Station
from vmbus.machine.host import Host
from vmbus.machine.migration.coordinator import Coordinator

KIB, MIB = 1 << 10, 1 << 20

NOISE = 2 * MIB
"""Bytes by which private memory varies without growth: arenas of the allocator, the interpreter's free lists."""
PER_STEP = KIB
"""Bytes that a step may leave on top of that: less than one page, and less than any object of a host."""
COUNT_NOISE = 1
"""By how much a count may vary: a descriptor or a thread that is about to go."""
MIN_SAMPLES = 6
"""With fewer the thirds say nothing of memory."""

BYTES = ("private", "qemu")
"""The quantities of a :class:`Sample` that are bytes."""
COUNTS = ("mappings", "descriptors", "threads", "processes", "files", "tasks", "hosts")


@dataclass(frozen=True)
class Sample:
    """Quantities after ``step`` steps. Memory in bytes."""

    step: int
    private: int
    """Memory of the emulators' process that is no file's and not shared (``Pss_Anon``)."""
    resident: int
    """``Rss`` of the same, with guest memory as far as it is mapped."""
    proportional: int
    """``Pss`` of the same."""
    qemu: int
    """``RssAnon`` of the QEMU that runs the guest: it is a new one after each migration, and has its past in it."""
    mappings: int
    descriptors: int
    threads: int
    processes: int
    """Children, and their children."""
    files: int
    """In all run directories of this run, guest memory included."""
    tasks: int
    """Of the event loop."""
    hosts: int
    """Guests, stations, hosts, buses and coordinators that are not collected."""


def _fields(path: Path) -> dict[str, int]:
    """Return the values in kB of a file of /proc, as bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * KIB for words in lines if words[-1] == "kB"}


def descendants(pid: int) -> int:
    """Return how many processes ``pid`` has started, and those in turn, that have not ended."""
    count = 0
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # the thread has ended
            continue
        count += len(found) + sum(descendants(int(each)) for each in found)
    return count


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def _threads() -> int:
    """Return how many threads there are, without those that the kernel starts and ends for io_uring."""
    count = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended
            count += not name.read_text().startswith("iou-")
    return count


def sample(step: int, qemu: int, run_folder: Path) -> Sample:
    """Measure now. ``qemu``: process of the guest's QEMU; ``run_folder``: parent of all run directories."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = _fields(Path("/proc/self/smaps_rollup"))
    counted = (Guest, Station, Host, Bus, Coordinator)
    return Sample(
        step=step,
        private=memory["Pss_Anon"],
        resident=memory["Rss"],
        proportional=memory["Pss"],
        qemu=_fields(Path(f"/proc/{qemu}/status"))["RssAnon"],
        mappings=len(Path("/proc/self/maps").read_text().splitlines()),
        descriptors=descriptors(),
        threads=_threads(),
        processes=descendants(os.getpid()),
        files=sum(len(files) for _, _, files in os.walk(run_folder)),
        tasks=len(asyncio.all_tasks()),
        hosts=sum(isinstance(each, counted) for each in gc.get_objects()),
    )


@dataclass(frozen=True)
class Trend:
    """One quantity over a run: the least of its first and of its last third, and by how much it may grow."""

    name: str
    first: float
    last: float
    allowed: float

    @property
    def grows(self) -> bool:
        return self.last - self.first > self.allowed

    def __str__(self) -> str:
        unit, scale = (" MiB", MIB) if self.name in BYTES else ("", 1)
        return (
            f"{self.name:12} {self.first / scale:10.2f} → {self.last / scale:10.2f}{unit}, "
            f"may grow by {self.allowed / scale:.2f}{unit}" + (": IT GROWS" if self.grows else "")
        )


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Compare the last third of a run with its first; empty for a run that is too short for that.

    The least of each: after some steps the guest's former side is still there when a sample is taken, and what is
    left behind for good is in every later one. A count that grows by one in a hundred steps grows by six in a
    thousand.
    """
    if len(samples) < MIN_SAMPLES:
        return []
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]
    steps = statistics.median(each.step for each in last) - statistics.median(each.step for each in first)
    allowed = dict.fromkeys(BYTES, NOISE + PER_STEP * steps) | dict.fromkeys(COUNTS, float(COUNT_NOISE))

    def least(part: Sequence[Sample], name: str) -> float:
        return float(min(getattr(each, name) for each in part))

    return [Trend(name, least(first, name), least(last, name), allowed[name]) for name in (*BYTES, *COUNTS)]
