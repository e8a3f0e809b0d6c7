"""Disks on a real NBD server: a file system, discards, and a server that is killed under load."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmbus.provision.qemu import find_qemu

from tests.guest.harness import LOADED_MODULES, boot
from tests.guest.test_boot import complaints
from tests.guest.test_scsi import WAIT, units
from tests.guest.waiting import Process, until_blocking

pytestmark = pytest.mark.guest

MODULES = (*LOADED_MODULES, "hv_storvsc", "sd_mod")
MIB = 1 << 20


class Server:
    """``qemu-nbd`` for one image."""

    def __init__(self, image: Path, path: Path) -> None:
        self.image, self.path = image, path
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///disk?socket={self.path}"

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        qemu = find_qemu()
        self.process = subprocess.Popen(
            [
                *qemu.qemu_nbd(),
                "-k",
                self.path,
                "-x",
                "disk",
                "-f",
                "raw",
                "-t",
                "-e",
                "0",
                "--discard=unmap",
                self.image,
            ],
            env={**os.environ, **qemu.environment},
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def served(image: Path, path: Path) -> Iterator[Server]:
    server = Server(image, path)
    server.start()
    try:
        assert server.process is not None
        until_blocking(path.exists, "socket of the server", Process("qemu-nbd", server.process))
        yield server
    finally:
        server.kill()


async def test_a_server_that_is_killed_under_load_and_comes_back(tmp_path: Path) -> None:
    """One disk waits for its server, the other one does not."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(8 * MIB))
    before = hashlib.md5(image.read_bytes()).hexdigest()
    script = (
        WAIT.format("sda")
        + WAIT.format("sdb")
        # Which of the two is found first, and so called sda, is chance.
        + "disk() { ls /sys/class/scsi_disk/*:0:0:$1/device/block; }; "
        + "a=/dev/$(disk 0) b=/dev/$(disk 1); "
        + "md5sum <$a; blkdiscard -o 4194304 -l 4194304 $a && echo discarded; "
        + "(until ! dd if=$b of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null; do :; done; "
        + "echo b-failed; "
        + "until dd if=$b of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null; do usleep 50000; done; "
        + "echo b-back) & dd if=/dev/urandom of=/root/f bs=64k count=16 2>/dev/null; sum=$(md5sum </root/f); n=0; "
        + "while :; do dd if=/root/f of=$a bs=64k seek=$((n % 4 * 16)) oflag=direct conv=notrunc 2>/dev/null "
        + "|| echo bad-write; [ "
        + '"$(dd if=$a bs=16k skip=$((n % 4 * 64)) count=64 iflag=direct 2>/dev/null | md5sum)" = "$sum" ] '
        + "|| echo bad-read; n=$((n + 1)); echo round-$n; done"
    )

    with served(image, tmp_path / "n") as server:
        async with boot(
            tmp_path,
            smp=2,
            devices=(f"scsi,image={server.uri},reconnect=120", f"scsi,image={server.uri},reconnect=0.2"),
            load=MODULES,
            command=[script],
        ) as guest:
            await guest.says("discarded")
            assert guest.output.decode().split()[0] == before
            assert image.stat().st_blocks * 512 <= 5 * MIB
            await guest.says("round-2")
            sessions = units(guest)["0:0"]["sessions"]
            server.kill()
            await guest.says("b-failed")
            assert "3/11/00" in units(guest)["0:1"]["errors"]
            await guest.until(lambda: "trouble" in units(guest)["0:0"], "the loss to be noticed")
            rounds = guest.output.count(b"round-")
            server.start()
            await guest.says("b-back")
            await guest.until(lambda: guest.output.count(b"round-") > rounds + 2, "rounds after it came back")
            assert guest.lines_of_failure() == [], guest.tail()
            found = units(guest)["0:0"]
            assert (found["connections"], found["sessions"]) == (4, sessions + 1)
            assert set(found["errors"]) <= {"5/24/00", "5/20/00"}
            assert complaints(guest.console()) == []
