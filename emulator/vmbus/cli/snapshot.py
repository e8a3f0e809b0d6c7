"""``vmbus snapshot``: save a served guest, and restore it later."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from vmbus.cli.options import seconds
from vmbus.cli.output import show, show_json
from vmbus.cli.table import table
from vmbus.errors import UsageError, UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.machine.host import Host
from vmbus.machine.migration import snapshots

_EPILOG = """\
examples:
  vmbus run --snapshots web.qcow2           a guest with an image for snapshots (created if needed)
  vmbus snapshot save before-upgrade        the only served guest
  vmbus snapshot save web before-upgrade
  vmbus snapshot load web before-upgrade
  vmbus snapshot list web --json
  vmbus snapshot save web a --without-disks   disks that are in no snapshot are put back by you

Guest memory, processors, QEMU's devices, the bus and all synthetic devices are restored together. Snapshots that were
made by QEMU's own commands (savevm, snapshot-save) lack the emulator's part and cannot be loaded.

Disks of --device scsi in qcow2 images (format=qcow2) are saved, restored and deleted with the guest; each image holds
its own part. Raw files of a disk with copies=FOLDER are copied into that folder. A guest that can write to a disk of
another kind is refused, because its file system would not fit its memory after a load; --without-disks is for those
who copy such disks themselves.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "snapshot",
        help="save a served guest, and restore it later",
        description="Saves a served guest with all its devices into a snapshot; loads, lists and deletes snapshots.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        metavar="{save,load,list,delete}",
        choices=("save", "load", "list", "delete"),
        help="save or load the guest, list or delete snapshots",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[NAME] TAG",
        help="name of the guest (not needed if only one is served), and of the snapshot",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="give up after this time (default: 600)",
    )
    parser.add_argument(
        "--without-disks",
        action="store_true",
        help="save or load although the guest can write to disks that the snapshot does not hold",
    )
    parser.add_argument(
        "--allow-missing-devices",
        action="store_true",
        help="load although devices of the snapshot are not offered now: the guest loses their channels",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    words = list(arguments.words)
    tag = words.pop() if arguments.what != "list" and words else ""
    if len(words) > 1 or (arguments.what != "list" and not tag):
        takes = "[NAME]" if arguments.what == "list" else "[NAME] TAG"
        why = "" if tag or arguments.what == "list" else ": the name of the snapshot is missing"
        raise UsageError(f"{arguments.what} takes {takes}{why}")
    if arguments.allow_missing_devices and arguments.what != "load":
        raise UsageError("--allow-missing-devices goes with load: only a load restores devices")
    control = rundir.find(words[0] if words else None) / "control.sock"
    found = ask(
        control,
        "snapshot",
        answer_timeout=arguments.timeout + 30,
        what=arguments.what,
        tag=tag,
        timeout=arguments.timeout,
        without_disks=arguments.without_disks,
        allow_missing_devices=arguments.allow_missing_devices,
    )
    if arguments.json:
        show_json(found, indent=2)
    else:
        show(render(arguments.what, tag, found))
    return 0


def render(what: str, tag: str, found: Mapping[str, Any]) -> str:
    """Return the answer as text."""
    if what == "list":
        rows = [
            [
                each["tag"],
                f"{each['size'] / (1 << 20):.1f} MiB",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["date"])),
                ", ".join(each["disks"]) or "-",
            ]
            for each in found["snapshots"]
        ]
        return table(["snapshot", "size", "made", "disks"], rows) if rows else "no snapshots"
    if what == "save":
        return (
            f"saved {tag} in {found['seconds']:.2f} s, {found['state_bytes']} bytes of it from the emulator"
        )
    return f"{'loaded' if what == 'load' else 'deleted'} {tag} in {found['seconds']:.2f} s"


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``snapshot``."""
    what, tag = request.get("what"), str(request.get("tag", ""))
    timeout = float(request.get("timeout", 600))
    without_disks = request.get("without_disks") is True
    begun = time.monotonic()
    found: dict[str, object] = {}
    if what == "list":
        return {
            "snapshots": [
                {"tag": each.tag, "size": each.size, "date": each.date, "disks": list(each.disks)}
                for each in await snapshots.listed(host.migration)
            ]
        }
    if not tag:
        raise UserError("the name of the snapshot is missing")
    if what == "save":
        report = await snapshots.save(host.migration, tag, without_disks=without_disks, timeout=timeout)
        found.update(report.as_dict())
    elif what == "load":
        await snapshots.load(
            host.migration,
            tag,
            without_disks=without_disks,
            allow_missing_devices=request.get("allow_missing_devices") is True,
            timeout=timeout,
        )
    elif what == "delete":
        await snapshots.delete(host.migration, tag, timeout=timeout)
    else:
        raise UserError(f"unknown action {what!r}; known: delete, list, load, save")
    return {"tag": tag, "seconds": time.monotonic() - begun, **found}
