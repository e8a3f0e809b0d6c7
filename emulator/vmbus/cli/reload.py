"""``vmbus reload``: replace the emulator of a guest while the guest runs."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

from vmbus.cli.actions import GUEST_NAME, add_verb
from vmbus.cli.options import seconds
from vmbus.cli.output import show, show_json, tell
from vmbus.errors import UsageError, UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask

_LOOK_EVERY = 0.25
"""Seconds between two looks at the watched files."""

_EPILOG = """\
examples:
  vmbus reload                                    the only served guest, with the code as it is now
  vmbus reload web                                by name
  vmbus reload web --emulator ~/new/bin/vmbus     go on with another release, or back to an older one
  vmbus reload web --watch src/my_device          again whenever a Python file below that folder changes

A new process makes the guest's devices, takes over its channels with what is under way on them, and goes on; the
guest notices a pause of some milliseconds. QEMU, the guest's name, its disks and counters stay. If the new process
cannot take over (a device whose code fails, another release that lacks a device), the old one goes on as if nothing
had been asked, and the reason is shown.
"""


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "reload",
        "replace the emulator of a running guest",
        "Replaces the emulator of a guest, with its code as it is now, while the guest runs.",
        _EPILOG,
    )
    parser.add_argument("name", nargs="?", help=GUEST_NAME)
    parser.add_argument(
        "--emulator", type=Path, metavar="PATH", help="the `vmbus` of another release (default: this one)"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=180.0,
        metavar="SECONDS",
        help="how long to wait for the answer (default: 180)",
    )
    parser.add_argument(
        "--watch",
        type=Path,
        metavar="DIR",
        help="reload whenever a Python file in DIR, or below it, changes, until Ctrl-C or the end of the guest",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    path = rundir.find(arguments.name)
    if arguments.watch is None:
        _reload(path, arguments)
        return 0
    if not arguments.watch.is_dir():
        raise UsageError(f"--watch {arguments.watch}: there is no such folder")
    seen = stamps(arguments.watch)
    tell(f"watching {len(seen)} Python files in {arguments.watch}; Ctrl-C ends that")
    while True:
        while (now := stamps(arguments.watch)) == seen:
            time.sleep(_LOOK_EVERY)
            if not rundir.is_served(path):
                tell(f"{path.name} is not served any more")
                return 0
        changed = sorted({each for each, _ in now.items() ^ seen.items()})
        seen = _settled(arguments.watch, now)
        tell(f"changed: {', '.join(str(each.relative_to(arguments.watch)) for each in changed)}")
        try:
            _reload(path, arguments)
        except UserError as error:
            tell(f"vmbus reload: {error}")


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the Python files in ``folder`` and below, with the time of their last change and their size."""
    found = {}
    for path in folder.rglob("*.py"):
        with contextlib.suppress(OSError):  # an editor replaces it at this moment
            there = path.stat()
            found[path] = (there.st_mtime_ns, there.st_size)
    return found


def _settled(folder: Path, before: dict[Path, tuple[int, int]]) -> dict[Path, tuple[int, int]]:
    """Wait until nothing changes for a moment: several files are saved, or a branch is checked out."""
    while True:
        time.sleep(_LOOK_EVERY)
        if (now := stamps(folder)) == before:
            return now
        before = now


def _reload(path: Path, arguments: argparse.Namespace) -> None:
    emulator = None if arguments.emulator is None else str(arguments.emulator.absolute())
    answer = ask(path / "control.sock", "reload", answer_timeout=arguments.timeout, emulator=emulator)
    if arguments.json:
        show_json(answer)
    else:
        show(
            f"{path.name} is served by process {answer['pid']} now; nobody served it for "
            f"{answer['still'] * 1000:.0f} ms"
        )
