"""werror=enospc on a file system that gets full: the guest stops, moves, and goes on when there is room.

On a raw file, and on a qcow2 in the queue of its storage daemon, which cannot be read at first (rerror=stop).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.harness import LOADED_MODULES, Booted, boot
from tests.guest.test_boot import complaints
from tests.guest.test_image_formats import qemu_img
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


WRITE = (
    "dd if=/dev/urandom of=/root/f bs=64k count=192 2>/dev/null; "
    "dd if=/root/f of=/dev/sda bs=64k seek=32 oflag=direct 2>/dev/null; echo written $?; "
    "dd if=/dev/sda bs=64k skip=32 count=192 iflag=direct 2>/dev/null | cmp - /root/f && echo the-same"
)


def compressed(image: bytes, cluster: int) -> int:
    """Return where a compressed cluster of 64 KiB begins in a small qcow2."""
    (first,) = struct.unpack_from(">Q", image, 40)
    (second,) = struct.unpack_from(">Q", image, first)
    (entry,) = struct.unpack_from(">Q", image, (second & 0x00FF_FFFF_FFFF_FE00) + 8 * cluster)
    assert entry >> 62 == 1
    return int(entry & ((1 << 54) - 1))


async def stopped(guest: Booted) -> str:
    """Wait until the guest is stopped for its disk; return why.

    The reason is there before QEMU was told to stop the guest: a `cont` that comes between the two is lost.
    """
    await guest.until(lambda: guest.status()["stopped_because"], "the guest to be stopped")
    async with asyncio.timeout(LIMIT):
        while (await guest.host.qmp.execute("query-status"))["running"]:  # noqa: ASYNC110 - it sends an event only once
            await asyncio.sleep(0.01)
    [because] = guest.status()["stopped_because"]
    return str(because)


async def is_full_moves_and_gets_room(guest: Booted, folder: Path) -> None:
    """The guest is stopped at a full file system, moves to another QEMU, and ends when there is room."""
    assert "No space left" in await stopped(guest)
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
    await stopped(guest)
    subprocess.run(["mount", "-o", f"remount,size={64 * MIB}", folder], check=True)  # noqa: ASYNC221
    await guest.host.qmp.execute("cont")
    assert await guest.finish() == 0, guest.tail()
    assert set(units(guest)["0:0"]["errors"]) <= {"5/24/00", "5/20/00"}
    assert complaints(guest.console()) == []


async def test_a_guest_waits_for_room_and_loses_nothing(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "full", 6 * MIB) as folder:
        image = folder / "disk.img"
        image.touch()
        os.truncate(image, 32 * MIB)
        line = f"scsi,image={image},cache=writeback,werror=enospc"
        script = WAIT.format("sda") + WRITE
        async with boot(
            tmp_path, memory=256, devices=("heartbeat", line), load=MODULES, command=[script]
        ) as guest:
            await is_full_moves_and_gets_room(guest, folder)
            assert guest.output.split() == [b"written", b"0", b"the-same"]


async def test_a_guest_waits_for_an_image_behind_a_queue(tmp_path: Path) -> None:
    """One of its clusters is compressed, and cannot be read while its first bytes are others."""
    content = b"".join(hashlib.sha256(b"%d" % each).hexdigest().encode() for each in range(2 * MIB // 64))
    raw = tmp_path / "content"
    raw.write_bytes(content)
    os.truncate(raw, 32 * MIB)
    with small_file_system(tmp_path / "full", 6 * MIB) as folder:
        image = folder / "disk.qcow2"
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
        before = image.read_bytes()
        place = compressed(before, 16)
        right = before[place : place + 16]
        with image.open("r+b") as file:
            file.seek(place)
            file.write(bytes([0xFF]) * len(right))  # no block of DEFLATE begins so
        line = f"scsi,image={image},format=qcow2,cache=writeback,werror=enospc,rerror=stop"
        script = (
            WAIT.format("sda")
            # so many that the channel is compiled code's, which it is not at once after a guest's first commands
            + "for each in 1 2 3; do dd if=/dev/sda of=/dev/null bs=4k count=256 iflag=direct 2>/dev/null; done; "
            + "dd if=/dev/sda bs=64k count=32 iflag=direct 2>/dev/null | md5sum; "
            + WRITE
        )
        async with boot(
            tmp_path, memory=256, devices=("heartbeat", line), load=MODULES, command=[script]
        ) as guest:
            assert "a read failed: Input/output error" in await stopped(guest)
            found = units(guest)["0:0"]
            assert found["sessions"] == 1  # the daemon is the first one
            assert found["path"] == "vhost-user"
            assert (queued := found["queued"]) > 0
            with image.open("r+b") as file:
                file.seek(place)
                file.write(right)
            await guest.host.qmp.execute("cont")
            await guest.says(hashlib.md5(content).hexdigest())
            await stopped(guest)
            assert units(guest)["0:0"]["queued"] > queued + 20
            await is_full_moves_and_gets_room(guest, folder)
            assert guest.output.split()[2:] == [b"written", b"0", b"the-same"]
            assert units(guest)["0:0"]["path"] == "vhost-user"
            assert units(guest)["0:0"]["queued"] > 20
