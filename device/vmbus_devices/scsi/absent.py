"""What a controller answers itself: REPORT LUNS, and everything for a unit that is not there.

Source: docs/protocol/devices.md#storage-units. INQUIRY says with valid data that there is no unit, REPORT LUNS always
answers, the rest fails with INVALID_LUN on path 0, and with INVALID_TARGET_ID on other paths: Linux takes INVALID_LUN
for path 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmbus.wire.scsi import NO_DEVICE, Opcode, cdb_allocation, lun_list
from vmbus.wire.storvsp import SrbStatus

from vmbus_devices.scsi.request import Request


def execute_without(request: Request, places: Iterable[tuple[int, int]]) -> None:
    """Do a command that no unit does; ``places``: target and LUN of the units that there are."""
    srb, cdb = request.srb, request.cdb
    if cdb[0] == Opcode.REPORT_LUNS:
        luns = [] if srb.path else sorted(lun for target, lun in places if target == srb.target)
        request.give(lun_list(luns), cdb_allocation(cdb))
    elif cdb[0] == Opcode.INQUIRY and not cdb[1] & 1:
        # The additional length is there, since Linux warns of an answer shorter than 36 bytes.
        request.give(bytes((NO_DEVICE, 0, 0, 0, 31)) + bytes(31), cdb_allocation(cdb))
    else:
        request.finish(SrbStatus.INVALID_TARGET_ID if srb.path else SrbStatus.INVALID_LUN)
