"""Guest memory that is not copied (x-ignore-shared, CPR): the same guest goes on in it, or none does."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from vmbus.errors import QemuError
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.drive import MigrationFailed, arrived, migrate, receive
from vmbus.machine.migration.snapshots import SnapshotFailed
from vmbus.machine.qemu.qmp import Qmp

from tests.guest.harness import Booted
from tests.guest.matrix import full
from tests.migration.journey import Journey
from tests.migration.load import LIMIT, Program, guest_resumed, place, put, tcp_uri, under_load, went_well

pytestmark = pytest.mark.guest

SHARED = {"x-ignore-shared": True}
LEAST = 4 << 20
"""Bytes that go where memory does not: firmware, video memory, devices."""

AUX_SHARED = ("-machine", "aux-ram-share=on")


async def arrives(guest: Journey, there: Booted) -> None:
    await arrived(there.host.migration, timeout=LIMIT)
    await guest.settle_at(there)
    await guest_resumed(guest)


@pytest.mark.parametrize("moves", [1, full(2)])
async def test_a_handover_on_one_host_copies_no_memory(
    tmp_path: Path, guest_program: Program, moves: int
) -> None:
    async with under_load(tmp_path, guest_program, image=True) as guest:
        # A place with a memory file of its own has no guest in it: refused there, and the guest goes on.
        there = await place(guest, SHARED)
        with pytest.raises(MigrationFailed, match="continues here"):
            await migrate(guest.host.migration, await tcp_uri(there), timeout=LIMIT)
        assert "in another file" in there.host.migration.load_refused
        await guest_resumed(guest)
        await guest.leave(there)

        for _ in range(moves):
            there = await place(guest, SHARED, memory_of=guest.here)
            outcome = await migrate(guest.host.migration, await tcp_uri(there), timeout=LIMIT)
            went_well(outcome)
            assert outcome.memory_bytes < LEAST
            # Not one instruction runs here any more: the memory is the target's.
            left = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
            with pytest.raises(QemuError, match="lock"):
                await left.cont()
            assert not (await left.execute("query-status"))["running"]
            await left.close()
            await arrives(guest, there)

        # What holds for migrations holds for snapshots too, which would have no memory.
        with pytest.raises(SnapshotFailed, match="x-ignore-shared"):
            await snapshots.save(guest.host.migration, "empty")
        assert await snapshots.listed(guest.host.migration) == []
        await guest_resumed(guest)
        await put(guest.host, {"x-ignore-shared": False})
        outcome = await guest.move()
        went_well(outcome)
        assert outcome.memory_bytes > LEAST
        await guest_resumed(guest)


async def test_a_target_that_fails_has_not_touched_the_memory_it_shares(
    tmp_path: Path, guest_program: Program
) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        for _ in range(2):
            there = await guest.begin(
                replace(guest.options, incoming=True), devices=("shutdown",), memory_of=guest.here
            )
            for station in (guest.here, there):
                await put(station.host, SHARED)
            with pytest.raises(MigrationFailed, match="continues here"):
                await migrate(guest.host.migration, await tcp_uri(there), timeout=LIMIT)
            assert "not-there" in there.host.migration.load_refused
            await guest_resumed(guest)
            await guest.leave(there)
        there = await place(guest, SHARED, memory_of=guest.here)
        went_well(await migrate(guest.host.migration, await tcp_uri(there), timeout=LIMIT))
        await arrives(guest, there)


@pytest.mark.full
async def test_cpr_reboot_with_memory_in_the_file_and_beside_it(
    tmp_path: Path, guest_program: Program
) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        reboot = {"mode": "cpr-reboot"}
        uri = f"file:{tmp_path}/guest"
        await put(guest.host, {}, reboot)
        outcome = await migrate(guest.host.migration, uri, timeout=LIMIT)
        went_well(outcome)
        assert outcome.memory_bytes > LEAST
        there = await place(guest, {}, reboot)
        await receive(there.host.migration, uri)
        await arrives(guest, there)

        await put(guest.host, SHARED)
        outcome = await migrate(guest.host.migration, uri, timeout=LIMIT)
        went_well(outcome)
        assert outcome.memory_bytes < LEAST

        # The guest goes on where it was: its memory is then newer than the file.
        await guest.host.qmp.execute("cont")
        await guest_resumed(guest)
        there = await place(guest, SHARED, reboot, memory_of=guest.here)
        await guest.host.qmp.execute("stop")
        await receive(there.host.migration, uri)
        with pytest.raises(MigrationFailed, match="not as the guest left it"):
            await arrived(there.host.migration, timeout=LIMIT)
        await guest.leave(there)
        await guest.host.qmp.execute("cont")
        await guest_resumed(guest)

        went_well(await migrate(guest.host.migration, uri, timeout=LIMIT))
        there = await place(guest, SHARED, reboot, memory_of=guest.here)
        await receive(there.host.migration, uri)
        await arrives(guest, there)


def cpr_place(guest: Journey, channel: Path) -> asyncio.Task[Booted]:
    """Start a target that takes over descriptors first: it answers nothing before they have come."""
    address = {"transport": "socket", "type": "unix", "path": str(channel)}
    incoming = ("-incoming", json.dumps({"channel-type": "cpr", "addr": address}))
    options = replace(guest.options, incoming=True, extra=(*AUX_SHARED, *incoming))
    return asyncio.ensure_future(guest.begin(options, memory_of=guest.here))


@pytest.mark.parametrize("moves", [1, full(2)])
async def test_cpr_transfer(tmp_path: Path, guest_program: Program, moves: int) -> None:
    async with under_load(tmp_path, guest_program, extra=AUX_SHARED) as guest:
        for number in range(moves):
            channel, main = tmp_path / f"cpr{number}", tmp_path / f"main{number}"
            coming = cpr_place(guest, channel)
            await guest.here.until(channel.exists, "channel for descriptors")
            moving = asyncio.ensure_future(
                migrate(guest.host.migration, f"unix:{main}", cpr=f"unix:{channel}", timeout=LIMIT)
            )
            there = await coming
            await receive(there.host.migration, f"unix:{main}")
            outcome = await moving
            went_well(outcome)
            assert outcome.memory_bytes < 1 << 20
            await arrives(guest, there)


async def test_cpr_exec_is_refused(tmp_path: Path, guest_program: Program) -> None:
    async with under_load(tmp_path, guest_program, extra=AUX_SHARED) as guest:
        await put(guest.host, {}, {"mode": "cpr-exec", "cpr-exec-command": ["false"]})
        with pytest.raises(MigrationFailed, match="cpr-exec: QEMU would be replaced by another program"):
            await migrate(guest.host.migration, f"file:{tmp_path}/guest", timeout=LIMIT)
        await guest_resumed(guest)
        await put(guest.host, {}, {"mode": "normal"})
        went_well(await guest.move())
        await guest_resumed(guest)
