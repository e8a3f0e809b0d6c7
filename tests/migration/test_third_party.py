"""Another program drives QEMU: the emulator follows, or reports why it cannot."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from vmbus.machine.migration.drive import MigrationFailed, arrived, migrate
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.state_machine import Phase, Switchover
from vmbus.machine.qemu.qmp import Qmp

from tests.guest.waiting import while_alive
from tests.migration.journey import journey
from tests.migration.load import LIMIT, Program, guest_resumed, put, swallow, under_load, went_well
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest


async def test_a_migration_that_another_program_drives_is_followed(tmp_path: Path) -> None:
    async with journey(tmp_path) as guest:
        await more_beats(guest)
        other = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
        coordinator = guest.host.migration

        # Post-copy and COLO cannot work: they are cancelled at once, with the reason in the log.
        for capability, way_back in (("postcopy-ram", False), ("x-colo", True)):
            there = await guest.target()
            await _set(other, "return-path", way_back)
            await _set(other, capability, True)
            coordinator.report = Report()
            await other.execute("migrate", {"uri": guest.uri(there)})
            await guest.here.migration(
                lambda: coordinator.report.statuses[-1:] in (["cancelled"], ["failed"]),
                "end of the migration",
            )
            await guest.here.until(
                lambda: coordinator.report.refusal.startswith(f"{capability}: "),
                "reason",
            )
            with pytest.raises(MigrationFailed):
                await arrived(there.host.migration, LIMIT)
            await _set(other, capability, False)
            await more_beats(guest)
            await guest.leave(there)

        # Without the pause nothing is made ready: the target refuses, the guest goes on.
        there = await guest.target()
        await _set(other, "pause-before-switchover", False)
        await _set(other, "return-path", True)
        coordinator.report = Report()
        await other.execute("migrate", {"uri": guest.uri(there)})
        await guest.here.migration(lambda: "failed" in coordinator.report.statuses, "status failed")
        assert "without the emulator" in there.host.migration.load_refused
        await _set(other, "pause-before-switchover", True)
        await more_beats(guest)
        await guest.leave(there)

        # With it, and with that program's own migrate-continue.
        there = await guest.target()
        coordinator.switchover = Switchover.OBSERVE
        await other.execute("migrate", {"uri": guest.uri(there)})
        await guest.here.migration(lambda: coordinator.phase is Phase.READY, "phase ready", there)
        await guest.here.until(lambda: coordinator.report.prepared_in, "state made ready", there)
        await other.execute("migrate-continue", {"state": "pre-switchover"})
        await guest.here.migration(lambda: coordinator.phase is Phase.LEFT, "phase left", there)
        await arrived(there.host.migration, LIMIT)
        await other.close()
        await guest.settle_at(there)
        await more_beats(guest, 10)
        assert guest.device("heartbeat").status()["odd_answers"] == 0


async def test_a_driver_that_does_not_wait_for_the_emulator_cannot_lose_the_guest(
    tmp_path: Path, guest_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        other = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
        coordinator = guest.host.migration
        coordinator.switchover = Switchover.OBSERVE
        settle = guest.host.workers.settle
        done = asyncio.Event()

        async def late(limit: float) -> bool:
            await done.wait()
            return await settle(limit)

        for way_back in (True, False):
            monkeypatch.setattr(guest.host.workers, "settle", late)  # a device has much to do
            done.clear()
            there = await guest.target()
            await _set(other, "return-path", way_back)
            waiting = asyncio.ensure_future(coordinator.until_ready(LIMIT))
            await other.execute("migrate", {"uri": guest.uri(there)})
            await guest.here.migration(
                lambda: coordinator.report.statuses[-1:] == ["pre-switchover"], "status pre-switchover", there
            )
            assert not coordinator.ready
            await other.execute("migrate-continue", {"state": "pre-switchover"})
            assert not await waiting
            # Without a way back QEMU takes it for completed.
            assert coordinator.report.statuses[-1] == ("failed" if way_back else "completed")
            done.set()
            monkeypatch.undo()
            await guest.here.migration(lambda: coordinator.phase is Phase.IDLE, "phase idle")
            await guest_resumed(guest)
            assert "without the emulator" in there.host.migration.load_refused
            await guest.leave(there)

        there = await guest.target()
        waiting = asyncio.ensure_future(coordinator.until_ready(LIMIT))
        await other.execute("migrate", {"uri": guest.uri(there)})
        assert await waiting
        await other.execute("migrate-continue", {"state": "pre-switchover"})
        await arrived(there.host.migration, LIMIT)
        await other.close()
        await guest.settle_at(there)
        await guest_resumed(guest)


FILLING = "echo started; while echo_client --fill 300; do :; done; echo failed"


async def test_cancelled_in_the_pause_while_a_device_writes_guest_memory(
    tmp_path: Path, guest_program: Program
) -> None:
    """The guest checks every byte of its pages; they have no byte that is only the host's."""
    async with under_load(tmp_path, guest_program, echoing=FILLING) as guest:
        other = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
        coordinator = guest.host.migration
        coordinator.switchover = Switchover.OBSERVE
        await put(guest.host, {"return-path": False})
        carried = []
        sink = tmp_path / "sink"
        async with await asyncio.start_unix_server(swallow, str(sink)):
            for turns in range(0, 30, 6):  # of this loop, in which the emulator makes its state
                before = coordinator.report
                await other.execute("migrate", {"uri": f"unix:{sink}"})
                async with while_alive("status pre-switchover", guest.here):
                    async for name, data in other.events():
                        if (name, data.get("status")) == ("MIGRATION", "pre-switchover"):
                            break
                for _ in range(turns):
                    await asyncio.sleep(0)
                await other.execute("migrate_cancel")
                await guest.here.migration(
                    lambda: (
                        coordinator.report is not before
                        and coordinator.report.statuses[-1:] == ["cancelled"]
                        and coordinator.phase is Phase.IDLE
                    ),
                    "cancelled migration",
                )
                carried.append(coordinator.report.pages_carried)
        await other.close()
        coordinator.switchover = Switchover.OWN
        await guest_resumed(guest)
        outcome = await guest.move()
        went_well(outcome)
        await guest_resumed(guest)
        assert outcome.report.as_dict()["pages_carried"] > 0
        assert any(carried), carried


