"""What a journal costs: the traps of ``traps`` with and without one, in turn, in guests of a few instructions."""

from __future__ import annotations

import asyncio
import statistics

from tests.bench import traps
from tests.bench.report import Result

ROUNDS = 3
_AIM = "median < 2"


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("What a journal adds to a trap (medians of rounds in turn, in the guest)")
    added: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        without, with_one = Result(""), Result("")
        await traps.measure(without)
        await traps.measure(with_one, journal=True)
        result.notes += [*without.notes, *with_one.notes]
        for name, found in with_one.distributions.items():
            added.setdefault(name, []).append(found.median - without.distributions[name].median)
    for name, differences in added.items():
        aim = _AIM if "HvPost" in name else ""
        result.figure(name, statistics.median(differences), "us more", aim)
    return result
