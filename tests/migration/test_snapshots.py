"""Snapshots of a real guest: saved while it runs, loaded again and again, and never half."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
from pathlib import Path

import pytest
from vmbus.errors import DeviceError
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.drive import MigrationFailed, migrate
from vmbus.machine.migration.snapshot_disks import NotBegun
from vmbus.machine.migration.snapshots import SnapshotFailed
from vmbus.provision.qemu import find_qemu
from vmbus_devices.scsi.controller import Controller

from tests.guest.harness import LOADED_MODULES, STORAGE_MODULES
from tests.guest.test_boot import complaints
from tests.guest.waiting import LIMIT
from tests.migration.journey import Journey, journey
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest

COUNT = ["i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"]


def numbers(guest: Journey) -> list[int]:
    return [int(line) for line in guest.here.output.splitlines(True)[:-1] if line.strip().isdigit()]


async def count_on(guest: Journey, count: int) -> list[int]:
    wanted = len(numbers(guest)) + count
    await guest.here.until(lambda: len(numbers(guest)) >= wanted, f"{count} more numbers")
    return numbers(guest)


def since_it_jumped(found: list[int]) -> list[int]:
    """The last of ``found``, each one more than the one before."""
    jumps = [at for at in range(1, len(found)) if found[at] != found[at - 1] + 1]
    return found[jumps[-1] if jumps else 0 :]


async def test_a_guest_goes_back_to_a_snapshot_as_often_as_asked(tmp_path: Path) -> None:
    async with journey(tmp_path, command=COUNT, snapshots=True) as guest:
        host = guest.host
        await more_beats(guest)
        before_save = (await count_on(guest, 5))[-1]
        report = await snapshots.save(host.migration, "first")
        assert report.state_bytes > 0
        after_save = (await count_on(guest, 1))[-1]
        await more_beats(guest)
        await count_on(guest, 20)
        sequence = guest.device("heartbeat").status()["sequence"]
        for _ in range(2):
            before = len(numbers(guest))
            await snapshots.load(host.migration, "first")
            assert guest.device("heartbeat").status()["sequence"] < sequence
            # It counts on from where it was saved; a line that was under way then may come in two halves.
            later = since_it_jumped((await count_on(guest, 20))[before:])
            assert before_save <= later[0] <= after_save + 3
            assert len(later) > 10
            await more_beats(guest, 10)
        await snapshots.save(host.migration, "second")
        await more_beats(guest)
        assert [each.tag for each in await snapshots.listed(host.migration)] == ["first", "second"]
        with pytest.raises(SnapshotFailed, match="already"):
            await snapshots.save(host.migration, "second")
        await snapshots.delete(host.migration, "first")
        with pytest.raises(SnapshotFailed, match="no snapshot first"):
            await snapshots.load(host.migration, "first")
        await more_beats(guest)
        await snapshots.load(host.migration, "second")
        await more_beats(guest)
        await count_on(guest, 10)
        assert guest.device("heartbeat").status()["odd_answers"] == 0
        found = guest.here.status()
        assert found["bus"]["refusals"] == {}
        assert all(channel["refusals"] == {} for channel in found["channels"])
        assert complaints(guest.here.console()) == []

        # QEMU keeps the error of a migration that failed, and would take it for one of the load.
        with pytest.raises(MigrationFailed, match="continues here"):
            await migrate(host.migration, f"unix:{tmp_path}/nobody", timeout=LIMIT)
        await more_beats(guest)
        await snapshots.load(host.migration, "second")
        await more_beats(guest)
        assert [each.tag for each in await snapshots.listed(host.migration)] == ["second"]

        # Behind the emulator's back: what QEMU saves then cannot be loaded, and says why.
        await host.qmp.monitor("savevm behind")
        await more_beats(guest)
        with pytest.raises(SnapshotFailed, match="without the emulator"):
            await snapshots.load(host.migration, "behind")
        await snapshots.load(host.migration, "second")
        await host.qmp.execute("cont")
        await more_beats(guest)


async def test_a_snapshot_that_cannot_be_loaded_costs_nothing(tmp_path: Path) -> None:
    """Looked at first: is it in every image, is it the one that is meant, and does its state fit?"""
    disk = "scsi,format=memory,size=8M"
    async with journey(tmp_path, snapshots=True, devices=("heartbeat,interval=0.05", disk)) as guest:
        coordinator, qmp = guest.host.migration, guest.host.qmp
        await more_beats(guest)
        for number in ("7", "2", ""):
            with pytest.raises(SnapshotFailed, match="letter"):
                await snapshots.save(coordinator, number)
        await qmp.monitor("savevm 2")
        await more_beats(guest)
        await snapshots.save(coordinator, "good", without_disks=True)  # its id is 2
        outside = r"scsi/0:0 \(scsi,format=memory,size=8M.*--without-disks"
        with pytest.raises(SnapshotFailed, match=outside):
            await snapshots.save(coordinator, "other")
        with pytest.raises(SnapshotFailed, match=outside):
            await snapshots.load(coordinator, "good")

        controller = guest.device("scsi")
        assert isinstance(controller, Controller)
        unit = controller.units.pop((0, 0))
        second = tmp_path / "second.qcow2"
        create = [*find_qemu().qemu_img(), "create", "-q", "-f", "qcow2", str(second), "64K"]
        await asyncio.to_thread(subprocess.run, create, check=True)
        reasons = {"good": "missing here", "2": "id of snapshot good"}
        for tag, reason in reasons.items():
            with pytest.raises(SnapshotFailed, match=reason):
                await snapshots.load(coordinator, tag, without_disks=True)
            assert (await qmp.execute("query-status"))["running"], tag
        controller.units[0, 0] = unit
        descriptor = os.open(second, os.O_RDWR)
        file = {"driver": "file", "filename": f"/dev/fdset/{await qmp.lend([descriptor])}"}
        os.close(descriptor)
        await qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "second", "file": file})
        with pytest.raises(SnapshotFailed, match="added since"):
            await snapshots.load(coordinator, "good", without_disks=True)
        assert (await qmp.execute("query-status"))["running"]
        await more_beats(guest)
        await qmp.execute("blockdev-del", {"node-name": "second"})

        # A guest that is stopped is loaded as often as asked, and runs then.
        await qmp.execute("stop")
        for _ in range(2):
            await snapshots.load(coordinator, "good", without_disks=True)
            assert not (await qmp.execute("query-status"))["running"]
        await qmp.execute("cont")
        await more_beats(guest)


def went_back(found: list[int]) -> bool:
    return any(later <= earlier for earlier, later in itertools.pairwise(found))


ON_DISK = """
until [ -b /dev/sda ]; do usleep 100000; done
i=0
while :; do
  found=$(dd if=/dev/sda bs=512 count=1 iflag=direct 2>/dev/null | tr -d ' ')
  [ "${found:-0}" -eq "$i" ] || { echo "failed: the disk has $found, memory $i"; exit 1; }
  i=$((i+1))
  printf '%-512s' $i > /tmp/block
  dd if=/tmp/block of=/dev/sda bs=512 oflag=direct 2>/dev/null || { echo "failed: write $i"; exit 1; }
  [ $((i % 10)) -ne 0 ] || sync
  echo $i
