"""``--supervise``: whenever the process that serves a guest is killed, the next one goes on, by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.qemu.qmp import Qmp

from tests.guest.debian import system_copy
from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.matrix import full
from tests.guest.test_boot import complaints
from tests.guest.waiting import until
from tests.migration.journey import machine
from tests.migration.own_qemu import own_qemu
from tests.migration.test_commands import emulators
from tests.migration.test_fio import SCRIPT, SIZE
from tests.migration.test_reload import WRITE_AND_READ

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("KILL_SEED", "1"))
OPTIONS = ("--supervise", "--memory", "256M", "--device", "heartbeat,interval=0.05")
LOAD_MODULES = "while sleep 0.3; do rmmod hv_utils && modprobe hv_utils || echo bad-module; done & "
"""Shell: close and open the channels of a driver again and again."""


async def worker(guest: Emulator, name: str = "a") -> int:
    """Return the process that serves the guest, once one does."""
    found: dict[str, Any] = {}

    async def served() -> bool:
        found.update((await guest.status(name)).get("emulator", {}))
        return bool(found)

    await until(served, "service of the guest", guest, timeout=LIMIT)
    return int(found["pid"])


async def killed(guest: Emulator, name: str = "a") -> int:
    """Kill the process that serves the guest; wait until another one does, and return it."""
    before = await worker(guest, name)
    assert before != guest.process.pid
    os.kill(before, signal.SIGKILL)
    after = await worker(guest, name)
    assert after not in (before, guest.process.pid)
    return after


@pytest.mark.parametrize(
    ("kernel", "smp", "kills"),
    [("debian-6.12", 2, 6), full("debian-6.1", 2, 100), full("debian-backports", 1, 100)],
)
async def test_a_guest_outlives_the_processes_that_serve_it(
    tmp_path: Path, kernel: str, smp: int, kills: int
) -> None:
    disks = []
    for name in ("one.img", "two.img"):
        (tmp_path / name).write_bytes(bytes(64 << 20))
        disks += ["--device", f"scsi,image={tmp_path / name}"]
    chance = random.Random(SEED)
    async with emulators() as started:
        guest = Emulator.start(
            tmp_path,
            "run",
            "--name",
            "a",
            "--guest",
            kernel,
            "--smp",
            str(smp),
            *OPTIONS,
            *disks,
            "--",
            "sh",
            "-c",
            LOAD_MODULES + WRITE_AND_READ,
        )
        started.append(guest)

        async def works() -> None:
            done = guest.output.count("round-")
            await until(lambda: guest.output.count("round-") >= done + 2, "two rounds", guest, timeout=LIMIT)
            await guest.more_beats("a")

        await works()
        for number in range(kills):
            await asyncio.sleep(chance.uniform(0, 1.5))
            await killed(guest)
            if number % 3 == 1:
                await asked(tmp_path, "reload", "a")
            elif number % 3 == 2:
                await asked(tmp_path, "migrate", "a")
        await works()
        status = await guest.status("a")
        assert status["takeovers"] == kills
        assert f"killed {kills} times" in await asked(tmp_path, "status", "a")

        # A device that was added is not forgotten. The guest ends when it has seen it.
        await asked(tmp_path, "device", "add", "a", "echo")
        os.kill(status["emulator"]["pid"], signal.SIGKILL)
        status_of_command, errors = await guest.ended()
        assert status_of_command == 5, errors
        assert "bad-" not in guest.output
        assert not (tmp_path / "vmbus" / "a").exists()


@pytest.mark.parametrize("kills", [full(100)])
async def test_fio_finds_no_wrong_block_when_emulators_are_killed(tmp_path: Path, kills: int) -> None:
    data = tmp_path / "data.img"
    data.touch()
    os.truncate(data, SIZE)
    disks = ("--device", f"scsi,image={system_copy(tmp_path)}", "--device", f"scsi,image={data}")
    words = (*("--smp", "2", "--root", "LABEL=debian"), *OPTIONS, *disks, "--", SCRIPT)
    chance = random.Random(SEED)
    async with emulators() as started:
        guest = Emulator.start(tmp_path, "run", "--name", "a", *words)
        started.append(guest)

        async def rounds(count: int) -> None:
            wanted = guest.output.count("round") + count
            await until(
                lambda: guest.output.count("round") >= wanted or "failed" in guest.output,
                f"{count} rounds of fio",
                guest,
                timeout=10 * LIMIT,
            )
            assert "failed" not in guest.output, guest.output

        await rounds(1)
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0, 2))
            await killed(guest)
            assert "failed" not in guest.output, guest.output
        await rounds(2)
        assert (await guest.status("a"))["takeovers"] == kills
        console = (tmp_path / "vmbus" / "a" / "console.log").read_text(errors="replace")
        assert complaints(console) == []
        assert not re.search(r"I/O error|Sense Key|hung_task", console)


@pytest.mark.parametrize("times", [5, full(100)])
async def test_a_process_that_is_killed_in_a_reload_is_replaced(tmp_path: Path, times: int) -> None:
    """By the new one, or by a third, whichever of both is killed, and when."""
    chance = random.Random(SEED)
    async with emulators() as started:
        guest = Emulator.start(tmp_path, "run", "--name", "a", "--fast-boot", *OPTIONS)
        started.append(guest)
        await guest.more_beats("a")
        for _ in range(times):
            before = await worker(guest)
            begun = time.monotonic()
            reloading = Emulator.start(tmp_path, "reload", "a")
            started.append(reloading)
            await asyncio.sleep(chance.uniform(0.2, 1.6))
            with contextlib.suppress(ProcessLookupError):  # it has handed the guest over, and has ended
                os.kill(before if chance.random() < 0.7 else await worker(guest), signal.SIGKILL)
            await reloading.ended()
            assert await worker(guest) != before, time.monotonic() - begun
            await guest.more_beats("a")
        await asked(tmp_path, "shutdown", "a")
        assert await guest.ended() == (0, guest.errors)


HANGS = f"""\
#!{sys.executable}
import os, select, sys
from pathlib import Path

