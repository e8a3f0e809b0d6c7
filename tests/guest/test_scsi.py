"""Disks on a real kernel: file systems that survive a reboot, direct I/O, discards, hot plugging, CD-ROMs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vmbus.errors import UserError
from vmbus.machine.io.uring import Uring
from vmbus.machine.qemu.storage_daemon import QemuImages
from vmbus.provision.qemu import find_qemu
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.drive import DriveOptions, Format, open_drive

from tests.guest.harness import DEFAULT_DEVICES, LOADED_MODULES, Booted, boot
from tests.guest.matrix import full
from tests.guest.test_boot import complaints
from tests.guest.waiting import LIMIT
from tests.migration.journey import journey

pytestmark = pytest.mark.guest

MODULES = (*LOADED_MODULES, "hv_storvsc", "sd_mod")
FILE_SYSTEM = (*MODULES, "crc32c_generic", "ext4")
MIB = 1 << 20

ASKED_IN_VAIN = {"5/24/00", "5/20/00"}
"""Pages and commands that Linux asks for to see whether they are there."""

WAIT = "until grep -q {0} /proc/partitions; do usleep 100000; done; "
"""Shell: until the kernel has a disk of that name."""


def units(guest: Booted, name: str = "scsi") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = guest.channel(name)["details"]["units"]
    return found


def e2fs(name: str, *words: object) -> int:
    """Run a program of e2fsprogs; return its exit status."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} (package e2fsprogs) is not installed")
    return subprocess.run([found, *map(str, words)], stdout=subprocess.DEVNULL, check=False).returncode


def new_image(path: Path, format: str) -> None:
    line = [*find_qemu().qemu_img(), "create", "-q", "-f", format, str(path), "8M"]
    subprocess.run(line, check=True)


def calm(guest: Booted) -> None:
    """Nothing was refused, and the kernel does not complain."""
    assert complaints(guest.console()) == []
    assert not re.search(r"I/O error|storvsc.*(?:error|fail)|sd \S+:.*(?:Sense|FAILED)", guest.console())
    for channel in guest.status()["channels"]:
        assert channel["refusals"] == {}, channel


@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_an_image_that_is_used_already_is_refused_at_the_start(tmp_path: Path, format: str) -> None:
    image = tmp_path / "disk.img"
    new_image(image, format)
    line = f"scsi,image={image},format={format}"
    with pytest.raises(UserError, match=r"scsi/0:1: the image .*/disk.img (is used by|cannot be opened)"):
        async with boot(tmp_path, devices=[line, line], load=MODULES):
            pytest.fail("the guest has started")
    other = open_drive(DriveOptions(str(image), format=Format(format)), "other", QemuImages())
    other.claim(LIMIT)
    try:
        with pytest.raises(UserError, match=r"scsi/0:0: the image .*/disk.img (is used by|cannot be opened)"):
            async with boot(tmp_path, devices=[line], load=MODULES):
                pytest.fail("the guest has started")
    finally:
        other.close()
        assert await asyncio.to_thread(other.backend.wait_closed, LIMIT)


@pytest.mark.full  # a Debian and a guest that is reset under load find their disk again
@pytest.mark.parametrize("kernel", ["debian-6.1", "debian-6.12", "debian-backports"])
async def test_a_file_system_survives_a_reboot(tmp_path: Path, kernel: str) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 128 * MIB)
    assert e2fs("mke2fs", "-q", "-t", "ext4", image) == 0
    modules = tuple(each for each in FILE_SYSTEM if kernel == "debian-6.1" or each != "crc32c_generic")

    async def run(command: str) -> str:
        async with boot(
            tmp_path,
            kernel=kernel,
            smp=2,
            devices=(*DEFAULT_DEVICES, f"scsi,image={image}"),
            load=modules,
            command=[WAIT.format("sda") + command],
        ) as guest:
            assert await guest.finish() == 0, guest.tail()
            calm(guest)
            return guest.output.decode()

    written = await run(
        "mkdir -p /mnt; mount -t ext4 /dev/sda /mnt || exit 1; mkdir /mnt/d; "
        "for i in $(seq 40); do dd if=/dev/urandom of=/mnt/d/$i bs=4k count=$((i * 3)) 2>/dev/null || exit 2; done; "
        "rm /mnt/d/7 /mnt/d/14; cd /mnt/d; md5sum * >/mnt/sums || exit 3; cat /mnt/sums; cd /; "
        "sync; umount /mnt || exit 4"
    )
    assert written.count("\n") == 38
    assert e2fs("e2fsck", "-fn", image) == 0
    checked = await run(
        "mkdir -p /mnt; mount -t ext4 /dev/sda /mnt || exit 1; cd /mnt/d; md5sum -c /mnt/sums >/root/out || exit 2; "
        "grep -c OK /root/out; cat /mnt/sums; cd /; umount /mnt"
    )
    assert checked == "38\n" + written


