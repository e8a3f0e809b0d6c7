"""A guest's scans for units: the requests for them, and whether it has found out which units are gone.

Source: docs/protocol/devices.md#storage-changes. Linux scans when its driver binds, and after each ENUMERATE_BUS. A
scan ends with an INQUIRY at the last place, and takes seconds on a busy machine, with a pause at each empty place:

    unknown --INQUIRY at path 1, target 0--> under way --INQUIRY at path 7, target 1--> ended
       '<--opened; a unit was removed-- any     '<--INQUIRY at path 1, target 0-- ended

Path 0 does not tell the beginning of a scan: Linux sends no INQUIRY to units that it still knows.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from vmbus.errors import DeviceError
from vmbus.wire.scsi import Opcode
from vmbus.wire.storvsp import (
    PACKET_SIZE,
    SHORT_PACKET_SIZE,
    Operation,
    ProtocolVersion,
    ScsiRequest,
    Status,
    build_packet,
)

if TYPE_CHECKING:
    from vmbus.bus.io.channel_io import ChannelIo

FIRST_PLACE = (1, 0)
"""Path and target of the first place that never has a unit, in Linux's order."""
LAST_PLACE = (7, 1)
"""Path and target of the last place that Linux asks."""


class ScanRequests:
    """The packets ENUMERATE_BUS of one controller: each has the guest scan for units that were added or removed."""

    def __init__(self) -> None:
        self.count = 0
        """Sent so far."""
        self.due = False
        """Whether the guest does not read, and is to be asked when it does."""

    def send(self, io: ChannelIo, version: int | None) -> None:
        """Ask the guest, over its primary channel, which it negotiated as ``version``."""
        size = PACKET_SIZE if (version or 0) >= ProtocolVersion.WIN8 else SHORT_PACKET_SIZE
        try:
            io.send(build_packet(Operation.ENUMERATE_BUS, Status.SUCCESS, size=size))
        except DeviceError:
            # The guest does not read: the change is made, and the guest is notified when it has read.
            self.due = True
            io.notify_room()
        else:
            self.due = False
            self.count += 1


class Scan(Enum):
    """The last scan since the guest opened the controller and since a unit was removed."""

    UNKNOWN = auto()
    UNDER_WAY = auto()
    ENDED = auto()


class ScanWatch:
    """The scans of one controller's guest."""

    def __init__(self) -> None:
        self.scan = Scan.UNKNOWN
        self._known: set[tuple[int, int]] = set()
        """Target and LUN of the removed units that the guest may still know."""

    @property
    def over(self) -> bool:
        """Whether the guest has scanned to the end, and knows no unit that is gone."""
        return self.scan is Scan.ENDED and not self._known

    def opened(self) -> None:
        """Note that the guest opened the controller, and knows nothing of it."""
        self.scan = Scan.UNKNOWN
        self._known.clear()

    def added(self, place: tuple[int, int]) -> None:
        """Note a unit at ``place``: target and LUN."""
        self._known.discard(place)

    def removed(self, place: tuple[int, int], *, known: bool) -> None:
        """Note that the unit at ``place`` is gone. ``known``: the guest can have found it before."""
        self.scan = Scan.UNKNOWN
        if known:
            self._known.add(place)

    def asked(self, srb: ScsiRequest, opcode: int) -> None:
        """Note a command for a place without a unit."""
        if opcode == Opcode.INQUIRY:
            place = (srb.path, srb.target)
            if place == FIRST_PLACE:
                self.scan = Scan.UNDER_WAY
            elif place == LAST_PLACE and self.scan is Scan.UNDER_WAY:
                self.scan = Scan.ENDED
        elif opcode != Opcode.REPORT_LUNS and not srb.path:
            self._known.discard((srb.target, srb.lun))  # it is told so: INVALID_LUN
