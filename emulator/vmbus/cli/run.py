"""``vmbus run``: start a guest, serve it, and run the command after ``--`` in it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.cli.devices import registry
from vmbus.cli.migrate import own_descriptor
from vmbus.cli.options import (
    DEFAULT_GUEST,
    MAX_VCPUS,
    add_host_options,
    add_missing_devices_option,
    add_supervise_option,
    confine,
    device_lines,
    host_options,
    limit_memory,
    seconds,
    size,
    whole_number,
)
from vmbus.cli.output import Echo, is_terminal, serving, show_exactly, tell
from vmbus.cli.serving import CONTROL_COMMANDS
from vmbus.errors import DeviceError, UsageError, UserError, VmbusError
from vmbus.machine import rundir, signals
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest, emulator_options
from vmbus.machine.host import ExitReason, Host, HostOptions
from vmbus.machine.migration import refused
from vmbus.machine.migration.addresses import check_port, descriptor_number
from vmbus.machine.migration.drive import arrived, receive
from vmbus.machine.migration.side_channel import CarrierAddress
from vmbus.machine.qemu.boot_media import BootDisk, BootMedia
from vmbus.machine.qemu.confined import qemu_filter
from vmbus.machine.qemu.image_files import check_names
from vmbus.machine.qemu.launch import GuestOptions, command_line
from vmbus.machine.qemu.qcow2 import MAGIC
from vmbus.provision.command_output import CommandOutput
from vmbus.provision.drivers import modules_for, present
from vmbus.provision.firmware import NAME as OVMF
from vmbus.provision.firmware import find_firmware
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, ROOT_MODULES, build_initramfs, parse_add
from vmbus.provision.kernel import GUESTS, GuestKernel, find_kernel, own_kernel
from vmbus.provision.modules import ModuleTree
from vmbus.provision.qemu import QemuBinary, find_qemu
from vmbus.provision.unpacked import unpacked_kernel

_EPILOG = """\
examples:
  vmbus run                                          the default guest, until it is shut down or Ctrl-C
  vmbus run -- cat /proc/version                     run a command, show its output, exit with its status
  vmbus run --guest debian-6.1 --smp 2 --device echo --add ./prog -- prog --flag
  vmbus run --kernel bzImage --modules ./lib/modules --append "debug" --serial console.txt
  vmbus run --root /dev/sda1 --device scsi,image=debian.img          boot the system on that disk
  vmbus run --root /dev/sda1 --device scsi,image=debian.img -- gcc --version    or only run a command in it
  vmbus run --cdrom debian.iso                       boot a CD-ROM; with --firmware ovmf: by UEFI
  vmbus run --disk-boot disk.img --cdrom debian.iso --firmware ovmf     install from one to the other
  vmbus run --supervise --device scsi,image=disk.img     the guest goes on if its emulator is killed
  vmbus run --dry-run                                print the QEMU command line

