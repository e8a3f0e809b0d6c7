"""``vmbus status``: what a served guest has negotiated and what goes through its channels."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from emulator.cli.table import table
from emulator.machine import rundir
from emulator.machine.control import ask

_EPILOG = """\
examples:
  vmbus status                    the only served guest
  vmbus status NAME --json        everything, for programs
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "status",
        help="channels, versions, rings and counters of a served guest",
        description="Shows what a served guest has negotiated and what goes through its channels.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="the guest (not needed where only one is served)")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    directory = rundir.find(arguments.name)
    found = ask(directory / "control.sock", "status")
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        print(render(found))
    return 0


def render(status: Mapping[str, Any]) -> str:
    """The status for a person."""
    bus = status["bus"]
    guest = status["partition"]["guest_os"]
    version = bus["version"] or "not connected"
    lines = [
        f"{status['name']}: {guest or 'no guest system yet'}, VMBus {version}, "
        f"{status['vcpus']} vCPU{'s' if status['vcpus'] != 1 else ''}, QEMU {status['qemu']['version']}",
        channel_table(status),
    ]
    refused = {**status["partition"]["refusals"], **bus["refusals"]}
    if refused:
        lines.append("refused: " + ", ".join(f"{reason} ({count})" for reason, count in refused.items()))
    for crash in status["crashes"]:
        lines.append(f"the guest crashed: {crash}")
    return "\n".join(lines)


def channel_table(status: Mapping[str, Any]) -> str:
    """One row a channel."""
    rows = []
    for channel in status["channels"]:
        io = channel.get("io") or {}
        rings = io.get("rings")
        refusals = {**channel["refusals"], **io.get("refusals", {})}
        note = io.get("failure") or ", ".join(f"{reason} ({n})" for reason, n in refusals.items())
        rows.append(
            (
                str(channel["relid"] or "-"),
                channel["device"],
                channel["state"],
                "-" if channel["target_vp"] is None else str(channel["target_vp"]),
                f"{rings['incoming']['size'] >> 10}+{rings['outgoing']['size'] >> 10} KiB" if rings else "-",
                str(io.get("packets_in", 0)),
                str(io.get("packets_out", 0)),
                str(channel["doorbells"]),
                str(channel["interrupts"]),
                note,
            )
        )
    heads = ("id", "device", "state", "VP", "rings", "in", "out", "doorbells", "interrupts", "")
    return table(heads, rows, right=(0, 3, 4, 5, 6, 7, 8))
