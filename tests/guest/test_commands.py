"""The commands as a user types them: real processes, real output."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import find_qemu

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.harness import LOADED_MODULES
from tests.guest.waiting import Process, reporting, until

pytestmark = pytest.mark.guest


@dataclass
class User:
    """A user with a runtime directory of its own."""

    runtime: Path
    logs: Path

    def starts(self, *words: str, dies: str = "") -> Emulator:
        return Emulator.start(self.runtime, *words, dies=dies, logs=self.logs)

    async def asks(self, *words: str, status: int = 0) -> str:
        return await asked(self.runtime, *words, status=status, logs=self.logs)


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    """A user whose runtime directory must have no files in the end."""
    runtime = Path("/dev/shm") / f"vmbus-test-{os.getpid()}"
    runtime.mkdir(mode=0o700)
    try:
        yield User(runtime, tmp_path)
        left = [path for path in runtime.rglob("*") if not path.is_dir()]
        assert left == [], "files were left behind"
    finally:
        shutil.rmtree(runtime)


async def test_run_gives_the_commands_output_and_its_status(tmp_path: Path, user: User) -> None:
    console = tmp_path / "console.txt"
    added = tmp_path / "hello.sh"
    added.write_text("#!/bin/sh\necho \"added program: $1\"\nprintf '\\001\\377'\nexit 7\n")
    added.chmod(0o755)
    done = user.starts("run", "--add", f"{added}:/bin/hello", "--serial", str(console), "--", "hello", "a  b")
    status, errors = await done.ended()
    assert status == 7, errors
    assert done.output_bytes == b"added program: a  b\n\x01\xff"
    assert "Hypervisor detected: Microsoft Hyper-V" in console.read_text(errors="replace")


@pytest.mark.parametrize(
    ("words", "complaint", "status"),
    [
        (["run", "--smp", "0"], "argument --smp: '0' is not a whole number", 2),
        (["run", "--device", "nonsense"], "nonsense", 2),
        (["run", "--kernel", "/nowhere"], "/nowhere", 2),
        (["run", "--timeout", "1", "--", "sleep", "1000"], "did not end within 1 s", 1),
        (["run", "--qemu", "-device nonsense", "--", "true"], "nonsense", 1),
        (["attach", "--qmp", "/nowhere.sock"], "the QMP socket /nowhere.sock: No such file", 1),
        (["status"], "no emulator runs", 1),
        (["status", "x/y"], "is not a guest name", 2),
    ],
)
async def test_what_went_wrong_is_said_and_nothing_is_left(
    user: User, words: list[str], complaint: str, status: int
) -> None:
    errors = await user.asks(*words, status=status)
    assert complaint in errors
    assert "Traceback" not in errors


@dataclass
class ByHand:
    """A QEMU as a user would start it, with the words that ``vmbus qemu-args`` prints."""

    user: User
    qemu: Process
    folder: Path

    @contextlib.asynccontextmanager
    async def attached(self, *words: str, dies: str = "") -> AsyncIterator[Emulator]:
        """``vmbus attach`` in the background, with more ``words``."""
        emulator = self.user.starts(
            *("attach", "--qmp", str(self.folder / "emulator-qmp.sock"), "--name", "hand"),
            *("--device", "heartbeat,interval=0.2"),
            *words,
            dies=dies,
        )
        try:
            with reporting(lambda: (self.qemu, emulator)):
                yield emulator
        finally:
            emulator.process.kill()
            emulator.process.wait(LIMIT)

    async def ended(self) -> int:
        """Wait for QEMU's end."""
        await until(lambda: self.qemu.process.poll() is not None, "end of QEMU", timeout=LIMIT)
        return self.qemu.process.wait()


