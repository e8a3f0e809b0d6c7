"""A guest of one's own: its run directory, its QEMU, the host that serves it, all ended together.

    async with Guest.start(...) as guest:
        ending = await guest.served.serve()

Whatever happens inside, QEMU is ended and the run directory removed on the way out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulator.bus.device import Device
from emulator.errors import QemuGone
from emulator.machine import rundir
from emulator.machine.acpi import vmbus_table
from emulator.machine.arguments import EmulatorOptions
from emulator.machine.host import Host, HostOptions
from emulator.machine.launch import GuestOptions, QemuProcess, command_line
from emulator.machine.migration.vmstate import DbusDaemon
from emulator.machine.rundir import RunDirectory
from emulator.machine.served import HostCommand, Served
from emulator.provision.qemu import QemuBinary


def emulator_options(
    directory: RunDirectory,
    memory_size: int,
    gateway_library: Path,
    *,
    wait: bool = True,
    migratable: bool = True,
) -> EmulatorOptions:
    """The emulator's options for a guest in ``directory``; ``migratable`` needs a QEMU with ``dbus-vmstate``."""
    return EmulatorOptions(
        memory_path=directory.memory,
        memory_size=memory_size,
        gateway_library=gateway_library,
        gateway_socket=directory.gateway,
        qtest_socket=directory.qtest,
        qmp_socket=directory.qmp,
        acpi_table=directory.acpi_table,
        wait=wait,
        dbus_socket=directory.dbus if migratable else None,
    )


@dataclass(slots=True)
class Guest:
    """A started guest."""

    directory: RunDirectory
    process: QemuProcess
    served: Served
    command: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None

    @property
    def host(self) -> Host:
        return self.served.host

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        *,
        name: str | None,
        qemu: QemuBinary,
        gateway_library: Path,
        memory_size: int,
        options: GuestOptions,
        devices: Sequence[Device],
        host_options: HostOptions | None = None,
        commands: Mapping[str, HostCommand] | None = None,
    ) -> AsyncIterator[Guest]:
        """Start QEMU with the guest held at its first look for a hypervisor, attach, let it go."""
        directory = rundir.create(name, memory_size)
        process: QemuProcess | None = None
        served: Served | None = None
        command: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        daemon: DbusDaemon | None = None
        try:
            if qemu.dbus_vmstate:  # QEMU connects to it when it starts
                daemon = await DbusDaemon.start(qemu.dbus_daemon(), directory.path)
            directory.acpi_table.write_bytes(vmbus_table())
            line = command_line(
                qemu.argv_prefix,
                directory,
                emulator_options(directory, memory_size, gateway_library, migratable=daemon is not None),
                options,
            )
            process = QemuProcess.start(line, directory.qemu_log, qemu.environment)
            qmp = await process.connect_qmp(directory.qmp)
            if options.command_port:
                command = await asyncio.open_unix_connection(str(directory.command))
            host = await Host.attach(qmp, devices, host_options)
            served = Served(host, directory.path, commands)
            await served.start()
            yield cls(directory, process, served, command)
        finally:
            if command is not None:
                command[1].close()
            if served is not None:
                if process is not None and process.process.poll() is None and served.host.qmp.connected:
                    with contextlib.suppress(QemuGone):  # it may end by itself in this moment
                        await served.host.qmp.execute("quit")
                await served.close()
            if process is not None:
                await asyncio.to_thread(process.stop)
            if daemon is not None:
                await asyncio.to_thread(daemon.stop)
            directory.remove()
