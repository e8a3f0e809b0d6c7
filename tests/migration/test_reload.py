"""The process that serves a guest is replaced while the guest works: nothing is lost, and a refusal costs nothing."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vmbus.provision.qemu import find_qemu
from vmbus.wire.echo import ECHO_INSTANCE

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.matrix import full
from tests.guest.waiting import until
from tests.migration.journey import machine
from tests.migration.own_qemu import own_qemu
from tests.migration.test_commands import emulators

pytestmark = pytest.mark.guest

WRITE_AND_READ = f"""
i=0
until [ -e /sys/bus/vmbus/devices/{ECHO_INSTANCE} ]; do
    i=$((i+1))
    at=$((i % 8 * 16))
    dd if=/dev/urandom of=/tmp/block bs=64k count=16 2>/dev/null
    for disk in /dev/sda /dev/sdb; do
        dd if=/tmp/block of=$disk bs=64k seek=$at conv=fsync 2>/dev/null || echo bad-write
        echo 3 > /proc/sys/vm/drop_caches
        there=$(dd if=$disk bs=64k skip=$at count=16 2>/dev/null | md5sum)
        [ "$there" = "$(md5sum < /tmp/block)" ] || echo bad-$i
    done
    echo round-$i
done
exit 5
"""
"""Shell: write to two disks and read them again, until an echo device is there."""

COUNTED = ("packets_in", "packets_out", "doorbells")


def counters(status: dict[str, Any]) -> dict[str, int]:
    """What `vmbus status` has counted, by channel and name."""
    found = {f"{each['device']} {name}": each["io"][name] for each in status["channels"] for name in COUNTED}
    disk = next((each for each in status["channels"] if each["device"] == "scsi"), None)
    if disk is not None:
        unit = disk["details"]["units"]["0:0"]
        found |= {name: unit[name] for name in ("reads", "writes", "bytes_read", "bytes_written")}
    return found | {"traps": status["traps"], "messages": status["partition"]["counters"]["messages_posted"]}


def has_gone_on(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """The counters that are less than they were."""
    return [name for name, count in before.items() if after[name] < count]


def make_qcow2(path: Path, size: str) -> None:
    create = [*find_qemu().qemu_img(), "create", "-q", "-f", "qcow2", str(path), size]
    subprocess.run(create, check=True)


async def reload(folder: Path, name: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(await asked(folder, "reload", name, "--json", *words))
    return found


@pytest.mark.parametrize(
    ("kernel", "smp", "times"),
    [
        ("debian-6.12", 2, 4),
        full("debian-6.12", 1, 200),
        full("debian-6.1", 1, 20),
        full("debian-6.1", 2, 20),
        full("debian-backports", 2, 20),
    ],
)
async def test_a_guest_is_reloaded_again_and_again_while_it_works(
    tmp_path: Path, kernel: str, smp: int, times: int
) -> None:
    image, qcow2 = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    image.write_bytes(bytes(64 << 20))
    make_qcow2(qcow2, "64M")
    disks = ("--device", f"scsi,image={image}", "--device", f"scsi,image={qcow2},format=qcow2")
    fast = () if kernel == "debian-6.1" else ("--fast-boot",)  # it cannot be unpacked
    options = ("--guest", kernel, "--smp", str(smp), *fast, "--memory", "256M")
    options = (*options, "--device", "heartbeat,interval=0.05", *disks)
    async with emulators() as started:
        guest = Emulator.start(tmp_path, "run", "--name", "a", *options, "--", "sh", "-c", WRITE_AND_READ)
        started.append(guest)

        def rounds() -> int:
            return guest.output.count("round-")

        async def works() -> None:
            done = rounds()
            await until(lambda: rounds() >= done + 2, "two more rounds", guest, timeout=LIMIT)
            await guest.more_beats("a")

        await works()
        pids = [guest.process.pid]
        stood_still = []
        for _ in range(times):
            before = counters(await guest.status("a"))
            found = await reload(tmp_path, "a")
            pids.append(found["pid"])
            stood_still.append(found["still"])
            status = await guest.status("a")
            assert status["emulator"]["pid"] == found["pid"]
            assert has_gone_on(before, counters(status)) == []
            assert [each["state"] for each in status["channels"]] == ["open"] * len(status["channels"])
            await works()
        print(f"{times} reloads, median {statistics.median(stood_still) * 1000:.0f} ms")
        assert len(set(pids)) == len(pids)
        assert guest.process.poll() is None

        # The last one can do all that the first one could: a device is added, and the guest ends by itself.
        await asked(tmp_path, "device", "add", "a", "echo")
        status_of_command, errors = await guest.ended()
        assert status_of_command == 5, errors
        assert "bad-" not in guest.output
        assert not (tmp_path / "vmbus" / "a").exists()


TOY = """
from vmbus.errors import DeviceError
from vmbus_devices.echo import Echo


class Toy(Echo):
    \"\"\"A device that somebody writes.\"\"\"

    name = "toy"

    def status(self):
        return super().status() | {"edition": EDITION}

    def claim(self):
        if EDITION == 4:
            raise DeviceError("what it needs is taken")
