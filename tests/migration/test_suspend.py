"""A guest that sleeps (ACPI S3): it wakes with all of its channels, here or where it was taken in its sleep."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.drive import arrived, migrate
from vmbus.machine.qemu.qmp import Qmp

from tests.guest.matrix import full
from tests.guest.waiting import while_alive
from tests.migration.journey import Journey
from tests.migration.load import LIMIT, Program, guest_resumed, under_load, went_well
from tests.migration.test_live import beats

pytestmark = pytest.mark.guest

SLEEPER = "(while read line; do echo mem >/sys/power/state; done </dev/ttyS1) &"


async def run_state(guest: Journey) -> str:
    return str((await guest.host.qmp.execute("query-status"))["status"])


def synics(guest: Journey) -> list[bool]:
    """Of each virtual processor, whether its SynIC is on."""
    return [vp["synic_enabled"] for vp in guest.here.status()["partition"]["vps"]]


async def falls_asleep(guest: Journey) -> None:
    """Tell the guest to sleep, and wait until it does."""
    monitor = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
    port = guest.here.guest.command
    assert port is not None
    port[1].write(b"sleep\n")
    async with while_alive("sleeping guest", guest.here):
        async for name, _ in monitor.events():
            if name == "SUSPEND":
                break
    await monitor.close()
    assert await run_state(guest) == "suspended"
    assert not any(synics(guest))


async def wakes(guest: Journey) -> None:
    answered = beats(guest)
    assert not any(synics(guest))
    await guest.host.qmp.execute("system_wakeup")
    await guest.here.until(lambda: beats(guest) > answered, "heartbeats of a guest that woke up")
    await guest_resumed(guest)
    assert await run_state(guest) == "running"
    assert all(synics(guest))


@pytest.mark.parametrize("smp", [full(1), 2])
async def test_a_sleeping_guest_is_moved_and_wakes_there(
    tmp_path: Path, guest_program: Program, smp: int
) -> None:
    # On q35, QEMU 11.1 lets a Linux guest sleep only once, with or without this emulator.
    pc = ("-machine", "pc")
    # QEMU loads a kernel that is not compressed anew when the guest wakes, over the one that slept.
    async with under_load(
        tmp_path, guest_program, smp=smp, side_channel=SLEEPER, image=True, extra=pc, compressed=True
    ) as guest:
        # It is not moved.
        await falls_asleep(guest)
        await wakes(guest)

        # It sleeps all the way.
        await falls_asleep(guest)
        went_well(await guest.move())
        assert await run_state(guest) == "suspended"
        await wakes(guest)

        # It sleeps, and is stopped besides.
        await falls_asleep(guest)
        await guest.host.qmp.execute("stop")
        there = await guest.target()
        went_well(await migrate(guest.host.migration, guest.uri(there), timeout=LIMIT))
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        assert await run_state(guest) == "paused"
        await guest.host.qmp.execute("cont")
        assert await run_state(guest) == "suspended"
        await wakes(guest)

        # In a snapshot, too.
        await falls_asleep(guest)
        await snapshots.save(guest.host.migration, "asleep")
        assert await run_state(guest) == "suspended"
        await wakes(guest)
        await snapshots.load(guest.host.migration, "asleep")
        await wakes(guest)
