"""``vmbus successor``: take over a guest; started by ``vmbus reload``, not by a person."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path
from typing import Any

from vmbus.cli.devices import registry
from vmbus.cli.options import confine
from vmbus.cli.output import serving
from vmbus.cli.serving import CONTROL_COMMANDS
from vmbus.machine import signals
from vmbus.machine.reload.link import Link, ReloadFailed
from vmbus.machine.reload.moves import Mover
from vmbus.machine.reload.successor import take_over
from vmbus.machine.served import Served


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser("successor", description="Takes over a guest; `vmbus reload` starts it.")
    parser.add_argument("--link", required=True, type=int, metavar="FD", help="to who serves the guest")
    parser.add_argument("--keeper", required=True, type=int, metavar="FD", help="to who keeps the guest")
    parser.add_argument("--sandbox", choices=("on", "off"), default="on", help="as of `vmbus run`")
    parser.add_argument(
        "--supervised", action="store_true", help="say to the keeper when the guest is served"
    )
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    confine(arguments)
    with serving():
        return signals.run(
            _serve(
                socket.socket(fileno=arguments.link),
                socket.socket(fileno=arguments.keeper),
                supervised=arguments.supervised,
            )
        )


async def _serve(predecessor: socket.socket, keeper: socket.socket, *, supervised: bool) -> int:
    for each in (predecessor, keeper):
        each.set_inheritable(False)
    kept = Link(keeper, "the process that keeps the guest")
    asked_to_end: list[int] = []
    try:
        # Until the guest is this process's, who asks it to end closes its link as well. From then on it has to
        # end the service in order.
        with signals.handled(asked_to_end.append):
            try:
                taken = await take_over(
                    Link(predecessor, "the process that serves the guest"), registry().create_all
                )
            except ReloadFailed:
                return 1  # who asked for the reload hears the reason
            listener, *_ = (socket.socket(fileno=number) for number in taken.descriptors)
            served = Served(
                taken.host, Path(taken.values["directory"]), CONTROL_COMMANDS, kept=kept, listener=listener
            )
            if served.kept is not None:
                mover = Mover(served.kept, registry().create_all, served.replace)
                served.add_command("move", mover.asked)
            try:
                await served.start()
                if supervised:
                    await kept.tell("serving")
                if asked_to_end:
                    served.stop()
                await served.serve()
            finally:
                await signals.finished(served.close())
        return 0
    finally:
        kept.close()