from vmbus.cli import main
from vmbus.machine.migration.host_state import HostState
from vmbus.machine.reload.link import Link

marker = Path({{marker!r}})
hear, resume = Link.hear, HostState.resume


def hang():
    if not marker.exists():
        marker.with_suffix(".new").write_text(str(os.getpid()))
        marker.with_suffix(".new").rename(marker)
        select.select([], [], [])


async def hangs_before_it_reads(self, *kinds, **options):
    if kinds == ("yours",):
        select.select([self], [], [])
        hang()
    return await hear(self, *kinds, **options)


def hangs_before_it_serves(self):
    hang()
    resume(self)


if {{where!r}} == "before it reads":
    Link.hear = hangs_before_it_reads
else:
    HostState.resume = hangs_before_it_serves
sys.exit(main())
"""
"""Program: an emulator that hangs once in the last step of a reload, and says so in a file."""


@pytest.mark.parametrize("where", ["before it reads", "before it serves"])
async def test_both_processes_of_a_reload_are_killed_in_its_last_step(tmp_path: Path, where: str) -> None:
    program, marker = tmp_path / "programs" / "hangs", tmp_path / "programs" / "marker"
    program.parent.mkdir()
    program.write_text(HANGS.format(marker=str(marker), where=where))
    program.chmod(0o700)
    async with emulators() as started:
        guest = Emulator.start(tmp_path, "run", "--name", "a", "--fast-boot", *OPTIONS)
        started.append(guest)
        await guest.more_beats("a")
        before = await worker(guest)
        reloading = Emulator.start(tmp_path, "reload", "a", "--emulator", str(program))
        started.append(reloading)
        await until(marker.exists, "the last step", guest, timeout=LIMIT)
        new = int(marker.read_text())
        if where == "before it reads":  # later the first one has ended by itself
            os.kill(before, signal.SIGKILL)
        os.kill(new, signal.SIGKILL)
        await reloading.ended()
        assert await worker(guest) not in (before, new, guest.process.pid)
        await guest.more_beats("a")
        assert (await guest.status("a"))["takeovers"] == 1
        guest.process.terminate()
        assert (await guest.ended())[0] == 0, guest.errors


async def test_a_process_that_is_killed_in_a_move_is_replaced_where_the_guest_is(tmp_path: Path) -> None:
    async with emulators() as started:
        guest = Emulator.start(tmp_path, "run", "--name", "a", "--fast-boot", *OPTIONS)
        started.append(guest)
        await guest.more_beats("a")
        await worker(guest)
        qmp = await Qmp.connect(str(tmp_path / "vmbus" / "a" / "qmp.sock"))
        try:
            await qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
            moving = Emulator.start(tmp_path, "migrate", "a")
            started.append(moving)

            async def active() -> bool:
                return bool((await qmp.execute("query-migrate")).get("status") == "active")

            await until(active, "the move", guest, moving, timeout=LIMIT)
        finally:
            await qmp.close()
        qemu = (await guest.status("a"))["qemu"]["pid"]
        await killed(guest)
        assert (await moving.ended())[0] == 1
        await guest.more_beats("a")
        assert (await guest.status("a"))["qemu"]["pid"] == qemu
        await until(
            lambda: not list((tmp_path / "vmbus" / "a").glob("*/emulator-qmp.sock")),
            "the end of the second QEMU",
            guest,
            timeout=LIMIT,
        )
        qmp = await Qmp.connect(str(tmp_path / "vmbus" / "a" / "qmp.sock"))
        await qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        await qmp.close()
        # It can move now, and is replaced there.
        await asked(tmp_path, "migrate", "a")
        await killed(guest)
        await guest.more_beats("a")
        assert (await guest.status("a"))["qemu"]["pid"] != qemu
        guest.process.terminate()
        assert (await guest.ended())[0] == 0, guest.errors


async def test_a_guest_of_attach_is_supervised(tmp_path: Path) -> None:
    async with own_qemu(tmp_path / "q", machine(tmp_path)) as qemu:
        emulator = qemu.attach("--supervise")
        await qemu.attached()
        await emulator.more_beats("q", qemu)
        await killed(emulator, "q")
        await emulator.more_beats("q", qemu)
        await qemu.qmp.execute("stop")
        await killed(emulator, "q")
        assert await qemu.status() == "paused"
        await qemu.qmp.execute("cont")
        await emulator.more_beats("q", qemu)
        emulator.process.terminate()
        status, errors = await emulator.ended()
        assert status == 0, errors
        assert await qemu.status() == "running"


async def test_a_disk_that_could_not_go_on_is_refused_before_the_guest_starts(tmp_path: Path) -> None:
    said = await asked(
        tmp_path, "run", "--name", "a", "--supervise", "--device", "scsi,format=memory,size=1M", status=1
    )
    assert "--supervise cannot have it" in said, said