@contextlib.asynccontextmanager
async def started_by_hand(tmp_path: Path, user: User, memory: str) -> AsyncIterator[ByHand]:
    folder = tmp_path / "vm"
    folder.mkdir(mode=0o700)
    printed = await user.asks("qemu-args", "--dir", str(folder), "--memory", memory)
    kernel = find_kernel("debian-6.12")
    console = tmp_path / "console.log"
    line = [
        *find_qemu().argv_prefix,
        *shlex.split(printed),
        *("-machine", "q35", "-cpu", "max", "-smp", "2", "-display", "none", "-nodefaults"),
        *("-serial", f"file:{console}", "-kernel", str(kernel.vmlinuz)),
        *("-initrd", str(build_initramfs(kernel, modules=LOADED_MODULES))),
        *("-append", " ".join(KERNEL_ARGUMENTS)),
    ]
    with Process.started("QEMU", line, console, cwd=folder) as qemu:
        await until((folder / "emulator-qmp.sock").exists, "QMP socket", qemu, timeout=LIMIT)
        yield ByHand(user, qemu, folder)


async def test_attach_to_a_qemu_started_by_hand_status_and_shutdown(tmp_path: Path, user: User) -> None:
    async with started_by_hand(tmp_path, user, "6G") as hand, hand.attached() as emulator:
        await emulator.more_beats("hand", hand.qemu)
        found = await emulator.status("hand")
        assert found["bus"]["version"] == "5.3"
        assert found["vcpus"] == 2
        assert found["qemu"]["memory"] == 6 << 30
        shown = await user.asks("status")
        assert "heartbeat" in shown
        assert "VMBus 5.3" in shown
        second = await user.asks("attach", "--qmp", str(hand.folder / "emulator-qmp.sock"), status=1)
        assert "serves one client" in second
        assert await user.asks("shutdown", "hand") == "ok\n"
        assert await hand.ended() == 0
        assert (await emulator.ended())[0] == 0


async def test_an_emulator_killed_while_the_guest_waits_is_replaced(tmp_path: Path, user: User) -> None:
    """The first one dies in place of its first answer, so the guest waits, and has set up nothing yet."""
    async with started_by_hand(tmp_path, user, "512M") as hand:
        async with hand.attached(dies="trap") as emulator:
            await emulator.killed()
        assert hand.qemu.gone() == ""
        async with hand.attached() as emulator:
            await emulator.more_beats("hand", hand.qemu)
            assert await user.asks("shutdown", "hand") == "ok\n"
            assert await hand.ended() == 0
            assert (await emulator.ended())[0] == 0
    shutil.rmtree(user.runtime / "vmbus")  # what the first one left


async def test_a_qemu_without_the_options_is_told_what_to_add(tmp_path: Path, user: User) -> None:
    socket = tmp_path / "qmp.sock"
    line = [*find_qemu().argv_prefix, "-accel", "tcg", "-display", "none", "-nodefaults"]
    with Process.started("QEMU", [*line, "-S", "-qmp", f"unix:{socket},server=on,wait=off"]) as qemu:
        await until(socket.exists, "QMP socket", qemu, timeout=LIMIT)
        errors = await user.asks("attach", "--qmp", str(socket), status=1)
    for option in ("memory-backend-file", "-qtest unix:", "-plugin", "vmbus qemu-args"):
        assert option in errors


@pytest.mark.full  # tests/migration/test_deaths.py has it after a migration
async def test_an_emulator_that_is_killed_takes_its_own_qemu_along(user: User) -> None:
    emulator = user.starts("run", "--name", "doomed")
    try:
        found: dict[str, Any] = {}

        async def served() -> bool:
            found.update(await emulator.status("doomed"))
            return bool(found)

        await until(served, "guest that is served", emulator, timeout=LIMIT)
    finally:
        emulator.process.send_signal(signal.SIGKILL)
    await emulator.killed()
    qemu = Path(f"/proc/{found['qemu']['pid']}")
    await until(lambda: not qemu.exists(), "end of QEMU", timeout=LIMIT)
    # What a SIGKILL left is swept by the next guest of that name.
    await user.asks("run", "--name", "doomed", "--", "true")
