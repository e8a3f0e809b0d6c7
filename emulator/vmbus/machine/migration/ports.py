"""What migrations and snapshots use of a machine.

The modules of this package are made from these protocols, so that a test drives them without a host, and the host
may import them. Guest memory, the bus and the partition are used as they are: they do no I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from vmbus.bus.io.channel_io import ChannelDevice, ChannelIo
from vmbus.machine.gateway.traps import Unclaimed
from vmbus.machine.memory import MappedMemory
from vmbus.machine.qemu.qtest import MainLoopWaits
from vmbus.wire.gateway import GuestState
from vmbus.wire.saved import ChannelIdentity


class Monitor(Protocol):
    """QEMU's monitor; :class:`~vmbus.machine.qemu.qmp.Qmp`."""

    @property
    def connected(self) -> bool:
        """Whether QEMU still has the connection open."""

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Execute one command and return its result.

        Raises :class:`~vmbus.errors.QemuError` if QEMU refuses it, :class:`~vmbus.errors.QemuGone` if QEMU ended.
        """

    async def cont(self) -> None:
        """Resume the guest, as soon as QEMU has ended a migration that it still finishes."""

    async def hand_over(self, descriptor: int, name: str) -> None:
        """Pass ``descriptor`` to QEMU, as ``fd:NAME`` in a later command."""

    async def lend(self, descriptors: Sequence[int]) -> int:
        """Pass descriptors of one file to QEMU; return the number of their ``/dev/fdset``."""


class PageMarker(Protocol):
    """Writes of guest memory that QEMU's dirty log records; :class:`~vmbus.machine.qemu.qtest.Qtest`."""

    waits: MainLoopWaits
    """Whether the event loop waits for QEMU's main loop."""

    def mark(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        """Write each ``(guest physical address, byte)``; return when all are written. The event loop waits."""

    async def marked(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        """Do the same, and wait as a task."""

    async def settled(self) -> None:
        """Wait until QEMU has executed all commands so far."""

    def settle(self) -> None:
        """Do the same; the event loop waits."""

    def loading(self) -> AbstractContextManager[None]:
        """Restore a guest in the block, while QEMU's main loop waits for that."""


class TrapAnswers(Protocol):
    """Answers that the gateway holds; :class:`~vmbus.machine.gateway.client.Gateway`."""

    guest: GuestState
    """Where the guest is; outlives the emulator."""

    def unclaimed(self) -> list[Unclaimed]:
        """Return the answers that no vCPU has fetched; the machine is stopped."""

    def carried(self) -> list[Unclaimed]:
        """Return those of before a migration that no vCPU has repeated."""

    def carry(self, unclaimed: Iterable[Unclaimed]) -> None:
        """Take over answers that were given before a migration."""


class PausableClock(Protocol):
    """Reference time of a guest; :class:`~vmbus.machine.clock.TcgClock`."""

    stopped_at: int | None
    """The guest's TSC when the guest was stopped; ``None`` while it runs, or if it is not known."""

    @property
    def tsc_frequency(self) -> int:
        """Frequency of the guest's TSC in Hz."""

    def stop(self) -> None:
        """Stop time: the guest was stopped."""

    def restore(self, frequency: int, tsc: int, now: int, last_read: int, *, same_host: bool = False) -> bool:
        """Continue the time of a saved guest; return whether its TSC runs at the same frequency here."""


class RangeReports(Protocol):
    """Compiled code that stores into guest memory; :class:`~vmbus.machine.io.engines.NativeEngines`."""

    def report_ranges(self, on: bool) -> None:
        """Switch reports of every range that is stored on or off."""


class DeviceWork(Protocol):
    """Work of devices outside the event loop; :class:`~vmbus.machine.io.workers.WorkerThreads`."""

    @property
    def engines(self) -> RangeReports | None:
        """Compiled code that transfers data, if there is any."""

    async def settle(self, timeout: float) -> bool:
        """Wait until all work is done and reported; return False on timeout (seconds)."""


class Background(Protocol):
    """Tasks beside all else."""

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` as a task; its failure ends the host, but not a command that QEMU refuses."""


class GuestService(Background, Protocol):
    """The host's service of its guest; :class:`~vmbus.machine.host.Host`."""

    def serve_gateway(self) -> None:
        """Answer the traps that wait, and handle the doorbells that were rung."""

    def look_at_gateway(self) -> None:
        """Serve the gateway soon, also if nothing wakes the event loop."""

    def channel_end(self, device: ChannelDevice) -> ChannelIo:
        """Return a new host's end for a channel of ``device``."""

    def reset(self) -> None:
        """Drop all that the guest has set up; keep the offers."""

    def report_missing_devices(self, channels: Sequence[ChannelIdentity]) -> None:
        """Say that ``channels`` of a restored state are revoked, because their devices are not offered here."""

    def report_lost_channels(self, lost: Mapping[str, str]) -> None:
        """Say that the channels of devices are rescinded and offered anew; ``lost``: the reason, by device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPorts:
    """What the coordinator of migrations uses."""

    qmp: Monitor
    qtest: PageMarker
    memory: MappedMemory
    gateway: TrapAnswers
    workers: DeviceWork
    service: GuestService
    dbus_address: str | None
    """Address of the D-Bus daemon that QEMU's ``dbus-vmstate`` uses; ``None``: QEMU has no such object."""
