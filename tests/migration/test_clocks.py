"""A guest's clocks over migrations: no step back, no two that disagree, no time that the guest did not live."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.harness import LOADED_MODULES
from tests.guest.matrix import full
from tests.migration.journey import Journey, journey

pytestmark = pytest.mark.guest

SLACK = 1.0
"""Seconds that a line of the guest's may take to get here, and that its program may wait for a processor."""


class Clocks:
    """What the guest's program has read so far."""

    def __init__(self, guest: Journey) -> None:
        self._guest = guest

    def lines(self) -> list[dict[str, int]]:
        return [json.loads(line) for line in self._guest.here.output.decode().splitlines(True)[:-1]]

    async def more(self, count: int = 3) -> dict[str, int]:
        """The last line, after ``count`` new ones."""
        wanted = len(self.lines()) + count
        await self._guest.here.until(lambda: len(self.lines()) >= wanted, f"{count} more lines")
        return self.lines()[-1]


@pytest.mark.parametrize(("smp", "moves"), [(2, 6), full(1, 20), full(2, 20)])
async def test_no_clock_of_the_guest_steps_back_over_migrations(
    tmp_path: Path, guest_program: Callable[[str], Path], smp: int, moves: int
) -> None:
    async with journey(
        tmp_path,
        smp=smp,
        add=[(guest_program("clocks"), "/bin/clocks")],
        load=(*LOADED_MODULES, "msr"),
        command=["clocks"],
    ) as guest:
        clocks = Clocks(guest)
        first, begun = await clocks.more(5), time.monotonic()
        sequences = []
        stood_still = 0.0
        for _ in range(moves):
            before = len(clocks.lines())
            outcome = await guest.move()
            stood_still += outcome.downtime
            await clocks.more()
            sequences.append(guest.host.partition.reference_time.sequence)
            # The move is between two of these readings.
            jump = max(line["gap_us"] for line in clocks.lines()[before:]) / 1e6
            assert jump <= outcome.downtime + SLACK, outcome
        # A guest that is stopped and goes on in the same QEMU.
        stopped = time.monotonic()
        await guest.host.qmp.execute("stop")
        await asyncio.sleep(0.3)
        await guest.host.qmp.execute("cont")
        stood_still += time.monotonic() - stopped
        last, ended = await clocks.more(5), time.monotonic()
        assert last["back"] == 0
        # One formula gives both. While the TSC is sampled anew the counter may lag, and it may lead by half the
        # time for which a vCPU was kept from its processor in the middle of the first sample: 0.4 s were seen on a
        # machine with five busy processes for two processors.
        assert last["apart_max_ns"] < 50_000_000, last
        assert last["apart_min_ns"] > -1_000_000_000, last
        # All in all the guest has lived as long as it ran: not longer, and not shorter.
        for clock in ("monotonic_ns", "reference_ns"):
            lived = (last[clock] - first[clock]) / 1e9
            assert lived <= ended - begun + SLACK, clock
            assert lived >= ended - begun - stood_still - SLACK, clock
        assert sequences == sorted(sequences), "a TSC page that was published anew has a new sequence"
