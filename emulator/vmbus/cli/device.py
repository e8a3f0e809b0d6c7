"""``vmbus device``: list, add, remove and resize the devices of a guest that runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from vmbus_devices.scsi.controller import Controller
from vmbus_devices.scsi.drive import parse_size
from vmbus_devices.scsi.unit import LogicalUnit

from vmbus.bus.io.device import Device
from vmbus.cli.devices import registry
from vmbus.cli.table import table
from vmbus.devices.joined import Joinable
from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.machine.host import AttachedDevice, Host
from vmbus.machine.migration.coordinator import Phase

_EPILOG = """\
examples:
  vmbus device list                                     the only served guest
  vmbus device list NAME --json
  vmbus device add scsi,image=data.qcow2,format=qcow2   one more disk; what stands after --device of `vmbus run`
  vmbus device add NAME echo                            one more device
  vmbus device remove scsi/0:1                          a disk: controller, target, LUN, as `list` shows it
  vmbus device remove NAME echo                         a device, or a controller with all its disks
  vmbus device resize scsi/0:1 20G                      a raw or qcow2 image and its disk
  vmbus device resize NAME scsi/0:1                     the image was resized already: look

The guest is told, and nothing is asked of it: unmount a disk before you remove it. What was added goes along when
the guest moves (`vmbus migrate NAME`); for a target of your own give `vmbus run --incoming` the same devices.
"""

_DISK = re.compile(r"(.+)/(?:(\d+):)?(\d+)")
QUIET = 0.5
"""Seconds without a request after which a guest is done with a controller that has no disks any more."""
WITHDRAW_LIMIT = 10.0
LIMIT = 120.0
"""Seconds that opening or resizing an image may take."""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "device",
        help="list, add, remove and resize devices of a served guest",
        description="Lists, adds, removes and resizes the devices of a served guest while it runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="device_action", metavar="ACTION", required=True)
    for action, text, values in (
        ("list", "what the guest is offered", ()),
        ("add", "offer one more", (("line", "NAME[,KEY=VALUE...]", "as after --device of `vmbus run`"),)),
        ("remove", "take one away", (("device", "DEVICE", "as `vmbus device list` names it"),)),
        ("resize", "make a disk larger", (("device", "DISK", "as `vmbus device list` names it"),)),
    ):
        each = actions.add_parser(
            action,
            help=text,
            description=f"vmbus device {action}: {text}.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        each.add_argument("name", nargs="?", help="the guest (not needed where only one is served)")
        for value, metavar, meaning in values:
            each.add_argument(value, metavar=metavar, help=meaning)
        if action == "resize":
            each.add_argument("size", nargs="?", help="20G; none: the image has its new size already")
        each.add_argument("--json", action="store_true", help="the answer, as one JSON object")
    parser.set_defaults(action=main)


def main(arguments: argparse.Namespace) -> int:
    action = arguments.device_action
    request: dict[str, Any] = {"action": action}
    name = arguments.name
    if action == "add":
        request["line"] = arguments.line
    elif action in ("remove", "resize"):
        request["device"] = arguments.device
    if action == "resize":
        size = arguments.size
        if size is None and name is not None and _DISK.fullmatch(name):  # no guest's name has a slash
            name, request["device"], size = None, name, arguments.device
        if size is not None:
            request["size"] = parse_size(size)
    found = ask(rundir.find(name) / "control.sock", "device", limit=LIMIT, **request)
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    elif action == "list":
        print(render(found["devices"]))
    else:
        print(found["done"])
    return 0


def render(devices: list[Mapping[str, Any]]) -> str:
    """One row a device, and one a disk of it."""
    rows = []
    for device in devices:
        rows.append((device["name"], device["state"], device["line"] if not device["disks"] else ""))
        rows += [(disk["name"], disk["type"], disk["line"]) for disk in device["disks"]]
    return table(("device", "state", "made by --device"), rows)


# --- in the emulator -----------------------------------------------------------------------------------------------


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """The control socket's ``device``."""
    action = request.get("action")
    if action == "list":
        return {"devices": [_listed(each) for each in host.devices]}
    if host.migration.phase is not Phase.IDLE:
        raise UserError(f"the guest's devices cannot be changed now: it is {host.migration.phase.value}")
    if action == "add":
        return await _add(host, str(request.get("line", "")))
    if action == "remove":
        return await _remove(host, str(request.get("device", "")))
    if action == "resize":
        size = request.get("size")
        return await _resize(host, str(request.get("device", "")), None if size is None else int(size))
    raise UserError(f"no such action: {action}")