"""


def write_device(folder: Path, edition: str) -> None:
    """Write the module of the device, as an editor does."""
    (folder / "new").write_text(TOY.replace("EDITION", edition))
    (folder / "new").rename(folder / "toy.py")


async def test_a_device_is_edited_under_its_guest_and_what_cannot_take_over_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    (source / "toy-1.0.dist-info").mkdir(parents=True)
    (source / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (source / "toy-1.0.dist-info" / "entry_points.txt").write_text("[vmbus.devices]\ntoy = toy:Toy\n")
    write_device(source, "1")
    monkeypatch.setenv("PYTHONPATH", str(source))
    not_one = tmp_path / "not-an-emulator"
    not_one.write_text("#!/bin/sh\nexit 3\n")
    not_one.chmod(0o700)

    async def edition(guest: Emulator) -> int:
        channels = (await guest.status("a")).get("channels", ())
        return next((each["details"]["edition"] for each in channels if each["device"] == "toy"), 0)

    async with emulators() as started:
        options = (
            "--fast-boot",
            "--memory",
            "256M",
            "--device",
            "heartbeat,interval=0.05",
            "--device",
            "toy",
        )
        guest = Emulator.start(tmp_path, "run", "--name", "a", *options)
        started.append(guest)
        await guest.more_beats("a")
        assert await edition(guest) == 1
        for emulator, why in ((not_one, "ended with status 3"), (tmp_path / "no", "not a program")):
            said = await asked(tmp_path, "reload", "a", "--emulator", str(emulator), status=1)
            assert why in said, said
            assert (await guest.status("a"))["emulator"]["pid"] == guest.process.pid
            await guest.more_beats("a")

        watch = Emulator.start(tmp_path, "reload", "a", "--watch", str(source))
        started.append(watch)
        await until(lambda: "watching 1 Python file" in watch.errors, "watching", watch, timeout=LIMIT)
        write_device(source, "2")
        await until(lambda: "is served by process" in watch.output, "a reload", watch, guest, timeout=LIMIT)
        assert await edition(guest) == 2
        first = (await guest.status("a"))["emulator"]["pid"]
        await guest.more_beats("a")
        # Half written: the worker goes on with the edition before.
        write_device(source, "undefined_name")
        write_device(source, "(")
        await until(lambda: "SyntaxError" in watch.errors, "a refusal", watch, guest, timeout=LIMIT)
        found = await guest.status("a")
        assert found["emulator"]["pid"] == first
        assert await edition(guest) == 2
        await guest.more_beats("a")
        write_device(source, "3")
        await until(lambda: watch.output.count("is served by") == 2, "a reload", watch, guest, timeout=LIMIT)
        assert await edition(guest) == 3
        await guest.more_beats("a")
        # Refused at the last moment, when the process that goes has given up what the next one needs.
        write_device(source, "4")
        await until(
            lambda: "what it needs is taken" in watch.errors, "a refusal", watch, guest, timeout=LIMIT
        )
        assert await edition(guest) == 3
        await guest.more_beats("a")
        # It can still move into a new QEMU, and be reloaded there.
        qemu = (await guest.status("a"))["qemu"]["pid"]
        for words in ((), ("--share-memory",)):
            assert "the guest stood still for" in await asked(tmp_path, "migrate", "a", *words)
            await guest.more_beats("a")
        assert (await guest.status("a"))["qemu"]["pid"] != qemu
        write_device(source, "5")
        await until(lambda: watch.output.count("is served by") == 3, "a reload", watch, guest, timeout=LIMIT)
        assert await edition(guest) == 5
        await guest.more_beats("a")
        await asked(tmp_path, "shutdown", "a")
        assert (await guest.ended())[0] == 0
        assert (await watch.ended())[0] == 0
        assert "not served any more" in watch.errors


async def test_a_guest_of_attach_is_reloaded(tmp_path: Path) -> None:
    async with own_qemu(tmp_path / "q", machine(tmp_path)) as qemu:
        first = qemu.attach()
        await qemu.attached()
        await reload(tmp_path, "q")  # its guest boots
        await first.more_beats("q", qemu)
        found = await reload(tmp_path, "q")
        await first.more_beats("q", qemu)
        assert (await first.status("q"))["emulator"]["pid"] == found["pid"]
        await qemu.qmp.execute("stop")
        before = await first.beats("q")
        await reload(tmp_path, "q")
        assert await qemu.status() == "paused"
        await qemu.qmp.execute("cont")
        await first.more_beats("q", qemu)
        assert await first.beats("q") > before
        said = await asked(tmp_path, "migrate", "q", status=1)
        assert "did not start this guest's QEMU" in said, said
        # The process that was started ends the service, whoever serves, and however new that one is.
        await reload(tmp_path, "q")
        first.process.terminate()
        status, errors = await first.ended()
        assert (status, "unexpectedly" in errors) == (0, False), errors
        assert await qemu.status() == "running"
