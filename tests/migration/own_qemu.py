"""QEMUs that no emulator started, and emulators that are processes of their own: each can die alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmbus.errors import UserError
from vmbus.machine.control import ask
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import emulator_options
from vmbus.machine.migration.vmstate import DbusDaemon
from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.launch import GuestOptions, QemuProcess, command_line
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.rundir import RunDirectory
from vmbus.provision.qemu import find_qemu

LIMIT = 120.0


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Ask until the answer is true."""
    end = time.monotonic() + LIMIT
    while not await condition():
        assert time.monotonic() < end, f"no {what} within {LIMIT:g} s"
        await asyncio.sleep(0.02)


@dataclass
class Emulator:
    """``vmbus`` as a process of its own."""

    process: subprocess.Popen[str]
    folder: Path

    @classmethod
    def start(cls, folder: Path, *words: str, dies: str = "") -> Emulator:
        """``vmbus WORDS``, run directories in ``folder``; ``dies``: a moment of ``mortal``."""
        module = ["tests.migration.mortal", dies] if dies else ["emulator"]
        return cls(
            subprocess.Popen(
                [sys.executable, "-m", *module, *words],
                env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
            folder,
        )

    async def ended(self) -> tuple[int, str]:
        """Its exit status (negative: by that signal), and what it said."""
        _, errors = await asyncio.to_thread(self.process.communicate, timeout=LIMIT)
        return self.process.returncode, errors

    async def killed(self) -> None:
        """It killed itself."""
        status, errors = await self.ended()
        assert status == -signal.SIGKILL, errors

    async def beats(self, name: str) -> int:
        """Heartbeats answered by the guest of that name; 0 while it is not served."""
        control = self.folder / "vmbus" / name / "control.sock"
        try:
            channels = (await asyncio.to_thread(ask, control, "status"))["channels"]
        except UserError:
            return 0
        return next((each["details"]["answers"] for each in channels if each["device"] == "heartbeat"), 0)

    async def more_beats(self, name: str) -> None:
        """The guest lives, and is served."""
        wanted = await self.beats(name) + 3
        end = time.monotonic() + LIMIT
        while await self.beats(name) < wanted:
            if self.process.poll() is not None:
                raise AssertionError((await self.ended())[1])
            assert time.monotonic() < end, f"no heartbeats of {name} within {LIMIT} s"
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(ValueError):  # what it said was read already
            await asyncio.to_thread(self.process.communicate, timeout=LIMIT)


@dataclass
class OwnQemu:
    """A QEMU with everything that an emulator needs, and with a QMP socket for whoever drives it."""

    directory: RunDirectory
    process: QemuProcess
    daemon: DbusDaemon
    qmp: Qmp
    emulators: list[Emulator] = field(default_factory=list)

    @classmethod
    async def start(cls, folder: Path, options: GuestOptions, memory: int) -> OwnQemu:
        folder.mkdir(mode=0o700)
        directory = RunDirectory(folder, folder / "memory")
        qemu = find_qemu()
        directory.acpi_table.write_bytes(vmbus_table())
        daemon = await DbusDaemon.start(qemu.dbus_daemon(), folder)
        try:
            line = command_line(
                qemu.argv_prefix,
                directory,
                emulator_options(directory, memory, gateway_build.build()),
                replace(options, serial=folder / "console.log"),
            )
            process = QemuProcess.start(line, directory.qemu_log, qemu.environment)
            try:
                return cls(directory, process, daemon, await process.connect_qmp(directory.user_qmp))
            except BaseException:
                process.stop()
                raise
        except BaseException:
            daemon.stop()
            raise

    def attach(self, *words: str, dies: str = "") -> Emulator:
        """An emulator for it, with default devices, named as the directory."""
        name = self.directory.name
        line = ("attach", "--qmp", str(self.directory.qmp), "--name", name)
        devices = ("--device", "heartbeat,interval=0.05")
        found = Emulator.start(self.directory.path.parent, *line, *devices, *words, dies=dies)
        self.emulators.append(found)
        return found

    async def attached(self) -> None:
        """An emulator serves it."""
        control = self.directory.path.parent / "vmbus" / self.directory.name / "control.sock"
        end = time.monotonic() + LIMIT
        while not control.exists():
            emulator = self.emulators[-1]
            if emulator.process.poll() is not None:
                raise AssertionError((await emulator.ended())[1])
            assert time.monotonic() < end, f"no emulator attached within {LIMIT} s"
            await asyncio.sleep(0.02)

    async def status(self) -> str:
        """QEMU's run state."""
        return str((await self.qmp.execute("query-status"))["status"])

    async def migration(self, *wanted: str) -> str:
        """Wait until the migration is in one of the statuses; which."""
        end = time.monotonic() + LIMIT
        while (found := (await self.qmp.execute("query-migrate")).get("status")) not in wanted:
            assert time.monotonic() < end, f"the migration is {found}, not {' or '.join(wanted)}"
            await asyncio.sleep(0.02)
        return str(found)

    async def send(self, uri: str) -> None:
        """Begin to migrate, as a program does that knows of no emulator."""
        capability = {"capability": "return-path", "state": True}
        await self.qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})
        await self.qmp.execute("migrate", {"uri": uri})

    async def receive(self, uri: str) -> None:
        await self.qmp.execute("migrate-incoming", {"uri": uri, "exit-on-error": False})

    async def close(self) -> None:
        for emulator in self.emulators:
            await emulator.stop()
        await self.qmp.close()
        self.process.stop()
        self.daemon.stop()
        self.directory.memory.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def own_qemu(folder: Path, options: GuestOptions, memory: int = 256 << 20) -> AsyncIterator[OwnQemu]:
    """A QEMU (memory in bytes) that is ended on the way out, with its emulators."""
    found = await OwnQemu.start(folder, options, memory)
    try:
        yield found
    finally:
        await found.close()


def travellers(options: GuestOptions) -> Sequence[GuestOptions]:
    """The source's and the target's."""
    return options, replace(options, incoming=True)
