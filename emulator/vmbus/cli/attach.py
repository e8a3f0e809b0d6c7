"""``vmbus attach``: serve a QEMU that is already running."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from vmbus.cli.devices import registry
from vmbus.cli.options import (
    add_host_options,
    add_missing_devices_option,
    add_supervise_option,
    confine,
    device_lines,
    host_options,
    limit_memory,
)
from vmbus.cli.output import serving, tell
from vmbus.cli.serving import CONTROL_COMMANDS
from vmbus.machine import rundir, signals
from vmbus.machine.host import ExitReason, Host
from vmbus.machine.migration.side_channel import CarrierAddress
from vmbus.machine.reload.supervisor import AttachedMachine
from vmbus.machine.served import Served

_EPILOG = """\
examples:
  vmbus attach --qmp /tmp/vm/emulator-qmp.sock
  vmbus attach --qmp qmp.sock --device echo --name build-vm
  vmbus attach --qmp qmp.sock --journal --device scsi,image=disk.img

The QEMU must have been started with the options that `vmbus qemu-args` prints. Everything else (guest memory and its
layout, gateway, qtest, vCPUs) is found through QMP and the QEMU process.

Ctrl-C detaches. QEMU continues to run, and its guest waits as soon as it needs its Hyper-V host. A new emulator can
serve a guest that has not used that host yet, or whose emulator kept a journal (--journal): give it the same devices.
Any other guest has to be reset (--reset), because the state of its host is lost with the emulator. To keep such a
guest, migrate it or save a snapshot before you detach.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "attach",
        help="serve a QEMU that is already running",
        description="Attaches to a running QEMU and plays its guest's Hyper-V host.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--qmp", required=True, type=Path, metavar="SOCKET", help="QEMU's QMP socket")
    parser.add_argument(
        "--name", help="name of the guest for `vmbus status` and the other verbs (default: guest-N)"
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="replace an emulator that is attached to this QEMU; that emulator ends",
    )
    parser.add_argument(
        "--reset",
        action="store_true",
        help="reset the guest if it has already used its Hyper-V host, because the state of that host was lost with "
        "the emulator that served it",
    )
    parser.add_argument(
        "--journal",
        action="store_true",
        help="keep a journal, from which the next `vmbus attach` continues the guest if this one is killed; disks "
        "must be raw images",
    )
    add_supervise_option(parser)
    parser.add_argument(
        "--carrier",
        metavar="unix:PATH|file:PATH",
        help="for a QEMU that waits for a migrating guest: receive the emulator's state here "
        "instead of in QEMU's stream; as `vmbus migrate --carrier`",
    )
    add_missing_devices_option(parser)
    add_host_options(parser)
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    confine(arguments)
    with serving():
        return signals.run(_attach(arguments))


async def _attach(arguments: argparse.Namespace) -> int:
    devices = registry().create_all(device_lines(arguments))
    limit_memory(arguments)
    directory = rundir.create(arguments.name, qemu=False)
    try:
        host = await Host.attach(arguments.qmp, devices, host_options(arguments))
        served = Served(host, directory.path, CONTROL_COMMANDS)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(lambda: signals.finished(served.close()))
            if arguments.carrier is not None:
                await host.migration.listen(CarrierAddress.parse(arguments.carrier))
            await served.start()
            if arguments.supervise:
                await served.supervise(AttachedMachine(arguments.qmp, host.facts.pid))
            tell(f"attached to QEMU {host.facts.version} (process {host.facts.pid}) as {directory.name}")
            exit_reason = await served.serve()
    finally:
        directory.remove()
    if exit_reason is not ExitReason.STOPPED:
        tell(f"QEMU (process {host.facts.pid}) ended: {exit_reason.value}")
    return 0
