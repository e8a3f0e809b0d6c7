"""``vmbus channel``: pause, start, save and restore one channel of a running guest, call by call."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vmbus.cli.actions import GUEST_NAME, add_actions, add_verb
from vmbus.cli.output import show, show_json, tell
from vmbus.cli.table import table
from vmbus.devices.options import parse_size
from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.machine.control import ask
from vmbus.machine.host import Host
from vmbus.machine.migration.alone import check_idle
from vmbus.saving import NtStatus, StateRefused, by_hand
from vmbus.saving.device_channel import DeviceChannel
from vmbus.saving.dump import dump
from vmbus.saving.stream import BUFFER_SIZE

_EPILOG = """\
examples:
  vmbus channel list                              the channels of the only served guest, and how to name them
  vmbus channel pause heartbeat                   VmbChannelPause; the guest's packets wait in the ring
  vmbus channel save heartbeat hb.chunks          the calls, one a line; the chunks go into a file
  vmbus channel save heartbeat hb.chunks --buffer 64 --dump
  vmbus channel restore heartbeat hb.chunks       the device's end starts from nothing and gets this state
  vmbus channel start heartbeat                   VmbChannelStart; the guest has noticed a delay
  vmbus channel save web scsi:1 /dev/null --json  a sub-channel of guest web
  vmbus channel dump hb.chunks                    decode a file; no guest is needed

