"""A bound on the memory that this process takes for itself: the backstop behind all bounds of single things.

RLIMIT_DATA counts private writable memory (Linux 4.7 and later): Python's objects, buffers, stacks of threads, disks
in memory. It does not count guest RAM, which is mapped shared, as RLIMIT_AS would. What does not fit fails in this
process (``MemoryError``, or a disk that is refused); without a bound the kernel chooses what to kill.
"""

from __future__ import annotations

import resource
from pathlib import Path

ALLOWANCE = 2 << 30
"""Bytes for all that is made after the start; a guest with four disks and four vCPUs takes some 90 MiB in all."""


def private_memory() -> int:
    """Return the bytes that RLIMIT_DATA counts of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0


def limit(allowance: int = ALLOWANCE) -> int:
    """Bound this process to twice what it has now, and ``allowance`` bytes more; return that bound.

    Twice: a guest that moves to a new QEMU has its devices, and so its disks in memory, two times for a while. Only
    the soft limit is set; :func:`lift` removes it in a child.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = 2 * private_memory() + allowance
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    return bound


def lift() -> None:
    """Remove the bound, in a child that has its own: the translated code of QEMU alone may take a gibibyte."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
