"""fio writes, reads and verifies while the guest moves and goes back to snapshots: not one block is wrong.

fio is Debian's own, in the root file system of the system disk, which source and target share; the blocks that it
checks are on another disk: a raw file, a qcow2 or an NBD server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.host import Host
from vmbus.machine.migration import snapshots
from vmbus.provision.qemu import find_qemu

from tests.guest.debian import system_image
from tests.guest.matrix import full
from tests.guest.test_boot import complaints
from tests.guest.test_image_formats import qemu_img, storage_daemon
from tests.guest.test_network_disks import served
from tests.guest.test_scsi import ASKED_IN_VAIN
from tests.migration.journey import Journey, journey

pytestmark = pytest.mark.guest
_logger = logging.getLogger(__name__)

MIB = 1 << 20
SIZE = 112 * MIB

JOBS = """
[global]
filename=$disk
direct=1
verify=crc32c
verify_fatal=1
verify_dump=0
randrepeat=0
group_reporting=1

[sequential-1m]
offset=0
size=32m
rw=write
bs=1m
ioengine=libaio
iodepth=4

[sequential-64k]
offset=32m
size=16m
rw=write
bs=64k
ioengine=psync

[random-4k]
offset=48m
size=8m
rw=randwrite
bs=4k
ioengine=io_uring
iodepth=64

[random-mixed]
offset=56m
size=24m
rw=randrw
bsrange=4k-256k
bs_unaligned=0
ioengine=libaio
iodepth=16

