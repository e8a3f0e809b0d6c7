"""An emulator or a QEMU dies at each moment of a migration: the guest lives on one side, never on both.

What the guest has set up is known to its emulator alone until the state is out. So an emulator that dies before that
costs the guest its devices, as it does without a migration; it stays where it is, held, and can be reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from vmbus.errors import UserError
from vmbus.machine.host import Host
from vmbus.machine.migration.drive import MigrationFailed, arrived, migrate, receive
from vmbus.machine.migration.state_machine import Phase, Switchover
from vmbus.machine.qemu.launch import GuestOptions

from tests.guest.emulator import LIMIT, Emulator
from tests.guest.harness import Booted
from tests.guest.matrix import full
from tests.guest.waiting import reporting, until
from tests.migration.journey import Journey, journey, machine
from tests.migration.own_qemu import OwnQemu, own_qemu, travellers
from tests.migration.test_live import beats, more_beats

pytestmark = pytest.mark.guest

BEFORE = ("setup", "active", "pre-switchover", "ready", "saving")
AFTER = ("saved", "completed")
ORDINARY = ("ready", "saved")
"""Those of them that `make test` tries."""


@contextlib.asynccontextmanager
async def listening(folder: Path, options: GuestOptions) -> AsyncIterator[Booted]:
    """A target with an emulator in this process, whose QEMU may make the socket in ``folder``."""
    options = replace(options, reachable=(folder,))
    places = Journey(folder, options, 256 << 20, ("heartbeat,interval=0.05", "shutdown", "timesync"), None)
    try:
        there = await places.begin(options)
        await receive(there.host.migration, f"unix:{folder}/migration.sock")
        with reporting(places.sides):
            yield there
    finally:
        await places.close()


@pytest.mark.parametrize("moment", [each if each in ORDINARY else full(each) for each in (*BEFORE, *AFTER)])
async def test_the_source_loses_its_emulator(tmp_path: Path, moment: str) -> None:
    here, incoming = travellers(machine(tmp_path))
    async with own_qemu(tmp_path / "a", here) as source, listening(tmp_path, incoming) as there:
        emulator = source.attach(dies=moment)
        await source.attached()
        await emulator.more_beats("a")
        await source.send(f"unix:{tmp_path}/migration.sock")
        await emulator.killed()
        if moment in AFTER:
            await it_has_left(source, there)
        else:
            await it_has_stayed(source, there, moment)


async def it_has_left(source: OwnQemu, there: Booted) -> None:
    await arrived(there.host.migration, LIMIT)
    answers = there.device("heartbeat").status()["answers"]
    there.start_following()
    await there.until(
        lambda: there.device("heartbeat").status()["answers"] > answers + 3, "heartbeats", source
    )
    assert there.device("heartbeat").status()["odd_answers"] == 0
    await there.stop_following()
    assert await source.status() == "postmigrate"
    for words in ((), ("--reset",)):
        status, said = await source.attach(*words).ended()
        assert status == 1
        assert "has left" in said
    assert await source.status() == "postmigrate"


async def it_has_stayed(source: OwnQemu, there: Booted, moment: str) -> None:
    # QEMU may wait for ever: the next emulator ends the migration, and does not touch the guest.
    await source.migration("failed" if moment == "saving" else "pre-switchover")
    assert there.host.migration.phase is Phase.INCOMING
    status, said = await source.attach().ended()
    assert status == 1
    assert "known only to the emulator" in said
    assert ("pre-switchover" in said) == (moment != "saving")
    assert await source.status() == "running"
    with pytest.raises(MigrationFailed):
        await arrived(there.host.migration, LIMIT)
    assert (await there.host.qmp.execute("query-status"))["status"] != "running"
    if moment == "ready":  # one is enough: it boots
        successor = source.attach("--reset")
        await source.attached()
        await successor.more_beats("a")


async def test_the_target_loses_its_emulator(tmp_path: Path) -> None:
    async with journey(tmp_path, devices=("heartbeat,interval=0.05", "shutdown", "timesync")) as guest:
        await more_beats(guest)
        _, incoming = travellers(guest.options)
        host = guest.host
        for moment in ("setup", "active", "loading"):
            async with own_qemu(tmp_path / moment, incoming) as there:
                uri = f"unix:{tmp_path}/{moment}.sock"
                emulator = there.attach(dies=moment)
                await there.attached()
                await there.receive(uri)
                with pytest.raises(MigrationFailed, match="continues here"):
                    await migrate(host.migration, uri, timeout=LIMIT)
                await emulator.killed()
                await more_beats(guest)

        # The target has another emulator in time.
        async with own_qemu(tmp_path / "b", incoming) as there:
            uri = f"unix:{tmp_path}/b.sock"
            emulator = there.attach(dies="active")
            await there.attached()
            await there.receive(uri)
            await host.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4 << 20})
            moving = asyncio.ensure_future(migrate(host.migration, uri, timeout=LIMIT))
            await emulator.killed()
            # The control socket of the one that died is still there.
            (tmp_path / "vmbus" / "b" / "control.sock").unlink()
            emulator = there.attach()
            await there.attached()
            await host.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
            await moving
            answered = beats(guest)
            await emulator.more_beats("b")
            assert await emulator.beats("b") > answered
            assert host.migration.fenced

            # Another program lets the source go on: it must not.
            await host.qmp.execute("cont")
            await until(lambda: is_paused(host), "stopped source")
            await asyncio.sleep(0.2)  # nothing more is served
            assert beats(guest) == answered
            await emulator.more_beats("b")

        # That QEMU has ended now, guest and all: the source still has what it sent.
        await host.migration.take_back()
        await more_beats(guest)
        with pytest.raises(UserError, match="nothing to take back"):
            await host.migration.take_back()

        # It dies when it has everything: the guest is there and waits, until it is taken back.
        for moment in ("loaded", "running"):
            async with own_qemu(tmp_path / moment, incoming) as there:
                uri = f"unix:{tmp_path}/{moment}.sock"
                emulator = there.attach(dies=moment)
                await there.attached()
                await there.receive(uri)
                await migrate(host.migration, uri, timeout=LIMIT)
                await emulator.killed()
                status, said = await there.attach().ended()
                assert status == 1
                assert "known only to the emulator" in said
                assert host.migration.fenced
            await host.migration.take_back()
            await more_beats(guest)
        await guest.move()
        await more_beats(guest)
        assert guest.device("heartbeat").status()["odd_answers"] == 0


async def test_the_target_is_killed(tmp_path: Path) -> None:
    async with journey(tmp_path) as guest:
        await more_beats(guest)
        for moment in ("setup", "active", "pre-switchover", "device", "completed"):
            await leave_for_a_target_that_dies(guest, moment)
            await more_beats(guest)
        await guest.move()
        await more_beats(guest)
        assert guest.device("heartbeat").status()["odd_answers"] == 0


async def leave_for_a_target_that_dies(guest: Journey, moment: str) -> None:
    host, coordinator = guest.host, guest.host.migration
    there = await guest.target()
    target = there.guest.process.process
    if moment == "setup":
        target.send_signal(signal.SIGSTOP)
    elif moment == "active":
        await host.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4 << 20})
    elif moment == "pre-switchover":
        coordinator.switchover = Switchover.OBSERVE
    elif moment == "device":  # QEMU has asked for the state, and waits for the target's word
        there.host.migration.state.restore = lambda _, **__: target.kill()  # type: ignore[method-assign]
    moving = asyncio.ensure_future(migrate(host.migration, guest.uri(there), timeout=LIMIT))
    if moment in ("setup", "active"):
        await guest.here.migration(lambda: moment in coordinator.report.statuses, f"status {moment}")
        target.kill()
    elif moment == "pre-switchover":
        await guest.here.until(lambda: coordinator.report.prepared_in, "state made ready")
        target.kill()
        await host.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    if moment == "completed":
        await moving
        target.kill()
        assert coordinator.fenced
        await coordinator.take_back()
    else:
        with pytest.raises(MigrationFailed, match="continues here"):
            await moving
    coordinator.switchover = Switchover.OWN
    await host.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
    await guest.leave(there)


@pytest.mark.parametrize("moment", [full("ready"), "completed", full("loading")])
async def test_an_emulator_that_started_its_qemu_takes_it_along(tmp_path: Path, moment: str) -> None:
    """``vmbus run`` on both sides; at ``loading`` it is the target that dies."""
    at_target = moment == "loading"

    options = ("--fast-boot", "--memory", "256M", "--device", "heartbeat,interval=0.05")
    uri = f"unix:{tmp_path}/migration.sock"
    source = Emulator.start(tmp_path, "run", "--name", "a", *options, dies="" if at_target else moment)
    target = None
    try:
        await source.more_beats("a")
        pid = (await source.status("a"))["qemu"]["pid"]
        target = Emulator.start(
            tmp_path, "run", "--name", "b", "--incoming", uri, *options, dies=moment if at_target else ""
        )
        await until((tmp_path / "migration.sock").exists, "listening target", source, target)
        moving = Emulator.start(tmp_path, "migrate", "a", uri)
        await (target if at_target else source).killed()
        status, said = await moving.ended()
        if moment == "loading":
            assert status == 1
            assert "continues here" in said
            await source.more_beats("a")
        else:
            await until(lambda: not Path(f"/proc/{pid}").exists(), "end of the QEMU")
        if moment == "completed":  # before that, what its QEMU had not sent yet is lost with it
            await target.more_beats("b")
        elif not at_target:
            status, said = await target.ended()
            assert status == 1, said
    finally:
        for emulator in (source, target):
            if emulator is not None:
                await emulator.stop()


async def is_paused(host: Host) -> bool:
    return bool((await host.qmp.execute("query-status"))["status"] == "paused")
