"""Round trips of heartbeats that follow each other as fast as the guest answers (``heartbeat,interval=0``)."""

from __future__ import annotations

import asyncio
import time

from vmbus.devices.histogram import Histogram
from vmbus_devices.heartbeat import Heartbeat

from tests.bench.linux import linux_guest
from tests.bench.report import Result

SECONDS = 5.0


class Samples(Histogram):
    """Keeps every duration, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[float] = []

    def add(self, seconds: float) -> None:
        self.all.append(seconds)


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("Heartbeats, one after another (6.12, one vCPU, idle otherwise)")
    heartbeat = Heartbeat(interval=0)
    command = ["echo started; sleep 600"]
    async with linux_guest(command, devices=("shutdown", "timesync"), extra_devices=[heartbeat]) as guest:
        await guest.says("started")
        await guest.until(lambda: heartbeat.answers > 100, "100 beats")
        await asyncio.sleep(1.0)
        samples = Samples()
        heartbeat.round_trips = samples
        begun, cpu = time.monotonic(), time.process_time()
        await asyncio.sleep(SECONDS)
        spent, cpu = time.monotonic() - begun, time.process_time() - cpu
        result.add("round trip", [seconds * 1e6 for seconds in samples.all], "median < 120")
        result.figure("beats a second", len(samples.all) / spent)
        result.figure("emulator's CPU a beat", cpu / max(len(samples.all), 1) * 1e6, "us")
        if heartbeat.odd_answers or heartbeat.missed_total:
            result.notes.append(f"NOT AS PLANNED: {heartbeat.status()}")
    return result
