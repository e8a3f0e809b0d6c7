"""Processor time of a QEMU's threads, by what they are for, and of this process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ThreadTimes:
    """Seconds so far."""

    vcpus: float
    qemu: float
    """All other threads of QEMU."""
    emulator: float

    @classmethod
    def now(cls, pid: int) -> ThreadTimes:
        """Of the QEMU with process id ``pid``."""
        vcpus = qemu = 0.0
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                name = (task / "comm").read_text()
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            except FileNotFoundError:
                continue  # it has just ended
            if name.startswith("CPU "):
                vcpus += seconds
            else:
                qemu += seconds
        return cls(vcpus, qemu, time.process_time())

    def __sub__(self, other: ThreadTimes) -> ThreadTimes:
        return ThreadTimes(self.vcpus - other.vcpus, self.qemu - other.qemu, self.emulator - other.emulator)
