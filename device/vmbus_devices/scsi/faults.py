"""Injected faults of a disk, for tests of how a guest handles them.

    fault=read-error@1000-1007          the blocks 1000 to 1007 cannot be read
    fault=write-error@0-                no block can be written
    fault=delay:0.5@2048-4095           transfers that include one of these blocks take half a second longer
    fault=short:0.25@*                  a quarter of the requested blocks is transferred
    fault=read-error@7-7;delay:2@*      several faults, separated by semicolons

``error`` applies to reads and writes. A kind followed by ``/read`` or ``/write`` applies to these only
(``delay:1/write@*``).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass

from vmbus.errors import UsageError

_FORM = re.compile(
    r"(?P<kind>error|read-error|write-error|delay|short)(?::(?P<number>[0-9.]+))?(?:/(?P<way>read|write))?"
    r"@(?:(?P<all>\*)|(?P<first>\d+)(?P<to>-)?(?P<last>\d+)?)"
)
LAST = (1 << 64) - 1


class FaultKind(enum.Enum):
    """The effect of a fault."""

    ERROR = "error"
    DELAY = "delay"
    SHORT = "short"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the blocks ``first`` to ``last``, both inclusive.

    ``number``: seconds of a delay, or the share of the blocks that a short transfer moves.
    """

    kind: FaultKind
    first: int
    last: int
    reads: bool = True
    writes: bool = True
    number: float = 0.0

    def touches(self, lba: int, blocks: int, *, write: bool) -> bool:
        """Return whether a transfer of these blocks has this fault."""
        return (self.writes if write else self.reads) and lba <= self.last and lba + blocks > self.first


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Return the faults in the text of the option. Raises :class:`~vmbus.errors.UsageError`."""
    return tuple(_parse(part) for part in text.split(";") if part)


def _parse(text: str) -> Fault:
    found = _FORM.fullmatch(text)
    if found is None:
        raise UsageError(
            f"fault {text!r}: not KIND@FIRST-LAST, with KIND one of error, read-error, write-error, "
            "delay:SECONDS, short:SHARE, and * for all blocks"
        )
    kind, way = found["kind"], found["way"]
    if kind in ("read-error", "write-error"):
        way, kind = kind.partition("-")[0], "error"
    number = 0.0
    if kind != "error":
        try:
            number = float(found["number"] or "")
        except ValueError:
            raise UsageError(f"fault {text!r}: {kind} needs a number, as in {kind}:0.5") from None
        if kind == "short" and number >= 1:
            raise UsageError(f"fault {text!r}: the share must be below 1")
    elif found["number"] is not None:
        raise UsageError(f"fault {text!r}: an error has no number")
    first = int(found["first"] or 0)
    last = int(found["last"]) if found["last"] else LAST if found["all"] or found["to"] else first
    if last < first:
        raise UsageError(f"fault {text!r}: the last block comes before the first")
    return Fault(FaultKind(kind), first, last, way != "write", way != "read", number)


class FaultPlan:
    """The faults of one disk; they can be changed while it runs."""

    def __init__(self, faults: tuple[Fault, ...] = ()) -> None:
        self._faults = faults
        self.changing: Callable[[], None] = lambda: None
        """Called before they change."""
        self.met = dict.fromkeys((kind.value for kind in FaultKind), 0)
        """How often each kind happened."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults; all are replaced together."""
        return self._faults

    @faults.setter
    def faults(self, faults: tuple[Fault, ...]) -> None:
        self.changing()
        self._faults = faults

    def __bool__(self) -> bool:
        return bool(self._faults)

    def delay(self, lba: int, blocks: int, *, write: bool) -> float:
        """Return the seconds by which the transfer is delayed."""
        seconds = 0.0
        for fault in self.faults:
            if fault.kind is FaultKind.DELAY and fault.touches(lba, blocks, write=write):
                self.met["delay"] += 1
                seconds += fault.number
        return seconds

    def bad_block(self, lba: int, blocks: int, *, write: bool) -> int | None:
        """Return the first block of the transfer that fails, if any."""
        bad = None
        for fault in self.faults:
            if fault.kind is FaultKind.ERROR and fault.touches(lba, blocks, write=write):
                first = max(lba, fault.first)
                bad = first if bad is None else min(bad, first)
        if bad is not None:
            self.met["error"] += 1
        return bad

    def blocks(self, lba: int, blocks: int, *, write: bool) -> int:
        """Return how many blocks are transferred."""
        for fault in self.faults:
            if fault.kind is FaultKind.SHORT and fault.touches(lba, blocks, write=write):
                self.met["short"] += 1
                blocks = int(blocks * fault.number)
        return blocks