@pytest.mark.full  # one of the mixed steps of test_soak.py
async def test_a_guest_that_was_stopped_before_is_stopped_after(tmp_path: Path) -> None:
    async with journey(tmp_path) as guest:
        await more_beats(guest)
        await guest.host.qmp.execute("stop")
        before = guest.host
        there = await guest.target(devices=("shutdown",))
        with pytest.raises(MigrationFailed, match="continues here"):  # once QEMU has asked for the state
            await migrate(before.migration, guest.uri(there), timeout=LIMIT)
        assert "not-there" in there.host.migration.load_refused
        assert before.migration.phase is Phase.IDLE
        await guest.leave(there)
        there = await guest.target()
        await before.qmp.execute("migrate", {"uri": guest.uri(there)})
        await guest.here.migration(lambda: before.migration.phase is Phase.LEFT, "phase left", there)
        await arrived(there.host.migration, LIMIT)
        await guest.settle_at(there)
        assert guest.host.migration.phase is Phase.IDLE
        assert (await guest.host.qmp.execute("query-status"))["status"] == "paused"
        await guest.move()  # a second time, as stopped as before
        assert (await guest.host.qmp.execute("query-status"))["status"] == "paused"
        answered = guest.device("heartbeat").status()["answers"]
        await guest.host.qmp.execute("cont")
        await more_beats(guest, 10)
        assert guest.device("heartbeat").status()["answers"] > answered


async def test_a_guest_that_its_user_stops_while_it_migrates_stays_stopped(tmp_path: Path) -> None:
    async with journey(tmp_path) as guest:
        await more_beats(guest)
        coordinator, qmp = guest.host.migration, guest.host.qmp
        coordinator.switchover = Switchover.OBSERVE
        there = await guest.target()
        await _set(qmp, "return-path", True)
        await qmp.execute("migrate-set-parameters", {"max-bandwidth": 4 << 20})
        waiting = asyncio.ensure_future(
            coordinator.until(lambda: coordinator.report.status == "active", LIMIT)
        )
        await qmp.execute("migrate", {"uri": guest.uri(there)})
        await waiting
        await qmp.execute("stop")
        await qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        await guest.here.migration(lambda: coordinator.ready, "prepared state", there)
        await qmp.execute("migrate_cancel")
        await guest.here.migration(lambda: coordinator.phase is Phase.IDLE, "phase idle", there)
        assert not (await qmp.execute("query-status"))["running"]
        await guest.leave(there)
        await qmp.execute("cont")
        await more_beats(guest)


async def _set(qmp: Qmp, capability: str, state: bool) -> None:
    await qmp.execute(
        "migrate-set-capabilities", {"capabilities": [{"capability": capability, "state": state}]}
    )
