"""``vmbus migrate``: live-migrate a served guest into a new QEMU on this machine, or to a QEMU that listens."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmbus.cli.options import seconds, whole_number
from vmbus.cli.output import ERASE_LINE, is_terminal, note, show, show_json, tell
from vmbus.cli.table import table
from vmbus.errors import UsageError, UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.machine.host import ExitReason, Host
from vmbus.machine.migration.addresses import check_port, descriptor_number
from vmbus.machine.migration.alone import alone
from vmbus.machine.migration.drive import MigrationFailed, migrate
from vmbus.machine.migration.side_channel import CarrierAddress
from vmbus.printable import one_line

_EPILOG = """\
examples:
  vmbus migrate                             into a new QEMU and emulator, under the same name
  vmbus migrate web --json                  the same, with all figures
  vmbus run --incoming tcp:0:4444 ...       on the target: the same options as the guest was started with
  vmbus migrate web tcp:target:4444         and then this, on the source
  vmbus migrate web unix:m --carrier unix:c
                                            the state goes from emulator to emulator (QEMU without D-Bus)
  vmbus migrate web --share-memory          into a new QEMU that maps the same memory; none is copied
  vmbus migrate web unix:main.sock --cpr unix:cpr.sock
                                            the same with QEMU's cpr-transfer, into a QEMU of your own
  vmbus migrate web fd:3 3<>/dev/tcp/target/4444
                                            over a descriptor that the shell opened (a socket, a pipe)
  vmbus migrate web exec:'ssh t start' --keep
                                            over a command; the guest is kept here, stopped
  vmbus migrate web --take-back             if the target refused it: resume the guest here
  vmbus migrate web --wait-ready            another program drives, and sends migrate-continue after this

