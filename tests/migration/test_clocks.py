"""A guest's clocks over migrations: no step back, no two that disagree, no time that the guest did not live."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.harness import LOADED_MODULES
from tests.migration.journey import journey

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("smp", [1, 2])
def test_no_clock_of_the_guest_steps_back_over_migrations(
    tmp_path: Path, guest_program: Callable[[str], Path], smp: int
) -> None:
    async def story() -> None:
        async with journey(
            tmp_path,
            smp=smp,
            add=[(guest_program("clocks"), "/bin/clocks")],
            load=(*LOADED_MODULES, "msr"),
            command=["clocks"],
        ) as guest:

            def lines() -> list[dict]:
                return [json.loads(line) for line in guest.here.output.decode().splitlines(True)[:-1]]

            async def more(count: int) -> list[dict]:
                wanted = len(lines()) + count
                await guest.here.until(lambda: len(lines()) >= wanted, f"{count} more lines")
                return lines()

            await more(5)
            sequences = []
            for _ in range(3):
                await guest.move()
                await more(5)
                sequences.append(guest.host.partition.reference_time.sequence)
            # A guest that is stopped and goes on in the same QEMU.
            await guest.host.qmp.execute("stop")
            await asyncio.sleep(0.3)
            await guest.host.qmp.execute("cont")
            found = await more(5)
            assert found[-1]["back"] == 0
            # One formula gives both; the counter may lag for the moment in which the TSC is sampled anew.
            assert found[-1]["apart_max_ns"] < 2_000_000, found[-1]
            assert found[-1]["apart_min_ns"] > -100_000_000, found[-1]
            assert sequences == sorted(set(sequences)), (
                "a TSC page that was published anew has a new sequence"
            )

    asyncio.run(story())
