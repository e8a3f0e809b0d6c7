"""Which units of one controller may take the fast path.

    a disk on a file, in a queue or on nothing, no fault, no pending unit attention → eligible
    anything else                                                                   → not eligible

The units are compared with what was last set before packets are taken, so a change needs no notification.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping

from vmbus.ports import FastChannel, FastOwner
from vmbus.wire.storvsp import MAX_LUNS, MAX_TARGETS

from vmbus_devices.scsi.fast.path import FastPath, FastUnit
from vmbus_devices.scsi.unit import LogicalUnit


class FastUnits:
    """The units of a controller, and their numbers in ``fast``."""

    def __init__(self, fast: FastPath) -> None:
        self._fast = fast
        self.table = array("h", [-1] * (MAX_TARGETS * MAX_LUNS))
        """target * MAX_LUNS + LUN → number of the unit there, or -1."""
        self._known: dict[tuple[int, int], tuple[LogicalUnit, bool, int, int]] = {}
        self._numbers: dict[LogicalUnit, int] = {}

    def open_channel(self, owner: FastOwner) -> FastChannel | None:
        """Return the fast path of a channel of the controller that opened; ``None`` if there is no room for it."""
        return self._fast.open_channel(owner, self.table)

    def refresh(
        self, units: Mapping[tuple[int, int], LogicalUnit], changing: Callable[[], None] = lambda: None
    ) -> None:
        """Bring ``fast`` and the table up to date with ``units``; ``changing`` is called before a change."""
        known = self._known
        for place, unit in units.items():
            now = (unit, unit.fast_path_eligible, unit.blocks, unit.backend.queue)
            if known.get(place) != now:
                changing()
                self._update(place, unit)
                known[place] = now
        if len(known) > len(units):
            changing()
            for place in [place for place in known if place not in units]:
                self.remove(place)

    def remove(self, place: tuple[int, int]) -> None:
        """Take no more requests for the unit at ``place``; those under way continue."""
        self._known.pop(place, None)
        self.table[place[0] * MAX_LUNS + place[1]] = -1

    def forget(self, unit: LogicalUnit) -> None:
        """Free the number of a unit that was removed and has no request under way."""
        number = self._numbers.pop(unit, None)
        if number is not None:
            unit.statistics.detach_fast()
            self._fast.remove_unit(number)

    def _update(self, place: tuple[int, int], unit: LogicalUnit) -> None:
        at = place[0] * MAX_LUNS + place[1]
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
            unit.statistics.attach_fast(self._fast, number)
        return number
