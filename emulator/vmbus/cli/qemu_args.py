"""``vmbus qemu-args``: print what to add to one's own QEMU so that the emulator can attach."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from vmbus.cli.options import size
from vmbus.cli.output import show_exactly, show_json, tell
from vmbus.errors import UsageError, UserError
from vmbus.machine import unix_path
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.migration.vmstate import configure_daemon
from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.arguments import EmulatorOptions, libvirt
from vmbus.machine.qemu.example import readconfig_file
from vmbus.private import check_only_mine

_EPILOG = """\
examples:
  mkdir -m 700 /tmp/vm && vmbus qemu-args --dir /tmp/vm --memory 2G
  qemu-system-x86_64 -cpu max -smp 1,maxcpus=2 $(vmbus qemu-args --dir /tmp/vm) -kernel bzImage ...
  vmbus attach --qmp /tmp/vm/emulator-qmp.sock

All of the guest's RAM is in --memory: DIMMs and virtio-mem are out of the emulator's reach.
Needs QEMU 11.1 or newer with TCG, and maxcpus=2 or more: in a machine for one vCPU only, TCG does not make the
guest's locked instructions atomic, and signals get lost. The directory must exist, and be closed to other users: QEMU
creates its sockets and its memory file there. The ACPI table is written to it now.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "qemu-args",
        help="print what to add to your own QEMU command line",
        description="Prints the options that a QEMU needs for the emulator to attach to it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(),
        help="directory for the sockets and the memory file (default: the current one)",
    )
    parser.add_argument(
        "--memory", type=size, default=1 << 30, metavar="SIZE", help="guest memory (default: 1G)"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="let the guest boot without Hyper-V if no emulator is attached"
    )
    parser.add_argument(
        "--migratable",
        action="store_true",
        help="include the D-Bus connection that carries the emulator's state in migrations and snapshots; its daemon "
        "has to be started before QEMU, and the command for that is printed on standard error",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--readconfig", action="store_true", help="print a file for -readconfig")
    form.add_argument("--libvirt", action="store_true", help="print libvirt's <qemu:commandline>")
    form.add_argument("--json", action="store_true", help="print a JSON list of words")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    directory = arguments.dir.resolve()
    if not directory.is_dir():
        raise UsageError(
            f"--dir {arguments.dir}: there is no such directory; create it with `mkdir -m 700 {arguments.dir}`"
        )
    try:
        check_only_mine(directory, f"use a folder of yours alone, as `mkdir -m 700 {arguments.dir}` makes it")
    except UserError as error:
        raise UsageError(f"--dir {arguments.dir}: {error}") from None
    if not unix_path.fits(longest := directory / "emulator-qmp.sock"):
        raise UsageError(
            f"--dir {arguments.dir}: the path {longest} is too long for a socket, {unix_path.MAX_BYTES} bytes is the "
            "limit: use a folder with a shorter path"
        )
    table = directory / "vmbus.aml"
    table.write_bytes(vmbus_table())
    options = EmulatorOptions(
        memory_path=directory / "memory",
        memory_size=arguments.memory,
        gateway_library=gateway_build.build(),
        gateway_socket=directory / "gateway.sock",
        qtest_socket=directory / "qtest.sock",
        qmp_socket=directory / "emulator-qmp.sock",
        acpi_table=table,
        wait=not arguments.no_wait,
        dbus_socket=directory / "dbus.sock" if arguments.migratable else None,
    )
    if arguments.migratable:
        configuration = directory / "dbus.conf"
        configuration.write_text(configure_daemon(directory / "dbus.sock"))
        tell(f"start first: dbus-daemon --config-file={configuration} --nofork --nopidfile")
    if arguments.readconfig:
        show_exactly(readconfig_file(options).rstrip("\n"))
    elif arguments.libvirt:
        show_exactly(libvirt(options.options()).rstrip("\n"))
    elif arguments.json:
        show_json(options.argv())
    else:
        show_exactly(shlex.join(options.argv()))
    return 0
