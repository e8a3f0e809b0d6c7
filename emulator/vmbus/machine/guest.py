"""A guest that this process starts: its run directory, its QEMU and its host, which end together.

    async with Guest.start(...) as guest:
        exit_reason = await guest.served.serve()

At the end of the block QEMU is ended and the run directory removed, also after an error. A guest can move
(:meth:`Guest.move`) to a new QEMU and a new host, by live migration; its name, its control socket and the output of
its command stay.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.errors import InternalError, QemuError, UserError, system_reason
from vmbus.machine import rundir
from vmbus.machine.bounded_log import BoundedLog, LogCopy, copy_socket
from vmbus.machine.host import ExitReason, Host, HostOptions
from vmbus.machine.migration.alone import alone
from vmbus.machine.migration.drive import MigrationFailed, Outcome, Progress
from vmbus.machine.migration.vmstate import DbusDaemon
from vmbus.machine.moving import copy_memory_again, ended, stay, transfer
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.arguments import EmulatorOptions
from vmbus.machine.qemu.launch import GuestOptions, QemuProcess, command_line
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.reload.supervisor import gone
from vmbus.machine.rundir import RunDirectory
from vmbus.machine.served import HostCommand, Served
from vmbus.machine.signals import finished
from vmbus.provision.qemu import QemuBinary

_KEPT_CONSOLE = 1 << 20
"""Bytes of the beginning, and of the end, of the console: the run directory is in memory."""
_KEPT_SERIAL = 64 << 20
"""The same for a file that the user named."""

_QUIT_TIMEOUT = 5.0
"""Seconds that QEMU may take to answer ``quit``."""


def emulator_options(
    directory: RunDirectory,
    memory_size: int,
    gateway_library: Path,
    *,
    wait: bool = True,
    migratable: bool = True,
) -> EmulatorOptions:
    """Return the emulator's options for a guest in ``directory``; ``migratable`` needs ``dbus-vmstate``."""
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


