"""``vmbus device``: list, add, remove and resize the devices of a running guest."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmbus.bus.io.device import Device
from vmbus.cli.actions import GUEST_NAME, add_actions, add_verb
from vmbus.cli.devices import registry
from vmbus.cli.output import show, show_json
from vmbus.cli.table import table
from vmbus.devices.joined import Joinable
from vmbus.devices.options import parse_size
from vmbus.devices.parts import HasParts, NoticesRemoval, Part
from vmbus.devices.registry import Registry
from vmbus.errors import InternalError, MissingRequirement, UserError
from vmbus.machine import removal, rundir
from vmbus.machine.control import ask
from vmbus.machine.host import AttachedDevice, Host
from vmbus.machine.migration.alone import check_idle

_EPILOG = """\
examples:
  vmbus device list                                     the only served guest
  vmbus device list NAME --json
  vmbus device add scsi,image=data.qcow2,format=qcow2   one more disk; the same text as after `vmbus run --device`
  vmbus device add NAME echo                            one more device
  vmbus device remove scsi/0:1                          a disk: controller, target, LUN, as `list` shows it
  vmbus device remove NAME echo                         a device, or a controller with all its disks
  vmbus device resize scsi/0:1 20G                      a raw or qcow2 image and its disk
  vmbus device resize NAME scsi/0:1                     the image has been resized already: use its new size

The guest is notified, but not asked: unmount a disk before you remove it. A controller loses its disks first, and
goes when the guest has finished with it; if that takes more than a minute, it stays, without disks.

Added devices migrate with the guest (`vmbus migrate NAME`); if you start the target yourself, give
`vmbus run --incoming` the same devices.
"""

CONTROL_TIMEOUT = 120.0
"""Seconds that opening or resizing an image may take, or a guest with the removal of a device."""


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "device",
        "list, add, remove and resize devices of a served guest",
        "Lists, adds, removes and resizes the devices of a served guest while it runs.",
        _EPILOG,
    )
    actions = {
        "list": "list the devices that the guest is offered",
        "add": "offer one more device",
        "remove": "remove a device or a disk",
        "resize": "make a disk larger",
    }
    values = {
        "add": ("line", "NAME[,KEY=VALUE...]", "the device, as after `vmbus run --device`"),
        "remove": ("device", "DEVICE", "device or disk, as `vmbus device list` names it"),
        "resize": ("device", "DISK", "disk, as `vmbus device list` names it"),
    }
    for action, each in add_actions(parser, "device_action", actions, _EPILOG).items():
        each.add_argument("name", nargs="?", help=GUEST_NAME)
        if action in values:
            value, metavar, meaning = values[action]
            each.add_argument(value, metavar=metavar, help=meaning)
        if action == "resize":
            each.add_argument(
                "size",
                nargs="?",
                help="new size in bytes, or as in 20G; omit it if the image has been resized already",
            )
        if action == "remove":
            each.add_argument(
                "--force",
                action="store_true",
                help="do not wait for the guest: requests that it has not finished hang in it",
            )
        each.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    action = arguments.device_action
    request: dict[str, Any] = {"action": action}
    name = arguments.name
    if action == "add":
        request["line"] = Registry().seen_from(Path.cwd(), arguments.line)
    elif action in ("remove", "resize"):
        request["device"] = arguments.device
    if action == "remove":
        request["force"] = arguments.force
    if action == "resize":
        size = arguments.size
        if size is None and name is not None and "/" in name:  # no guest's name has a slash
            name, request["device"], size = None, name, arguments.device
        if size is not None:
            request["size"] = parse_size(size)
    control = rundir.find(name) / "control.sock"
    found = ask(control, "device", answer_timeout=CONTROL_TIMEOUT, **request)
    if arguments.json:
        show_json(found, indent=2)
    elif action == "list":
        show(render(found["devices"]))
    else:
        show(found["done"])
    return 0


def render(devices: list[Mapping[str, Any]]) -> str:
    """Return a table with one row for each device and one for each of its parts."""
    rows = []
    for device in devices:
        rows.append((device["name"], device["state"], device["line"] if not device["disks"] else ""))
        rows += [(disk["name"], disk["type"], disk["line"]) for disk in device["disks"]]
    return table(("device", "state", "made by --device"), rows)


# --- in the emulator ---


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``device``."""
    action = request.get("action")
    if action == "list":
        return {"devices": [_listed(each) for each in host.devices]}
    check_idle(host.migration, "devices")
    if action == "add":
        return await _add(host, str(request.get("line", "")))
    if action == "remove":
        return await _remove(host, str(request.get("device", "")), force=bool(request.get("force")))
    if action == "resize":
        size = request.get("size")
        return await _resize(host, str(request.get("device", "")), None if size is None else int(size))
    raise UserError(f"unknown action {action!r}; known: add, list, remove, resize")


