"""Boots real kernels for tests: every wait is for an event, ends when the event cannot come, and says what it was."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.cli.devices import registry
from vmbus.cli.run import AVAILABLE_MODULES
from vmbus.cli.serving import CONTROL_COMMANDS
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.host import ExitReason, Host, HostOptions
from vmbus.machine.qemu.launch import GuestOptions
from vmbus.machine.served import status
from vmbus.provision.command_output import CommandOutput
from vmbus.provision.drivers import present
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, ROOT_MODULES, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import find_qemu
from vmbus.provision.unpacked import fastest_image
from vmbus_devices.shutdown import Shutdown

from tests.guest.waiting import LIMIT, Side, end_of, reporting, section, until, while_alive

LOADED_MODULES = ("hv_vmbus", "hv_utils")
STORAGE_MODULES = ("hv_storvsc", "sd_mod")
DEFAULT_DEVICES = ("heartbeat,interval=0.2", "shutdown", "timesync")

RESERVED_MEMORY = 2048
"""MiB; guests with more are for the layout of their memory, and use little of it."""

PANIC = "Kernel panic - not syncing"
_PANIC_CHECK_INTERVAL = 0.5


@dataclass(eq=False)
class Booted:
    """A guest under test, and a :class:`~tests.guest.waiting.Side`: it ends with its host, its QEMU or its kernel.

    ::

        await guest.until(lambda: guest.host.events.resets, "reset")
        await guest.says("ready")
    """

    guest: Guest
    console_path: Path
    received: CommandOutput = field(default_factory=CommandOutput)
    output: bytearray = field(default_factory=bytearray)
    may_panic: bool = False
    """The test makes the kernel panic: a wait goes on after that."""
    failure_word: bytes = b""
    """What the guest's command prints when it fails; nothing can be expected of it after that."""

    _serving: asyncio.Task[ExitReason] | None = None
    _reading: asyncio.Task[None] | None = None
    _console_checked: float = 0.0

    @property
    def host(self) -> Host:
        return self.guest.host

    @property
    def name(self) -> str:
        return self.guest.directory.name

    def console(self) -> str:
        return self.console_path.read_text(errors="replace") if self.console_path.exists() else ""

    def status(self) -> dict[str, Any]:
        return status(self.guest.host, self.name)

    def device(self, name: str) -> Device:
        return next(a.device for a in self.host.devices if a.device.name == name)

    def channel(self, name: str) -> dict[str, Any]:
        return next(channel for channel in self.status()["channels"] if channel["device"] == name)

    # --- waiting ---

    def gone(self) -> str:
        """Return why the guest does nothing any more; empty while it lives."""
        serving, reading = self._serving, self._reading
        if serving is not None and serving.done():
            if not serving.cancelled() and (error := serving.exception()) is not None:
                return f"the host of {self.name} failed: {error!r}"
            return f"{self.name} ended" + ("" if serving.cancelled() else f": {serving.result().value}")
        if (
            reading is not None
            and reading.done()
            and not reading.cancelled()
            and (error := reading.exception())
        ):
            return f"the output of {self.name}'s command could not be read: {error!r}"
        if serving is None and (code := self.guest.process.process.poll()) is not None:
            return f"the QEMU of {self.name} ended with status {code}"
        if self.failure_word and self.failure_word in self.output:
            return f"the command of {self.name} says {self.failure_word.decode()!r}"
        return "" if self.may_panic else self._panic()

    def _panic(self) -> str:
        now = time.monotonic()
        if self._console_checked <= now:
            self._console_checked = now + _PANIC_CHECK_INTERVAL
            if self.host.events.crashes or PANIC in end_of(self.console_path, 80):
                return f"the kernel of {self.name} panicked"
        return ""

    async def until(
        self,
        condition: Callable[[], object],
        what: str,
        *others: Side,
        timeout: float = LIMIT,
    ) -> None:
        """Wait until ``condition()`` holds; ends at once when the guest, or one of ``others``, has ended."""
        await until(condition, what, self, *others, timeout=timeout)

    async def migration(self, condition: Callable[[], bool], what: str, *others: Side) -> None:
        """Wait as :meth:`until` does for a state of the guest's migration; each event is looked at, however short."""
        async with while_alive(what, self, *others):
            await self.host.migration.until(condition, LIMIT)

    async def shut_down(self, request: str = "shutdown") -> str:
        """Ask the guest's shutdown driver; return its answer."""
        result: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        device = self.device("shutdown")
        assert isinstance(device, Shutdown)
        device.shut_down(request, result.set_result)
        async with while_alive("answer to a shutdown request", self):
            return str(await result)

    async def says(self, text: str, timeout: float = LIMIT) -> None:
        """Wait for ``text`` in the command's output; ends at once when the command has ended."""
        await self.until(
            lambda: text.encode() in self.output,
            f"{text!r} in the command's output",
            _Command(self),
            timeout=timeout,
        )

    async def more_beats(self, count: int = 3) -> None:
        """Wait for ``count`` more heartbeats; ends at once when the channel is refused or taken away."""
        before = self._beats()
        await self.until(
            lambda: self._beats() >= before + count, f"{count} more heartbeats", _Heartbeat(self)
        )

    def _beats(self) -> int:
        return int(self.device("heartbeat").status()["answers"])

    async def finish(self, timeout: float = LIMIT) -> int | None:
        """Wait until the guest has powered off; return the exit status of its command."""
        serving, reading = self._serving, self._reading
        assert serving is not None
        # The end is what is waited for: only a panic makes it impossible.
        await until(
            lambda: serving.done() and (reading is None or reading.done()),
            "end of the guest",
            _Panic(self),
            timeout=timeout,
        )
        if reading is not None:
            await reading
        exit_reason = await serving
        await self.guest.console_written()
        assert exit_reason is ExitReason.POWERED_OFF, f"{exit_reason}\n{self.tail()}"
        return self.received.status

    async def exit_reason(self, timeout: float = LIMIT) -> ExitReason:
        """Wait for the end of the host's service; return its reason."""
        serving = self._serving
        assert serving is not None
        await until(serving.done, "end of the guest", _Panic(self), timeout=timeout)
        return await serving

    # --- reports ---

    def lines_of_failure(self, word: str = "bad-") -> list[str]:
        """Return the lines of the command's output that begin with ``word``.

        A search in the whole output finds the word in checksums, too: one MD5 in 140 contains "bad".
        """
        return [line for line in self.output.decode(errors="replace").splitlines() if line.startswith(word)]

    def tail(self, lines: int = 40) -> str:
        """Return the command's output and the end of the console."""
        output = self.output.decode(errors="replace")[-8000:]
        return section("output", output) + "\n" + section("console", end_of(self.console_path, lines))

    def report(self) -> str:
        """Return output, console, QEMU's messages and the emulator's status."""
        try:
            found = json.dumps(self.status(), indent=1, default=str)
        except Exception as error:  # noqa: BLE001  its memory may be unmapped already
            found = repr(error)
        log = end_of(self.guest.directory.qemu_log)
        parts = (self.tail(), section("QEMU", log), section("vmbus status", found))
        return f"=== guest {self.name} ===\n" + "\n".join(parts)

    # --- the command's port ---

    def tell(self, line: str) -> None:
        """Send a line to whatever reads ``/dev/ttyS1`` in the guest, where its command's output goes.

        Only once the command has written something: Linux drops what came before it opened the port.
        """
        assert self.guest.command is not None
        assert self.output, "the command has not begun, and would not get this line"
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


