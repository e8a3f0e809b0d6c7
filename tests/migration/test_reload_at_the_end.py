"""A new process that ends when it has all but taken over: its guest is served by the one that has served it."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.waiting import until
from tests.migration.test_commands import emulators
from tests.migration.test_reload import WRITE_AND_READ, pytestmark, reload

__all__ = ["pytestmark"]

ENDS = f"""\
#!{sys.executable}
import os, select, sys

from vmbus.cli import main
from vmbus.machine.reload.link import Link

hear = Link.hear


async def ends(self, *kinds, **options):
    if kinds == ("yours",):
        if WAITS:
            select.select([self], [], [])
        os._exit(3)
    return await hear(self, *kinds, **options)


Link.hear = ends
sys.exit(main())
"""
"""Program: an emulator that ends after it has locked the images, before ``yours`` was sent or before it is read."""


def program(folder: Path, *, waits: bool) -> Path:
    path = (
        folder / "programs" / f"ends-{waits}"
    )  # the run directories' folder is a package to a program beside it
    path.parent.mkdir(exist_ok=True)
    path.write_text(ENDS.replace("WAITS", str(waits)))
    path.chmod(0o700)
    return path


async def test_a_new_process_that_ends_before_the_guest_is_its_own_costs_nothing(tmp_path: Path) -> None:
    disks: list[str] = []
    for name in ("first.img", "second.img"):
        image = tmp_path / name
        image.write_bytes(bytes(16 << 20))
        disks += ["--device", f"scsi,image={image}"]
    options = (
        "--guest",
        "debian-6.12",
        "--fast-boot",
        "--memory",
        "256M",
        "--device",
        "heartbeat,interval=0.05",
    )
    async with emulators() as started:
        words = (*options, *disks, "--", "sh", "-c", WRITE_AND_READ)
        guest = Emulator.start(tmp_path, "run", "--name", "a", *words)
        started.append(guest)

        async def works() -> None:
            done = guest.output.count("round-")
            await until(
                lambda: guest.output.count("round-") >= done + 2, "two more rounds", guest, timeout=LIMIT
            )
            await guest.more_beats("a")

        await works()
        for serves in (guest.process.pid, None):  # the process that was started, then a worker
            pid = serves or (await reload(tmp_path, "a"))["pid"]
            for waits in (False, True):
                emulator = program(tmp_path, waits=waits)
                said = await asked(tmp_path, "reload", "a", "--emulator", str(emulator), status=1)
                assert "ended with status 3" in said, said
                assert (await guest.status("a"))["emulator"]["pid"] == pid
                await works()
        assert (await reload(tmp_path, "a"))["pid"] != pid
        await works()
        await asked(tmp_path, "device", "add", "a", "echo")
        status, errors = await guest.ended()
        assert status == 5, errors
        assert "bad-" not in guest.output
