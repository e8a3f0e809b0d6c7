"""``vmbus migrate``, ``snapshot``, ``run --incoming`` and ``attach --carrier`` as a user types them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from vmbus.machine.qemu.qmp import Qmp
from vmbus.wire.echo import ECHO_INSTANCE

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.waiting import Side, reporting, until, while_alive
from tests.migration.journey import machine
from tests.migration.own_qemu import own_qemu, travellers

pytestmark = pytest.mark.guest

COUNT = (
    f"i=0; until [ -e /sys/bus/vmbus/devices/{ECHO_INSTANCE} ]; do i=$((i+1)); echo $i; usleep 50000; done"
)
"""Shell: count until an echo device is there."""


@contextlib.asynccontextmanager
async def emulators() -> AsyncIterator[list[Emulator]]:
    """A list for those that a test starts: they are ended on the way out, and shown in a failure."""
    started: list[Emulator] = []
    try:
        with reporting(lambda: started):
            yield started
    finally:
        for emulator in started:
            await emulator.stop()


async def test_a_guest_moves_is_saved_and_leaves_for_another_process(tmp_path: Path) -> None:
    options = ("--fast-boot", "--memory", "256M", "--device", "heartbeat,interval=0.1")
    command = ("--", "sh", "-c", f"{COUNT}; exit 5")

    async def vmbus(*words: str, status: int = 0) -> str:
        return await asked(tmp_path, *words, status=status)

    async with emulators() as started:

        def run(name: str, *words: str) -> Emulator:
            started.append(Emulator.start(tmp_path, "run", "--name", name, *words, *options, *command))
            return started[-1]

        source = run("a", "--snapshots", str(tmp_path / "s.qcow2"))
        await source.more_beats("a")
        summary = json.loads(await vmbus("migrate", "a", "--save-buffer", "100", "--json"))
        assert summary["statuses"][-1] == "completed"
        assert summary["state_bytes"] > 0
        statuses = {status for channel in summary["channels"] for status in channel["statuses"]}
        assert statuses == {"STATUS_BUFFER_TOO_SMALL", "STATUS_BUFFER_OVERFLOW", "STATUS_SUCCESS"}
        assert "the guest stood still for" in await vmbus("migrate")

        assert "saved one" in await vmbus("snapshot", "save", "one")
        listed = json.loads(await vmbus("snapshot", "list", "a", "--json"))
        assert [each["tag"] for each in listed["snapshots"]] == ["one"]
        assert "loaded one" in await vmbus("snapshot", "load", "a", "one")
        assert "no snapshot two" in await vmbus("snapshot", "load", "two", status=1)
        assert "deleted one" in await vmbus("snapshot", "delete", "one")
        assert "continues here" in await vmbus("migrate", "a", f"unix:{tmp_path}/nobody", status=1)

        # A target on this machine that refuses the guest says why, and the source passes that on.
        no = f"unix:{tmp_path}/no.sock"
        refusing = run(
            "c", "--incoming", no, "--snapshots", str(tmp_path / "c.qcow2"), "--no-default-devices"
        )
        await until((tmp_path / "no.sock").exists, "listening target", refusing, timeout=LIMIT)
        said = await vmbus("migrate", "a", no, status=1)
        assert "the target refused the guest: " in said and "not-there" in said, said
        assert (await refusing.ended())[0] == 1
        await source.more_beats("a")

        uri = f"unix:{tmp_path}/incoming.sock"
        # A guest that is to be taken has the same machine; the image for snapshots belongs to it.
        target = run("b", "--incoming", uri, "--snapshots", str(tmp_path / "t.qcow2"))
        await until((tmp_path / "incoming.sock").exists, "listening target", target, timeout=LIMIT)
        await vmbus("migrate", "a", uri)
        status, errors = await source.ended()
        assert status == 0, errors
        assert "the guest was migrated" in errors
        await target.more_beats("b")
        await vmbus("device", "add", "b", "echo")
        status, errors = await target.ended()
        assert status == 5, errors
        numbers = [int(word) for word in source.output.split()]
        # The load of the snapshot took it back a little; apart from that every number comes once, in order.
        backwards = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
        assert len(backwards) <= 1
        rest = [int(word) for word in target.output.split()]
        whole = numbers[backwards[0] if backwards else 0 :] + rest
        assert rest
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert list((tmp_path / "vmbus").iterdir()) == []


async def test_somebody_else_drives_over_descriptors_and_asks_when_to_go_on(tmp_path: Path) -> None:
    options = (
        "--fast-boot",
        "--memory",
        "256M",
        "--device",
        "heartbeat,interval=0.1",
        "--switchover",
        "observe",
    )
    command = ("--", "sh", "-c", f"{COUNT}; exit 6")

    async def vmbus(*words: str, status: int = 0, descriptors: Sequence[int] = ()) -> str:
        return await asked(tmp_path, *words, status=status, descriptors=descriptors)

    async def drive(here: socket.socket, *sides: Side) -> None:
        """What libvirt does: a monitor of its own, a socket that is connected already."""
        qmp = await Qmp.connect(str(tmp_path / "vmbus" / "a" / "qmp.sock"))
        await qmp.hand_over(here.fileno(), "there")
        here.close()
        await qmp.execute("migrate", {"uri": "fd:there"})
        found = json.loads(await vmbus("migrate", "a", "--wait-ready", "--json"))
        assert found["state_bytes"] > 0
        status = json.loads(await vmbus("status", "a", "--json"))
        assert status["migration"]["phase"] == "ready"
        assert status["migration"]["ready"]
        assert (await qmp.execute("query-migrate"))["status"] == "pre-switchover"
        await qmp.execute("migrate-continue", {"state": "pre-switchover"})
        await event(qmp, "MIGRATION", "completed", sides=sides)
        await qmp.execute("quit")
        await qmp.close()

    def control(name: str) -> Path:
        return tmp_path / "vmbus" / name / "control.sock"

    async with emulators() as started:

        def run(name: str, *words: str, descriptors: Sequence[int] = ()) -> Emulator:
            line = ("run", "--name", name, *words, *options, *command)
            started.append(Emulator.start(tmp_path, *line, descriptors=descriptors))
            return started[-1]

        source = run("a")
        await source.more_beats("a")
        here, there = socket.socketpair()
        with here, there:
            number = there.fileno()
            second = run("b", "--incoming", f"fd:{number}", descriptors=[number])
            there.close()
            await until(control("b").exists, "target", second, timeout=LIMIT)
            await drive(here, source, second)
        status, errors = await source.ended()
        assert status == 0, errors
        assert "the guest was migrated" in errors
        await second.more_beats("b")

        # Through a pipe, and driven by vmbus itself: no other program takes part.
        assert "give the number of a descriptor" in await vmbus("migrate", "b", "fd:there", status=2)
        assert "Bad file descriptor" in await vmbus("migrate", "b", "fd:77", status=2)
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
            third = run("c", "--incoming", f"fd:{reading}", descriptors=[reading])
            reader.close()
            await until(control("c").exists, "target", third, timeout=LIMIT)
            await vmbus("migrate", "b", f"fd:{writing}", descriptors=[writing])
            writer.close()
        status, errors = await second.ended()
        assert status == 0, errors
        await vmbus("device", "add", "c", "echo")
        status, errors = await third.ended()
        assert status == 6, errors
        numbers = [int(word) for emulator in started for word in emulator.output.split()]
        assert numbers == list(range(1, len(numbers) + 1))


async def test_a_guest_is_taken_back_and_then_leaves_beside_qemus_stream(tmp_path: Path) -> None:
    options = ("--fast-boot", "--memory", "256M", "--device", "heartbeat,interval=0.05")
    count = ["i=0; while i=$((i+1)); do echo $i; usleep 50000; done"]
    command = ("--", "sh", "-c", *count)
    void, main, carrier = (f"unix:{tmp_path}/{name}" for name in ("void", "main", "carrier"))

    async def says(*words: str, status: int = 0) -> str:
        return await asked(tmp_path, *words, status=status)

    async with emulators() as started:

        def run(name: str, *words: str) -> Emulator:
            started.append(Emulator.start(tmp_path, "run", "--name", name, *words, *options, *command))
            return started[-1]

        source = run("a")
        await source.more_beats("a")
        assert "nothing to take back: it is idle" in await says("migrate", "a", "--take-back", status=1)
        assert "starts no migration: leave out the URI" in await says(
            "migrate", "a", void, "--take-back", status=2
        )

        # Another program sends it away, to a target that dies when it has everything.
        target = run("void", "--incoming", void)
        await until((tmp_path / "void").exists, "listening target", target, timeout=LIMIT)
        driver = await Qmp.connect(str(tmp_path / "vmbus" / "a" / "qmp.sock"))
        await driver.execute("migrate-set-capabilities", {"capabilities": [WAY_BACK]})
        await driver.execute("migrate", {"uri": void})
        await event(driver, "MIGRATION", "completed", sides=[source, target])
        await target.more_beats("void")
        target.process.kill()
        await target.ended()

        # It must not go on by itself.
        answered = await source.beats("a")
        await driver.execute("cont")
        await event(driver, "STOP", sides=[source])
        assert await source.beats("a") == answered
        assert "it is left" in await says("migrate", "a", void, status=1)
        assert await says("migrate", "a", "--take-back") == "the guest was resumed here\n"
        await source.more_beats("a")
        await driver.close()

        # It goes into a file, which cannot report a refusal, and is refused: it was kept, and is taken back.
        file = f"file:{tmp_path}/guest"
        assert "goes with a URI" in await says("migrate", "a", "--keep", status=2)
        assert "run `vmbus migrate --take-back`" in await says("migrate", "a", file, "--keep")
        answered = await source.beats("a")
        status, errors = await run("no", "--incoming", file, "--no-default-devices").ended()
        assert (status, "not-there" in errors) == (1, True), errors
        assert await source.beats("a") == answered
        await says("migrate", "a", "--take-back")
        await source.more_beats("a")

        # And on it goes, into another emulator's QEMU, and into one that no emulator started.
        target = run("b", "--incoming", main, "--carrier", carrier)
        await until((tmp_path / "main").exists, "listening target", target, timeout=LIMIT)
        await says("migrate", "a", main, "--carrier", carrier)
        status, errors = await source.ended()
        assert status == 0, errors
        await target.more_beats("b")
        async with own_qemu(tmp_path / "d", travellers(machine(tmp_path, command=count))[1]) as refusing:
            refusing.attach("--no-default-devices")  # its QEMU, and where it listens, are another program's
            await refusing.attached()
            await refusing.receive(f"unix:{tmp_path}/d.sock")
            said = await says("migrate", "b", f"unix:{tmp_path}/d.sock", status=1)
            assert "the target refused the guest: " in said and "not-there" in said, said
            await target.more_beats("b")
        async with own_qemu(tmp_path / "c", travellers(machine(tmp_path, command=count))[1]) as last:
            last.attach("--carrier", carrier)
            await last.attached()
            await last.receive(main)
            assert "no emulator receives a state" in await says(
                *("migrate", "b", main, "--carrier", f"{carrier}2"), status=1
            )
            answered = await target.beats("b")
            await says("migrate", "b", main, "--carrier", carrier)
            assert await last.emulators[-1].beats("c") >= answered
            await last.emulators[-1].more_beats("c")
            status, errors = await target.ended()
            assert status == 0, errors
        numbers = [int(word) for word in (source.output + target.output).split()]
        assert numbers == list(range(1, len(numbers) + 1))  # what it said in the void came again


WAY_BACK = {"capability": "return-path", "state": True}


async def event(qmp: Qmp, wanted: str, status: str = "", *, sides: Sequence[Side]) -> None:
    """Wait for an event, with that status if one is given."""
    async with while_alive(f"event {wanted} {status}", *sides, timeout=LIMIT):
        async for name, data in qmp.events():
            if name == wanted and (not status or data["status"] == status):
                return
    raise AssertionError(f"QEMU ended before {wanted} {status}")