The kernel's console goes to --serial FILE, or to console.log in the guest's run directory
($XDG_RUNTIME_DIR/vmbus/NAME), which is removed when the guest ends. The file keeps the first and the last MiB
(--serial: the first and the last 64 MiB) of what the guest prints.
"""

AVAILABLE_MODULES = ("uio_hv_generic",)
"""Modules for modprobe in the guest, besides the drivers of the offered devices."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run",
        help="start a guest and serve it; after --, run a command in it",
        description="Starts a guest in QEMU and plays its Hyper-V host.",
        usage="vmbus run [options] [-- CMD ...]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    guest = parser.add_argument_group("the guest")
    guest.add_argument("--name", help="name of the guest (default: guest-N)")
    guest.add_argument(
        "--guest", choices=sorted(GUESTS), help=f"embedded guest to boot (default: {DEFAULT_GUEST})"
    )
    guest.add_argument(
        "--fast-boot",
        action="store_true",
        help="start the embedded guest's kernel unpacked: two seconds less, but no KASLR and no sleep (S3): QEMU "
        "loads such a kernel anew when the guest wakes",
    )
    guest.add_argument("--kernel", type=Path, metavar="FILE", help="boot a kernel image of your own")
    guest.add_argument(
        "--modules", type=Path, metavar="DIR", help="modules of that kernel, for the embedded initramfs"
    )
    guest.add_argument(
        "--initrd", type=Path, metavar="FILE", help="use an initramfs of your own instead of the embedded one"
    )
    guest.add_argument(
        "--cdrom",
        type=Path,
        metavar="FILE",
        help="boot from this image of a CD-ROM, instead of a Linux kernel",
    )
    guest.add_argument(
        "--disk-boot",
        nargs="?",
        const="",
        metavar="FILE[,format=FORMAT]",
        help="boot from this image of a disk (raw), before the CD-ROM; without a FILE: from drives that --qemu adds. "
        "Firmware has no driver for VMBus, so QEMU's own controller serves both",
    )
    guest.add_argument(
        "--firmware",
        metavar="ovmf|FILE",
        help="firmware to start with; ovmf: UEFI (`vmbus setup --firmware` fetches it) (default: SeaBIOS)",
    )
    guest.add_argument(
        "--root",
        metavar="DEVICE",
        help="continue in the file system on this device (/dev/sda1, LABEL=x, UUID=x): its init takes over, or the "
        "command after -- runs in it",
    )
    guest.add_argument(
        "--append", default="", metavar="ARGUMENTS", help="add this to the kernel's command line, as one word"
    )
    guest.add_argument(
        "--smp", type=whole_number(1, MAX_VCPUS), default=1, metavar="N", help="vCPUs (default: 1)"
    )
    guest.add_argument("--memory", type=size, default=512 << 20, metavar="SIZE", help="RAM (default: 512M)")
    guest.add_argument(
        "--no-reserve",
        action="store_true",
        help="do not reserve RAM at start: it takes room as the guest uses it, and QEMU is killed when there is none",
    )
    guest.add_argument(
        "--machine", default="q35", metavar="TYPE", help="QEMU's machine type: q35 or pc (default: q35)"
    )
    guest.add_argument("--cpu", default="max", metavar="MODEL", help="QEMU's CPU model (default: max)")
    guest.add_argument(
        "--load",
        action="append",
        default=[],
        metavar="MODULE",
        help="load one more kernel module; may be repeated",
    )
    guest.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="FILE[:PATH]",
        help="put a file into the initramfs; may be repeated",
    )
    guest.add_argument("--serial", type=Path, metavar="FILE", help="write the kernel's console to this file")
    guest.add_argument(
        "--qemu", default="", metavar="OPTIONS", help="add options to QEMU's command line, as one word"
    )
    guest.add_argument(
        "--allow",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="let QEMU use this file or folder, too, which you name later over QMP; may be repeated (see --sandbox)",
    )
    guest.add_argument(
        "--incoming",
        metavar="URI",
        help="boot nothing, but wait at this address for a migrating guest; fd:N is descriptor N of this command",
    )
    guest.add_argument(
        "--carrier",
        metavar="unix:PATH|file:PATH",
        help="with --incoming: receive the emulator's state here instead of in QEMU's stream; as "
        "`vmbus migrate --carrier`",
    )
    add_missing_devices_option(guest)
    guest.add_argument(
        "--snapshots",
        type=Path,
        metavar="FILE",
        help="qcow2 image for snapshots; created if it does not exist",
    )
    add_supervise_option(guest)
    guest.add_argument("--no-reboot", action="store_true", help="end when the guest reboots")
    add_host_options(parser)
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="end the guest and fail after this time (default: no limit)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the QEMU command line and start nothing"
    )
    parser.set_defaults(action=main)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before a guest is started."""

    name: str | None
    qemu: QemuBinary
    gateway: Path
    memory: int
    guest: GuestOptions
    devices: tuple[Device, ...]
    host: HostOptions
    new_devices: Callable[[Sequence[str]], Sequence[Device]]
    """Makes devices from their lines, for a guest that moves."""
    incoming: str | None = None
    supervise: bool = False
    """Whether a process of its own serves the guest, and is replaced when it is killed."""
    carrier: CarrierAddress | None = None
    """With ``incoming``: where the emulator's state arrives if not in QEMU's stream."""


def plan(arguments: argparse.Namespace) -> Plan:
    """Turn the command line into a plan; compile and build what is missing."""
    if arguments.allow_missing_devices and arguments.incoming is None:
        raise UsageError(
            "--allow-missing-devices goes with --incoming: only a guest that arrives can miss devices"
        )
    media = _media(arguments)
    devices = tuple(registry().create_all(device_lines(arguments)))
    booted = _linux(arguments, devices)
    qemu = find_qemu()
    if arguments.snapshots is not None and not arguments.dry_run:
        make_image(qemu, arguments.snapshots)
    try:
        extra = shlex.split(arguments.qemu)
    except ValueError as error:
        raise UsageError(f"--qemu {arguments.qemu}: {error}; quote it as for a shell") from error
    if arguments.no_reboot or arguments.command:
        extra.append("-no-reboot")
    return Plan(
        name=arguments.name,
        qemu=qemu,
        gateway=gateway_build.build(),
        memory=arguments.memory,
        guest=GuestOptions(
            kernel=booted.kernel,
            initrd=booted.initrd,
            append=booted.append,
            media=media,
            machine=arguments.machine,
            # The gateway ends interrupts through the local APIC's memory page, which x2APIC mode has not.
            cpu=f"{arguments.cpu},-x2apic" if arguments.auto_eoi else arguments.cpu,
            smp=arguments.smp,
            serial=arguments.serial.absolute() if arguments.serial else None,
            command_port=bool(arguments.command),
            incoming=arguments.incoming is not None,
            snapshots=arguments.snapshots.absolute() if arguments.snapshots else None,
            reachable=tuple(_reachable(arguments)),
            reserve_memory=not arguments.no_reserve,
            extra=tuple(extra),
        ),
        devices=devices,
        host=host_options(arguments),
        new_devices=registry().create_all,
        incoming=_incoming(arguments.incoming),
        carrier=_carrier(arguments),
        supervise=arguments.supervise,
    )


@dataclass(frozen=True, slots=True)
class _Linux:
    """What QEMU loads; nothing for a guest that its firmware boots."""

    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""


_FOR_LINUX = ("initrd", "modules", "root", "append", "load", "add", "fast_boot")
"""Options that need a kernel that QEMU loads."""


def _linux(arguments: argparse.Namespace, devices: Sequence[Device]) -> _Linux:
    """Return the kernel to boot, and make its initramfs."""
    firmware_boots = arguments.cdrom is not None or arguments.disk_boot is not None
    if firmware_boots and arguments.kernel is None and arguments.guest is None:
        given = [f"--{name.replace('_', '-')}" for name in _FOR_LINUX if getattr(arguments, name)]
        if given or arguments.command:
            raise UsageError(
                f"{given[0] if given else 'a command after --'} is for a Linux kernel that QEMU loads, and --cdrom "
                "and --disk-boot let the firmware load something else: name the kernel, too (--guest or --kernel), "
                "or leave it out"
            )
        return _Linux()
    kernel = _kernel(arguments)
    if arguments.initrd is not None:
        if arguments.command or arguments.add:
            raise UsageError("--add and a command after -- need the embedded initramfs: leave out --initrd")
        if not arguments.initrd.is_file():
            raise UsageError(f"--initrd {arguments.initrd}: there is no such file")
        initrd = arguments.initrd
    else:
        more = [*(present(kernel, ROOT_MODULES) if arguments.root else ()), *arguments.load]
        initrd = build_initramfs(
            kernel,
            modules=guest_modules(kernel, devices, more),
            available=present(kernel, AVAILABLE_MODULES),
            add=[parse_add(line) for line in arguments.add],
            command=arguments.command or None,
            in_root=arguments.root is not None,
        )
    root = [f"root={arguments.root}"] if arguments.root else []
    if arguments.fast_boot and arguments.firmware is not None:
        raise UsageError("--fast-boot needs QEMU's own firmware: leave out --firmware, or --fast-boot")
    image = unpacked_kernel(kernel) if arguments.fast_boot else kernel.vmlinuz
    return _Linux(image, initrd, " ".join([*KERNEL_ARGUMENTS, *root, arguments.append]).strip())


def _media(arguments: argparse.Namespace) -> BootMedia:
    """Return what the firmware boots from, after a look at the files."""
    if arguments.disk_boot == "" and not arguments.qemu:
        raise UsageError(
            "--disk-boot without a FILE boots from a drive that --qemu adds, and there is none; firmware cannot boot "
            "from --device scsi, because it has no driver for VMBus: name the image with --disk-boot FILE"
        )
    firmware = None
    if arguments.firmware is not None:
        firmware = find_firmware() if arguments.firmware == OVMF else Path(arguments.firmware).absolute()
    media = BootMedia(
        disk=BootDisk.parse(arguments.disk_boot) if arguments.disk_boot else None,
        cdrom=arguments.cdrom.absolute() if arguments.cdrom is not None else None,
        firmware=firmware,
    )
    media.check()
    return media


def _reachable(arguments: argparse.Namespace) -> list[Path]:
    """Return what QEMU may use besides the files on its command line."""
    found = list(arguments.allow)
    if arguments.incoming is not None and arguments.incoming.startswith("unix:"):
        found.append(Path(arguments.incoming.removeprefix("unix:")).absolute().parent)
    return found


def _carrier(arguments: argparse.Namespace) -> CarrierAddress | None:
    if arguments.carrier is None:
        return None
    if arguments.incoming is None:
        raise UsageError("--carrier goes with --incoming: without a migrating guest no state arrives")
    return CarrierAddress.parse(arguments.carrier)


def _incoming(uri: str | None) -> str | None:
    if uri is not None:
        check_port(uri)
        if (number := descriptor_number(uri)) is not None:
            own_descriptor(number)
    return uri


def make_image(qemu: QemuBinary, path: Path) -> None:
    """Create an image that holds nothing but snapshots, unless the file exists."""
    if path.exists():
        try:
            check_names(path, "qcow2")
            with path.open("rb") as file:
                is_qcow2 = file.read(len(MAGIC)) == MAGIC
        except (DeviceError, OSError) as error:
            raise UserError(f"cannot use {path} for snapshots: {error}") from error
        if not is_qcow2:
            raise UserError(
                f"cannot use {path} for snapshots: it is not a qcow2 image; name one, or a new file"
            )
        return
    command = [*qemu.qemu_img(), "create", "-q", "-f", "qcow2", str(path.absolute()), "64K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"cannot create {path}: {done.stderr.strip()}")


def _kernel(arguments: argparse.Namespace) -> GuestKernel:
    if arguments.kernel is not None:
        if arguments.guest is not None:
            raise UsageError("--guest and --kernel exclude each other: give one of them")
        if arguments.fast_boot:
            raise UsageError(
                "--fast-boot is for the embedded guests: give --kernel an unpacked kernel (vmlinux) instead"
            )
        return own_kernel(arguments.kernel, arguments.modules)
    if arguments.modules is not None:
        raise UsageError("--modules goes with --kernel: the embedded guests have their own modules")
    return find_kernel(arguments.guest or DEFAULT_GUEST)


def guest_modules(
    kernel: GuestKernel, devices: Sequence[Device], more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the modules to load for ``devices``, and ``more``; only the latter for a kernel without modules."""
    if kernel.modules is None:
        return tuple(more)
    interfaces = [device.offer().interface_id for device in devices]
    return tuple(dict.fromkeys([*modules_for(ModuleTree(kernel.modules), interfaces), *more]))


