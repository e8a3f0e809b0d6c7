"""``vmbus cont``: resume a stopped guest."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vmbus.machine import rundir
from vmbus.machine.control import ask

if TYPE_CHECKING:
    from vmbus.machine.host import Host


_EPILOG = """\
examples:
  vmbus cont                      the only served guest
  vmbus cont NAME

A disk with werror= or rerror= stops its guest when a request fails; `vmbus status` shows the reason. Remove the cause
first (free some space, restart the server), then resume the guest: the failed requests are tried again.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "cont",
        help="resume a stopped guest",
        description="Resumes a stopped guest; the requests that it was stopped for are tried again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="name of the guest (not needed if only one is served)")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    ask(rundir.find(arguments.name) / "control.sock", "cont")
    return 0


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``cont``."""
    await host.qmp.cont()
    return {}


CONTROL_COMMANDS = {"cont": answer}
