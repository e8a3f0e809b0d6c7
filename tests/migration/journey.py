"""A guest that travels from one QEMU and emulator to the next, within one test process."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vmbus.bus.io.device import Device
from vmbus.cli.devices import registry
from vmbus.cli.run import AVAILABLE_MODULES
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.migration.drive import Outcome, arrived, migrate, receive
from vmbus.machine.qemu.launch import GuestOptions
from vmbus.provision.command_output import CommandOutput
from vmbus.provision.drivers import present
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, ROOT_MODULES, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.qemu import QemuBinary, find_qemu
from vmbus.provision.unpacked import fastest_image

from tests.guest.harness import LOADED_MODULES, STORAGE_MODULES, Booted
from tests.guest.waiting import LIMIT, reporting, while_alive


@dataclass
class Journey:
    """Where the guest is (``here``), and how to make a place for it to go to."""

    folder: Path
    options: GuestOptions
    memory: int
    devices: Sequence[str]
    host_options: HostOptions | None
    qemu: QemuBinary = field(default_factory=find_qemu)
    here: Booted = field(init=False)
    stations: dict[Booted, contextlib.AsyncExitStack] = field(default_factory=dict)
    """The places that have not been ended."""
    begun: int = 0
    moves: int = 0

    async def begin(
        self,
        options: GuestOptions,
        *,
        devices: Sequence[str] | None = None,
        memory_of: Booted | None = None,
    ) -> Booted:
        """A new QEMU and emulator; with the memory file ``memory_of`` another place, if it is to be shared."""
        console = self.folder / f"console-{self.begun}.log"
        self.begun += 1
        stack = contextlib.AsyncExitStack()
        guest = await stack.enter_async_context(
            Guest.start(
                name=None,
                qemu=self.qemu,
                gateway_library=gateway_build.build(),
                memory_size=self.memory,
                options=replace(options, serial=console),
                devices=registry().create_all(devices or self.devices),
                host_options=self.host_options,
                memory_of=memory_of.guest.directory.memory if memory_of else None,
                new_devices=registry().create_all,
            )
        )
        station = Booted(guest, console)
        self.stations[station] = stack
        return station

    async def target(self, *, devices: Sequence[str] | None = None) -> Booted:
        """A place to go to, listening."""
        there = await self.begin(replace(self.options, incoming=True), devices=devices)
        await receive(there.host.migration, self.uri(there))
        return there

    def uri(self, there: Booted) -> str:
        return f"unix:{there.guest.directory.path}/migration.sock"

    async def move(self, there: Booted | None = None) -> Outcome:
        """Migrate to ``there``, or to a new place; the one before is ended."""
        before = self.here
        there = there or await self.target()
        async with while_alive("end of the migration", before, there):
            outcome = await migrate(before.host.migration, self.uri(there), timeout=LIMIT)
            await arrived(there.host.migration, timeout=LIMIT)
        await self.settle_at(there)
        return outcome

    async def settle_at(self, there: Booted) -> None:
        """The guest is there now."""
        before = self.here
        await before.stop_following()
        await self._end(before)
        there.output, there.received = before.output, before.received
        there.may_panic, there.failure_word = before.may_panic, before.failure_word
        there.start_following()
        self.here = there
        self.moves += 1

    async def leave(self, there: Booted) -> None:
        """End a place that the guest did not come to."""
        await self._end(there)

    async def _end(self, station: Booted) -> None:
        await self.stations.pop(station).aclose()

    def sides(self) -> list[Booted]:
        """Every place that has not been ended: where the guest is, and where it may go."""
        return list(self.stations)

    async def close(self) -> None:
        """End every place that there still is."""
        while self.stations:
            await self.stations.popitem()[1].aclose()

    @property
    def host(self) -> Host:
        return self.here.host

    def device(self, name: str) -> Device:
        return self.here.device(name)


def machine(
    folder: Path,
    *,
    kernel: str = "debian-6.12",
    command: Sequence[str] | None = None,
    smp: int = 1,
    add: Sequence[tuple[Path, str]] = (),
    load: Sequence[str] = LOADED_MODULES,
    append: str = "",
    root: str | None = None,
    snapshots: bool = False,
    extra: Sequence[str] = (),
    reachable: Sequence[Path] = (),
    compressed: bool = False,
) -> GuestOptions:
    """A guest that can travel, as every QEMU of its journey is started with it. ``root``: as ``vmbus run --root``.

    ``reachable``: files and folders that QEMU may use, besides those of ``-drive`` and the like on its command line.
    ``compressed``: as for :func:`tests.guest.harness.boot`.
    """
    found = find_kernel(kernel)
    if root is not None:
        append = f"root={root} {append}"
        load = (*load, *STORAGE_MODULES, *present(found, ROOT_MODULES))
    image = folder / "snapshots.qcow2"
    if snapshots:
        subprocess.run(
            [*find_qemu().qemu_img(), "create", "-q", "-f", "qcow2", str(image), "64K"], check=True
        )
    return GuestOptions(
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
        smp=smp,
        command_port=command is not None,
        snapshots=image if snapshots else None,
        extra=tuple(extra),
        reachable=tuple(reachable),
    )


@contextlib.asynccontextmanager
async def journey(
    folder: Path,
    *,
    kernel: str = "debian-6.12",
    command: Sequence[str] | None = None,
    devices: Sequence[str] = ("heartbeat,interval=0.05", "shutdown"),
    smp: int = 1,
    memory: int = 256,
    add: Sequence[tuple[Path, str]] = (),
    load: Sequence[str] = LOADED_MODULES,
    append: str = "",
    root: str | None = None,
    host_options: HostOptions | None = None,
    snapshots: bool = False,
    extra: Sequence[str] = (),
    reachable: Sequence[Path] = (),
    compressed: bool = False,
    dbus: bool = True,
) -> AsyncIterator[Journey]:
    """Boot a guest (memory in MiB) that can travel; without ``dbus`` its QEMUs carry no state of the emulator's."""
    options = machine(
        folder,
        kernel=kernel,
        command=command,
        smp=smp,
        add=add,
        load=load,
        append=append,
        root=root,
        snapshots=snapshots,
        extra=extra,
        reachable=reachable,
        compressed=compressed,
    )
    qemu = replace(find_qemu(), dbus_vmstate=dbus)
    made = Journey(folder, options, memory << 20, devices, host_options, qemu)
    try:
        made.here = await made.begin(options)
        made.here.received, made.here.output = CommandOutput(), bytearray()
        made.here.start_following()
        with reporting(made.sides):
            yield made
    finally:
        if hasattr(made, "here"):
            await made.here.stop_following()
        await made.close()
