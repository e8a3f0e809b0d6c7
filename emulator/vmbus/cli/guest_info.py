"""``vmbus guest-info``: report which VMBus devices a kernel can drive, and the modules to load for that."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vmbus.cli.output import show, show_json
from vmbus.cli.table import table
from vmbus.provision.drivers import guest_info
from vmbus.provision.kernel import GUESTS, find_kernel

_EPILOG = """\
examples:
  vmbus guest-info debian-6.12                    an embedded guest
  vmbus guest-info /lib/modules/$(uname -r)       the kernel of this machine
  vmbus guest-info ./build --json                 a folder with lib/modules/RELEASE in it
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "guest-info",
        help="report which VMBus devices a kernel can drive",
        description="Reads from a kernel's modules which VMBus devices it can drive, and in which "
        "order to load them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "kernel", metavar="KERNEL-DIR", help="a folder with kernel modules, or the name of an embedded guest"
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.kernel)
    if arguments.kernel in GUESTS and not folder.exists():
        folder = find_kernel(arguments.kernel).modules or folder
    found = guest_info(folder)
    if arguments.json:
        show_json(found.as_json(), indent=2)
        return 0
    show(f"Linux {found.release}, bus driver: {found.bus}")
    rows = [
        (
            driver.device,
            driver.module,
            "built in" if driver.builtin else " ".join(driver.load_order),
            str(driver.interface_id),
        )
        for driver in found.drivers
    ]
    show(table(("device", "driver", "load order", "interface"), rows))
    if found.missing:
        show(f"no driver for: {', '.join(found.missing)}")
    if found.generic:
        show(f"for any device: {', '.join(found.generic)}")
    return 0
