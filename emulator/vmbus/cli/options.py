"""Options that several verbs share, and the parsers of their values."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

from vmbus.cli.output import show
from vmbus.devices.registry import Registry
from vmbus.errors import VmbusError
from vmbus.hypervisor.features import Features
from vmbus.machine.host import HostOptions
from vmbus.machine.migration.state_machine import Switchover
from vmbus.sandbox import confinement, memory
from vmbus.wire.version import Version

DEFAULT_GUEST = "debian-6.12"
DEFAULT_DEVICES = ("heartbeat", "shutdown", "timesync")

_SIZE = re.compile(r"(\d{1,15})([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_WHOLE_NUMBER = re.compile(r"[+-]?\d{1,19}")
_UNITS = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

MAX_MEMORY = 1 << 46
"""Bytes of guest memory: 64 TiB, what an x86 with 46 address bits can have."""
MAX_VCPUS = 4096
"""vCPUs of QEMU's largest machine type."""
MAX_TIMEOUT = 366 * 24 * 3600.0
"""Seconds of the longest timeout: a year."""
MAX_HOLD = 4e6
"""Seconds that the gateway's counter of milliseconds can hold: 46 days."""

MIN_ALLOWANCE = 256 << 20
"""Bytes that ``--emulator-memory`` leaves at least: four times what a guest can make the emulator hold."""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds; write 30 or 0.5") from None


def seconds(text: str) -> float:
    """Return the seconds of a timeout: above 0, and at most :data:`MAX_TIMEOUT`."""
    value = _number(text)
    if not 0 < value <= MAX_TIMEOUT:  # false for NaN, too
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a timeout: write a number of seconds above 0 and up to {MAX_TIMEOUT:.0f} (a year)"
        )
    return value


def hold_limit(text: str) -> float:
    """Return the seconds of ``--hold-limit``, 0 to :data:`MAX_HOLD`."""
    value = _number(text)
    if not 0 <= value <= MAX_HOLD:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a limit: write a number of seconds up to {MAX_HOLD:.0f}, or 0 for no limit"
        )
    return value


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        value = int(text) if _WHOLE_NUMBER.fullmatch(text) else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return value

    return parse


