"""Boots real kernels for tests: every wait is for an event, with a limit, and says what it waited for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmbus.bus.io.device import Device
from vmbus.cli.devices import registry
from vmbus.cli.run import AVAILABLE_MODULES
from vmbus.cli.serving import CONTROL_COMMANDS
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.host import ExitReason, HostOptions
from vmbus.machine.qemu.launch import GuestOptions
from vmbus.machine.served import status
from vmbus.provision.command_output import CommandOutput
from vmbus.provision.drivers import present
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, ROOT_MODULES, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import find_qemu

LOADED_MODULES = ("hv_vmbus", "hv_utils")
STORAGE_MODULES = ("hv_storvsc", "sd_mod")
DEFAULT_DEVICES = ("heartbeat,interval=0.2", "shutdown", "timesync")

#: Seconds in which any guest must have got anywhere; these machines are slow and shared.
LIMIT = 180.0


@dataclass
class Booted:
    """A guest under test."""

    guest: Guest
    console_path: Path
    received: CommandOutput = field(default_factory=CommandOutput)
    output: bytearray = field(default_factory=bytearray)

    @property
    def host(self):
        return self.guest.host

    def console(self) -> str:
        return self.console_path.read_text(errors="replace") if self.console_path.exists() else ""

    def status(self) -> dict:
        return status(self.guest.host, self.guest.directory.name)

    def device(self, name: str) -> Device:
        return next(a.device for a in self.host.devices if a.device.name == name)

    def channel(self, name: str) -> dict:
        return next(channel for channel in self.status()["channels"] if channel["device"] == name)

    async def until(self, condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
        """Wait until ``condition()`` holds; fails with ``what`` and the end of the console."""
        end = time.monotonic() + limit
        serving = self._serving
        while not condition():
            if serving.done():
                serving.result()
                raise AssertionError(f"the guest ended while waiting for {what}\n{self.tail()}")
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {limit:g} s\n{self.tail()}")
            await asyncio.sleep(0.02)

    def tail(self, lines: int = 40) -> str:
        console = "\n".join(self.console().splitlines()[-lines:])
        return f"--- output ---\n{self.output.decode(errors='replace')}\n--- console ---\n{console}"

    async def finish(self, limit: float = LIMIT) -> int | None:
        """Wait until the guest has powered off; the status of its command."""
        async with asyncio.timeout(limit):
            if self._reading is not None:
                await self._reading
            exit_reason = await self._serving
        assert exit_reason is ExitReason.POWERED_OFF, f"{exit_reason}\n{self.tail()}"
        return self.received.status

    async def says(self, text: str, limit: float = LIMIT) -> None:
        """Wait for ``text`` in the command's output."""
        await self.until(lambda: text.encode() in self.output, f"{text!r} in the command's output", limit)

    def tell(self, line: str) -> None:
        """A line for whoever reads ``/dev/ttyS1`` in the guest, where its command's output goes."""
        assert self.guest.command is not None
        self.guest.command[1].write(f"{line}\n".encode())

    def start_following(self) -> None:
        self._serving = asyncio.ensure_future(self.guest.served.serve())
        self._reading = asyncio.ensure_future(self._read()) if self.guest.command else None

    async def _read(self) -> None:
        async for data in self.guest.command_output():
            self.output += self.received.feed(data)
        self.output += self.received.close()

    async def stop_following(self) -> None:
        for task in (self._reading, self._serving):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


def nothing_lost(guest: Booted) -> bool:
    """Every heartbeat but the one under way was answered, once. A late answer is no loss."""
    beat = guest.channel("heartbeat")["details"]
    return beat["sequence"] - beat["answers"] in (0, 1) and not beat["odd_answers"]


@contextlib.asynccontextmanager
async def boot(
    directory: Path,
    *,
    kernel: str = "debian-6.12",
    command: Sequence[str] | None = None,
    devices: Sequence[str] = DEFAULT_DEVICES,
    smp: int = 1,
    memory: int = 512,
    machine: str = "q35",
    append: str = "",
    root: str | None = None,
    add: Sequence[tuple[Path, str]] = (),
    load: Sequence[str] = LOADED_MODULES,
    host_options: HostOptions | None = None,
    extra: Sequence[str] = (),
) -> AsyncIterator[Booted]:
    """Start a guest (memory in MiB) and serve it; it is ended on the way out whatever happens.

    ``root``: the disk's file system to go on in, as ``vmbus run --root``.
    """
    found = find_kernel(kernel)
    if root is not None:
        append = f"root={root} {append}"
        load = (*load, *STORAGE_MODULES, *present(found, ROOT_MODULES))
    console = directory / "console.log"
    options = GuestOptions(
        kernel=found.vmlinuz,
        initrd=build_initramfs(
            found,
            modules=load,
            available=AVAILABLE_MODULES,
            add=add,
            command=command,
            in_root=root is not None,
        ),
        append=" ".join([*KERNEL_ARGUMENTS, append]),
        machine=machine,
        smp=smp,
        serial=console,
        command_port=command is not None,
        extra=tuple(extra),
    )

    async with Guest.start(
        name=None,
        qemu=find_qemu(),
        gateway_library=gateway_build.build(),
        memory_size=memory << 20,
        options=options,
        devices=registry().create_all(devices),
        host_options=host_options,
        new_devices=registry().create_all,
        commands=CONTROL_COMMANDS,
    ) as guest:
        booted = Booted(guest, console)
        booted.start_following()
        try:
            yield booted
        finally:
            await booted.stop_following()
