"""How long a guest stands still in the first migration of a process, and in later ones: from STOP to RESUME.

A process that migrates one guest after the other does for the first time, in the first of them, whatever source and
target do; of an emulator that waits for a guest, or sends one away, each migration is the first. So each sample is a
process of its own, ``python -m tests.bench.fresh_moves``, which prints microseconds as JSON. The times are those of
QEMU's events, not the milliseconds in which QEMU counts downtime.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vmbus.machine.qemu import qmp

from tests.bench.report import Result

PROCESSES = 5
MOVES = 4


def add_fresh(result: Result) -> None:
    """Rows for ``result``."""
    moves: list[list[float]] = [[] for _ in range(MOVES)]
    for _ in range(PROCESSES):
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.fresh_moves"], stdout=subprocess.PIPE, check=True, text=True
        )
        for samples, sample in zip(moves, json.loads(done.stdout), strict=True):
            samples.append(sample)
    later = [sample for samples in moves[1:] for sample in samples]
    result.add("idle: STOP to RESUME, first of a process", moves[0])
    result.add("idle: STOP to RESUME, later ones", later)
    difference = (statistics.median(moves[0]) - statistics.median(later)) / 1e3
    result.figure("idle: the first of a process longer by, medians", difference, "ms", "< 2 ms")


def _note_times(noted: list[tuple[str, float]]) -> Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]:
    """Return what reads an event in place of the usual function, and appends its name and time in microseconds."""
    read = qmp._event

    def event(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        at = message["timestamp"]
        noted.append((message["event"], at["seconds"] * 1e6 + at["microseconds"]))
        return read(message)

    return event


async def _moves() -> list[float]:
    from tests.bench.migration import LIMIT, LOADS, guest_options, with_emulator

    noted: list[tuple[str, float]] = []
    setattr(qmp, "_event", _note_times(noted))  # noqa: B010 - mypy takes it for a function only
    found = []
    async with with_emulator(guest_options(LOADS["idle"][0]), LOADS["idle"][1]) as guest:
        for _ in range(MOVES):
            await guest.host.qmp.execute("migrate-set-parameters", {"downtime-limit": 5})
            noted.clear()
            await guest.move(timeout=LIMIT)
            stops = [at for name, at in noted if name == "STOP"]
            found.append(next(at for name, at in noted if name == "RESUME" and at > stops[-1]) - stops[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_moves())))
