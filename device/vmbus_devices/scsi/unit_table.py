"""The units of one controller: at which places they are, for whom their images are locked, and when they are closed.

    add() ──▶ at a place ──remove()──────────▶ removed ──close_removed(), no command under way──▶ closed
                   '─────────close(), of all of them ───────────────^

Commands of a unit that was removed still end, and its file is closed only then: a transfer under way would reach the
next file with that number. Compiled code has numbers of its own for the units (:mod:`vmbus_devices.scsi.fast.units`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from vmbus.bus.io.device import DeviceEnvironment
from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.devices.parts import Part
from vmbus.errors import DeviceError, UsageError, UserError
from vmbus.wire.storvsp import MAX_LUNS, SrbStatus

from vmbus_devices.scsi.fast.path import FastPath
from vmbus_devices.scsi.fast.units import FastUnits
from vmbus_devices.scsi.places import part_name
from vmbus_devices.scsi.request import Request
from vmbus_devices.scsi.unit import LogicalUnit

_CLAIM_TIMEOUT = 2.0
"""Seconds in which an emulator that ended, or qemu-img, has to give up an image."""

Place = tuple[int, int]
"""Target and LUN."""


class UnitTable:
    """The units of the controller ``controller``.

    ``line_of`` returns the text after ``--device`` for a place. ``changing`` is called before anything changes that
    compiled code uses.
    """

    def __init__(
        self, controller: str, *, line_of: Callable[[Place], str], changing: Callable[[], None]
    ) -> None:
        self.units: dict[Place, LogicalUnit] = {}
        self.active = False
        """Whether the images are locked for this guest, as far as nobody else has them."""
        self.fast: FastUnits | None = None
        """The units in compiled code, if there is any."""
        self.removed: list[LogicalUnit] = []
        """Units that wait for their commands to end, to be closed."""
        self._controller = controller
        self._line_of = line_of
        self._changing = changing
        self._environment: DeviceEnvironment | None = None
        self._closed = False
        """Whether the units are closed, whose numbers in compiled code may be others' by now."""

    # --- from the first unit to the end ---

    def start(self, environment: DeviceEnvironment) -> None:
        """Start the units that are there, and from now on each that is added."""
        self._environment = environment
        self._closed = False
        if environment.native is not None and (path := environment.native.engine(FastPath.open)) is not None:
            self.fast = FastUnits(path)
        for unit in self.units.values():
            unit.start(environment)

    def claim(self, name: str) -> None:
        """Lock the images before the guest uses them; ``name`` is the device's. In any thread.

        Raises :class:`~vmbus.errors.UserError` if somebody else uses one of them.
        """
        for place, unit in sorted(self.units.items()):
            try:
                unit.claim(_CLAIM_TIMEOUT)
            except DeviceError as error:
                raise UserError(f"{name}/{part_name(place)}: {error}") from error

    def take_images(self) -> None:
        """Lock the images: before the first command, and before the first one after :meth:`release_images`.

        A unit whose image somebody else has by then lets the guest's commands wait, and fail.
        """
        for unit in self.units.values():
            unit.take_image()
        self.active = True

    def release_images(self) -> None:
        """Release the images: the guest may continue elsewhere."""
        self.active = False
        for unit in self.units.values():
            unit.release_image()

    def close(self) -> None:
        """Close all units, those with commands under way when these have ended."""
        self._closed = True
        self.removed += self.units.values()
        self.close_removed()
        for unit in self.removed:  # a server may answer late, or never
            unit.backend.abandon()

    def wait_closed(self, timeout: float) -> bool:
        """Wait until nothing is done to the images any more, ``timeout`` seconds for each; return whether it is."""
        return not [unit for unit in tuple(self.units.values()) if not unit.backend.wait_closed(timeout)]

    # --- places ---

    def free_lun(self, target: int) -> int:
        """Return the first LUN without a unit. Raises :class:`~vmbus.errors.UsageError` if there is none."""
        free = next((lun for lun in range(MAX_LUNS) if (target, lun) not in self.units), None)
        if free is None:
            raise UsageError(
                f"controller {self._controller}: all {MAX_LUNS} LUNs of target {target} are taken"
            )
        return free

    def add(self, unit: LogicalUnit, place: Place) -> None:
        """Add a unit. Raises :class:`~vmbus.errors.UsageError` if the place is taken, and does not close it then.

        Raises :class:`~vmbus.errors.UserError` if the guest runs, and somebody else uses the image.
        """
        if place in self.units:
            raise UsageError(f"controller {self._controller}: target {place[0]} LUN {place[1]} is taken")
        if self._environment is not None:
            unit.start(self._environment)
        if self.active and not unit.take_image():
            raise UserError(unit.trouble)
        unit.changing = self._changing
        self.units[place] = unit

    def at(self, place: Place) -> LogicalUnit:
        """Return the unit at ``place``. Raises :class:`~vmbus.errors.UsageError` if there is none."""
        unit = self.units.get(place)
        if unit is None:
            raise UsageError(f"controller {self._controller}: it has no target {place[0]} LUN {place[1]}")
        return unit

    def remove(self, place: Place) -> None:
        """Remove the unit at ``place``: the commands that it keeps are aborted, and it is closed after the others."""
        unit = self.at(place)
        del self.units[place]
        self._changing()
        self.removed.append(unit)
        if self.fast is not None:
            self.fast.remove(place)
        for request in unit.take_kept():
            request.finish(SrbStatus.ABORTED)
        self.close_removed()

    def close_removed(self) -> None:
        """Close the removed units that have no command under way."""
        for unit in tuple(self.removed):
            if not unit.statistics.depth:
                self.removed.remove(unit)
                if self.fast is not None:
                    self.fast.forget(unit)
                unit.close()

    def take_kept(self) -> list[tuple[LogicalUnit, Request]]:
        """Return the commands that wait for the guest to be resumed, each with its unit; they wait no longer."""
        return [(unit, request) for unit in self.units.values() for request in unit.take_kept()]

    def refresh_fast(self) -> bool:
        """Bring compiled code up to date; return whether it may execute commands now."""
        fast = self.fast
        if fast is None or not self.active or self._closed:
            return False
        fast.refresh(self.units, self._changing)
        return True

    # --- what users see ---

    def parts(self) -> Mapping[str, Part]:
        """Return the units by the names of their places (see :class:`~vmbus.devices.parts.HasParts`)."""
        return {
            part_name(place): Part(
                type=unit.device_type.name.lower(),
                line=self._line_of(place),
                size=unit.blocks * unit.block_size,
                status=unit.status(),
            )
            for place, unit in sorted(self.units.items())
        }

    async def set_size(self, place: Place, size: int | None, name: str) -> None:
        """Make an image ``size`` bytes large, or with ``None`` look how large it is; ``name`` is that of its place.

        The unit has that size only after ``LogicalUnit.resized``. Raises :class:`~vmbus.errors.UserError` if the
        image cannot have it.
        """
        unit = self.units[place]
        before = unit.blocks * unit.block_size
        if size is None:
            await asyncio.to_thread(unit.backend.reread_size)
        elif size < before:
            raise UserError(f"{name} has {before} bytes; a disk cannot be made smaller")
        elif size % unit.block_size:
            raise UserError(f"{size} bytes are not a multiple of the block size, {unit.block_size} bytes")
        else:
            await asyncio.to_thread(unit.backend.grow, size)
        if self.units.get(place) is not unit:  # perhaps another one is there by now
            raise UserError(f"{name} was removed while it was resized")

    def outside_snapshots(self, name: str) -> Sequence[str]:
        """Name the disks that a snapshot would not have; ``name`` is the device's."""
        return [
            f"{name}/{part_name(place)} ({self._line_of(place) or unit.identity.serial})"
            for place, unit in sorted(self.units.items())
            if not unit.backend.read_only and unit.backend.snapshot_disk is None
        ]

    def snapshot_disks(self, name: str) -> Mapping[str, SnapshotDisk]:
        """Return the disks that a snapshot has; ``name`` is the device's."""
        return {
            f"{name}/{part_name(place)}": unit.backend.snapshot_disk
            for place, unit in sorted(self.units.items())
            if unit.backend.snapshot_disk is not None
        }
