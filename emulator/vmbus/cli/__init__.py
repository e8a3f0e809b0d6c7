"""The command ``vmbus``: one module a verb, this one parses and dispatches.

Exit status: 0 done, 1 failed, 2 used wrongly; ``run -- CMD`` exits with CMD's own status.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from vmbus import __version__
from vmbus.cli import (
    attach,
    cont,
    demo,
    device,
    doctor,
    guest_info,
    migrate,
    qemu_args,
    run,
    setup,
    shutdown,
    snapshot,
    status,
)
from vmbus.errors import UserError, VmbusError

_EPILOG = """\
examples:
  vmbus setup                                     fetch QEMU and a guest kernel, build the gateway
  vmbus run                                       boot the default guest and serve it
  vmbus run --device echo -- uname -a             run a command in the guest, exit with its status
  vmbus qemu-args                                 what to add to your own QEMU command line
  vmbus attach --qmp /run/me/qmp.sock             serve a QEMU that runs already
  vmbus status --json                             channels and counters of a served guest
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="vmbus",
        description="Plays the Hyper-V host for unmodified guests in a stock QEMU under TCG.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vmbus {__version__}")
    top.add_argument("-v", "--verbose", action="count", default=0, help="more log lines; twice: all of them")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in (
        doctor,
        setup,
        run,
        attach,
        qemu_args,
        status,
        migrate,
        snapshot,
        device,
        cont,
        shutdown,
        guest_info,
        demo,
    ):
        module.add_parser(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    arguments = parser().parse_args(words)
    arguments.command = command
    if command and arguments.verb != "run":
        print(f"vmbus {arguments.verb}: takes no command after --", file=sys.stderr)
        return 2
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.basicConfig(
        level=levels.get(arguments.verbose, logging.DEBUG),
        format="vmbus: %(name)s: %(message)s" if arguments.verbose else "vmbus: %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(arguments.action(arguments))
    except UserError as error:
        print(f"vmbus {arguments.verb}: {error}", file=sys.stderr)
        return error.exit_status
    except VmbusError as error:
        print(f"vmbus {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
