"""werror=enospc on a file system that gets full: the guest stops, moves, and goes on when there is room."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.harness import LOADED_MODULES, boot
from tests.guest.test_boot import complaints
from tests.guest.test_scsi import WAIT, units
from tests.guest.waiting import LIMIT

pytestmark = pytest.mark.guest

MODULES = (*LOADED_MODULES, "hv_storvsc", "sd_mod")
MIB = 1 << 20


@contextlib.contextmanager
def small_file_system(path: Path, size: int) -> Iterator[Path]:
    """A tmpfs; skips where none can be mounted."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


async def test_a_guest_waits_for_room_and_loses_nothing(tmp_path: Path) -> None:
    script = WAIT.format("sda") + (
        "dd if=/dev/urandom of=/root/f bs=64k count=192 2>/dev/null; "
        "dd if=/root/f of=/dev/sda bs=64k oflag=direct 2>/dev/null; echo written $?; "
        "dd if=/dev/sda bs=64k count=192 iflag=direct 2>/dev/null | cmp - /root/f && echo the-same"
    )

    with small_file_system(tmp_path / "full", 6 * MIB) as folder:
        image = folder / "disk.img"
        image.touch()
        os.truncate(image, 32 * MIB)
        line = f"scsi,image={image},cache=writeback,werror=enospc"
        async with boot(
            tmp_path, memory=256, devices=("heartbeat", line), load=MODULES, command=[script]
        ) as guest:
            await guest.until(lambda: guest.status()["stopped_because"], "the guest to be stopped")
            assert "No space left" in guest.status()["stopped_because"][0]
            assert "No space left" in units(guest)["0:0"]["kept"]["because"]
            await guest.guest.move(timeout=LIMIT)
            found = await guest.host.qmp.execute("query-status")
            assert found["status"] == "paused"
            assert b"written" not in guest.output
            await guest.host.qmp.execute("cont")  # there is no room yet

            async def paused() -> bool:
                return bool((await guest.host.qmp.execute("query-status"))["status"] == "paused")

            # what it was stopped for before may still be written there
            await guest.until(paused, "stopped guest")
            await guest.until(lambda: guest.status()["stopped_because"], "the reason")
            subprocess.run(["mount", "-o", f"remount,size={64 * MIB}", folder], check=True)  # noqa: ASYNC221
            await guest.host.qmp.execute("cont")
            assert await guest.finish() == 0, guest.tail()
            assert guest.output.split() == [b"written", b"0", b"the-same"]
            assert set(units(guest)["0:0"]["errors"]) <= {"5/24/00", "5/20/00"}
            assert complaints(guest.console()) == []
