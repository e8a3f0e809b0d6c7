"""``vmbus status``: what a served guest has negotiated and what goes through its channels."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from vmbus.cli.output import show, show_json
from vmbus.cli.table import table
from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.printable import one_line

_EPILOG = """\
examples:
  vmbus status                    the only served guest
  vmbus status NAME --json        everything, for programs
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "status",
        help="show channels, versions, rings and counters of a served guest",
        description="Shows what a served guest has negotiated, and the counters of its channels and disks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="name of the guest (not needed if only one is served)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    directory = rundir.find(arguments.name)
    found = ask(directory / "control.sock", "status")
    if arguments.json:
        show_json(found, indent=2)
    else:
        show(render(found))
    return 0


def render(status: Mapping[str, Any]) -> str:
    """Return the status as text."""
    bus = status["bus"]
    guest = status["partition"]["guest_os"]
    version = bus["version"] or "not connected"
    lines = [
        f"{status['name']}: {one_line(guest) or 'no guest system yet'}, VMBus {version}, "
        f"{status['vcpus']} vCPU{'s' if status['vcpus'] != 1 else ''}, QEMU {status['qemu']['version']}",
        channel_table(status),
    ]
    if disks := disk_table(status):
        lines += ["", disks, ""]
    for why in status.get("stopped_because", ()):
        lines.append(f"stopped: {one_line(why)}; remove the cause, then run `vmbus cont {status['name']}`")
    lines += [f"problem: {one_line(sentence)}" for sentence in status.get("problems", ())]
    if takeovers := status.get("takeovers", 0):
        lines.append(
            f"its emulator was killed {takeovers} time{'s' if takeovers != 1 else ''}, and the next one went on"
        )
    refused = {**status["partition"]["refusals"], **bus["refusals"]}
    if refused:
        lines.append(
            "refused: " + ", ".join(f"{one_line(reason)} ({count})" for reason, count in refused.items())
        )
    for crash in status["crashes"]:
        lines.append(f"the guest crashed: {one_line(crash)}")
    return "\n".join(lines)


def disk_table(status: Mapping[str, Any]) -> str:
    """Return a table of all disks, and below it a line for each disk in trouble; empty without disks."""
    rows = []
    troubles = []
    for channel in status["channels"]:
        for place, unit in ((channel.get("details") or {}).get("units") or {}).items():
            name = f"{channel['device']}/{place}"
            latency = unit["latency"]
            errors = ", ".join(f"{sense} ({count})" for sense, count in unit["errors"].items())
            rows.append(
                (
                    name,
                    _bytes(unit["size"]),
                    str(unit["reads"]),
                    _bytes(unit["bytes_read"]),
                    str(unit["writes"]),
                    _bytes(unit["bytes_written"]),
                    str(unit["flushes"]),
                    f"{unit['queue_depth']} of {unit['most_queue_depth']}",
                    *(_microseconds(latency.get(key)) for key in ("median_us", "p90_us", "p99_us")),
                    _image(unit),
                    errors,
                )
            )
            if "trouble" in unit:
                troubles.append(f"{name}: {unit['trouble']}")
            if "waits" in unit:
                troubles.append(f"{name}: a request has waited for the server for {unit['waits']:g} s")
            if "kept" in unit:
                troubles.append(
                    f"{name}: {unit['kept']['because']}; {unit['kept']['requests']} requests wait"
                )
    if not rows:
        return ""
    transfers = ("reads", "bytes", "writes", "bytes", "flushes", "depth")
    heads = ("disk", "size", *transfers, "median", "90 %", "99 %", "image", "errors")
    return "\n".join([table(heads, rows, right=range(1, 11)), *map(one_line, troubles)])


def _image(unit: Mapping[str, Any]) -> str:
    image = str(unit.get("image", unit.get("backend", "")))
    notes = [str(unit["format"])] if "format" in unit else []
    notes += ["read-only"] if unit["read_only"] else []
    return f"{image} ({', '.join(notes)})" if notes else image


def _bytes(count: int) -> str:
    """Return ``1.5M`` for 1.5 MiB."""
    value, unit = float(count), ""
    for unit in ("", "K", "M", "G", "T"):
        if value < 1024 or unit == "T":
            break
        value /= 1024
    return f"{value:.0f}{unit}" if value >= 10 or value == int(value) else f"{value:.1f}{unit}"


def _microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 1000:
        return f"{value:.0f} us"
    return f"{value / 1000:.1f} ms" if value < 1e6 else f"{value / 1e6:.1f} s"


def channel_table(status: Mapping[str, Any]) -> str:
    """Return a table with one row for each channel."""
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
