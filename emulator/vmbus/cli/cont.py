"""``vmbus cont``: let a stopped guest go on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.machine.host import Host

_EPILOG = """\
examples:
  vmbus cont                      the only served guest
  vmbus cont NAME

A disk with werror= or rerror= stops its guest when something fails; `vmbus status` says what. When it is mended (room
made, a server back), the guest goes on, and what had failed is done again.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "cont",
        help="let a stopped guest go on",
        description="Lets a stopped guest go on; requests that it was stopped for are done again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="the guest (not needed where only one is served)")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    ask(rundir.find(arguments.name) / "control.sock", "cont")
    return 0


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """The control socket's ``cont``."""
    await host.qmp.cont()
    return {}


CONTROL_COMMANDS = {"cont": answer}
