"""A qcow2 overlay under a guest: a file system on it, discards, migrations there and back under load."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from vmbus.machine.migration.drive import MigrationFailed
from vmbus.provision.qemu import find_qemu

from tests.guest.harness import LOADED_MODULES, boot
from tests.guest.matrix import full
from tests.guest.test_boot import complaints
from tests.guest.test_power_failure import children_of
from tests.guest.test_scsi import WAIT, e2fs, units
from tests.guest.waiting import LIMIT

pytestmark = pytest.mark.guest

MODULES = (*LOADED_MODULES, "hv_storvsc", "sd_mod", "ext4")
MIB = 1 << 20

SCRIPT = WAIT.format("sda") + (
    "mkdir -p /mnt; mount -t ext4 -o discard /dev/sda /mnt || exit 1; cat /mnt/base; "
    "dd if=/dev/urandom of=/mnt/big bs=64k count=256 2>/dev/null; sync; echo written; "
    "rm /mnt/big; sync; echo removed; n=0; while :; do "
    "dd if=/dev/urandom of=/mnt/f$((n % 4)) bs=16k count=32 2>/dev/null || echo bad-write; sync; "
    "md5sum </mnt/f$((n % 4)) >/root/sum; echo 3 >/proc/sys/vm/drop_caches; "
    "md5sum </mnt/f$((n % 4)) | cmp -s - /root/sum || echo bad-read; n=$((n + 1)); echo round-$n; done"
)


def qemu_img(*words: object) -> str:
    line = [*find_qemu().qemu_img(), *map(str, words)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("moves", [1, full(2)])
async def test_a_guest_moves_with_its_overlay_under_load(tmp_path: Path, moves: int) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "base").write_text("from-below\n")
    base, overlay = tmp_path / "base.img", tmp_path / "overlay.qcow2"
    assert e2fs("mke2fs", "-q", "-t", "ext4", "-d", files, base, "64M") == 0
    before = base.read_bytes()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)

    async with boot(
        tmp_path,
        smp=2,
        memory=256,
        devices=("heartbeat,interval=0.2", f"scsi,image={overlay},format=qcow2,backing={base}"),
        load=MODULES,
        command=[SCRIPT],
    ) as guest:
        await guest.says("written")
        await guest.says("removed")
        await guest.until(lambda: overlay.stat().st_blocks * 512 < 8 * MIB, "room given back")
        assert units(guest)["0:0"]["bytes_written"] > 16 * MIB

        async def guest_resumed() -> None:
            rounds = guest.output.count(b"round-")
            await guest.until(lambda: guest.output.count(b"round-") >= rounds + 2, "two more rounds")

        await guest_resumed()
        for _ in range(moves):
            await guest.guest.move(timeout=LIMIT)
            await guest_resumed()
        new_devices, guest.guest._new_devices = guest.guest._new_devices, lambda lines: []
        with pytest.raises(MigrationFailed):
            await guest.guest.move(timeout=LIMIT)
        guest.guest._new_devices = new_devices
        await guest_resumed()
        await guest.guest.move(timeout=LIMIT)
        await guest_resumed()
        found = units(guest)["0:0"]
        assert (found["backend"], found["format"]) == ("image", "qcow2")
        assert set(found["errors"]) <= {"5/24/00", "5/20/00"}
        assert guest.lines_of_failure() == [], guest.tail()
        assert guest.output.startswith(b"from-below")
        assert complaints(guest.console()) == []
    assert base.read_bytes() == before
    assert "No errors" in qemu_img("check", "-f", "qcow2", overlay)
    qemu_img("convert", "-O", "raw", overlay, tmp_path / "all.img")
    # The guest was cut off in the middle of its work: the journal is played back, and all is well.
    assert e2fs("e2fsck", "-fy", tmp_path / "all.img") in (0, 1)


def storage_daemon() -> int:
    """The process id of the only one of this process."""
    [found] = [
        each
        for each in children_of(os.getpid())
        if b"qemu-storage-daemon" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]
    return found


async def test_a_storage_daemon_that_is_killed_under_load_loses_nothing(tmp_path: Path) -> None:
    """What it did not answer, through the queue or over NBD, is sent to its successor.

    All clusters are there from the beginning: which new ones are in use is safe only after a flush.
    """
    files = tmp_path / "files"
    files.mkdir()
    (files / "base").write_text("from-below\n")
    raw, image = tmp_path / "raw.img", tmp_path / "disk.qcow2"
    assert e2fs("mke2fs", "-q", "-t", "ext4", "-d", files, raw, "64M") == 0
    qemu_img("convert", "-O", "qcow2", "-o", "preallocation=falloc", raw, image)
    async with boot(
        tmp_path,
        smp=2,
        memory=256,
        devices=(f"scsi,image={image},format=qcow2,discard=off",),
        load=MODULES,
        command=[SCRIPT],
    ) as guest:
        await guest.says("round-2")
        for _ in range(3):
            await guest.until(lambda: units(guest)["0:0"]["queued"] > 10, "requests in the queue")
            found = units(guest)["0:0"]
            assert found["path"] == "vhost-user"
            sessions = found["sessions"]
            os.kill(storage_daemon(), signal.SIGKILL)
            await guest.until(lambda: units(guest)["0:0"]["sessions"] > sessions, "another daemon")
            rounds = guest.output.count(b"round-")
            await guest.until(lambda: guest.output.count(b"round-") >= rounds + 2, "two more rounds")
        assert set(units(guest)["0:0"]["errors"]) <= {"5/24/00", "5/20/00"}
        assert b"bad-" not in guest.output
        assert guest.lines_of_failure() == [], guest.tail()
        assert complaints(guest.console()) == []
    qemu_img("convert", "-O", "raw", image, raw)
    assert e2fs("e2fsck", "-fy", raw) in (0, 1)
