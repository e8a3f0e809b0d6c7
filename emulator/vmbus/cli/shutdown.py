"""``vmbus shutdown``: ask a guest to shut down or restart, over its shutdown channel."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from typing import Any

from vmbus_devices.shutdown import Shutdown, ShutdownOutcome, ShutdownResult

from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.machine.host import Host

_EPILOG = """\
examples:
  vmbus shutdown                  the only served guest
  vmbus shutdown NAME --restart

Prints the guest's answer. Exit status 0 when it agreed; it then shuts down in its own time.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "shutdown",
        help="ask a guest to shut down or restart",
        description="Asks a guest to shut down or restart, over its shutdown channel.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="the guest (not needed where only one is served)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--restart", action="store_true", help="restart instead")
    action.add_argument("--hibernate", action="store_true", help="hibernate instead")
    parser.add_argument("--force", action="store_true", help="do not wait for the guest's programs")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    action = "restart" if arguments.restart else "hibernate" if arguments.hibernate else "shutdown"
    control = rundir.find(arguments.name) / "control.sock"
    found = ask(control, "shutdown", action=action, force=arguments.force)
    print(found["result"])
    return 0 if found["agreed"] else 1


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """The control socket's ``shutdown``: waits for the guest's answer."""
    for attached in host.devices:
        if isinstance(attached.device, Shutdown):
            result: asyncio.Future[ShutdownResult] = asyncio.get_running_loop().create_future()
            attached.device.shut_down(
                str(request.get("action", "shutdown")),
                result.set_result,
                force=bool(request.get("force", False)),
            )
            found = await result
            return {"result": str(found), "agreed": found.outcome is ShutdownOutcome.OK}
    raise UserError("this guest is served without a shutdown device; offer it with --device shutdown")


CONTROL_COMMANDS = {"shutdown": answer}
