"""``python -m tests.bench [NAME ...] [--json]``; ``make bench [BENCH="traps heartbeat"] [JSON=1]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from vmbus.errors import VmbusError

from tests.bench.report import Result

NAMES = (
    "traps",
    "interrupts",
    "doorbell",
    "heartbeat",
    "echo",
    "idle",
    "boot",
    "migration",
    "reload",
    "journal",
    "storage",
    "journal_disk",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measures, and reports: docs/performance.md says what the figures mean.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--json", action="store_true", help="end with all figures as one JSON object, on a line"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    begun = time.monotonic()
    machine = f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f} at the start"
    print(f"{machine}; figures of a loaded machine say little\n")
    found: dict[str, Any] = {}
    for name in options.names or NAMES:
        try:
            result: Result = importlib.import_module(f"tests.bench.{name}").run()
        except VmbusError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(result.text(), end="\n\n", flush=True)
        found[name] = result.json()
    seconds = time.monotonic() - begun
    print(f"{seconds:.0f} s in all, load {os.getloadavg()[0]:.1f} at the end")
    if options.json:
        print(json.dumps({"machine": machine, "seconds": round(seconds, 1), "results": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