def main(arguments: argparse.Namespace) -> int:
    confine(arguments)
    if arguments.name is not None:
        rundir.check_name(arguments.name)
    decided = plan(arguments)
    if arguments.dry_run:
        directory = rundir.RunDirectory(
            rundir.runtime_root() / (decided.name or "guest-1"),
            rundir.runtime_root() / (decided.name or "guest-1") / "memory",
        )
        options = emulator_options(
            directory, decided.memory, decided.gateway, migratable=decided.qemu.dbus_vmstate
        )
        line = command_line(decided.qemu.argv_prefix, directory, options, decided.guest)
        show_exactly(shlex.join([*line, *(qemu_filter(line) if decided.qemu.sandbox else ())]))
        return 0
    limit_memory(arguments)
    with serving():
        return signals.run(_run(decided, bool(arguments.command), arguments.timeout))


async def _run(decided: Plan, command: bool, limit: float | None) -> int:
    try:
        async with asyncio.timeout(limit):
            return await run_guest(decided, Echo() if command else None)
    except TimeoutError:
        raise UserError(f"the guest did not end within {limit:g} s (--timeout), so it was ended") from None


async def run_guest(decided: Plan, output: Echo | None) -> int:
    """Start and serve the guest until it ends, passing what its command prints to ``output``.

    Return the command's exit status, or 0 for a guest without a command that was powered off.
    """
    async with Guest.start(
        name=decided.name,
        qemu=decided.qemu,
        gateway_library=decided.gateway,
        memory_size=decided.memory,
        options=decided.guest,
        devices=decided.devices,
        host_options=decided.host,
        commands=CONTROL_COMMANDS,
        new_devices=decided.new_devices,
    ) as guest:
        if decided.incoming is not None:
            number = descriptor_number(decided.incoming)
            addresses = (decided.incoming, *(refused.of_descriptor(number) if number is not None else ()))
            try:
                await _receive(guest.host, decided.incoming, decided.carrier)
                await arrived(guest.host.migration, None)
            except VmbusError as error:
                for each in addresses:
                    refused.leave(each, str(error))
                raise
        if decided.supervise:
            await guest.supervise()
        if output is None or guest.command is None:
            if is_terminal(sys.stderr):
                tell(
                    f"serving {guest.directory.name}; `vmbus status {guest.directory.name}` shows its channels, "
                    "Ctrl-C ends it"
                )
            exit_reason = await guest.served.serve()
            if exit_reason is ExitReason.QEMU_GONE:
                await asyncio.to_thread(guest.process.stop)  # its sockets close before it has ended
                raise UserError(f"{guest.process.ending()}, unexpectedly:\n{guest.process.messages()}")
            return 0
        return await _command(guest, output, under_way=decided.incoming is not None)


