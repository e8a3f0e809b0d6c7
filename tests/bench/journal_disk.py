"""What a journal costs a disk: two guests with the same load, one of them with a journal, by turns.

Both guests measure all cells again and again. While one runs, the other is stopped; the first measurement after that
is left out, because the stop was in it. A round has all cells of both guests, in an order that turns. Beside the
rates stands the processor time that this process, which serves both, spends on a request of the guest that runs: it
says more where other work has the processors.

    python -m tests.bench journal_disk
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from vmbus.machine.host_parts import HostOptions

from tests.bench.linux import KERNEL, compile_program
from tests.bench.report import Result
from tests.bench.storage import BOOT_LIMIT, CELLS, SECONDS, fill, reports
from tests.guest.harness import LOADED_MODULES, Booted, boot

ROUNDS = 8
IMAGE_SIZE = 256 << 20
MEASURED = [cell for cell in CELLS if cell.vcpus == 1 and cell.block <= 128 << 10]
WITH, WITHOUT = "with a journal", "without"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one guest did while the other one was stopped."""

    rates: list[float]
    """Requests a second, of each cell."""
    spent: float
    """Microseconds of the emulator's processor time a request."""


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    found: list[dict[str, Turn]] = []
    async with AsyncExitStack() as guests:
        scratch = Path(guests.enter_context(tempfile.TemporaryDirectory(prefix="vmbus-bench-")))
        program = compile_program("disk_load", scratch)
        both: dict[str, Booted] = {}
        for name in (WITH, WITHOUT):
            folder = scratch / name.replace(" ", "-")
            folder.mkdir()
            fill(folder / "disk.img", IMAGE_SIZE)
            both[name] = await guests.enter_async_context(
                boot(
                    folder,
                    kernel=KERNEL,
                    command=[_script()],
                    devices=(f"scsi,image={folder / 'disk.img'}",),
                    add=[(program, "/bin/disk_load")],
                    load=(*LOADED_MODULES, "hv_storvsc", "sd_mod"),
                    host_options=HostOptions(journal=name == WITH),
                )
            )
            await both[name].until(lambda: reports(both[name]), "the disk", timeout=BOOT_LIMIT)
            await both[name].host.qmp.execute("stop")
        for turn in range(ROUNDS):
            order = (WITH, WITHOUT) if turn % 2 else (WITHOUT, WITH)
            found.append({name: await _measure(both[name]) for name in order})
        for name, guest in both.items():
            _check_compiled(name, guest)
    return _report(found)


def _script() -> str:
    loads = [f"disk_load --device /dev/sda {cell.arguments(SECONDS)}" for cell in MEASURED]
    return "\n".join(["echo none >/sys/block/sda/queue/scheduler", "while :; do", *loads, "done"])


async def _measure(guest: Booted) -> Turn:
    """Let the guest run."""
    before, spent, done = len(reports(guest)), time.process_time(), _requests(guest)
    await guest.host.qmp.execute("cont")
    await guest.until(
        lambda: len(reports(guest)) > before + len(MEASURED),
        "the measurements",
        timeout=60 + 5 * SECONDS * len(MEASURED),
    )
    await guest.host.qmp.execute("stop")
    spent, done = time.process_time() - spent, _requests(guest) - done
    found = [0.0] * len(MEASURED)
    for number, report in enumerate(reports(guest)[before + 1 : before + 1 + len(MEASURED)], before + 1):
        if report["failed"]:
            raise AssertionError(f"{MEASURED[number % len(MEASURED)].name}: {report}")
        found[number % len(MEASURED)] = report["iops"]
    return Turn(found, spent * 1e6 / done)


def _requests(guest: Booted) -> int:
    return int(guest.channel("scsi")["details"]["units"]["0:0"]["requests"])


def _check_compiled(name: str, guest: Booted) -> None:
    unit = guest.channel("scsi")["details"]["units"]["0:0"]
    if unit["compiled"] < 0.99 * unit["requests"]:
        raise AssertionError(
            f"{name}: compiled code has done {unit['compiled']} of {unit['requests']} requests"
        )


def _report(found: list[dict[str, Turn]]) -> Result:
    result = Result("A disk with a journal over one without, two guests, by turns (1 is as fast)")
    for at, cell in enumerate(MEASURED):
        ratios = [each[WITH].rates[at] / each[WITHOUT].rates[at] for each in found]
        result.ratio(cell.name, ratios)
        rate = statistics.median(each[WITH].rates[at] for each in found)
        result.notes.append(_row(cell.name, f"{rate:8.0f} a second", ratios))
    name = "processor time of a request"
    spent = [each[WITH].spent / each[WITHOUT].spent for each in found]
    result.ratio(name, spent)
    result.notes.append(_row(name, f"{statistics.median(each[WITH].spent for each in found):8.1f} us", spent))
    return result


def _row(name: str, with_journal: str, ratios: list[float]) -> str:
    spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
    return f"{name:28} {with_journal:18} {spread}"
