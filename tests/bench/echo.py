"""Packets a second through the echo device, from a guest program on ``uio_hv_generic`` that checks every byte."""

from __future__ import annotations

import asyncio
import json

from tests.bench.linux import linux_guest
from tests.bench.report import Result

LATENCY_ROUNDS = 1000
COUNTS = {1: 2000, 32: 20000}


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("Echo through uio (6.12, one vCPU, 64 bytes of data, checksummed by both)")
    runs = [f"echo_client --signal-latency {LATENCY_ROUNDS}"]
    runs += [f"echo_client --size 64 --count {count} --burst {burst}" for burst, count in COUNTS.items()]
    async with linux_guest([" && ".join(runs)], program="echo_client", devices=["echo"]) as guest:
        status = await guest.finish()
        reports = [json.loads(line) for line in guest.output.decode().splitlines() if line.startswith("{")]
        if status or len(reports) != len(runs):
            result.notes.append(f"NOT AS PLANNED: {status} {reports}")
            return result
        latency = reports[0]["signal_latency_us"]
        for name in ("min", "median", "p99"):
            result.figure(f"one round trip, signal and interrupt, {name}", latency[name], "us")
        for (burst, _), report in zip(COUNTS.items(), reports[1:], strict=True):
            echo = report["echo"]
            result.figure(f"packets a second, {burst} at a time", echo["packets"] / echo["seconds"], "/s")
    return result