def _listed(attached: AttachedDevice) -> dict[str, Any]:
    device = attached.device
    disks = []
    if isinstance(device, Controller):
        for place, unit in sorted(device.units.items()):
            disks.append({"name": disk_name(device, place), "line": device.line_of(place), **unit.status()})
    return {
        "name": device.name,
        "state": attached.channel.state.name.lower(),
        "instance": str(attached.channel.offer.instance_id),
        "line": device.line,
        "disks": disks,
    }


def disk_name(device: Device, place: tuple[int, int]) -> str:
    """``scsi/0:1``: what a disk is called."""
    return f"{device.name}/{place[0]}:{place[1]}"


async def _add(host: Host, line: str) -> dict[str, Any]:
    there = [each for attached in host.devices for each in attached.device.lines()]
    [line] = registry().completed([line], there)
    device = await asyncio.to_thread(registry().create, line)
    try:
        if found := _join(host, device):
            return {"name": found, "done": f"{found} is there"}
        if any(each.device.name == device.name for each in host.devices):
            raise UserError(f"there is a device {device.name} already: give this one a name (id=)")
        host.add_device(device)
    except BaseException:
        device.stop()
        raise
    return {"name": device.name, "done": f"{device.name} is offered"}


def _join(host: Host, device: Device) -> str:
    """Make it a part of a device that is there; the name of the part, or nothing."""
    for attached in host.devices:
        there = attached.device
        before = set(there.units) if isinstance(there, Controller) else set()
        if isinstance(there, Joinable) and there.join(device):
            added = (
                sorted(set(there.units) - before)
                if isinstance(there, Controller)
                else list[tuple[int, int]]()
            )
            return ", ".join(disk_name(there, place) for place in added) or there.name
    return ""


def _find(host: Host, name: str) -> tuple[AttachedDevice, tuple[int, int] | None]:
    """A device, or a disk of it. Raises :class:`~vmbus.errors.UserError`."""
    for attached in host.devices:
        if attached.device.name == name:
            return attached, None
    if disk := _DISK.fullmatch(name):
        place = (int(disk[2] or 0), int(disk[3]))
        for attached in host.devices:
            device = attached.device
            if device.name == disk[1] and isinstance(device, Controller) and place in device.units:
                return attached, place
    known = [each.device.name for each in host.devices]
    known += [
        disk_name(each.device, place)
        for each in host.devices
        if isinstance(each.device, Controller)
        for place in sorted(each.device.units)
    ]
    raise UserError(f"there is no device {name}; there are {', '.join(known)}")


async def _remove(host: Host, name: str) -> dict[str, Any]:
    attached, place = _find(host, name)
    device = attached.device
    if place is not None and isinstance(device, Controller):
        device.detach(*place)
    else:
        if isinstance(device, Controller):
            await _withdraw_disks(attached, device)
        if attached in host.devices:
            host.remove_device(attached)
    return {"name": name, "done": f"{name} is taken away"}


async def _withdraw_disks(attached: AttachedDevice, controller: Controller) -> None:
    """Take the disks away first, and wait until the guest has understood that.

    Linux never ends a request that was in a ring when its channel went.
    """
    for place in tuple(controller.units):
        controller.detach(*place)
    channels = (attached.io, *attached.io.subchannels)
    end = asyncio.get_running_loop().time() + WITHDRAW_LIMIT
    seen = -1
    while asyncio.get_running_loop().time() < end:
        before, seen = seen, sum(each.status()["packets_in"] for each in channels)
        if seen == before and not controller.status()["in_flight"]:
            return
        await asyncio.sleep(QUIET)


async def _resize(host: Host, name: str, size: int | None) -> dict[str, Any]:
    attached, place = _find(host, name)
    controller = attached.device
    if place is None or not isinstance(controller, Controller):
        raise UserError(f"{name} is no disk: say which, as in {name}/0:0")
    unit: LogicalUnit = controller.units[place]
    before = unit.blocks * unit.block_size
    if size is not None:
        if size < before:
            raise UserError(f"{name} has {before} bytes, and a disk is never made smaller")
        if size % unit.block_size:
            raise UserError(f"{size} bytes are no whole number of blocks of {unit.block_size}")
        await asyncio.to_thread(unit.backend.grow, size)
    else:
        await asyncio.to_thread(unit.backend.look_again)
    if controller.units.get(place) is not unit:
        raise UserError(f"{name} was taken away meanwhile")
    changed = controller.resize(*place)
    now = unit.blocks * unit.block_size
    return {"name": name, "size": now, "done": f"{name} has {now} bytes{'' if changed else ', as before'}"}


CONTROL_COMMANDS = {"device": answer}
