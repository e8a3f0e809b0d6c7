"""``vmbus doctor``: report what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from vmbus.cli.output import show, show_json
from vmbus.cli.table import table
from vmbus.devices.registry import Registry
from vmbus.errors import UserError, VmbusError
from vmbus.machine.engine import build as engine_build
from vmbus.machine.gateway import build as gateway_build
from vmbus.native import NativeLibrary, compiler
from vmbus.provision.doctor import Check, State, examine, healthy
from vmbus.provision.qemu import find_qemu
from vmbus.sandbox.report import layers

_EPILOG = """\
examples:
  vmbus doctor
  vmbus doctor --json

Exit status: 0 if nothing necessary is missing, else 1. Nothing on the machine is changed.
"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="report what this machine has, what is missing, and how to get it",
        description="Checks what the emulator needs of this machine, and says how to get what is missing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the checks as one JSON list")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    libraries = (gateway_build.LIBRARY, engine_build.LIBRARY, *Registry().native_libraries())
    checks = examine(more=[*(_compiled(each) for each in libraries), *_sandbox()])
    if arguments.json:
        show_json([check.as_json() for check in checks], indent=2)
    else:
        rows = [(check.state.value, check.name, check.found) for check in checks]
        show(table(("", "what", "found"), rows))
        for check in checks:
            if check.remedy and check.state is not State.OK:
                show(f"{check.name}: {check.remedy}")
    return 0 if healthy(checks) else 1


def _sandbox() -> list[Check]:
    """Return what of the sandbox is in force here."""
    found = [
        Check(
            f"sandbox: {layer.name}",
            State.OK if layer.there and not layer.lacking else State.OPTIONAL,
            layer.found if not (layer.there and layer.lacking) else f"{layer.found}; open: {layer.lacking}",
            layer.lacking if not layer.there else "",
        )
        for layer in layers()
    ]
    with contextlib.suppress(UserError):  # without a QEMU, another line says so
        there = find_qemu().sandbox
        found.append(
            Check(
                "sandbox: QEMU's own",
                State.OK if there else State.OPTIONAL,
                "starts no programs, gains no privileges" if there else "this QEMU was built without seccomp",
                "" if there else "a QEMU built with libseccomp, or `vmbus setup` with VMBUS_QEMU unset",
            )
        )
    return found


def _compiled(library: NativeLibrary) -> Check:
    name = library.name_in_reports
    built = library.path()
    if built.is_file():
        return Check(name, State.OK, f"built: {built}")
    try:
        command = compiler()
    except VmbusError as error:
        return Check(name, State.MISSING, "not built, and no C compiler", str(error))
    return Check(name, State.OPTIONAL, f"not built yet ({command} is there)", "`vmbus setup` builds it")
