"""What a host is told when it attaches, and what it reports of its guest: options, events, the reason of the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vmbus.bus.channel.channel import Channel
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device
from vmbus.hypervisor.crash import CrashReport
from vmbus.hypervisor.features import Features
from vmbus.machine.migration.state_machine import Switchover
from vmbus.wire.version import Version

MakeDevices = Callable[[Sequence[str] | None], Sequence[Device]]
"""Makes devices from the lines of the emulator of before, or ``None`` if it has left none; in another thread."""


class ExitReason(Enum):
    """The reason why :meth:`Host.serve` returned."""

    POWERED_OFF = "powered off"
    QEMU_GONE = "QEMU ended"
    STOPPED = "stopped"
    MIGRATED = "migrated"


@dataclass(frozen=True, slots=True)
class HostOptions:
    """Choices of the user."""

    features: Features = field(default_factory=Features)
    max_version: Version = Version.COPPER
    takeover: bool = False
    """Detach an emulator that is attached to QEMU."""
    reset: bool = False
    """Reset a guest whose emulator has ended: only that emulator had its state (:mod:`~vmbus.machine.takeover`)."""
    hold_timeout: float = 0.0
    """Seconds that a guest waits for a next emulator before its messages are refused with the status on which guests
    try again; 0: without limit."""
    switchover: Switchover = Switchover.OWN
    """Which program sends ``migrate-continue`` in a migration that another program began."""
    journal: bool = False
    """Keep what another emulator needs to take the guest over if this one is killed; :mod:`vmbus.machine.journal`."""
    allow_missing_devices: bool = False
    """Take a guest that arrives although some of its devices are not offered here: their channels are revoked."""


@dataclass(frozen=True, slots=True)
class AttachedDevice:
    """A device, its primary channel, and the host's end of that channel."""

    device: Device
    io: ChannelIo
    channel: Channel


@dataclass(slots=True)
class HostEvents:
    """What happened to the guest so far; no list has more than 16 entries."""

    crashes: list[CrashReport] = field(default_factory=list)
    resets: int = 0
    takeovers: int = 0
    """How often the next emulator went on after one that was killed."""
    guest_panicked: int = 0