def _listed(attached: AttachedDevice) -> dict[str, Any]:
    device = attached.device
    return {
        "name": device.name,
        "state": attached.channel.state.name.lower(),
        "instance": str(attached.channel.offer.instance_id),
        "line": device.line,
        "disks": [
            {"name": f"{device.name}/{name}", "line": part.line, **part.status, "type": part.type}
            for name, part in _parts(device).items()
        ],
    }


def _parts(device: Device) -> Mapping[str, Part]:
    return device.parts() if isinstance(device, HasParts) else {}


async def _add(host: Host, line: str) -> dict[str, Any]:
    present = [each for attached in host.devices for each in attached.device.lines()]
    [line] = registry().completed([line], present)
    device = await asyncio.to_thread(_create, line)
    try:
        check_idle(host.migration, "devices")  # its images may have taken long
        host.check_device(device)
        if found := _join(host, device):
            return {"name": found, "done": f"{found} is there"}
        if any(each.device.name == device.name for each in host.devices):
            raise UserError(f"there is a device {device.name} already: give this one a name (id=)")
        host.add_device(device)
    except BaseException:
        device.stop()
        raise
    return {"name": device.name, "done": f"{device.name} is offered"}


def _create(line: str) -> Device:
    """Return the device of ``line``, ready for use: its images are locked, its libraries compiled. May block."""
    device = registry().create(line)
    try:
        device.claim()
    except BaseException:
        device.stop()
        raise
    for library in device.native_libraries:
        # The device works without the library, and its start() logs the reason.
        with contextlib.suppress(MissingRequirement, InternalError, OSError):
            library.build()
    return device


def _join(host: Host, device: Device) -> str:
    """Make ``device`` part of a device that is present; return the part's name, or nothing if none takes it."""
    for attached in host.devices:
        present = attached.device
        before = set(_parts(present))
        if isinstance(present, Joinable) and present.join(device):
            added = [f"{present.name}/{name}" for name in _parts(present) if name not in before]
            return ", ".join(added) or present.name
    return ""


def _find(host: Host, name: str) -> tuple[AttachedDevice, str | None]:
    """Return a device, and the name of its part if ``name`` is that of a part."""
    for attached in host.devices:
        if attached.device.name == name:
            return attached, None
    owner, _, wanted = name.rpartition("/")
    for attached in host.devices:
        device = attached.device
        if device.name == owner and isinstance(device, HasParts):
            part = device.part_name(wanted)
            if part is not None:
                return attached, part
    known = [each.device.name for each in host.devices]
    known += [f"{each.device.name}/{part}" for each in host.devices for part in _parts(each.device)]
    raise UserError(f"there is no device {name}; there are {', '.join(known)}")


async def _remove(host: Host, name: str, *, force: bool) -> dict[str, Any]:
    attached, part = _find(host, name)
    device = attached.device
    if isinstance(device, HasParts):
        if part is not None:
            device.detach_part(part)
            return {"name": name, "done": f"{name} is removed"}
        for each in tuple(device.parts()):
            device.detach_part(each)
        if not force:
            await _wait_for_guest(host, attached, device)
    if attached in host.devices:
        host.remove_device(attached)
    released = await removal.guest_released(host, attached.channel)
    late = (
        "" if released else "; the guest has not released its channel yet, whose id stays taken until it does"
    )
    return {"name": name, "released": released, "done": f"{name} is removed{late}"}


async def _wait_for_guest(host: Host, attached: AttachedDevice, device: HasParts) -> None:
    """Wait until the guest has finished with a device that has lost its parts.

    Raises :class:`~vmbus.errors.UserError` if it does not, or if the device must stay for another reason.
    """
    name = attached.device.name
    await removal.guest_finished(
        host,
        name,
        attached.channel,
        attached.io,
        busy=device.busy,
        noticed=device.removal_noticed if isinstance(device, NoticesRemoval) else lambda: True,
    )
    if device.parts():
        raise UserError(
            f"{name} stays: {', '.join(device.parts())} was added to it while it was being removed"
        )
    try:
        check_idle(host.migration, "devices")  # a migration may have begun
    except UserError as error:
        raise UserError(f"{name} is without its disks, but it is still offered: {error}") from error


async def _resize(host: Host, name: str, size: int | None) -> dict[str, Any]:
    attached, part = _find(host, name)
    device = attached.device
    if not isinstance(device, HasParts):
        raise UserError(f"{name} is not a disk, so it has no size; `vmbus device list` shows the disks")
    if part is None:
        raise UserError(
            f"{name} is not a disk but a device with disks: name one of them, as in {_example(device, name)}"
        )
    before = device.parts()[part].size
    if before is None:
        raise UserError(f"{name} cannot be resized: it has no size")
    await device.resize_part(part, size)
    found = device.parts().get(part)
    if found is None:
        raise UserError(f"{name} was removed while it was resized")
    unchanged = ", as before" if found.size == before else ""
    return {"name": name, "size": found.size, "done": f"{name} has {found.size} bytes{unchanged}"}


def _example(device: HasParts, name: str) -> str:
    return f"{name}/{next(iter(device.parts()), '0:0')}"


CONTROL_COMMANDS = {"device": answer}
