"""``vmbus qemu-args``: what to add to one's own QEMU so that the emulator can attach."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from vmbus.cli.options import size
from vmbus.errors import UsageError
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.migration.vmstate import configure_daemon
from vmbus.machine.qemu.acpi import vmbus_table
from vmbus.machine.qemu.arguments import EmulatorOptions, libvirt
from vmbus.machine.qemu.example import readconfig_file

_EPILOG = """\
examples:
  mkdir -m 700 /tmp/vm && vmbus qemu-args --dir /tmp/vm --memory 2G
  qemu-system-x86_64 -cpu max -smp 1,maxcpus=2 $(vmbus qemu-args --dir /tmp/vm) -kernel bzImage ...
  vmbus attach --qmp /tmp/vm/emulator-qmp.sock

QEMU 11.1 or newer is needed, with TCG, and a machine that can have two vCPUs or more: in one that cannot, the
guest's locked instructions are not atomic, and signals get lost. The directory must exist; it gets the ACPI table
now, and QEMU's sockets and memory file later.
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
        "--dir", type=Path, default=Path(), help="where sockets and memory go (default: here)"
    )
    parser.add_argument("--memory", type=size, default=1 << 30, help="guest memory (default: 1G)")
    parser.add_argument(
        "--no-wait", action="store_true", help="let the guest boot without Hyper-V if no emulator is attached"
    )
    parser.add_argument(
        "--migratable",
        action="store_true",
        help="with the D-Bus daemon that carries the emulator's state in migrations and snapshots; "
        "start it before QEMU (how is said on standard error)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--readconfig", action="store_true", help="as a -readconfig file")
    form.add_argument("--libvirt", action="store_true", help="as libvirt's <qemu:commandline>")
    form.add_argument("--json", action="store_true", help="as a JSON list of words")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    directory = arguments.dir.resolve()
    if not directory.is_dir():
        raise UsageError(f"--dir {arguments.dir}: there is no such directory; make it with mkdir -m 700")
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
        print(f"start first: dbus-daemon --config-file={configuration} --nofork --nopidfile", file=sys.stderr)
    if arguments.readconfig:
        print(readconfig_file(options), end="")
    elif arguments.libvirt:
        print(libvirt(options.options()), end="")
    elif arguments.json:
        print(json.dumps(options.argv()))
    else:
        print(shlex.join(options.argv()))
    return 0
