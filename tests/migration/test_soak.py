"""Many migrations of one guest under load: nothing lost, doubled, reordered or damaged, and nothing left behind.

Guest and host check every packet: the echo client holds each answer against what it sent, in order, and the device
checks each request's checksum.

``make soak N=1000`` moves one guest a thousand times, with failed and cancelled migrations, snapshots, stops and new
devices between, all drawn from a seed that it prints (``SEED=…`` repeats them; ``SECONDS=…`` ends it earlier).
``make soak SOAK=N`` moves every guest to and fro N times. ``make test`` takes one guest through some mixed steps.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.matrix import full
from tests.guest.test_boot import KERNELS
from tests.migration.growth import MIB, descendants, trends
from tests.migration.growth import descriptors as open_descriptors
from tests.migration.load import Program, guest_resumed, under_load, went_well
from tests.migration.mixed import (
    Figures,
    MixedJourney,
    Step,
    cancelled_when_active,
    command,
    drawn,
    mixed_journey,
    run,
    snapshot,
    stopped,
    tcp,
)

pytestmark = pytest.mark.guest

SOAK = int(os.environ.get("SOAK", "0"))
MOVES = SOAK or 12
EVERY = [(kernel, smp) for kernel in KERNELS for smp in (1, 2)]
MIXED = int(os.environ.get("MIXED", "0"))
SEED = int(os.environ.get("SEED", "1"))
LOOK_EVERY = 10
"""Moves after which the load's own reports are waited for."""
SHORT: tuple[Step, ...] = (snapshot, stopped, cancelled_when_active, snapshot, tcp, command)
"""The steps of `make test`: a snapshot is loaded elsewhere, right after a migration that was cancelled."""
SECONDS = float(os.environ.get("MIXED_SECONDS", "inf"))
"""After which a mixed run ends with the step that it is in."""
SECONDS_PER_MOVE = 60
"""With everything between two moves, on a machine that does other things too."""


@pytest.mark.parametrize(
    ("kernel", "smp", "moves"),
    [full(*each, MOVES) for each in EVERY],
)
async def test_to_and_fro_under_load(
    tmp_path: Path, guest_program: Program, kernel: str, smp: int, moves: int
) -> None:
    async with under_load(tmp_path, guest_program, kernel=kernel, smp=smp) as guest:
        downtimes, prepared = [], []
        for move in range(1, moves + 1):
            requests = guest.device("echo").status()["requests"]
            outcome = await guest.move()
            went_well(outcome)
            downtimes.append(outcome.downtime * 1e3)
            prepared.append(outcome.report.prepared_in * 1e3)
            await guest.here.until(
                lambda: guest.device("echo").status()["requests"] > requests, "more echoes"
            )
            if move % LOOK_EVERY == 0:
                await guest_resumed(guest)
        await guest_resumed(guest)
        print(
            f"\n{kernel}, {smp} vCPUs: {moves} migrations, {guest.device('echo').status()['requests']} requests; "
            f"stood still for {statistics.median(downtimes):.0f} ms (median), {max(downtimes):.0f} (most), the "
            f"emulator's part {statistics.median(prepared):.1f} and {max(prepared):.1f} ms"
        )


@pytest.fixture
def run_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that has the run directories of this test, and of no other: memory files, too."""
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/dev/shm"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """What the emulators log, which would tear the line of progress."""
    path = tmp_path / "emulators.log"
    handler = logging.FileHandler(path)
    logging.getLogger().addHandler(handler)
    try:
        yield path
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


class Progress:
    """One line on a terminal; elsewhere a line now and then."""

    def __init__(self, moves: int) -> None:
        self._moves = moves
        self._begun = time.monotonic()
        self._terminal = sys.stdout.isatty()

    def __call__(self, journey: MixedJourney, number: int) -> None:
        line = (
            f"{time.monotonic() - self._begun:6.0f} s  step {number}, {journey.moves} of {self._moves} moves, "
            f"{journey.figures.cancelled} cancelled, {journey.figures.disk_bytes / MIB:.0f} MiB of disk compared, "
            f"{journey.kind}"
        )
        if self._terminal:
            print(f"\r{line:<118}", end="", flush=True)
        elif number % 25 == 0:
            print(line, flush=True)


def show(figures: Figures, seconds: float) -> None:
    """Print the table of a run."""
    print(f"\n{'step':24} {'count':>6} {'s each':>7}   stood still, ms: least / median / most")
    for kind, count in sorted(figures.steps.items()):
        pauses = figures.pauses.get(kind)
        still = (
            f"{min(pauses):8.0f} {statistics.median(pauses):8.0f} {max(pauses):8.0f}   of {len(pauses)} moves"
            if pauses
            else ""
        )
        print(f"{kind:24} {count:6} {figures.seconds[kind] / count:7.2f}   {still}")
    every = [pause for pauses in figures.pauses.values() for pause in pauses]
    print(
        f"{'all':24} {figures.steps.total():6} {seconds / figures.steps.total():7.2f}   {min(every):8.0f} "
        f"{statistics.median(every):8.0f} {max(every):8.0f}   of {len(every)} moves\n"
        f"{figures.cancelled} cancelled; {figures.memory_bytes / MIB:.0f} MiB sent by QEMU; "
        f"{figures.disk_bytes / MIB:.0f} MiB read from the disk and compared; at least {figures.requests} echoes"
    )
    for each in figures.samples:
        print(each)
    for trend in trends(figures.samples):
        print(trend)


@pytest.mark.timeout(max(900, MIXED * SECONDS_PER_MOVE))
@pytest.mark.parametrize(("moves", "seed"), [(MIXED, SEED)] if MIXED else [(3, None), full(12, SEED)])
async def test_mixed_steps_under_load(
    tmp_path: Path, guest_program: Program, run_folder: Path, log_file: Path, moves: int, seed: int | None
) -> None:
    rng = random.Random(0 if seed is None else seed)
    print(f"\nSEED={seed}, {moves} moves; what the emulators log is in {log_file}")
    begun = time.monotonic()
    processes, opened = descendants(os.getpid()), open_descriptors()
    async with mixed_journey(tmp_path, guest_program, kernel="debian-backports", smp=2, rng=rng) as journey:
        try:
            steps = SHORT if seed is None else drawn(rng)
            await run(journey, steps, moves, SECONDS, run_folder, Progress(moves))
            await journey.finds_a_wrong_block()
        finally:
            if journey.moves:
                show(journey.figures, time.monotonic() - begun)
    growing = [str(trend) for trend in trends(journey.figures.samples) if trend.grows]
    assert not growing, "\n".join(growing)
    assert [path for path in run_folder.rglob("*") if not path.is_dir()] == []
    assert descendants(os.getpid()) == processes
    assert open_descriptors() <= opened + 4