@pytest.mark.parametrize("by", ["io_uring", full("threads")])
async def test_direct_reads_and_writes_of_every_size_and_place(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "threads":
        monkeypatch.setattr(Uring, "open", classmethod(lambda cls, loop: None))
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(16 * MIB))
    before = hashlib.md5(image.read_bytes()).hexdigest()
    script = (
        WAIT.format("sda")
        + "md5sum </dev/sda; dd if=/dev/sda of=/root/all bs=1M iflag=direct 2>/dev/null; md5sum </root/all; "
        "for bs in 512 1536 4096 65536 524288; do "
        "dd if=/root/all of=/dev/sda bs=$bs skip=3 seek=5 count=17 oflag=direct conv=notrunc 2>/dev/null || exit 1; "
        "dd if=/root/all of=/root/new bs=$bs skip=3 seek=5 count=17 conv=notrunc 2>/dev/null; "
        "done; sync; md5sum </dev/sda"
    )

    async with boot(
        tmp_path, smp=2, devices=(f"scsi,image={image}",), load=MODULES, command=[script]
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        calm(guest)
        lines = guest.output.decode().split()
        assert lines[0] == lines[2] == before
        assert lines[4] == hashlib.md5(image.read_bytes()).hexdigest() != before
        found = units(guest)["0:0"]
        assert found["direct"]
        assert set(found["errors"]) <= ASKED_IN_VAIN
        assert found["bytes_read"] >= 2 * 16 * MIB
        assert found["bytes_written"] >= 17 * (512 + 1536 + 4096 + 65536 + 524288)
        assert guest.channel("scsi")["details"]["subchannels"] == 1


async def test_discarded_blocks_take_no_room_on_the_host(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(16 * MIB))
    script = WAIT.format("sda") + (
        "cat /sys/block/sda/queue/discard_max_bytes; blkdiscard -o 1048576 -l 8388608 /dev/sda || exit 1; "
        "dd if=/dev/sda bs=1M skip=1 count=8 iflag=direct 2>/dev/null | md5sum"
    )

    async with boot(tmp_path, devices=(f"scsi,image={image}",), load=MODULES, command=[script]) as guest:
        assert await guest.finish() == 0, guest.tail()
        most, digest, _ = guest.output.decode().split()
        assert int(most) > 8 * MIB
        assert digest == hashlib.md5(bytes(8 * MIB)).hexdigest()
        calm(guest)
    assert image.stat().st_blocks * 512 <= 9 * MIB


async def test_disks_come_and_go_and_grow_while_the_guest_runs(tmp_path: Path) -> None:
    images = [tmp_path / f"{number}.img" for number in range(2)]
    for image in images:
        image.write_bytes(bytes(8 * MIB))

    async with boot(
        tmp_path,
        smp=2,
        devices=(f"scsi,image={images[0]}",),
        load=MODULES,
        command=["while :; do echo $(awk '/sd/ {print $4 \":\" $3}' /proc/partitions); usleep 200000; done"],
    ) as guest:
        device = guest.device("scsi")
        assert isinstance(device, Scsi)

        def sees(text: str) -> bool:
            return guest.output.decode().endswith(f"\n{text}\n")

        await guest.until(lambda: sees("sda:8192"), "one disk")
        assert device.attach(open_drive(DriveOptions(str(images[1])), "second")) == 1
        await guest.until(lambda: sees("sda:8192 sdb:8192"), "a second disk")
        os.truncate(images[1], 24 * MIB)
        assert device.resize(0, 1)
        await guest.until(lambda: sees("sda:8192 sdb:24576"), "a larger disk")
        device.detach(0, 1)
        await guest.until(lambda: sees("sda:8192"), "one disk again")
        assert complaints(guest.console()) == []


async def test_several_controllers_targets_and_a_cdrom(tmp_path: Path) -> None:
    disc = tmp_path / "disc.iso"
    disc.write_bytes(os.urandom(3 * MIB))
    script = "".join(WAIT.format(name) for name in ("sda", "sdb", "sdc", "sr0")) + (
        "md5sum </dev/sr0; cd /sys/class/scsi_device; for d in *; do echo $d $(cat $d/device/type) "
        "$(dd if=$d/device/vpd_pg80 bs=1 skip=4 2>/dev/null) $(cat $d/device/block/sd?/ro 2>/dev/null); done"
    )

    async with boot(
        tmp_path,
        smp=4,
        devices=(
            "scsi,format=memory,size=8M,serial=first",
            "scsi,format=memory,size=8M,target=1,lun=7,serial=far,readonly=on",
            f"scsi,image={disc},serial=disc",
            "scsi,format=memory,size=8M,controller=other,serial=other",
        ),
        load=(*MODULES, "sr_mod"),
        command=[script],
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        lines = guest.output.decode().splitlines()
        assert lines[0].split()[0] == hashlib.md5(disc.read_bytes()).hexdigest()
        found = {tuple(line.split()[0].split(":")[1:]): line.split()[1:] for line in lines[1:5]}
        hosts = {line.split()[0].split(":")[0] for line in lines[1:5]}
        assert hosts == {"0", "1"}
        kinds = sorted(" ".join(line.split()[1:]) for line in lines[1:5])
        assert kinds == ["0 far 1", "0 first 0", "0 other 0", "5 disc"]
        assert ("0", "1", "7") in found
        assert guest.channel("scsi")["details"]["subchannels"] == 3
        assert complaints(guest.console()) == []


async def test_a_bad_block_is_an_error_in_the_guest_and_the_rest_is_read(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 * MIB))
    script = WAIT.format("sda") + (
        "dd if=/dev/sda of=/dev/null bs=4k skip=256 count=1 iflag=direct 2>/dev/null; echo $?; "
        "dd if=/dev/sda bs=4k count=256 iflag=direct 2>/dev/null | md5sum"
    )

    async with boot(
        tmp_path,
        devices=(f"scsi,image={image},fault=read-error@2048-2055",),
        load=MODULES,
        command=[script],
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        error, digest = guest.output.decode().splitlines()
        assert error == "1"
        assert digest.split()[0] == hashlib.md5(image.read_bytes()[:MIB]).hexdigest()
        assert "Unrecovered read error" in guest.console()
        assert set(units(guest)["0:0"]["errors"]) - ASKED_IN_VAIN == {"3/11/00"}


@pytest.mark.full  # tests/guest/test_life.py reloads every driver
async def test_the_driver_can_be_reloaded_under_its_disks(tmp_path: Path) -> None:
    script = WAIT.format("sda") + (
        "dd if=/dev/urandom of=/root/f bs=64k count=16 2>/dev/null; "
        "dd if=/root/f of=/dev/sda bs=64k oflag=direct 2>/dev/null; "
        "for i in 1 2 3; do rmmod hv_storvsc || exit 1; while grep -q sda /proc/partitions; do usleep 10000; done; "
        "modprobe hv_storvsc || exit 2; " + WAIT.format("sd") + "done; "
        "md5sum </root/f; "
        "dd if=/dev/$(awk '/sd/ {print $4}' /proc/partitions) bs=64k count=16 iflag=direct 2>/dev/null | md5sum"
    )

    async with boot(
        tmp_path, smp=2, devices=("scsi,format=memory,size=8M",), load=MODULES, command=[script]
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        first, second = guest.output.decode().splitlines()
        assert first == second
        assert guest.channel("scsi")["opens"] == 4
        calm(guest)


@pytest.mark.parametrize("resets", [2, full(4)])
async def test_a_guest_that_is_reset_under_load_finds_its_disk_again(tmp_path: Path, resets: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    script = WAIT.format("sda") + (
        "for i in 1 2 3 4; do (while :; do dd if=/dev/zero of=/dev/sda bs=64k count=200 oflag=direct; done) & done; "
        "sleep 1; echo b >/proc/sysrq-trigger; sleep 60"
    )

    async with boot(
        tmp_path, smp=2, devices=(f"scsi,image={image}",), load=MODULES, command=[script]
    ) as guest:
        for count in range(2, resets + 1):
            await guest.until(lambda: guest.host.events.resets >= count, f"reset {count}")
            written = units(guest)["0:0"]["bytes_written"]
            await guest.until(
                lambda: units(guest)["0:0"]["bytes_written"] > written + 4 * MIB,
                "writes after a reset",
            )
        assert set(units(guest)["0:0"]["errors"]) <= ASKED_IN_VAIN
        assert guest.channel("scsi")["refusals"] == {}


@pytest.mark.parametrize(("smp", "moves"), [(2, 2), full(1, 4), full(2, 4)])
async def test_a_guest_migrates_while_it_writes_and_reads(tmp_path: Path, smp: int, moves: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * MIB))
    script = WAIT.format("sda") + (
        "dd if=/dev/urandom of=/root/f bs=64k count=64 2>/dev/null; sum=$(md5sum </root/f); echo started; n=0; "
        "while [ ! -e /root/stop ]; do "
        "dd if=/root/f of=/dev/sda bs=64k seek=$((n % 15 * 64)) oflag=direct conv=notrunc 2>/dev/null "
        "|| echo bad-write; "
        '[ "$(dd if=/dev/sda bs=16k skip=$((n % 15 * 256)) count=256 iflag=direct 2>/dev/null | md5sum)" = "$sum" ] '
        "|| echo bad-read; n=$((n + 1)); echo round-$n; done"
    )

    async with journey(
        tmp_path, smp=smp, devices=("heartbeat", f"scsi,image={image}"), load=MODULES, command=[script]
    ) as guest:
        await guest.here.says("round-2")

        def rounds() -> int:
            return guest.here.output.count(b"round-")

        for _ in range(moves):
            before = rounds()
            outcome = await guest.move()
            assert outcome.report.statuses[-1] == "completed"
            await guest.here.until(lambda: rounds() >= before + 2, "two more rounds")
        assert guest.here.lines_of_failure() == [], guest.here.tail()
        found = guest.here.channel("scsi")
        assert found["details"]["stage"] == "ready"
        assert found["details"]["subchannels"] == smp - 1
        assert set(found["details"]["units"]["0:0"]["errors"]) <= ASKED_IN_VAIN
        assert complaints(guest.here.console()) == []
        assert not re.search(r"I/O error|Sense Key", guest.here.console())
