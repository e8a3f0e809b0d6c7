"""QEMUs that no emulator started, and emulators that are processes of their own: each can die alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import emulator_options
from vmbus.machine.migration.vmstate import DbusDaemon
from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.launch import GuestOptions, QemuProcess, command_line
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.rundir import RunDirectory
from vmbus.provision.qemu import find_qemu

from tests.guest.emulator import LIMIT, Emulator
from tests.guest.waiting import end_of, reporting, section, until


@dataclass
class OwnQemu:
    """A QEMU with everything that an emulator needs, and with a QMP socket for the program that drives it."""

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
        """Wait until the last emulator that was started serves it."""
        control = self.directory.path.parent / "vmbus" / self.directory.name / "control.sock"
        await until(control.exists, "attached emulator", self, self.emulators[-1], timeout=LIMIT)

    def gone(self) -> str:
        code = self.process.process.poll()
        return "" if code is None else f"the QEMU in {self.directory.name} ended with status {code}"

    def report(self) -> str:
        folder = self.directory.path
        parts = [section("console", end_of(folder / "console.log")), section("QEMU", self.process.messages())]
        shown = [emulator.report() for emulator in self.emulators]
        return "\n".join([f"=== QEMU in {self.directory.name} ===", *parts, *shown])

    async def status(self) -> str:
        """QEMU's run state."""
        return str((await self.qmp.execute("query-status"))["status"])

    async def migration(self, *wanted: str) -> str:
        """Wait until the migration is in one of the statuses; which."""
        found = ""

        async def reached() -> bool:
            nonlocal found
            found = str((await self.qmp.execute("query-migrate")).get("status"))
            return found in wanted

        await until(reached, f"migration that is {' or '.join(wanted)}", self, timeout=LIMIT)
        return found

    async def send(self, uri: str) -> None:
        """Begin to migrate, as a program does that is not made for an emulator."""
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
    """A QEMU (memory in bytes) that is ended on the way out, with its emulators.

    A failure inside carries the reports of all of them.
    """
    found = await OwnQemu.start(folder, options, memory)
    try:
        with reporting(lambda: (found,)):
            yield found
    finally:
        await found.close()


def travellers(options: GuestOptions) -> Sequence[GuestOptions]:
    """The source's and the target's."""
    return options, replace(options, incoming=True)
