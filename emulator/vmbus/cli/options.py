"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from vmbus.devices.registry import Registry
from vmbus.errors import VmbusError
from vmbus.hypervisor.features import Features
from vmbus.machine.host import HostOptions
from vmbus.machine.migration.coordinator import Switchover
from vmbus.wire.version import Version

DEFAULT_GUEST = "debian-6.12"
DEFAULT_DEVICES = ("heartbeat", "shutdown", "timesync")

_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """``512M``, ``2G``; a bare number is MiB, as QEMU's ``-m``. Whole MiB."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512M or 2G")
    value = int(found.group(1)) * _UNITS[found.group(2).upper()]
    if value % (1 << 20) or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of MiB")
    return value


def version(text: str) -> Version:
    """``5.3`` → :class:`Version`."""
    for known in Version:
        if str(known) == text:
            return known
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(str(known) for known in Version)}")


class DeviceOption(argparse.Action):
    """Collects ``--device`` texts; ``help`` and ``NAME,help`` print what there is and end, as ``--help`` does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        text = str(values)
        name, *pairs = text.replace(",,", "\0").split(",")
        if text == "help" or "help" in pairs:
            try:
                print(Registry().help(name if pairs else None))
            except VmbusError as error:
                parser.error(str(error))
            parser.exit()
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), text])


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """What of the Hyper-V host the user may choose."""
    group = parser.add_argument_group("the Hyper-V host")
    group.add_argument(
        "--device",
        action=DeviceOption,
        default=[],
        metavar="NAME[,KEY=VALUE...]",
        help="offer a device; may be repeated. `--device help` lists them, `--device NAME,help` the options of one",
    )
    group.add_argument(
        "--no-default-devices",
        action="store_true",
        help=f"do not offer {', '.join(DEFAULT_DEVICES)} unless asked for",
    )
    group.add_argument(
        "--max-version",
        type=version,
        default=Version.COPPER,
        metavar="VERSION",
        help="the newest VMBus version to agree to, 0.13 to 6.0 (default: 6.0)",
    )
    group.add_argument(
        "--stimer",
        choices=("off", "message", "direct"),
        default="off",
        help="offer synthetic timers, which Linux then uses as its clock event source (default: off)",
    )
    group.add_argument(
        "--hold-limit",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="if this emulator goes away, the guest waits that long for the next one, then its messages are told "
        "to try again (default: it waits for ever)",
    )
    group.add_argument(
        "--switchover",
        type=Switchover,
        choices=list(Switchover),
        default=Switchover.OWN,
        metavar="{own,observe}",
        help="who sends migrate-continue in migrations that pause before the switch-over: the emulator, as soon as "
        "its state is ready, or whoever drives, after `vmbus migrate --wait-ready` (default: own)",
    )
    group.add_argument(
        "--auto-eoi",
        action="store_true",
        help="do not advise against auto-EOI, so that guests use it (works in xAPIC mode: -cpu ...,-x2apic)",
    )


def host_options(arguments: argparse.Namespace) -> HostOptions:
    """The options above as the host takes them."""
    return HostOptions(
        features=Features(
            stimer=arguments.stimer != "off",
            stimer_direct=arguments.stimer == "direct",
            deprecate_auto_eoi=not arguments.auto_eoi,
        ),
        max_version=arguments.max_version,
        take_over=getattr(arguments, "take_over", False),
        reset=getattr(arguments, "reset", False),
        hold_limit=arguments.hold_limit,
        switchover=arguments.switchover,
    )


def device_lines(arguments: argparse.Namespace) -> list[str]:
    """The devices asked for, after the default ones that were not configured by the user."""
    asked = list(arguments.device)
    if arguments.no_default_devices:
        return asked
    named = {line.split(",", 1)[0] for line in asked}
    return [name for name in DEFAULT_DEVICES if name not in named] + asked
