"""``vmbus device``: what is added, removed and resized while a guest runs, and goes along when it moves."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from vmbus.cli import device as device_command
from vmbus.cli import main
from vmbus.sandbox import seccomp

from tests.guest.harness import LOADED_MODULES, boot
from tests.guest.test_boot import complaints
from tests.guest.test_image_formats import qemu_img
from tests.guest.waiting import LIMIT

pytestmark = pytest.mark.guest

MODULES = (*LOADED_MODULES, "hv_storvsc", "sd_mod")
MIB = 1 << 20
WATCH = (
    "(until [ -e /dev/sdc ]; do usleep 100000; done; "
    "while dd if=/dev/sdc of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done; echo sdc-failed) & "
    "while :; do echo disks $(awk '/sd/ {print $4 \":\" $3}' /proc/partitions | sort); usleep 100000; done"
)


READING = (
    "until [ -e /dev/sda ]; do usleep 100000; done; echo reading; "
    "while dd if=/dev/sda of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done; echo gone; sleep 1000"
)


async def test_a_controller_that_is_removed_while_its_guest_is_stopped_hangs_nothing(tmp_path: Path) -> None:
    """Linux waits for ever for a request that is in a ring at the rescind, and does not release the channel then."""
    async with boot(
        tmp_path,
        smp=2,
        devices=("heartbeat", "scsi,format=memory,size=4M"),
        load=MODULES,
        command=[READING],
    ) as guest:
        host = guest.host
        await guest.says("reading")
        requests = guest.channel("scsi")["io"]["packets_in"]
        await guest.until(lambda: guest.channel("scsi")["io"]["packets_in"] > requests, "more requests")
        await host.qmp.execute("stop")
        await guest.until(lambda: host.stopped, "the stop")
        removing = asyncio.ensure_future(device_command.answer(host, {"action": "remove", "device": "scsi"}))
        await asyncio.wait({removing}, timeout=1.5)
        await host.qmp.execute("cont")
        assert await removing == {"name": "scsi", "released": True, "done": "scsi is removed"}
        await guest.says("gone")
        assert [each["device"] for each in guest.status()["channels"]] == ["heartbeat"]
        await guest.more_beats()
        assert complaints(guest.console()) == []


async def test_devices_come_go_grow_and_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.img", tmp_path / "second,.qcow2"
    first.write_bytes(bytes(8 * MIB))
    qemu_img("create", "-q", "-f", "qcow2", second, "16M")

    async with boot(
        tmp_path,
        smp=2,
        memory=256,
        devices=("heartbeat", f"scsi,image={first},queues=2"),
        load=MODULES,
        command=[WATCH],
    ) as guest:
        name = guest.guest.directory.name

        async def vmbus(*words: str) -> str:
            capsys.readouterr()
            status = await asyncio.to_thread(main, ["device", words[0], name, *words[1:]])
            captured = capsys.readouterr()
            return captured.out if status == 0 else f"{status}: {captured.err}"

        async def sees(text: str) -> None:
            await guest.until(
                lambda: guest.output.decode().rstrip().endswith(f"disks {text}".rstrip()),
                f"disks {text!r}",
            )

        await sees("sda:8192")
        for field in ("NoNewPrivs:\t1", "Seccomp:\t2") if seccomp.available() else ("NoNewPrivs:\t1",):
            assert field in Path(f"/proc/{guest.guest.process.pid}/status").read_text()
        assert "is used by another guest, or by another disk of this one" in await vmbus(
            "add", f"scsi,image={first}"
        )
        path = str(second).replace(",", ",,")
        line = f"scsi,image={path},format=qcow2,queues=2,serial=late"
        assert await vmbus("add", line) == "scsi/0:1 is there\n"
        await sees("sda:8192 sdb:16384")
        assert await vmbus("resize", "scsi/0:0", "12M") == f"scsi/0:0 has {12 * MIB} bytes\n"
        assert await vmbus("resize", "scsi/0:1", "32M") == f"scsi/0:1 has {32 * MIB} bytes\n"
        await sees("sda:12288 sdb:32768")
        assert (await vmbus("add", "echo")) == "echo is offered\n"
        await guest.until(lambda: guest.channel("echo"), "the echo device")
        added = await vmbus("add", "scsi,format=memory,size=4M,controller=other,serial=far")
        assert added == "other is offered\n"
        await sees("sda:12288 sdb:32768 sdc:4096")
        # The disk that came first goes, and the others keep their places over a move.
        assert await vmbus("remove", "scsi/0:0") == "scsi/0:0 is removed\n"
        await sees("sdb:32768 sdc:4096")
        before = json.loads(await vmbus("list", "--json"))["devices"]
        await guest.guest.move(timeout=LIMIT)
        after = json.loads(await vmbus("list", "--json"))["devices"]
        assert [each["name"] for each in after] == [each["name"] for each in before]
        assert [disk["name"] for each in after for disk in each["disks"]] == ["scsi/0:1", "other/0:0"]
        assert after[1]["disks"][0]["serial"] == "late"
        table = await vmbus("list")
        assert "scsi/0:1" in table
        assert "second,,.qcow2" in table
        assert await vmbus("resize", "scsi/0:1", "64M") == f"scsi/0:1 has {64 * MIB} bytes\n"
        await sees("sdb:65536 sdc:4096")
        assert b"sdc-failed" not in guest.output
        assert await vmbus("remove", "other") == "other is removed\n"  # under load
        await guest.says("sdc-failed")
        assert await vmbus("remove", "scsi/0:1") == "scsi/0:1 is removed\n"
        await sees("")
        assert "cannot be made smaller" not in await vmbus("list")
        for words, status, message in (
            (("remove", "scsi/0:1"), 1, "there is no device scsi/0:1"),
            (("resize", "echo", "1G"), 1, "is not a disk"),
            (("add", "echo"), 1, "a name (id=)"),
            (("add", "scsi,image=/nowhere"), 1, "No such file"),
            (("add", "nonsense"), 2, "no device 'nonsense'"),
        ):
            answer = await vmbus(*words)
            assert answer.startswith(f"{status}: ")
            assert message in answer
        assert complaints(guest.console()) == []
    assert "No errors" in qemu_img("check", "-f", "qcow2", second)