A channel is named by its device (device:N for its N-th sub-channel), its id, or interface:instance:index, as `list`
shows them. Save and restore need a paused channel. What is refused changes nothing; the guest continues at `start`.
"""

SETTLE_TIMEOUT = 10.0
"""Seconds to wait for work that is under way in a device, unless the user says otherwise."""

_SETTLE_INTERVAL = 0.005
_ANSWER_TIMEOUT = 30.0
_MAX_BUFFER = by_hand.MAX_STATE


def add_parser(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "channel",
        "pause, start, save and restore one channel, call by call",
        "Pauses, starts, saves and restores one channel of a served guest while it runs.\n"
        "Shows what each function of the KMCL contract returned (KMCL: Hyper-V's client library for VMBus).",
        _EPILOG,
    )
    actions = {
        "list": "list the channels with their states",
        "pause": "take no more packets of a channel, and wait for work under way",
        "start": "take packets again",
        "save": "save a paused channel into a file",
        "restore": "replace the state of a paused channel by that of a file",
        "dump": "decode a file of chunks; no guest is needed",
    }
    for action, each in add_actions(parser, "channel_action", actions, _EPILOG).items():
        if action != "dump":
            each.add_argument("name", nargs="?", help=GUEST_NAME)
        if action not in ("list", "dump"):
            each.add_argument("channel", metavar="CHANNEL", help="channel, as `vmbus channel list` names it")
        if action in ("save", "restore", "dump"):
            each.add_argument(
                "file", metavar="FILE", type=Path, help="file of the saved chunks, one after the other"
            )
        if action in ("save", "restore"):
            each.add_argument(
                "--buffer",
                type=_buffer_size,
                default=BUFFER_SIZE,
                metavar="SIZE",
                help="size of the buffer of one call (0, 64, 64K): save makes it larger when a chunk needs more, "
                "restore fills it with whole chunks, at least one (default: 64K)",
            )
            each.add_argument("--dump", action="store_true", help="print the chunks decoded, too")
        if action in ("pause", "save", "restore"):
            each.add_argument(
                "--timeout",
                type=_seconds,
                default=SETTLE_TIMEOUT,
                metavar="SECONDS",
                help=f"fail if work under way in the device takes longer (default: {SETTLE_TIMEOUT:g})",
            )
        if action != "dump":
            each.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    parser.set_defaults(action=main)


def _buffer_size(text: str) -> int:
    try:
        size = 0 if text == "0" else parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if size > _MAX_BUFFER:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MAX_BUFFER >> 20}M")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return seconds


def main(arguments: argparse.Namespace) -> int:
    action = arguments.channel_action
    if action == "dump":
        return _dumped(_read(arguments.file))
    request: dict[str, Any] = {"action": action}
    for key in ("channel", "buffer", "timeout"):
        if hasattr(arguments, key):
            request[key] = getattr(arguments, key)
    control = rundir.find(arguments.name) / "control.sock"
    data = _read(arguments.file) if action == "restore" else b""
    with contextlib.ExitStack() as stack:
        descriptors = [stack.enter_context(_in_memory(data))] if action == "restore" else []
        found = ask(
            control,
            "channel",
            answer_timeout=_ANSWER_TIMEOUT + getattr(arguments, "timeout", 0.0),
            descriptors=descriptors,
            **request,
        )
    if action == "save":
        data = base64.b64decode(found.pop("data"))
        if not found["refusal"]:
            _write(arguments.file, data)
    if arguments.json:
        show_json(found, indent=2)
    else:
        show(render(action, found))
    if refusal := found.get("refusal"):
        tell(f"vmbus channel: {refusal['reason']}: {refusal['detail']}")
        return 1
    return _dumped(data) if getattr(arguments, "dump", False) and not arguments.json else 0


def render(action: str, found: Mapping[str, Any]) -> str:
    """Return the answer as text."""
    if action == "list":
        channels = [
            (
                each["name"],
                str(each["relid"] or "-"),
                each["state"],
                each["axis"],
                *(str(each[key]) for key in ("owed", "awaited", "queued", "opens")),
                each["identity"],
            )
            for each in found["channels"]
        ]
        heads = (
            "channel",
            "id",
            "state",
            "",
            "owed",
            "awaited",
            "queued",
            "opens",
            "interface:instance:index",
        )
        return table(heads, channels, right=(1, 4, 5, 6, 7))
    if action in ("pause", "start"):
        function = "VmbChannelPause" if action == "pause" else "VmbChannelStart"
        kept = f"; {found['owed']} requests were taken and are not completed" if found.get("owed") else ""
        return f"{found['channel']}: {function} returned {found['status']}{kept}"
    calls = [
        (
            each["function"],
            each["status"] or "(VOID)",
            "" if each["value"] is None else f"{each['value']:#010x}",
            *("" if each[key] is None else str(each[key]) for key in ("size", "filled", "required")),
        )
        for each in found["calls"]
    ]
    columns = ("function", "status", "value", "buffer", "filled", "required")
    return table(columns, calls, right=(3, 4, 5))


def _dumped(data: bytes) -> int:
    for line in dump(data):
        show(line)
    return 0


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(by_hand.MAX_STATE + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > by_hand.MAX_STATE:
        raise UserError(
            f"{path} has more than {by_hand.MAX_STATE >> 20} MiB, more than a channel's state: is it another file?"
        )
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(number, "wb") as file:
            file.write(data)
    except OSError as error:
        raise UserError(
            f"the chunks cannot be written to {path}: {error.strerror or error}; the channel is still "
            "paused, save it again"
        ) from error


@contextlib.contextmanager
def _in_memory(data: bytes) -> Any:
    """A descriptor of a file in memory, which the emulator can read without waiting."""
    number = os.memfd_create("vmbus-channel")
    with os.fdopen(number, "wb") as file:
        file.write(data)
        file.flush()
        yield number


# --- in the emulator ---


async def answer(host: Host, request: Mapping[str, Any]) -> object:
    """Answer the control socket's ``channel``."""
    action = request.get("action")
    state = host.state
    if action == "list":
        return {"channels": [_listed(host, each) for each in state.channels()]}
    if action not in ("pause", "start", "save", "restore"):
        raise UserError(f"unknown action {action!r}; known: list, pause, restore, save, start")
    name = str(request.get("channel", ""))
    check_idle(host.migration, "channels")
    channel = _find(host, name)
    if action == "start":
        return _answered(channel, _checked(host, channel, state.start_channel(channel)))
    timeout = min(max(float(request.get("timeout", SETTLE_TIMEOUT)), 0.0), 3600.0)
    if action == "pause":
        status = _checked(host, channel, state.hold_channel(channel))
        await _settle(channel, timeout)
        return _answered(channel, status)
    data = _received(request.get("descriptors", ())) if action == "restore" else b""
    if channel.paused:  # an active one is refused by the call itself
        await _settle(channel, timeout)
        check_idle(host.migration, "channels")
        if channel not in state.channels():
            raise UserError(f"channel {name} has gone meanwhile")
    size = min(max(int(request.get("buffer", BUFFER_SIZE)), 0), _MAX_BUFFER)
    if action == "save":
        outcome = by_hand.save(state.saver, channel, size)
    else:
        outcome = by_hand.restore(state.saver, channel, data, size)
    refusal = outcome.refusal
    return {
        "channel": _name(channel),
        "calls": [each.as_dict() for each in outcome.calls],
        "bytes": len(outcome.data if action == "save" else data),
        "refusal": None if refusal is None else {"reason": refusal.reason.value, "detail": refusal.detail},
        "data": base64.b64encode(outcome.data).decode(),
    }


