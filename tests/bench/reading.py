"""What marking filled buffers early does for a guest that reads a disk through its cache while it is migrated.

One guest, migrated again and again, with and without early marks in turn. Without them every page that was read since
the migration began is marked in the pause.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.report import Result
from tests.guest.harness import LOADED_MODULES, boot

if TYPE_CHECKING:
    from vmbus.machine.guest import Guest

ROUNDS = 6
SIZE = 128 << 20
LIMIT = 120.0
READING = """
while :; do echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/sda of=/dev/null bs=1M 2>/dev/null; echo read; done
"""


def add_reading(result: Result) -> None:
    """Rows for ``result``."""
    asyncio.run(_add(result))


async def _add(result: Result) -> None:
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as name:
        image = Path(name) / "disk.img"
        image.write_bytes(os.urandom(SIZE))
        async with boot(
            Path(name),
            devices=("heartbeat", "shutdown", f"scsi,image={image}"),
            load=(*LOADED_MODULES, "hv_storvsc", "sd_mod"),
            memory=384,
            command=[READING],
        ) as guest:
            await guest.says("read")
            found: dict[bool, list[tuple[float, float, int, int]]] = {True: [], False: []}
            for turn in range(ROUNDS):
                for early in (turn % 2 == 0, turn % 2 == 1):
                    found[early].append(await _move(guest.guest, early=early))
    for early, name in ((True, "with"), (False, "without")):
        downtimes, prepared, in_pause, before = zip(*found[early], strict=True)
        row = f"reading a disk, {name} early marks"
        result.figure(f"{row}: downtime, median", statistics.median(downtimes) * 1e3, "ms")
        result.figure(f"{row}: of that before migrate-continue", statistics.median(prepared) * 1e3, "ms")
        result.figure(f"{row}: pages marked in the pause", statistics.median(in_pause), "pages")
        result.figure(f"{row}: pages marked before it", statistics.median(before), "pages")


async def _move(guest: Guest, *, early: bool) -> tuple[float, float, int, int]:
    if not early:
        guest.host.migration.tracker.begin = lambda: None  # type: ignore[method-assign]
    outcome = await guest.move(timeout=LIMIT)
    report = outcome.report
    return outcome.downtime, report.prepared_in, report.pages_marked, report.pages_marked_early
