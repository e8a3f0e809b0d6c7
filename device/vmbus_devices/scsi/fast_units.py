"""Which units' plain reads and writes compiled code may do, for one controller.

    a disk on a file (or on nothing), no fault, no unit attention to tell → it may        anything else → it may not

What it knows is compared before packets are taken, so nobody has to tell.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from vmbus.ports import FastPath, FastUnit

from vmbus_devices.scsi.unit import LogicalUnit

TARGETS, LUNS = 2, 64
"""Places of the table."""


class FastUnits:
    """The units of a controller as ``fast`` knows them."""

    def __init__(self, fast: FastPath) -> None:
        self._fast = fast
        #: target * LUNS + LUN → number of the unit there, or -1.
        self.table = array("h", [-1] * (TARGETS * LUNS))
        self._known: dict[tuple[int, int], tuple[LogicalUnit, bool, int]] = {}
        self._numbers: dict[LogicalUnit, int] = {}

    def refresh(self, units: Mapping[tuple[int, int], LogicalUnit]) -> None:
        """Have ``fast`` know the units as they are now."""
        known = self._known
        for place, unit in units.items():
            plain, blocks = unit.plain, unit.blocks
            last = known.get(place)
            if last is None or last[0] is not unit or last[1] != plain or last[2] != blocks:
                self._tell(place, unit)
                known[place] = (unit, plain, blocks)
        if len(known) > len(units):
            for place in [place for place in known if place not in units]:
                self.leave(place)

    def leave(self, place: tuple[int, int]) -> None:
        """The unit at ``place`` takes nothing more."""
        self._known.pop(place, None)
        self.table[place[0] * LUNS + place[1]] = -1

    def forget(self, unit: LogicalUnit) -> None:
        """It is gone, and none of its requests is under way."""
        number = self._numbers.pop(unit, None)
        if number is not None:
            unit.statistics.unfollow()
            self._fast.remove_unit(number)

    def _tell(self, place: tuple[int, int], unit: LogicalUnit) -> None:
        at = place[0] * LUNS + place[1]
        fast = unit.fast_unit()
        if fast is None:
            self.table[at] = -1
            return
        number = self._numbers.get(unit)
        if number is not None:
            self._fast.change_unit(number, fast)
        else:
            number = self._add(unit, fast)
        self.table[at] = -1 if number is None else number

    def _add(self, unit: LogicalUnit, fast: FastUnit) -> int | None:
        number = self._fast.add_unit(fast)
        if number is not None:
            self._numbers[unit] = number
            unit.statistics.follow(self._fast, number)
        return number