def _answered(channel: DeviceChannel, status: NtStatus) -> dict[str, Any]:
    return {"channel": _name(channel), "status": status.name, "owed": channel.io.status()["owed"]}


def _checked(host: Host, channel: DeviceChannel, status: NtStatus) -> NtStatus:
    if status != NtStatus.STATUS_SUCCESS:
        why: StateRefused | None = host.state.saver.refusal(channel)
        raise UserError(f"{_name(channel)}: {status!s}: {why.detail if why else 'no reason is known'}")
    return status


def _listed(host: Host, channel: DeviceChannel) -> dict[str, Any]:
    io = channel.io.status()
    return {
        "name": _name(channel),
        "relid": channel.channel.relid,
        "identity": str(channel.identity),
        "state": channel.channel.state.value,
        "axis": "paused" if channel.paused else "active",
        "restored": host.state.saver.restored(channel) and not channel.open,
        "owed": io["owed"],
        "awaited": io["awaited"],
        "queued": io["backlog"],
        "opens": channel.channel.counters.opens,
    }


def _name(channel: DeviceChannel) -> str:
    index = channel.channel.offer.subchannel_index
    return f"{channel.io.device.name}:{index}" if index else channel.io.device.name


def _find(host: Host, name: str) -> DeviceChannel:
    channels = host.state.channels()
    for names in (_name, lambda each: str(each.identity), lambda each: str(each.channel.relid)):
        found = [each for each in channels if names(each) == name]
        if len(found) == 1:
            return found[0]
    known = ", ".join(map(_name, channels))
    raise UserError(f"there is no channel {name!r}; there are {known or 'none'}")


async def _settle(channel: DeviceChannel, timeout: float) -> None:
    """Wait until no work of ``channel`` is under way. Raises :class:`~vmbus.errors.UserError` on timeout."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    while not channel.io.device.settled(channel.io):
        if loop.time() >= end:
            raise UserError(
                f"{_name(channel)} still has work under way after {timeout:g} s: "
                f"{channel.io.status()['owed']} requests; wait longer (--timeout), or start it again"
            )
        await asyncio.sleep(_SETTLE_INTERVAL)


def _received(descriptors: Sequence[int]) -> bytes:
    if len(descriptors) != 1 or not stat.S_ISREG(os.fstat(descriptors[0]).st_mode):
        raise UserError("the state to restore must come as the descriptor of a regular file")
    size = os.fstat(descriptors[0]).st_size
    if size > by_hand.MAX_STATE:
        raise UserError(f"{size} bytes cannot be the state of a channel")
    return os.pread(descriptors[0], size, 0)


CONTROL_COMMANDS = {"channel": answer}