def _console(directory: RunDirectory, options: GuestOptions) -> BoundedLog | None:
    """Return the file of the guest's console; ``None`` for a terminal or the like, which QEMU writes to itself."""
    path = options.serial or directory.console
    if path.exists() and not path.is_file():
        return None
    try:
        return BoundedLog(path, _KEPT_CONSOLE if options.serial is None else _KEPT_SERIAL)
    except OSError as error:
        raise UserError(f"cannot write the guest's console to {path}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Setup:
    """The configuration of every QEMU of one guest."""

    qemu: QemuBinary
    gateway_library: Path
    memory_size: int
    options: GuestOptions
    host_options: HostOptions | None = None


class Station:
    """One QEMU with its host. Made by :meth:`open`."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.process: QemuProcess | None = None
        self.daemon: DbusDaemon | None = None
        self.command: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.console: LogCopy | None = None
        self.host: Host | None = None

    @classmethod
    async def open(
        cls,
        directory: RunDirectory,
        name: str,
        setup: Setup,
        devices: Sequence[Device],
        console: BoundedLog | None,
    ) -> Station:
        """Start QEMU, whose guest waits at its first query for a hypervisor, and attach: the guest continues.

        ``console``: the file of the guest's console; ``None``: QEMU writes it.
        """
        station = cls(directory)
        try:
            await station._open(name, setup, devices, console)
        except BaseException:
            await finished(station.close())
            raise
        return station

    @classmethod
    async def start(
        cls, directory: RunDirectory, name: str, setup: Setup, console: BoundedLog | None
    ) -> Station:
        """Start QEMU, as :meth:`open` does; another process attaches to it."""
        station = cls(directory)
        try:
            qmp = await station._start(name, setup, console)
            await qmp.close()
        except BaseException:
            await finished(station.close())
            raise
        return station

    async def _open(
        self, name: str, setup: Setup, devices: Sequence[Device], console: BoundedLog | None
    ) -> None:
        qmp = await self._start(name, setup, console)
        self.host = await Host.attach(qmp, devices, setup.host_options)

    async def _start(self, name: str, setup: Setup, console: BoundedLog | None) -> Qmp:
        """Start QEMU and connect to all that is not the host's; return its monitor."""
        directory, qemu = self.directory, setup.qemu
        if qemu.dbus_vmstate:  # QEMU connects to the daemon when it starts
            self.daemon = await DbusDaemon.start(qemu.dbus_daemon(), directory.path)
        directory.acpi_table.write_bytes(vmbus_table())
        options = emulator_options(
            directory, setup.memory_size, setup.gateway_library, migratable=self.daemon is not None
        )
        guest = replace(setup.options, console_socket=console is not None)
        line = command_line(qemu.argv_prefix, directory, options, guest, name)
        if qemu.sandbox:
            line += confined.qemu_filter(line)
        limits = confined.qemu(qemu.argv_prefix, line, directory.path, setup.options.reachable)
        self.process = QemuProcess.start(line, directory.qemu_log, qemu.environment, limits)
        qmp = await self.process.connect_qmp(directory.qmp)
        if console is not None:
            self.console = copy_socket(directory.console_socket, console)
        if setup.options.command_port:
            self.command = await asyncio.open_unix_connection(str(directory.command))
        return qmp

    @property
    def serving(self) -> Host:
        """The host. Raises :class:`~vmbus.errors.InternalError` before there is one."""
        if self.host is None:
            raise InternalError("a station without a host")
        return self.host

    async def close(self) -> None:
        """End QEMU, host and daemon, and remove their files, as far as they exist."""
        async with contextlib.AsyncExitStack() as steps:  # the last one first, and each also if another fails
            steps.callback(self.directory.remove_machine)
            if self.daemon is not None:
                steps.push_async_callback(asyncio.to_thread, self.daemon.stop)
            if self.command is not None:
                steps.callback(self.command[1].close)
            if self.console is not None:
                steps.push_async_callback(asyncio.to_thread, self.console.wait)
            if self.process is not None:
                steps.push_async_callback(asyncio.to_thread, self.process.stop)
            if self.host is not None:
                steps.push_async_callback(self.host.close)
                if self.process is not None and self.process.process.poll() is None:
                    steps.push_async_callback(self._quit, self.host)

    async def _quit(self, host: Host) -> None:
        """Ask QEMU to end; who waits for its process ends it otherwise."""
        if host.qmp.connected:
            with contextlib.suppress(QemuError, TimeoutError):  # it may end by itself at this moment
                async with asyncio.timeout(_QUIT_TIMEOUT):
                    await host.qmp.execute("quit")


class Guest:
    """A started guest."""

    def __init__(
        self,
        directory: RunDirectory,
        setup: Setup,
        station: Station,
        served: Served,
        new_devices: Callable[[Sequence[str]], Sequence[Device]] | None,
        console: BoundedLog | None,
    ) -> None:
        self.directory = directory
        self.served = served
        self._setup = setup
        self._station = station
        self._new_devices = new_devices
        self._console = console
        self._moving = False
        self._next: Station | None = None
        """A machine without a host of this process: a worker's guest moves there."""

    @property
    def host(self) -> Host:
        """The host that serves the guest now."""
        return self.served.host

    @property
    def process(self) -> QemuProcess:
        """The QEMU that runs the guest now."""
        if self._station.process is None:
            raise InternalError("a guest without a QEMU")
        return self._station.process

    @property
    def command(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """The second serial port of the guest's present QEMU; see :meth:`command_output`."""
        return self._station.command

    async def command_output(self) -> AsyncIterator[bytes]:
        """Yield the output of the second serial port, also after a move, until QEMU ends."""
        while (command := (station := self._station).command) is not None:
            while data := await command[0].read(1 << 16):
                yield data
            if self._station is station:
                return

    async def console_written(self) -> None:
        """Wait until all that the guest has printed is in the console's file, after its QEMU has ended."""
        if self._station.console is not None:
            await asyncio.to_thread(self._station.console.wait)

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
        new_devices: Callable[[Sequence[str]], Sequence[Device]] | None = None,
        memory_of: Path | None = None,
    ) -> AsyncIterator[Guest]:
        """Start QEMU, whose guest waits at its first query for a hypervisor, and attach: the guest continues.

        ``new_devices`` makes devices from their lines, for a guest that may :meth:`move`. ``memory_of``: the memory
        file of a guest that will arrive with its memory in that file.
        """
        directory = rundir.create(name)
        setup = Setup(qemu, gateway_library, memory_size, options, host_options)
        guest: Guest | None = None
        console: BoundedLog | None = None
        try:
            await directory.make_memory(memory_size, memory_of, reserve=options.reserve_memory)
            console = _console(directory, options)
            station = await Station.open(directory, directory.name, setup, devices, console)
            served = Served(station.serving, directory.path, commands)
            guest = cls(directory, setup, station, served, new_devices, console)
            served.add_command("move", guest._asked_to_move)
            served.machines = guest
            await served.start()
            yield guest
        finally:
            try:
                if guest is not None:
                    await finished(guest._end())
            finally:
                if console is not None:
                    console.close()
                directory.remove()

    async def _end(self) -> None:
        async with contextlib.AsyncExitStack() as steps:  # the last one first, and each also if another fails
            steps.push_async_callback(self._station.close)
            steps.push_async_callback(self.discard_machine)
            steps.push_async_callback(self.served.stop_listening)

    async def move(
        self, *, share_memory: bool = False, progress: Progress | None = None, timeout: float = 600.0
    ) -> Outcome:
        """Live-migrate into a new QEMU with a new host; end the old ones.

        ``share_memory``: guest memory stays in its file, which the new QEMU maps, too; it is not copied.

        Raises :class:`~vmbus.machine.migration.drive.MigrationFailed`: then the guest continues where it is.
        """
        if self._moving:
            raise MigrationFailed("this guest is being moved already")
        self._moving = True
        try:
            with alone(self.host.migration, "vmbus migrate", MigrationFailed):
                return await self._move(share_memory, progress, timeout)
        finally:
            self._moving = False

    async def _move(self, share_memory: bool, progress: Progress | None, timeout: float) -> Outcome:
        if self._new_devices is None:
            raise MigrationFailed("this guest's devices cannot be made a second time")
        lines = [line for attached in self.host.devices for line in attached.device.lines()]
        devices = await asyncio.to_thread(self._new_devices, lines)  # opens images, which may take long
        old = self._station
        try:
            new = await self._open_next(devices, share_memory)
        except BaseException:
            for device in devices:
                if not device.was_started:  # its images are open, and no host closes them
                    device.stop()
            raise
        source, target = self.host, new.serving
        try:
            outcome = await transfer(
                source,
                target,
                new.directory.path,
                share_memory=share_memory,
                progress=progress,
                timeout=timeout,
            )
        except BaseException as error:
            await finished(ended(new.close()))
            await stay(source, target, error, share_memory=share_memory)
            raise
        self._station = new  # at once: the guest runs there, and what ends this guest has to end it
        self.served.replace(target)
        if share_memory:
            await copy_memory_again(target)
        await finished(ended(self._leave(old)))
        return outcome

    async def _leave(self, old: Station) -> None:
        """End the station of before a move."""
        try:
            await old.close()
        finally:
            self.directory.point_to(self._station.directory)

    async def _open_next(self, devices: Sequence[Device], share_memory: bool) -> Station:
        """Start the QEMU that the guest moves to, with its host."""
        directory, setup = await self._prepare_next(share_memory)
        return await Station.open(directory, self.directory.name, setup, devices, self._console)

    async def _prepare_next(self, share_memory: bool) -> tuple[RunDirectory, Setup]:
        directory = rundir.within(self.directory)
        memory_of = self._station.directory.memory if share_memory else None
        try:
            await directory.make_memory(
                self._setup.memory_size, memory_of, reserve=self._setup.options.reserve_memory
            )
        except BaseException:
            directory.remove()
            raise
        return directory, replace(self._setup, options=replace(self._setup.options, incoming=True))

    # --- the machines of a guest that a worker serves ---

    async def open_machine(self, *, share_memory: bool) -> RunDirectory:
        """Start a QEMU that waits for the guest, and has no host yet; return its folder.

        ``share_memory``: it maps the guest's memory file.
        """
        directory, setup = await self._prepare_next(share_memory)
        self._next = await Station.start(directory, self.directory.name, setup, self._console)
        return directory

    async def take_machine(self) -> None:
        """End the guest's QEMU: it has moved to the one of :meth:`open_machine`."""
        if self._next is None:
            raise InternalError("there is no machine to take")
        old, self._station, self._next = self._station, self._next, None
        await finished(self._leave(old))

    async def discard_machine(self) -> None:
        """End the QEMU of :meth:`open_machine`, if there is one."""
        discarded, self._next = self._next, None
        if discarded is not None:
            await finished(discarded.close())

    def monitor(self) -> Path:
        """Return the QMP socket of the QEMU that has the guest."""
        return self._station.directory.qmp

    def has_next(self) -> bool:
        """Return whether there is the QEMU of :meth:`open_machine`."""
        return self._next is not None

    async def ended(self) -> ExitReason | None:
        """Return why QEMU has ended, after a moment for one that is about to; ``None`` while it runs."""
        process = self.process.process
        if not await gone(lambda: process.poll() is not None):
            return None
        return ExitReason.QEMU_GONE if process.returncode else ExitReason.POWERED_OFF

    async def supervise(self) -> None:
        """Let another process serve the guest, and replace it whenever it is killed; the guest needs a journal.

        Raises :class:`~vmbus.errors.UserError`: then this process serves it.
        """
        await self.served.supervise(self)

    async def _asked_to_move(self, host: Host, request: Mapping[str, Any]) -> object:
        if "save_buffer" in request:
            host.migration.buffer_size = int(request["save_buffer"])
        share = request.get("share_memory") is True
        with host.migration.driven_here():
            try:
                outcome = await self.move(share_memory=share, timeout=float(request.get("timeout", 600)))
            except OSError as error:
                raise MigrationFailed(f"the move failed: {system_reason(error)}") from error
        return outcome.as_dict()