done
"""
"""Writes a number after the other, flushes every tenth, and compares each with what the disk has."""


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_the_disk_goes_back_with_the_guest(tmp_path: Path, format: str) -> None:
    """Memory and disk are those of one moment, whatever was flushed then, and there is no half of a snapshot."""
    image, copies = tmp_path / "disk.img", tmp_path / "copies"
    create = [*find_qemu().qemu_img(), "create", "-q", "-f", format, str(image), "8M"]
    await asyncio.to_thread(subprocess.run, create, check=True)
    copies.mkdir()
    more = f",copies={copies}" if format == "raw" else ""
    async with journey(
        tmp_path,
        command=[ON_DISK],
        snapshots=True,
        devices=("shutdown", f"scsi,image={image},format={format},cache=writeback{more}"),
        load=(*LOADED_MODULES, *STORAGE_MODULES),
    ) as guest:
        coordinator, qmp = guest.host.migration, guest.host.qmp
        controller = guest.device("scsi")
        assert isinstance(controller, Controller)
        [disk] = controller.snapshot_disks().values()

        async def goes_on() -> list[int]:
            found = await count_on(guest, 5)
            assert b"failed" not in guest.here.output, guest.here.output
            return found

        async def came_back(seen: int) -> None:
            """Lines of before the load may still come."""
            await guest.here.until(
                lambda: went_back(numbers(guest)[seen - 1 :]) or b"failed" in guest.here.output,
                "a number that is lower than the one before",
            )

        before = (await goes_on())[-1]
        await snapshots.save(coordinator, "ten")
        assert [each.disks for each in await snapshots.listed(coordinator)] == [("scsi/0:0",)]
        for _ in range(2):
            await count_on(guest, 10)
            seen = len(numbers(guest))
            await snapshots.load(coordinator, "ten")
            await came_back(seen)
            since = since_it_jumped((await goes_on())[seen:])
            assert before <= since[0] <= before + 10
            assert len(since) >= 5
        [kept] = disk.snapshots()

        # A disk that cannot be saved leaves no snapshot at all, and the guest runs.
        disk_class = type(disk)
        work = disk_class.save_snapshot
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(disk_class, "save_snapshot", failing)
            with pytest.raises(SnapshotFailed, match="scsi/0:0 cannot be saved: no space; nothing was saved"):
                await snapshots.save(coordinator, "half")
        assert disk_class.save_snapshot is work
        assert [each.tag for each in await snapshots.listed(coordinator)] == ["ten"]
        assert list(disk.snapshots()) == [kept]
        await goes_on()

        # QEMU does not load: the disk has what it had, and so has the guest's memory.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshots, "_job", not_begun)
            with pytest.raises(SnapshotFailed, match="QEMU is busy; nothing was changed"):
                await snapshots.load(coordinator, "ten")
        assert list(disk.snapshots()) == [kept]
        await goes_on()

        # Its part is gone: refused before anything changes.
        await asyncio.to_thread(disk.delete_snapshot, kept.name)
        with pytest.raises(SnapshotFailed, match="snapshot ten does not hold the disk scsi/0:0"):
            await snapshots.load(coordinator, "ten")
        assert (await qmp.execute("query-status"))["running"]
        await goes_on()
        await snapshots.delete(coordinator, "ten")

        await snapshots.save(coordinator, "more")
        assert len(disk.snapshots()) == 1
        await snapshots.delete(coordinator, "more")
        assert (await snapshots.listed(coordinator), list(disk.snapshots())) == ([], [])
        await goes_on()
        assert complaints(guest.here.console()) == []


def failing(disk: object, name: str) -> None:
    raise DeviceError("no space")


async def not_begun(coordinator: object, command: str, *arguments: object) -> None:
    raise NotBegun("QEMU is busy")