[two-at-once]
offset=80m
size=16m
offset_increment=16m
numjobs=2
rw=randwrite
bs=16k
ioengine=io_uring
iodepth=8
verify_backlog=32
"""
SCRIPT = f"""
until [ -b "$disk" ]; do  # the other one is the root
  for each in /sys/block/sd?; do
    [ "$(cat $each/size)" = {SIZE // 512} ] && disk=/dev/${{each##*/}}
  done
  sleep 0.1
done
cat >/tmp/jobs <<END
{JOBS}
END
round=0
while :; do
  round=$((round + 1))
  fio --minimal /tmp/jobs >/tmp/out 2>&1 || {{
    echo "failed: round $round"; grep -m 1 -E 'verify: bad|verify failed' /tmp/out; tail -n 30 /tmp/out; exit 1
  }}
  echo "round $round."
done
"""


def rounds(guest: Journey) -> int:
    return guest.here.output.count(b"round")


async def more_rounds(guest: Journey, count: int) -> None:
    wanted = rounds(guest) + count
    output = guest.here.output
    await guest.here.until(
        lambda: output.count(b"round") >= wanted or b"failed" in output,
        f"{count} more rounds of fio",
        timeout=240,
    )
    assert b"failed" not in output, output.decode(errors="replace")


async def more_requests(guest: Journey, count: int = 200) -> None:
    """So that each station has something to do."""

    def done() -> int:
        return sum(unit["requests"] for unit in guest.here.channel("scsi")["details"]["units"].values())

    wanted = done() + count
    output = guest.here.output
    await guest.here.until(lambda: done() >= wanted or b"failed" in output, f"{count} more requests")


class CheckedDisk:
    """The disk that fio writes to, and what a snapshot of its guest does with it. ``image``: the file below."""

    def __init__(self, image: Path) -> None:
        self.image = image

    @contextlib.contextmanager
    def made(self) -> Iterator[str]:
        """Make it; return the device's words."""
        self.image.touch()
        os.truncate(self.image, SIZE)
        yield f"scsi,image={self.image}"

    async def save(self, host: Host, tag: str) -> None:
        """Save a guest that stands still."""
        await snapshots.save(host.migration, tag, without_disks=True)
        shutil.copyfile(self.image, self.image.with_suffix(f".{tag}"))

    async def load(self, host: Host, tag: str) -> None:
        await snapshots.load(host.migration, tag, without_disks=True)
        with self.image.with_suffix(f".{tag}").open("rb") as kept, self.image.open("r+b") as file:
            shutil.copyfileobj(kept, file, MIB)
            os.fsync(file.fileno())

    def places(self) -> Iterable[int]:
        """Where in the file blocks of 4 KiB are that fio has written."""
        return range(0, SIZE, 4096)

    def check(self, unit: dict[str, Any]) -> None:
        """``unit``: its report; that the way is the one to be shown."""
        assert unit["backend"] == "file"


class Qcow2Disk(CheckedDisk):
    """A qcow2: in the queue of its storage daemon, and in the snapshots of its guest."""

    @contextlib.contextmanager
    def made(self) -> Iterator[str]:
        qemu_img("create", "-q", "-f", "qcow2", self.image, SIZE)
        yield f"scsi,image={self.image},format=qcow2"

    async def save(self, host: Host, tag: str) -> None:
        await snapshots.save(host.migration, tag)

    async def load(self, host: Host, tag: str) -> None:
        await snapshots.load(host.migration, tag)

    def places(self) -> Iterable[int]:
        found = json.loads(qemu_img("map", "-U", "-f", "qcow2", "--output=json", self.image))
        return [
            at
            for each in found
            if "offset" in each
            for at in range(each["offset"], each["offset"] + each["length"], 4096)
        ]

    def check(self, unit: dict[str, Any]) -> None:
        assert unit["path"] == "vhost-user"
        assert unit["queued"] > 50


class NbdDisk(CheckedDisk):
    """The raw file behind a ``qemu-nbd``."""

    @contextlib.contextmanager
    def made(self) -> Iterator[str]:
        with super().made(), served(self.image, self.image.with_name("n")) as server:
            yield f"scsi,image={server.uri}"

    def check(self, unit: dict[str, Any]) -> None:
        assert unit["backend"] == "nbd"
        assert unit["sessions"] > 0


async def back_and_forth(guest: Journey, disk: CheckedDisk, tag: str) -> None:
    """Save the guest and its disk, let it go on, and put both back."""
    host = guest.host
    await host.qmp.execute("stop")
    await disk.save(host, tag)
    await host.qmp.execute("cont")
    await more_requests(guest, 500)
    await host.qmp.execute("stop")
    await disk.load(host, tag)
    await host.qmp.execute("cont")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kind", "moves", "loads"),
    [
        pytest.param(CheckedDisk, 1, 1, id="raw-1-1"),
        full(CheckedDisk, 3, 1, id="raw-3-1"),
        full(CheckedDisk, 6, 1, id="raw-6-1"),
        full(CheckedDisk, 20, 3, id="raw-20-3"),
        full(Qcow2Disk, 20, 3, id="qcow2-20-3"),
        full(NbdDisk, 20, 3, id="nbd-20-3"),
    ],
)
async def test_not_one_block_is_wrong_over_migrations_and_snapshots(
    tmp_path: Path,
    kind: type[CheckedDisk],
    moves: int,
    loads: int,
) -> None:
    checked = kind(tmp_path / "data.img")
    with checked.made() as words:
        devices = ("heartbeat,interval=0.1", "shutdown", f"scsi,image={system_image()},readonly=on", words)
        async with journey(
            tmp_path, smp=2, devices=devices, root="LABEL=debian", command=[SCRIPT], snapshots=True
        ) as guest:
            begun = time.monotonic()
            await more_requests(guest, 1000)
            for number in range(loads):
                await back_and_forth(guest, checked, f"snapshot-{number}")
                await more_requests(guest)
                checked.check(guest.here.channel("scsi")["details"]["units"]["0:1"])
            for _ in range(moves):
                outcome = await guest.move()
                assert outcome.report.statuses[-1] == "completed"
                await more_requests(guest)
                checked.check(guest.here.channel("scsi")["details"]["units"]["0:1"])
            await more_rounds(guest, min(moves, 2))
            _logger.info("%s: %d rounds in %d s", kind.__name__, rounds(guest), time.monotonic() - begun)
            assert guest.moves == moves
            found = guest.here.status()
            disks = [channel for channel in found["channels"] if channel["device"] == "scsi"]
            assert [channel["subchannel"] for channel in disks] == [0, 1]
            assert all(channel["refusals"] == {} for channel in found["channels"])
            for unit in disks[0]["details"]["units"].values():
                assert set(unit["errors"]) <= ASKED_IN_VAIN
            assert complaints(guest.here.console()) == []
            assert not re.search(r"I/O error|Sense Key|hung_task", guest.here.console())

            output = guest.here.output
            rng = random.Random(1)
            places = list(checked.places())

            def spoiled() -> bool:
                """Another block is not what was written: fio finds that."""
                with checked.image.open("r+b") as file:
                    file.seek(rng.choice(places))
                    file.write(rng.randbytes(4096))
                return (
                    b"verify: bad" in output or b"verify failed" in output
                )  # a header, or what is behind it

            await guest.here.until(spoiled, "fio to find a wrong block")
            assert b"failed: round" in output


@pytest.mark.full  # the shorter ones are tests/guest/test_image_formats.py
@pytest.mark.timeout(900)
async def test_not_one_block_of_a_qcow2_is_wrong_over_migrations_and_dead_daemons(tmp_path: Path) -> None:
    """Its daemon is another one after each move, and after each death."""
    image = tmp_path / "data.qcow2"
    options = ["-f", "qcow2", "-o", "preallocation=falloc", str(image), str(SIZE)]
    creator = await asyncio.create_subprocess_exec(*find_qemu().qemu_img(), "create", "-q", *options)
    assert await creator.wait() == 0
    devices = (
        "heartbeat,interval=0.1",
        "shutdown",
        f"scsi,image={system_image()},readonly=on",
        f"scsi,image={image},format=qcow2,discard=off",
    )
    async with journey(tmp_path, smp=2, devices=devices, root="LABEL=debian", command=[SCRIPT]) as guest:

        def disk() -> dict[str, Any]:
            found: dict[str, Any] = guest.here.channel("scsi")["details"]["units"]["0:1"]
            return found

        await more_requests(guest, 1000)
        for _ in range(3):
            outcome = await guest.move()
            assert outcome.report.statuses[-1] == "completed"
            await more_requests(guest, 1000)
            sessions = disk()["sessions"]
            assert disk()["path"] == "vhost-user"
            assert disk()["queued"] > 100
            os.kill(storage_daemon(), signal.SIGKILL)
            await guest.here.until(partial(another, disk, sessions), "another daemon")
            await more_requests(guest, 1000)
        await more_rounds(guest, 1)
        assert set(disk()["errors"]) <= ASKED_IN_VAIN
        assert complaints(guest.here.console()) == []
        assert not re.search(r"I/O error|Sense Key|hung_task", guest.here.console())


def another(disk: Callable[[], dict[str, Any]], sessions: int) -> bool:
    """Whether the disk has had more sessions since."""
    return bool(disk()["sessions"] > sessions)
