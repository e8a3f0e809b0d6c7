"""Snapshots of a real guest: saved while it runs, loaded again and again, and never half."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.drive import MigrationFailed, migrate
from vmbus.machine.migration.snapshots import SnapshotFailed
from vmbus.provision.qemu import find_qemu
from vmbus_devices.scsi.controller import Controller

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
        with pytest.raises(SnapshotFailed, match="behind the emulator's back"):
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
