"""``vmbus shutdown``: ask a guest over its shutdown channel to shut down, restart or hibernate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmbus.cli.output import show
from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask

if TYPE_CHECKING:
    from vmbus.machine.host import Host


_EPILOG = """\
examples:
  vmbus shutdown                  the only served guest
  vmbus shutdown NAME --restart

Prints the guest's answer. Exit status: 0 if the guest agreed (it then needs some time to shut down), else 1.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "shutdown",
        help="ask a guest to shut down, restart or hibernate",
        description="Asks a guest over its shutdown channel to shut down, restart or hibernate.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="name of the guest (not needed if only one is served)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--restart", action="store_true", help="restart instead")
    action.add_argument("--hibernate", action="store_true", help="hibernate instead")
    parser.add_argument("--force", action="store_true", help="tell the guest not to wait for its programs")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    action = "restart" if arguments.restart else "hibernate" if arguments.hibernate else "shutdown"
    control = rundir.find(arguments.name) / "control.sock"
    found = ask(control, "shutdown", action=action, force=arguments.force)
    show(found["result"])
    return 0 if found["agreed"] else 1


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``shutdown``: pass it to the device that can, and wait for the guest."""
    for attached in host.devices:
        command = attached.device.control_commands().get("shutdown")
        if command is not None:
            return await command(request)
    raise UserError("this guest has no shutdown device to be asked over; serve it with --device shutdown")


CONTROL_COMMANDS = {"shutdown": answer}
