"""To and fro under load: no message lost, doubled, reordered or damaged.

Guest and host check every packet: the echo client holds each answer against what it sent, in order, and the device
checks each request's checksum. ``make soak`` does a hundred migrations of each guest here, ``make soak SOAK=N`` N;
``make test-all`` does twelve of each, ``make test`` five of two.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

from tests.guest.matrix import full
from tests.guest.test_boot import KERNELS
from tests.migration.load import Program, guest_resumed, under_load, went_well

pytestmark = pytest.mark.guest

SOAK = int(os.environ.get("SOAK", "0"))
MOVES = SOAK or 12
ORDINARY_MOVES = 5
ORDINARY = [("debian-6.1", 1), ("debian-backports", 2)]
"""The guests that `make test` moves."""
EVERY = [(kernel, smp) for kernel in KERNELS for smp in (1, 2)]
LOOK_EVERY = 10
"""Moves after which the load's own reports are waited for."""


@pytest.mark.parametrize(
    ("kernel", "smp", "moves"),
    [
        *([] if SOAK else [(*each, ORDINARY_MOVES) for each in ORDINARY]),
        *(full(*each, MOVES) for each in EVERY),
    ],
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
