"""A CD-ROM drive with a disc in it: the commands of MMC-6 that a guest needs to read an ISO image."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from vmbus.wire.scsi import DeviceType, ModePage, Opcode, Sense, cdb_allocation

from vmbus_devices.scsi.backend import Backend
from vmbus_devices.scsi.blocks import BlockUnit
from vmbus_devices.scsi.faults import FaultPlan
from vmbus_devices.scsi.request import CheckCondition, Request

BLOCK_SIZE = 2048
_FRAMES = 75
_LEAD_OUT = 0xAA
_CD_ROM, _DVD_ROM = 0x0008, 0x0010
_CD_BLOCKS = 405_000
"""A disc with more blocks is reported as a DVD."""
_MEDIA_CLASS = 4


class CdRom(BlockUnit):
    """A drive; the guest may eject its disc, unless it prevented removal."""

    device_type = DeviceType.CDROM
    removable = True
    product = "Virtual DVD-ROM"

    def __init__(
        self,
        backend: Backend,
        serial: str,
        *,
        max_transfer: int = 256 << 10,
        faults: FaultPlan | None = None,
    ) -> None:
        super().__init__(
            backend,
            serial,
            block_size=BLOCK_SIZE,
            max_transfer=max_transfer,
            faults=faults or FaultPlan(),
        )
        self.loaded = True
        self.locked = False
        del self._commands[Opcode.READ_16]
        self._commands |= {
            Opcode.READ_TOC: self._read_toc,
            Opcode.GET_CONFIGURATION: self._get_configuration,
            Opcode.GET_EVENT_STATUS: self._get_event_status,
        }

    @property
    def read_only(self) -> bool:
        return True

    def reset(self) -> None:
        self.locked = False

    def execute(self, request: Request) -> None:
        opcode = request.cdb[0]
        if not self.loaded and opcode in (
            Opcode.TEST_UNIT_READY,
            Opcode.READ_CAPACITY_10,
            Opcode.READ_6,
            Opcode.READ_10,
            Opcode.READ_12,
            Opcode.READ_TOC,
        ):
            if self.attentions:
                raise CheckCondition(self.attentions.pop(0))
            raise CheckCondition(Sense.MEDIUM_NOT_PRESENT)
        super().execute(request)

    def _mode_pages(self) -> Mapping[int, bytes]:
        # Capabilities: reads CD-R, CD-RW and DVD; a tray that can be locked and opened.
        capabilities = bytes(
            (ModePage.CD_CAPABILITIES, 18, 0x0B, 0, 0, 0, 0x29 | (0x02 if self.locked else 0))
        )
        recovery = bytes((ModePage.ERROR_RECOVERY, 6)) + bytes(6)
        return {
            **super()._mode_pages(),
            ModePage.ERROR_RECOVERY: recovery,
            ModePage.CD_CAPABILITIES: capabilities.ljust(20, b"\0"),
        }

    def _prevent_allow(self, request: Request) -> None:
        self.locked = bool(request.cdb[4] & 1)
        request.succeed()

    def _start_stop(self, request: Request) -> None:
        if request.cdb[4] & 2:  # the tray
            load = bool(request.cdb[4] & 1)
            if not load and self.locked:
                raise CheckCondition(Sense.MEDIUM_REMOVAL_PREVENTED)
            if load and not self.loaded:
                self.attention(Sense.MEDIUM_CHANGED)
            self.loaded = load
        request.succeed()

    def _read_toc(self, request: Request) -> None:
        cdb = request.cdb
        minutes = bool(cdb[1] & 2)
        form, start = cdb[2] & 0xF or cdb[9] >> 6, cdb[6]
        if form == 0:
            if start > 1 and start != _LEAD_OUT:
                raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
            body = b"" if start == _LEAD_OUT else _track(1, 0, minutes)
            body += _track(_LEAD_OUT, self.blocks, minutes)
            data = struct.pack(">HBB", 2 + len(body), 1, 1) + body
        elif form == 1:
            data = struct.pack(">HBB", 10, 1, 1) + _track(1, 0, minutes)
        else:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        request.give(data, cdb_allocation(cdb))

    def _get_configuration(self, request: Request) -> None:
        current = 0
        if self.loaded:
            current = _DVD_ROM if self.blocks > _CD_BLOCKS else _CD_ROM
        profiles = b"".join(
            [struct.pack(">HBB", profile, profile == current, 0) for profile in (_DVD_ROM, _CD_ROM)]
        )
        features = struct.pack(">HBB", 0, 0x03, len(profiles)) + profiles  # profile list
        features += struct.pack(">HBBIB3x", 1, 0x0B, 8, 1, 1)  # core: SCSI
        features += struct.pack(">HBBB3x", 3, 0x03, 4, 0x29)  # removable medium: tray, eject, lock
        request.give(
            struct.pack(">IHH", 4 + len(features), 0, current) + features, cdb_allocation(request.cdb)
        )

    def _get_event_status(self, request: Request) -> None:
        cdb = request.cdb
        if not cdb[1] & 1:  # asynchronous reports are not supported
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if cdb[4] & 1 << _MEDIA_CLASS:
            data = struct.pack(">HBBBB2x", 6, _MEDIA_CLASS, 1 << _MEDIA_CLASS, 0, 2 if self.loaded else 0)
        else:
            data = struct.pack(">HBB", 2, 0x80, 1 << _MEDIA_CLASS)
        request.give(data, cdb_allocation(cdb))


def _track(number: int, lba: int, minutes: bool) -> bytes:
    """Return a descriptor of a table of contents: a data track, or the lead-out."""
    if minutes:
        frames = lba + 2 * _FRAMES
        address = bytes((0, frames // _FRAMES // 60 & 0xFF, frames // _FRAMES % 60, frames % _FRAMES))
    else:
        address = struct.pack(">I", min(lba, 0xFFFFFFFF))  # as READ CAPACITY(10) reports a larger disc
    return bytes((0, 0x14, number, 0)) + address