@dataclass(frozen=True)
class _Part:
    """Something of a guest that can end, or fail, alone."""

    guest: Booted

    def gone(self) -> str:
        raise NotImplementedError

    def report(self) -> str:
        return ""  # the guest's own report has it


class _Command(_Part):
    def gone(self) -> str:
        if self.guest.received.trailer_seen or self.guest.received.status is not None:
            return "the command has ended"
        return ""


class _Panic(_Part):
    def gone(self) -> str:
        return "" if self.guest.may_panic else self.guest._panic()

    def report(self) -> str:
        return self.guest.report()


class _Heartbeat(_Part):
    def gone(self) -> str:
        found = [each for each in self.guest.status()["channels"] if each["device"] == "heartbeat"]
        if not found:
            return "there is no heartbeat channel any more"
        refusals = found[0]["refusals"]
        return f"the heartbeat channel has refused {refusals}" if refusals else ""


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
    may_panic: bool = False,
    compressed: bool = False,
) -> AsyncIterator[Booted]:
    """Start a guest (memory in MiB) and serve it; it is ended on the way out, whatever happens.

    A failure inside carries the guest's report.

    ``root``: the disk's file system to go on in, as ``vmbus run --root``. ``compressed``: boot the image as it is
    distributed; it takes two seconds longer, and the kernel chooses its own address (KASLR).
    """
    found = find_kernel(kernel)
    if root is not None:
        append = f"root={root} {append}"
        load = (*load, *STORAGE_MODULES, *present(found, ROOT_MODULES))
    console = directory / "console.log"
    options = GuestOptions(
        kernel=found.vmlinuz if compressed else fastest_image(found),
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
        reserve_memory=memory <= RESERVED_MEMORY,
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
        booted = Booted(guest, console, may_panic=may_panic)
        booted.start_following()
        try:
            with reporting(lambda: (booted,)):
                yield booted
        finally:
            await booted.stop_following()
