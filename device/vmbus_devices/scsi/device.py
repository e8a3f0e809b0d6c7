"""``--device scsi,...``: each line is a disk or a CD-ROM drive; lines that name one controller are one device."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Annotated

from vmbus.bus.io.device import Device
from vmbus.devices.joined import Whole
from vmbus.devices.line import join_device, split_device
from vmbus.devices.options import Help
from vmbus.errors import UsageError
from vmbus.wire.storvsp import MAX_LUNS, MAX_TARGETS, ProtocolVersion

from vmbus_devices.scsi.blocks import ReadErrors, WriteErrors
from vmbus_devices.scsi.controller import MAX_QUEUES, Controller
from vmbus_devices.scsi.drive import DriveOptions, Format, Media, open_drive
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.image import DetectZeroes, ImageServers
from vmbus_devices.scsi.unit import LogicalUnit


class Scsi(Controller):
    """Disks and CD-ROMs behind a storage controller (hv_storvsc); one --device line for each of them."""

    name = "scsi"
    whole = Whole("controller", ("instance", "queues", "transfer", "version"))

    def __init__(
        self,
        *,
        image: Annotated[
            str | None, Help("file, block device or NBD URI; none: an empty controller", file=True)
        ] = None,
        format: Annotated[
            Format,
            Help(
                "of the image; auto: qcow2 if the file begins like one, else raw. "
                "Without image: null stores nothing, memory loses its data at the end"
            ),
        ] = Format.RAW,
        size: Annotated[str | None, Help("with format=null or memory: 512M, 4G")] = None,
        media: Annotated[
            Media | None, Help("what the guest sees (default disk, cdrom for an image named .iso)")
        ] = None,
        target: Annotated[int, Help("SCSI target", least=0, most=MAX_TARGETS - 1)] = 0,
        lun: Annotated[int | None, Help("LUN (default: the next free)", least=0, most=MAX_LUNS - 1)] = None,
        controller: Annotated[str, Help("name; lines with the same name share a controller")] = "scsi",
        readonly: Annotated[bool, Help("write-protect the disk; guests may share the image")] = False,
        cache: Annotated[Cache, Help("cache mode, as in QEMU")] = Cache.NONE,
        discard: Annotated[bool, Help("let the guest deallocate blocks (UNMAP)")] = True,
        detect_zeroes: Annotated[
            DetectZeroes,
            Help(
                "in a qcow2, zeros that are written allocate no blocks (on), and free allocated ones (unmap)"
            ),
        ] = DetectZeroes.OFF,
        backing: Annotated[
            str,
            Help(
                "backing files that the image may name: off, on (any), or their paths, separated by semicolons",
                files=True,
            ),
        ] = "off",
        data_file: Annotated[
            str | None, Help("external data file of a qcow2 that has one", file=True)
        ] = None,
        extents: Annotated[bool, Help("let a VMDK descriptor name the files with its data")] = False,
        copies: Annotated[
            str | None, Help("of a raw file: folder for copies, one for each `vmbus snapshot`", file=True)
        ] = None,
        reconnect: Annotated[
            float,
            Help("seconds that requests wait for a lost NBD server, or an image in use", least=0, most=86400),
        ] = 5.0,
        connections: Annotated[
            int, Help("to an NBD server that allows several clients", least=1, most=16)
        ] = 4,
        serial: Annotated[str | None, Help("serial number (default: from controller, target, LUN)")] = None,
        block: Annotated[int, Help("bytes of a block: 512 or 4096")] = 512,
        rotation: Annotated[
            int, Help("rotations per minute; 1: not a rotating medium", least=1, most=0xFFFE)
        ] = 1,
        werror: Annotated[
            WriteErrors,
            Help("on a failed write: report it, stop the guest, or stop it if no space is left"),
        ] = WriteErrors.REPORT,
        rerror: Annotated[
            ReadErrors, Help("on a failed read: report it, or stop the guest")
        ] = ReadErrors.REPORT,
        fault: Annotated[
            str, Help("faults to inject: error@8-15;delay:0.5@*;short:0.5@100-; docs/storage.md has all")
        ] = "",
        queues: Annotated[
            int,
            Help(
                "of the controller: most channels; a guest opens one for each vCPU", least=1, most=MAX_QUEUES
            ),
        ] = 8,
        transfer: Annotated[
            int, Help("of the controller: most KiB in one request", least=4, most=1024)
        ] = 256,
        version: Annotated[
            str, Help("of the controller: newest protocol version: 2.0, 4.2, 5.1, 6.0, 6.2")
        ] = "6.2",
        instance: Annotated[
            uuid.UUID | None, Help("of the controller: instance GUID (default: from the name)")
        ] = None,
        images: ImageServers | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        versions = {str(each): each for each in ProtocolVersion}
        if version not in versions:
            raise UsageError(f"version={version}: not one of {', '.join(versions)}")
        super().__init__(
            controller=controller,
            instance=instance,
            queues=queues,
            max_transfer=transfer << 10,
            max_version=versions[version],
            clock=clock,
        )
        self._joined: dict[LogicalUnit, str] = {}
        """Lines of units that were joined from other devices."""
        self.lun_was_chosen = lun is not None
        self.default_serial = serial is None
        options = DriveOptions(
            image=image,
            format=format,
            size=size,
            media=media,
            readonly=readonly,
            cache=cache,
            discard=discard,
            detect_zeroes=detect_zeroes,
            backing=backing,
            data_file=data_file,
            extents=extents,
            copies=copies,
            reconnect=reconnect,
            connections=connections,
            serial=serial,
            block=block,
            rotation=rotation,
            fault=fault,
            write_errors=werror,
            read_errors=rerror,
            max_transfer=self.max_transfer,
        )
        if image is None and format is Format.RAW:
            _check_no_disk(options, target, lun)
        else:
            self.attach(open_drive(options, f"{controller}-{target}-{lun or 0}", images), target, lun)

    def join(self, other: Device) -> bool:
        """Take over the units of ``other`` if it is the same controller (one --device line each)."""
        if not isinstance(other, Scsi) or other.controller != self.controller:
            return False
        if difference := self._difference(other):
            other.stop()
            raise UsageError(
                f"controller {self.controller} has {difference}; this option applies to the whole controller"
            )
        for (target, lun), unit in other.units.items():
            if not other.lun_was_chosen:
                lun = self.free_lun(target)
            if other.default_serial:
                unit.name(f"{self.controller}-{target}-{lun}")
            self.attach(unit, target, lun)
            self._joined[unit] = other.line
        other.units.clear()
        return True

    def _difference(self, other: Scsi) -> str:
        """Return how the options of ``other`` for the controller differ, or an empty text."""
        for key, here, there in (
            ("instance", self.instance, other.instance),
            ("queues", self.queues, other.queues),
            ("transfer", self.max_transfer >> 10, other.max_transfer >> 10),
            ("version", str(self.max_version), str(other.max_version)),
        ):
            if here != there:
                return f"{key}={here}, not {there}"
        return ""

    def line_of(self, place: tuple[int, int]) -> str:
        unit = self.units[place]
        line = self._joined.get(unit, self.line)
        if not line:
            return ""
        name, values = split_device(line)
        values |= {"target": str(place[0]), "lun": str(place[1]), "serial": unit.identity.serial}
        return join_device(name, self._named(values))

    def lines(self) -> list[str]:
        if not self.line:
            return []
        if self.units:
            return [self.line_of(place) for place in sorted(self.units)]
        name, values = split_device(self.line)
        kept = (self.whole.key, *self.whole.options)
        return [join_device(name, self._named({key: values[key] for key in kept if key in values}))]

    def _named(self, values: dict[str, str]) -> dict[str, str]:
        return values | ({"id": self.name} if self.name != self.controller else {})


def _check_no_disk(options: DriveOptions, target: int, lun: int | None) -> None:
    """Refuse options of a disk for a controller without one: the user meant to have a disk."""
    names = {"write_errors": "werror", "read_errors": "rerror"}
    given = [
        names.get(each.name, each.name)
        for each in dataclasses.fields(options)
        if each.name != "max_transfer" and getattr(options, each.name) != each.default
    ]
    given += ["target"] * bool(target) + ["lun"] * (lun is not None)
    if given:
        raise UsageError(
            f"{', '.join(f'{each}=' for each in given)} without a disk: without image= and format= the controller is "
            "empty; add image=, or format=memory or format=null"
        )
