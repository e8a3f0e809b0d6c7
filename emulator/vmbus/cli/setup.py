"""``vmbus setup``: fetch the private QEMU and guest kernels, compile what is C."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmbus.cli.options import DEFAULT_GUEST
from vmbus.cli.output import show, show_json
from vmbus.devices.registry import Registry
from vmbus.errors import MissingRequirement
from vmbus.machine.engine import build as engine_build
from vmbus.machine.gateway import build as gateway_build
from vmbus.provision.firmware import find_firmware
from vmbus.provision.kernel import GUESTS, find_busybox, find_kernel
from vmbus.provision.progress import for_stream
from vmbus.provision.qemu import find_qemu
from vmbus.provision.setup import Setup
from vmbus.provision.system_disk import copy_system, find_system

_EPILOG = """\
examples:
  vmbus setup                                what `vmbus run` and `vmbus demo` need
  vmbus setup --guest debian-6.1 --guest debian-backports
  vmbus setup --system debian.img            make a disk with a Debian system; then boot it:
  vmbus run --root /dev/sda1 --device scsi,image=debian.img
  vmbus setup --firmware                     also fetch OVMF, for `vmbus run --firmware ovmf`
  vmbus setup --dry-run                      say what would be fetched and compiled

A second run has nothing to do; an interrupted download is resumed. Everything is kept in $VMBUS_CACHE, or if that is
not set in $XDG_CACHE_HOME/vmbus or ~/.cache/vmbus.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "setup",
        help="fetch the private QEMU and a guest kernel, compile the gateway",
        description="Fetches the private QEMU and guest kernels, and compiles the gateway and the "
        "parts of devices that are C.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--guest",
        action="append",
        choices=sorted(GUESTS),
        help=f"a guest kernel to fetch; may be repeated (default: {DEFAULT_GUEST})",
    )
    parser.add_argument(
        "--system",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE",
        help="also make a disk image with a Debian system (systemd, apt, gcc; in about 45 "
        "seconds), and copy it to FILE",
    )
    parser.add_argument(
        "--firmware", action="store_true", help="also fetch UEFI firmware (OVMF) unless this machine has it"
    )
    parser.add_argument(
        "--update", action="store_true", help="fetch newer versions of what was fetched before"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be fetched and compiled, and do nothing"
    )
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    guests = arguments.guest or [DEFAULT_GUEST]
    if arguments.dry_run:
        return _dry_run(guests, arguments.system, arguments.firmware)
    setup = Setup(progress=for_stream())
    found = setup.run(guests, update=arguments.update)
    gateway = gateway_build.build()
    system = None
    if arguments.system is not None:
        system = setup.system(update=arguments.update)
        if arguments.system.name:
            copy_system(system, arguments.system)
            system = arguments.system

    firmware = setup.firmware(update=arguments.update) if arguments.firmware else None
    libraries = (engine_build.LIBRARY, *Registry().native_libraries())
    built = {each.name_in_reports: str(each.build()) for each in libraries}
    version = ".".join(map(str, found.qemu.version))
    if arguments.json:
        result = {
            "qemu": {"version": version, "origin": found.qemu.origin, "command": found.qemu.argv_prefix},
            "guests": [{"name": kernel.name, "release": kernel.release} for kernel in found.kernels],
            "gateway": str(gateway),
            "system": str(system) if system is not None else None,
            "firmware": str(firmware) if firmware is not None else None,
            **{name.replace(" ", "_"): path for name, path in built.items()},
        }
        show_json(result)
        return 0
    show(f"QEMU {version} ({found.qemu.origin})")
    for kernel in found.kernels:
        show(f"guest {kernel.name}: Linux {kernel.release}")
    show(f"gateway {gateway}")
    if system is not None:
        show(f"Debian system {system}")
    if firmware is not None:
        show(f"UEFI firmware {firmware}")

    for name, path in built.items():
        show(f"{name} {path}")
    return 0


def _dry_run(guests: list[str], system: Path | None, firmware: bool) -> int:
    checks: list[tuple[str, Callable[[], object]]] = [
        ("QEMU", find_qemu),
        ("busybox for the guest", find_busybox),
    ]
    if system is not None:
        checks.append(("Debian system", find_system))
    if firmware:
        checks.append(("UEFI firmware", find_firmware))
    for name, check in checks:
        try:
            check()
            show(f"{name}: already here")
        except MissingRequirement as missing:
            show(f"{name}: to be fetched or made ({missing})")
    for guest in guests:
        try:
            show(f"guest {guest}: already here (Linux {find_kernel(guest).release})")
        except MissingRequirement:
            show(f"guest {guest}: to be fetched")
    names = ", ".join(
        ["gateway", "engine", *[each.name_in_reports for each in Registry().native_libraries()]]
    )
    show(f"{names}: compiled from source if that has not been done yet")
    return 0
