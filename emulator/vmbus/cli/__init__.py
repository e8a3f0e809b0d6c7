"""The command ``vmbus``: one module for each verb; this one parses the command line and calls them.

Exit status: 0 for success, 1 for failure, 2 for wrong usage; ``run -- CMD`` exits with the status of CMD.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import shlex
import sys
from collections.abc import Sequence

from vmbus import __version__
from vmbus.cli import logs, output, process
from vmbus.cli.intermixed import VerbParser
from vmbus.cli.os_errors import os_sentence
from vmbus.errors import UserError, VmbusError
from vmbus.private import SHARED_UMASK, UMASK, umask

_logger = logging.getLogger(__name__)

_EPILOG = """\
examples:
  vmbus setup                                     fetch QEMU and a guest kernel, build the gateway
  vmbus run                                       boot the default guest and serve it
  vmbus run --name web --device echo              the same with a name, and with one more device
  vmbus run -- uname -a                           run a command in the guest, exit with its status
  vmbus status web                                show its channels, devices and counters
  vmbus migrate web                               move it into a new QEMU while it runs
  vmbus qemu-args                                 print what to add to your own QEMU command line
  vmbus attach --qmp /run/me/qmp.sock             serve a QEMU that is already running

`vmbus VERB --help` has the options of a verb, with examples. `vmbus doctor` says what this machine lacks.
Exit status: 0 done, 1 failed, 2 used wrongly; `vmbus run -- CMD` exits with the status of CMD.
"""


_VERBS = {
    name: f"vmbus.cli.{name.replace('-', '_')}"
    for name in (
        "doctor",
        "setup",
        "run",
        "attach",
        "qemu-args",
        "status",
        "migrate",
        "snapshot",
        "device",
        "channel",
        "cont",
        "reload",
        "shutdown",
        "guest-info",
        "demo",
    )
}
"""The module of each verb, in the order of the help."""

_INTERNAL_VERBS = {"successor": "vmbus.cli.successor"}
"""Verbs that the program itself uses, and no help shows."""

_TAKES_DASHES = ("--qemu", "--append")
"""Options whose values usually begin with a dash themselves."""


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of the command line ``words``, with the verb that they name; with all, if they name none.

    One verb alone is imported in a quarter of the time of all.
    """
    top = argparse.ArgumentParser(
        prog="vmbus",
        description="Plays the Hyper-V host for unmodified guests in a stock QEMU under TCG.\n"
        "A guest is served while its `vmbus run` or `vmbus attach` runs; the other commands find it by its name.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"vmbus {__version__}")
    top.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=0,
        help="log what is negotiated and refused; twice: every step",
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=VerbParser)
    first = next((word for word in words if not word.startswith("-")), "")
    known = _VERBS | _INTERNAL_VERBS
    for name in (first,) if first in known else _VERBS:
        importlib.import_module(known[name]).add_parser(verbs)
    return top


def with_values(words: Sequence[str]) -> list[str]:
    """Return ``words`` with ``--qemu -foo`` as ``--qemu=-foo``: argparse takes ``-foo`` for an option."""
    found: list[str] = []
    for word in words:
        single = word.startswith("-") and not word.startswith("--") and word not in ("-h", "-v")
        if found and found[-1] in _TAKES_DASHES and single:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit status."""
    output.open_streams()
    try:
        try:
            status = _main(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as ended:  # argparse, after --help or a wrong option
            output.finish()
            raise ended from None
        output.finish()
    except KeyboardInterrupt:  # while a verb is imported, too
        return 130
    except output.OutputClosed:
        return 1
    except output.OutputFailed as error:
        output.tell(f"vmbus: {error}")
        return error.exit_status
    return status


def _main(words: list[str]) -> int:
    command: list[str] = []
    separated = "--" in words
    if separated:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    arguments, unknown = parser(words).parse_known_args(with_values(words))
    arguments.command = command
    if unknown:
        output.tell(f"vmbus {arguments.verb}: {_not_understood(arguments.verb, unknown)}")
        return 2
    if separated and arguments.verb != "run":
        output.tell(f"vmbus {arguments.verb} takes no command after --; only `vmbus run` does")
        return 2
    if separated and not command:
        output.tell(
            "vmbus run: nothing follows --: write the command for the guest behind it, or leave -- out"
        )
        return 2
    with logs.written(arguments.verbose):
        return _act(arguments)


def _not_understood(verb: str, words: Sequence[str]) -> str:
    """Return a sentence about words that belong to no option of ``verb``, and that are more than it takes."""
    said = f"unrecognized arguments: {shlex.join(words)}"
    if verb == "run" and not words[0].startswith("-"):
        return (
            f"{said}; a command for the guest is written behind --, as in `vmbus run -- {shlex.join(words)}`"
        )
    return f"{said}; `vmbus {verb} --help` shows what it takes"


def _act(arguments: argparse.Namespace) -> int:
    """Execute a verb; return the exit status."""
    try:
        with umask(SHARED_UMASK if arguments.verb == "setup" else UMASK), process.restored():
            return int(arguments.action(arguments))
    except output.OutputClosed:
        raise
    except UserError as error:
        output.complain(arguments.verb, error)
        return error.exit_status
    except VmbusError as error:
        output.complain(arguments.verb, error)
        return 1
    except OSError as error:
        _logger.info("where this was met:", exc_info=error)
        output.complain(arguments.verb, os_sentence(error))
        return 1
    except Exception:
        _logger.exception("internal error in `vmbus %s`; please report this", arguments.verb)
        return 1