The guest is never lost: if anything fails before the target has all of it, the guest continues here.
Exit status: 0 if the guest runs at the target, 1 if it stayed here.
"""

_TIMEOUT = 600.0
"""Seconds, unless ``--timeout`` is given."""
_POLL = 0.2
_LEAVE = 0.2
"""Seconds for the answer to reach the client before the source's emulator ends."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "migrate",
        help="live-migrate a served guest",
        description="Live-migrates a served guest with its bus, devices and outstanding transactions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", help="name of the guest (not needed if only one is served)")
    parser.add_argument(
        "uri",
        nargs="?",
        help="where the target QEMU listens (tcp:HOST:PORT, unix:PATH, ...); default: a new QEMU on this machine",
    )
    parser.add_argument(
        "--save-buffer",
        type=whole_number(1, 1 << 30),
        metavar="BYTES",
        help="size of the buffer into which each channel is saved, chunk by chunk (default: 65536)",
    )
    parser.add_argument(
        "--share-memory",
        action="store_true",
        help="copy no guest memory: the new QEMU, on this machine, maps the same file",
    )
    parser.add_argument(
        "--cpr",
        metavar="ADDRESS",
        help="use QEMU's mode cpr-transfer: pass QEMU's descriptors to this address first, and copy no guest memory",
    )
    parser.add_argument(
        "--carrier",
        metavar="unix:PATH|file:PATH",
        help="send the emulator's state to the other emulator over a socket or through a file instead of in QEMU's "
        "stream: for a QEMU without dbus-vmstate, or for more than 1 MiB of state; the target needs the same option",
    )
    parser.add_argument(
        "--wait-ready",
        action="store_true",
        help="start no migration, but wait until the emulator's part of one that another program drives is ready, so "
        "that migrate-continue may be sent (see `vmbus run --switchover`); exit status 1 if that migration "
        "ends first",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="give up after this time (default: 600)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="after the guest has left, keep it here as well, stopped, for --take-back: where the "
        "target cannot report that it refused the guest (file:, exec:, a pipe, or --carrier file:)",
    )
    parser.add_argument(
        "--take-back",
        action="store_true",
        help="resume the guest here, after it was migrated with --keep or by another program and "
        "the target is known to have failed",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    name, uri = arguments.name, arguments.uri
    if uri is None and name is not None and ":" in name:  # no guest's name has a colon
        name, uri = None, name
    if arguments.take_back:
        _refuse_without_effect(
            "--take-back resumes the guest that was here and starts no migration",
            uri,
            arguments,
            ("share_memory", "wait_ready", "cpr", "carrier", "save_buffer", "keep", "timeout"),
        )
    elif arguments.wait_ready:
        _refuse_without_effect(
            "--wait-ready waits for a migration that another program drives, and starts none",
            uri,
            arguments,
            ("share_memory", "cpr", "carrier", "save_buffer", "keep"),
        )
    if uri is not None and arguments.share_memory:
        raise UsageError(
            "--share-memory is for a guest that moves into a new QEMU on this machine; for a URI, set "
            "x-ignore-shared on both sides, and start the target with the same mem-path"
        )
    if uri is None and arguments.keep:
        raise UsageError(
            "--keep goes with a URI; without one, the guest is kept anyway until its new QEMU has all of it"
        )
    if uri is None and arguments.cpr is not None:
        raise UsageError(
            "--cpr goes with a URI: the address where the same QEMU waits for the rest of the migration"
        )
    if arguments.carrier is not None:
        if uri is None:
            raise UsageError(
                "--carrier goes with a URI; without one, the way of the emulator's state is chosen for you"
            )
        arguments.carrier = str(CarrierAddress.parse(arguments.carrier))
    if uri is not None:
        check_port(uri)
        uri = absolute(uri)
    control = rundir.find(name) / "control.sock"
    if arguments.take_back:
        found = ask(control, "take-back")
        if arguments.json:
            show_json(found, indent=2)
        else:
            show("the guest was resumed here")
        return 0
    timeout = _TIMEOUT if arguments.timeout is None else arguments.timeout
    if arguments.wait_ready:
        return _wait_ready(control, timeout, as_json=arguments.json)
    request: dict[str, object] = {"timeout": timeout}
    if uri is not None:
        request["uri"] = uri
        if uri.startswith("exec:"):
            request["directory"] = str(Path.cwd())  # relative paths in the command are the caller's
    if arguments.share_memory:
        request["share_memory"] = True
    if arguments.cpr is not None:
        request["cpr"] = absolute(arguments.cpr)
    if arguments.carrier is not None:
        request["carrier"] = arguments.carrier
    if arguments.keep:
        request["keep"] = True
    if arguments.save_buffer is not None:
        request["save_buffer"] = arguments.save_buffer
    descriptors: list[int] = []
    if uri is not None and (number := descriptor_number(uri)) is not None:
        descriptors.append(own_descriptor(number))
    found = _ask_with_progress(control, "migrate" if uri else "move", request, timeout + 30, descriptors)
    if arguments.json:
        show_json(found, indent=2)
    else:
        show(render(found))
        if arguments.keep:
            show("the guest is kept here, stopped; if the target refused it, run `vmbus migrate --take-back`")
    return 0


def _refuse_without_effect(
    what: str, uri: str | None, arguments: argparse.Namespace, options: Sequence[str]
) -> None:
    """Raise :class:`~vmbus.errors.UsageError` if a URI or one of ``options`` is given; ``what``: the reason."""
    given = [
        f"--{each.replace('_', '-')}" for each in options if getattr(arguments, each) not in (None, False)
    ]
    if uri is not None:
        given.insert(0, f"the URI {uri}")
    if given:
        raise UsageError(f"{what}: leave out {', '.join(given)}")


def _wait_ready(control: Path, timeout: float, *, as_json: bool) -> int:
    found = ask(control, "wait-ready", answer_timeout=timeout + 30, timeout=timeout)
    if as_json:
        show_json(found, indent=2)
    else:
        show(f"ready: {found['state_bytes']} bytes of state; QEMU waits for migrate-continue")
    return 0


def absolute(uri: str) -> str:
    """Return ``uri`` with the path in it made absolute: the QEMU that opens it was started in another folder."""
    kind, _, path = uri.partition(":")
    return f"{kind}:{Path.cwd() / path}" if kind in ("file", "unix") and path else uri


def own_descriptor(number: int) -> int:
    """Return ``number`` if it is an open descriptor of this process, else raise :class:`~vmbus.errors.UsageError`."""
    try:
        os.fstat(number)
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "no descriptor has this number"
        raise UsageError(f"fd:{number}: {why}; open it for this command, as in 3>FILE for fd:3") from error
    return number


def _ask_with_progress(
    control: Path, command: str, request: Mapping[str, Any], timeout: float, descriptors: Sequence[int]
) -> Any:
    """Ask, and show QEMU's progress on a terminal meanwhile."""
    result: list[Any] = []

    def wait() -> None:
        try:
            result.append(ask(control, command, answer_timeout=timeout, descriptors=descriptors, **request))
        except Exception as error:  # noqa: BLE001 - it is raised below, in the main thread
            result.append(error)

    asking = threading.Thread(target=wait, daemon=True)
    asking.start()
    shown = False
    try:
        while asking.is_alive():
            asking.join(_POLL)
            if asking.is_alive() and is_terminal(sys.stderr):
                try:
                    note(ERASE_LINE + one_line(_line(ask(control, "migration", answer_timeout=5))))
                except UserError:
                    continue  # the guest has left already, or is at the switch-over
                shown = True
    except KeyboardInterrupt:
        note(ERASE_LINE if shown else "")
        tell("vmbus migrate: this command ends; the emulator carries on with the migration")
        raise
    if shown:
        note(ERASE_LINE)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _line(found: Mapping[str, Any]) -> str:
    ram = found.get("ram") or {}
    total, left = ram.get("total", 0), ram.get("remaining", 0)
    share = f", {100 * (total - left) // total} % of memory" if total else ""
    return f"{found.get('status', 'beginning')}{share}"


def render(found: Mapping[str, Any]) -> str:
    """Return the summary as text."""
    rows = [
        [
            channel["name"],
            str(channel["chunks"]),
            str(channel["bytes"]),
            " ".join(status.removeprefix("STATUS_") for status in channel["statuses"]),
        ]
        for channel in found["channels"]
    ]
    return "\n".join(
        [
            f"migrated in {found['total']:.2f} s, {found['memory_bytes'] >> 20} MiB in {found['passes']} passes; "
            f"the guest stood still for {1000 * found['downtime']:.0f} ms",
            f"of that {1000 * found['prepared_in']:.1f} ms for the emulator: {found['state_bytes']} bytes of state, "
            f"{found['pages_marked']} pages marked ({found['pages_marked_early']} more before), "
            f"{found['pages_carried']} pages carried along, "
            f"{found['answers_carried']} answers carried over",
            table(["channel", "chunks", "bytes", "SaveContinue returned"], rows),
        ]
    )


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``migrate`` to a URI. The emulator then ends, unless ``keep`` is set."""
    if "save_buffer" in request:
        host.migration.buffer_size = int(request["save_buffer"])
    try:
        with alone(host.migration, "vmbus migrate", MigrationFailed), host.migration.driven_here():
            outcome = await migrate(
                host.migration,
                str(request["uri"]),
                cpr=str(request["cpr"]) if "cpr" in request else None,
                descriptor=next(iter(request["descriptors"]), None),
                carrier=CarrierAddress.parse(str(request["carrier"])) if "carrier" in request else None,
                directory=Path(str(request["directory"])) if "directory" in request else None,
                timeout=float(request.get("timeout", 600)),
            )
    except (KeyError, ValueError) as error:
        raise MigrationFailed(f"not a request to migrate: {error}") from error
    if not request.get("keep"):
        asyncio.get_running_loop().call_later(_LEAVE, host.stop, ExitReason.MIGRATED)
    return outcome.as_dict()


async def move(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``move`` for a guest whose QEMU the emulator did not start."""
    raise MigrationFailed(
        "the emulator did not start this guest's QEMU, so it cannot start a second one like it: start one "
        "with -incoming defer, attach an emulator to it, and say where it listens (vmbus migrate NAME URI)"
    )


async def take_back(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``take-back``."""
    with alone(host.migration, "vmbus migrate --take-back"):
        await host.migration.take_back()
    return {}


async def wait_ready(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``wait-ready`` as soon as migrate-continue may be sent."""
    coordinator = host.migration
    timeout = float(request.get("timeout", 600))
    try:
        ready = await coordinator.until_ready(timeout)
    except TimeoutError:
        raise MigrationFailed(f"no migration was ready within {timeout:g} s") from None
    if not ready:
        report = coordinator.report
        raise MigrationFailed(f"the migration ended before that: {report.refusal or report.status}")
    return coordinator.report.as_dict()


async def progress(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``migration``: what QEMU reports of the present or the last migration."""
    found = await host.qmp.execute("query-migrate")
    return {**found, "emulator": host.migration.phase.value}