async def _receive(host: Host, uri: str, carrier: CarrierAddress | None) -> None:
    number = descriptor_number(uri)
    await receive(host.migration, uri, descriptor=number, carrier=carrier)
    if number is not None:
        os.close(number)  # QEMU has a copy; the peer must see it when QEMU closes that


async def _command(guest: Guest, output: Echo, *, under_way: bool) -> int:
    """Pass on what the guest's command prints; return its exit status, or 0 if the guest moved elsewhere.

    ``under_way``: the command was started before the guest arrived here.
    """
    received = CommandOutput()
    received.started = under_way

    async def read() -> None:
        async for data in guest.command_output():
            if found := received.feed(data):
                output.write(found)
                await output.room()
        output.write(received.close(), final=True)

    def stop_unread(reading: asyncio.Future[None]) -> None:
        if not reading.cancelled() and reading.exception() is not None:
            guest.served.stop()

    reading = asyncio.ensure_future(read())
    reading.add_done_callback(stop_unread)
    exit_reason = await guest.served.serve()
    output.lift_limit()
    if exit_reason in (ExitReason.STOPPED, ExitReason.MIGRATED):
        reading.cancel()  # the port stays open as long as QEMU runs
    with contextlib.suppress(asyncio.CancelledError):
        await reading
    if received.status is not None:
        output.owe()
        return received.status
    if exit_reason is ExitReason.STOPPED:
        return 130
    if exit_reason is ExitReason.MIGRATED:
        tell("vmbus run: the guest was migrated, and its command continues there")
        return 0
    await guest.console_written()
    how = ""
    if exit_reason is ExitReason.QEMU_GONE:
        await asyncio.to_thread(guest.process.stop)  # its sockets close before it has ended
        how = f": {guest.process.ending()}"
    raise UserError(_explain(guest, received, how))


def _explain(guest: Guest, received: CommandOutput, how: str) -> str:
    console = guest.directory.console
    tail = console.read_text(errors="replace").splitlines()[-15:] if console.exists() else []
    what = "ended before its command did" if received.started else "ended before its command started"
    lines = "\n".join(tail) or "(nothing; see the file of --serial if you gave one)"
    return f"the guest {what}{how}; the end of its console:\n{lines}\n{guest.process.messages()}".rstrip()
