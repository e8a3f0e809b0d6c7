"""``vmbus migrate``, ``snapshot``, ``run --incoming`` and ``attach --carrier`` as a user types them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from vmbus.machine.qemu.qmp import Qmp
from vmbus.wire.echo import ECHO_INSTANCE

from tests.migration.journey import machine
from tests.migration.own_qemu import Emulator, own_qemu, travellers
from tests.migration.own_qemu import until as holds

pytestmark = pytest.mark.guest

LIMIT = 120
COUNT = (
    f"i=0; until [ -e /sys/bus/vmbus/devices/{ECHO_INSTANCE} ]; do i=$((i+1)); echo $i; usleep 50000; done"
)
"""Shell: count until an echo device is there."""


def vmbus(folder: Path, *words: str, descriptors: Sequence[int] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vmbus", *words],
        pass_fds=descriptors,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def asked(folder: Path, *words: str, status: int = 0, descriptors: Sequence[int] = ()) -> str:
    process = vmbus(folder, *words, descriptors=descriptors)
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == status, errors
    return output if status == 0 else errors


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"no {what} within {LIMIT} s"
        time.sleep(0.05)


def beats(folder: Path, name: str) -> int:
    process = vmbus(folder, "status", name, "--json")
    output, _ = process.communicate(timeout=LIMIT)
    if process.returncode:
        return 0
    channels = json.loads(output)["channels"]
    return next((each["details"]["answers"] for each in channels if each["device"] == "heartbeat"), 0)


def test_a_guest_moves_is_saved_and_leaves_for_another_process(tmp_path: Path) -> None:
    options = ("--memory", "256M", "--device", "heartbeat,interval=0.1")
    command = ("--", "sh", "-c", f"{COUNT}; exit 5")
    source = vmbus(
        tmp_path, "run", "--name", "a", "--snapshots", str(tmp_path / "s.qcow2"), *options, *command
    )
    target = None
    try:
        until(lambda: beats(tmp_path, "a") > 3, "heartbeats")
        summary = json.loads(asked(tmp_path, "migrate", "a", "--save-buffer", "100", "--json"))
        assert summary["statuses"][-1] == "completed"
        assert summary["state_bytes"] > 0
        statuses = {status for channel in summary["channels"] for status in channel["statuses"]}
        assert statuses == {"STATUS_BUFFER_TOO_SMALL", "STATUS_BUFFER_OVERFLOW", "STATUS_SUCCESS"}
        assert "the guest stood still for" in asked(tmp_path, "migrate")

        assert "saved one" in asked(tmp_path, "snapshot", "save", "one")
        listed = json.loads(asked(tmp_path, "snapshot", "list", "a", "--json"))
        assert [each["tag"] for each in listed["snapshots"]] == ["one"]
        assert "loaded one" in asked(tmp_path, "snapshot", "load", "a", "one")
        assert "no snapshot two" in asked(tmp_path, "snapshot", "load", "two", status=1)
        assert "deleted one" in asked(tmp_path, "snapshot", "delete", "one")
        assert "goes on here" in asked(tmp_path, "migrate", "a", f"unix:{tmp_path}/nobody", status=1)

        uri = f"unix:{tmp_path}/incoming.sock"
        # A guest that is to be taken has the same machine; the image for snapshots belongs to it.
        target = vmbus(
            tmp_path,
            *("run", "--name", "b", "--incoming", uri, "--snapshots", str(tmp_path / "t.qcow2")),
            *(*options, *command),
        )
        until((tmp_path / "incoming.sock").exists, "listening target")
        asked(tmp_path, "migrate", "a", uri)
        output, errors = source.communicate(timeout=LIMIT)
        assert source.returncode == 0, errors
        assert "has moved" in errors
        until(lambda: beats(tmp_path, "b") > 3, "heartbeats there")
        asked(tmp_path, "device", "add", "b", "echo")
        rest, errors = target.communicate(timeout=LIMIT)
        assert target.returncode == 5, errors
        numbers = [int(word) for word in output.split()]
        # The load of the snapshot took it back a little; apart from that every number comes once, in order.
        backwards = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
        assert len(backwards) <= 1
        whole = numbers[backwards[0] if backwards else 0 :] + [int(word) for word in rest.split()]
        assert rest
        assert whole == list(range(whole[0], whole[0] + len(whole)))
        assert list((tmp_path / "vmbus").iterdir()) == []
    finally:
        for process in (source, target):
            if process is not None and process.poll() is None:
                process.terminate()
                process.communicate(timeout=30)


async def test_somebody_else_drives_over_descriptors_and_asks_when_to_go_on(tmp_path: Path) -> None:
    options = ("--memory", "256M", "--device", "heartbeat,interval=0.1", "--switchover", "observe")
    command = ("--", "sh", "-c", f"{COUNT}; exit 6")

    async def drive(here: socket.socket) -> None:
        """What libvirt does: a monitor of its own, a socket that is connected already."""
        qmp = await Qmp.connect(str(tmp_path / "vmbus" / "a" / "qmp.sock"))
        await qmp.hand_over(here.fileno(), "there")
        here.close()
        await qmp.execute("migrate", {"uri": "fd:there"})
        found = json.loads(await asyncio.to_thread(asked, tmp_path, "migrate", "a", "--wait-ready", "--json"))
        assert found["state_bytes"] > 0
        status = json.loads(await asyncio.to_thread(asked, tmp_path, "status", "a", "--json"))
        assert status["migration"]["phase"] == "ready"
        assert status["migration"]["ready"]
        assert (await qmp.execute("query-migrate"))["status"] == "pre-switchover"
        await qmp.execute("migrate-continue", {"state": "pre-switchover"})
        async for _, data in qmp.events():
            if data.get("status") == "completed":
                break
        await qmp.execute("quit")
        await qmp.close()

    started: list[subprocess.Popen[str]] = []

    def run(name: str, *words: str, descriptors: Sequence[int] = ()) -> subprocess.Popen[str]:
        process = vmbus(tmp_path, "run", "--name", name, *words, *options, *command, descriptors=descriptors)
        started.append(process)
        return process

    try:
        source = run("a")
        until(lambda: beats(tmp_path, "a") > 3, "heartbeats")
        here, there = socket.socketpair()
        with here, there:
            number = there.fileno()
            second = run("b", "--incoming", f"fd:{number}", descriptors=[number])
            there.close()
            until((tmp_path / "vmbus" / "b" / "control.sock").exists, "target")
            await drive(here)
        output, errors = source.communicate(timeout=LIMIT)
        assert source.returncode == 0, errors
        assert "has moved" in errors
        until(lambda: beats(tmp_path, "b") > 3, "heartbeats there")

        # Through a pipe, and driven by vmbus itself: nobody has to send anything.
        assert "by its number" in asked(tmp_path, "migrate", "b", "fd:there", status=2)
        assert "Bad file descriptor" in asked(tmp_path, "migrate", "b", "fd:77", status=2)
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
            third = run("c", "--incoming", f"fd:{reading}", descriptors=[reading])
            reader.close()
            until((tmp_path / "vmbus" / "c" / "control.sock").exists, "target")
            asked(tmp_path, "migrate", "b", f"fd:{writing}", descriptors=[writing])
            writer.close()
        middle, errors = second.communicate(timeout=LIMIT)
        assert second.returncode == 0, errors
        asked(tmp_path, "device", "add", "c", "echo")
        rest, errors = third.communicate(timeout=LIMIT)
        assert third.returncode == 6, errors
        numbers = [int(word) for word in (output + middle + rest).split()]
        assert numbers == list(range(1, len(numbers) + 1))
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=30)


async def test_a_guest_is_taken_back_and_then_leaves_beside_qemus_stream(tmp_path: Path) -> None:
    options = ("--memory", "256M", "--device", "heartbeat,interval=0.05")
    count = ["i=0; while i=$((i+1)); do echo $i; usleep 50000; done"]
    command = ("--", "sh", "-c", *count)
    void, main, carrier = (f"unix:{tmp_path}/{name}" for name in ("void", "main", "carrier"))
    started: list[Emulator] = []

    def run(name: str, *words: str) -> Emulator:
        started.append(Emulator.start(tmp_path, "run", "--name", name, *words, *options, *command))
        return started[-1]

    async def says(*words: str, status: int = 0) -> str:
        return await asyncio.to_thread(asked, tmp_path, *words, status=status)

    try:
        source = run("a")
        await source.more_beats("a")
        assert "nothing to take back: it is idle" in await says("migrate", "a", "--take-back", status=1)
        assert "goes with no URI" in await says("migrate", "a", void, "--take-back", status=2)

        # Somebody else sends it away, to a target that dies when it has everything.
        target = run("void", "--incoming", void)
        await holds(lambda: is_there(tmp_path / "void"), "listening target")
        driver = await Qmp.connect(str(tmp_path / "vmbus" / "a" / "qmp.sock"))
        await driver.execute("migrate-set-capabilities", {"capabilities": [WAY_BACK]})
        await driver.execute("migrate", {"uri": void})
        await event(driver, "MIGRATION", "completed")
        await target.more_beats("void")
        target.process.kill()
        await target.ended()

        # It must not go on by itself.
        answered = await source.beats("a")
        await driver.execute("cont")
        await event(driver, "STOP")
        assert await source.beats("a") == answered
        assert "it is left" in await says("migrate", "a", void, status=1)
        assert await says("migrate", "a", "--take-back") == "the guest goes on here\n"
        await source.more_beats("a")
        await driver.close()

        # It goes where nobody can say that it is refused, and it is: it was kept, and is taken back.
        file = f"file:{tmp_path}/guest"
        assert "goes with a URI" in await says("migrate", "a", "--keep", status=2)
        assert "--take-back lets it go on" in await says("migrate", "a", file, "--keep")
        answered = await source.beats("a")
        status, errors = await run("refuses", "--incoming", file, "--no-default-devices").ended()
        assert (status, "not-there" in errors) == (1, True), errors
        assert await source.beats("a") == answered
        await says("migrate", "a", "--take-back")
        await source.more_beats("a")

        # And on it goes, into another emulator's QEMU, and into one that no emulator started.
        target = run("b", "--incoming", main, "--carrier", carrier)
        await holds(lambda: is_there(tmp_path / "main"), "listening target")
        await says("migrate", "a", main, "--carrier", carrier)
        first, errors = await asyncio.to_thread(source.process.communicate, timeout=LIMIT)
        assert source.process.returncode == 0, errors
        await target.more_beats("b")
        async with own_qemu(tmp_path / "c", travellers(machine(tmp_path, command=count))[1]) as last:
            last.attach("--carrier", carrier)
            await last.attached()
            await last.receive(main)
            assert "no emulator takes a state" in await says(
                *("migrate", "b", main, "--carrier", f"{carrier}2"), status=1
            )
            answered = await target.beats("b")
            await says("migrate", "b", main, "--carrier", carrier)
            assert await last.emulators[-1].beats("c") >= answered
            await last.emulators[-1].more_beats("c")
            second, errors = await asyncio.to_thread(target.process.communicate, timeout=LIMIT)
            assert target.process.returncode == 0, errors
        numbers = [int(word) for word in (first + second).split()]
        assert numbers == list(range(1, len(numbers) + 1))  # what it said in the void came again
    finally:
        for emulator in started:
            await emulator.stop()


WAY_BACK = {"capability": "return-path", "state": True}


async def event(qmp: Qmp, wanted: str, status: str = "") -> None:
    """Wait for an event, with that status if one is given."""
    async with asyncio.timeout(LIMIT):
        async for name, data in qmp.events():
            if name == wanted and (not status or data["status"] == status):
                return
    raise AssertionError(f"QEMU ended before {wanted} {status}")


async def is_there(path: Path) -> bool:
    return path.exists()