def size(text: str) -> int:
    """Return the bytes of ``512M`` or ``2G``, whole MiB; a bare number is MiB, as for QEMU's ``-m``."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 512M or 2G")
    value = int(found.group(1)) * _UNITS[found.group(2).upper()]
    if value % (1 << 20) or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of MiB above 0")
    if value > MAX_MEMORY:
        raise argparse.ArgumentTypeError(
            f"{text!r} is more than {MAX_MEMORY >> 40}T, the most a guest can have"
        )
    return value


def allowance(text: str) -> int | None:
    """Return the bytes of ``--emulator-memory``; ``None``: no bound."""
    if text == "off":
        return None
    value = size(text)
    if value < MIN_ALLOWANCE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is too little: write at least {MIN_ALLOWANCE >> 20}M, or off"
        )
    return value


def version(text: str) -> Version:
    """Return the :class:`Version` that ``5.3`` stands for."""
    for known in Version:
        if str(known) == text:
            return known
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a VMBus version; known: {', '.join(str(known) for known in Version)}"
    )


def switchover(text: str) -> Switchover:
    """Return the :class:`Switchover` that ``own`` or ``observe`` stands for."""
    try:
        return Switchover(text)
    except ValueError:
        known = " or ".join(each.value for each in Switchover)
        raise argparse.ArgumentTypeError(f"{text!r} is neither of the two ways; write {known}") from None


class DeviceOption(argparse.Action):
    """Collects ``--device`` texts; ``help`` and ``NAME,help`` print devices or options and exit."""

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
                found = Registry().help(name if pairs else None)
            except VmbusError as error:
                parser.error(str(error))
            show(found)
            parser.exit()
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), text])


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that shape the Hyper-V host."""
    group = parser.add_argument_group("the Hyper-V host")
    group.add_argument(
        "--device",
        action=DeviceOption,
        default=[],
        metavar="NAME[,KEY=VALUE...]",
        help="offer a device; may be repeated. `--device help` lists the devices, `--device "
        "NAME,help` the options of one",
    )
    group.add_argument(
        "--no-default-devices",
        action="store_true",
        help=f"offer only devices given by --device, and not also {', '.join(DEFAULT_DEVICES)}",
    )
    group.add_argument(
        "--max-version",
        type=version,
        default=Version.COPPER,
        metavar="VERSION",
        help="newest VMBus version to accept, 0.13 to 6.0 (default: 6.0)",
    )
    group.add_argument(
        "--stimer",
        choices=("off", "message", "direct"),
        default="off",
        help="offer synthetic timers, which Linux then uses as its clock event source, as on Hyper-V (direct); its "
        "ticks stop while no emulator serves it (default: off)",
    )
    group.add_argument(
        "--hold-limit",
        type=hold_limit,
        default=0.0,
        metavar="SECONDS",
        help="how long the guest waits for another emulator if this one goes away; after that its "
        "messages are answered with a status on which it tries again (default: no limit)",
    )
    group.add_argument(
        "--sandbox",
        choices=("on", "off"),
        default="on",
        help="off: let QEMU, storage daemons and this emulator do all that you may do; on: only what they need, as "
        "far as this machine can restrict it (`vmbus doctor`) (default: on)",
    )
    group.add_argument(
        "--emulator-memory",
        type=allowance,
        default=memory.ALLOWANCE,
        metavar="SIZE|off",
        help="what the emulator itself may take after its start, guest RAM not counted; beyond that it fails, or "
        "refuses one more disk in memory (default: 2G)",
    )
    group.add_argument(
        "--switchover",
        type=switchover,
        default=Switchover.OWN,
        metavar="{own,observe}",
        help="who sends migrate-continue in migrations that pause before the switch-over: own: the "
        "emulator, as soon as its state is ready; observe: the program that drives, after `vmbus migrate "
        "--wait-ready` (default: own)",
    )
    group.add_argument(
        "--auto-eoi",
        action="store_true",
        help="do not recommend against auto-EOI, so that guests use it (needs xAPIC mode: -cpu ...,-x2apic)",
    )


def add_missing_devices_option(parser: Any) -> None:
    """Add the option of the commands that a guest arrives at."""
    parser.add_argument(
        "--allow-missing-devices",
        action="store_true",
        help="take a guest that arrives although some of its devices are not offered here: it loses their channels, "
        "and keeps all others",
    )


def add_supervise_option(parser: Any) -> None:
    """Add the option of the commands that serve a guest."""
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="serve the guest in a process of its own, and start the next one if that is killed: the guest goes on, "
        "and nothing is lost. Disks must be raw images; as --journal of `vmbus attach`",
    )


def host_options(arguments: argparse.Namespace) -> HostOptions:
    """Return the host's options from the command line."""
    return HostOptions(
        features=Features(
            stimer=arguments.stimer != "off",
            stimer_direct=arguments.stimer == "direct",
            deprecate_auto_eoi=not arguments.auto_eoi,
        ),
        max_version=arguments.max_version,
        takeover=getattr(arguments, "take_over", False),
        reset=getattr(arguments, "reset", False),
        hold_timeout=arguments.hold_limit,
        switchover=arguments.switchover,
        journal=getattr(arguments, "journal", False) or getattr(arguments, "supervise", False),
        allow_missing_devices=getattr(arguments, "allow_missing_devices", False),
    )


def confine(arguments: argparse.Namespace) -> None:
    """Confine this process, and all that it starts from now on, unless --sandbox off was given."""
    confinement.enable(arguments.sandbox == "on")
    confinement.confine_this_process(confinement.Confinement(inside=True))


def limit_memory(arguments: argparse.Namespace) -> None:
    """Bound the memory of this process, which has made its devices, unless ``--emulator-memory off`` was given."""
    if arguments.emulator_memory is not None:
        memory.limit(arguments.emulator_memory)


def device_lines(arguments: argparse.Namespace) -> list[str]:
    """Return the lines of --device, after the default devices that no such line configures."""
    asked = list(arguments.device)
    if arguments.no_default_devices:
        return asked
    named = {line.split(",", 1)[0] for line in asked}
    return [name for name in DEFAULT_DEVICES if name not in named] + asked
