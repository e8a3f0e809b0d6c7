"""Places of a controller's units: target and LUN, their names, and what answers where no unit is."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vmbus.wire.scsi import NO_DEVICE, Opcode, cdb_allocation, lun_list
from vmbus.wire.storvsp import SrbStatus

from vmbus_devices.scsi.request import Request

_PLACE = re.compile(r"(?:(\d+):)?(\d+)")


def part_name(place: tuple[int, int]) -> str:
    """Return ``0:1`` for target 0, LUN 1."""
    return f"{place[0]}:{place[1]}"


def place_of(text: str) -> tuple[int, int]:
    """Return target and LUN of ``0:1`` or ``1`` (target 0); of anything else, a place that never has a unit."""
    found = _PLACE.fullmatch(text)
    return (int(found[1] or 0), int(found[2])) if found else (-1, -1)


def execute_without_unit(request: Request, places: Iterable[tuple[int, int]]) -> None:
    """Execute REPORT LUNS, or a command for a unit that does not exist; ``places``: target and LUN of each unit.

    Source: docs/protocol/devices.md#storage-units. INQUIRY answers with valid data that there is no unit, REPORT LUNS
    always answers, the rest fails with INVALID_LUN on path 0, where Linux evaluates it, and with INVALID_TARGET_ID on
    other paths.
    """
    srb, cdb = request.srb, request.cdb
    if cdb[0] == Opcode.REPORT_LUNS:
        luns = [] if srb.path else sorted(lun for target, lun in places if target == srb.target)
        request.give(lun_list(luns), cdb_allocation(cdb))
    elif cdb[0] == Opcode.INQUIRY and not cdb[1] & 1:
        # With the additional length: Linux warns of an answer shorter than 36 bytes.
        request.give(bytes((NO_DEVICE, 0, 0, 0, 31)) + bytes(31), cdb_allocation(cdb))
    else:
        request.finish(SrbStatus.INVALID_TARGET_ID if srb.path else SrbStatus.INVALID_LUN)
