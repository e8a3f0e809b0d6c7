"""Live migrations of a real guest under load: nothing is lost, nothing comes twice, and a failure costs nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from vmbus.errors import DeviceError
from vmbus.machine.migration.drive import MigrationFailed, Outcome, arrived, migrate
from vmbus.machine.migration.state_machine import Phase, Switchover
from vmbus_devices.heartbeat import Heartbeat

from tests.guest.harness import Booted
from tests.guest.waiting import LIMIT
from tests.migration.journey import Journey, journey

pytestmark = pytest.mark.guest


def beats(guest: Journey) -> int:
    return int(guest.device("heartbeat").status()["answers"])


async def more_beats(guest: Journey, count: int = 5) -> None:
    await guest.here.more_beats(count)


class Unsavable(Heartbeat):
    """Cannot be saved while ``reason`` is set."""

    reason = ""
    size = 0

    def save(self) -> bytes:
        if self.reason:
            raise DeviceError(self.reason)
        return super().save() + bytes(self.size)


async def under_way(guest: Journey, there: Booted) -> asyncio.Task[Outcome]:
    """A migration that has begun to send memory."""
    coordinator = guest.host.migration
    before = coordinator.report
    moving = asyncio.ensure_future(migrate(guest.host.migration, guest.uri(there), timeout=LIMIT))
    await guest.here.migration(
        lambda: coordinator.report is not before and coordinator.report.statuses[-1:] == ["active"],
        "status active",
        there,
    )
    return moving


async def test_a_guest_that_cannot_leave_goes_on_and_can_leave_later(tmp_path: Path) -> None:
    async with journey(tmp_path, devices=("heartbeat,interval=0.05", "shutdown")) as guest:
        host = guest.host
        device = guest.device("heartbeat")
        device.__class__ = Unsavable
        assert isinstance(device, Unsavable)
        await more_beats(guest)

        # There is no listener.
        with pytest.raises(MigrationFailed, match="continues here"):
            await migrate(host.migration, f"unix:{tmp_path}/nobody.sock", timeout=LIMIT)
        await more_beats(guest)

        # A device that cannot be saved: the reason comes out, the guest stays.
        there = await guest.target()
        device.reason = "a disk in the middle of something"
        with pytest.raises(MigrationFailed, match="in the middle of something"):
            await migrate(host.migration, guest.uri(there), timeout=LIMIT)
        device.reason = ""
        await more_beats(guest)
        with pytest.raises(MigrationFailed):
            await arrived(there.host.migration, timeout=LIMIT)
        await guest.leave(there)

        # More state than QEMU's carrier takes.
        there = await guest.target()
        device.size = 2 << 20
        with pytest.raises(MigrationFailed, match="too-large"):
            await migrate(host.migration, guest.uri(there), timeout=LIMIT)
        device.size = 0
        await more_beats(guest)
        await guest.leave(there)

        # The target has another set of devices: its Load() says so, the source hears of it.
        there = await guest.target(devices=("shutdown",))
        with pytest.raises(MigrationFailed, match="continues here"):
            await migrate(host.migration, guest.uri(there), timeout=LIMIT)
        assert "not-there" in there.host.migration.load_refused
        await more_beats(guest)
        await guest.leave(there)

        # The target dies while the guest is on its way.
        there = await guest.target()
        await host.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        moving = await under_way(guest, there)
        there.guest.process.process.kill()
        with pytest.raises(MigrationFailed, match="continues here"):
            await moving
        await more_beats(guest)
        await guest.leave(there)

        # Cancelled while memory is sent.
        there = await guest.target()
        moving = await under_way(guest, there)
        await host.qmp.execute("migrate_cancel")
        with pytest.raises(MigrationFailed, match="continues here"):
            await moving
        assert host.migration.report.statuses[-1] == "cancelled"
        await host.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        await more_beats(guest)
        await guest.leave(there)

        # Cancelled at the last moment: the state is made, the guest stands.
        there = await guest.target()
        host.migration.switchover = Switchover.OBSERVE
        moving = asyncio.ensure_future(migrate(host.migration, guest.uri(there), timeout=LIMIT))
        await guest.here.migration(lambda: host.migration.phase is Phase.READY, "phase ready", there)
        answered = beats(guest)
        await asyncio.sleep(0.2)  # a guest that stands does not answer, and a paused host does not ask
        assert beats(guest) == answered
        await host.qmp.execute("migrate_cancel")
        with pytest.raises(MigrationFailed, match="continues here"):
            await moving
        host.migration.switchover = Switchover.OWN
        await more_beats(guest)
        await guest.leave(there)

        # And after all that it leaves.
        await guest.move()
        await more_beats(guest, 20)
        assert guest.device("heartbeat").status()["odd_answers"] == 0
        assert guest.here.channel("heartbeat")["refusals"] == {}

        # A target without one of its devices may take it: the guest gives this channel up, and nothing else.
        there = await guest.target(devices=("heartbeat,interval=0.05",))
        there.host.migration.allow_missing_devices = True
        await guest.move(there)
        await guest.here.until(lambda: len(guest.host.bus.channels) == 1, "release of the channel")
        assert "shutdown" in guest.host.problems.sentences[0]
        await more_beats(guest, 20)
