"""Reference time, and the page that lets a guest compute it from its TSC.

Source: docs/protocol/discovery.md#reference-tsc-page, TLFS 12.5 to 12.7.

    time = (tsc * scale >> 64) + offset      in units of 100 ns, 128-bit product

While such a page is in force, the counter MSR is computed by the same formula: the two readings of one clock
agree. Before that, time is what the clock says.

    state        time is        becomes
    -----------  -------------  -------------------------------------------------------------------
    free         clock.now()    following when a page is published and the guest's TSC is known
    following    the formula    free on reset; new scale and offset when the TSC's frequency changed

Neither step lets time go back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vmbus.ports import GuestPages
from vmbus.wire.synic import (
    REFERENCE_TSC_PAGE,
    TSC_SEQUENCE_INVALID,
    TSC_SEQUENCE_RESERVED,
    ReferenceTscPage,
)

UNITS_PER_SECOND = 10_000_000
_MASK64 = (1 << 64) - 1
_SEQUENCE_SIZE = 4


class GuestClock(Protocol):
    """The clocks of the machine."""

    def now(self) -> int:
        """Reference time in units of 100 ns since the partition was created; never goes back."""

    def guest_tsc(self) -> int:
        """The guest's time stamp counter now, as RDTSC in the guest would read it."""

    @property
    def tsc_frequency(self) -> int:
        """Of the guest's TSC, in Hz; 0 if not known."""

    @property
    def apic_frequency(self) -> int:
        """Input of the local APIC's timer before its divider, in Hz."""

    @property
    def tsc_known(self) -> bool:
        """Whether ``guest_tsc`` and ``tsc_frequency`` are exact enough for the reference TSC page."""


@dataclass(frozen=True, slots=True)
class TscScaling:
    """The formula's constants for a TSC of ``frequency`` Hz."""

    frequency: int
    scale: int
    offset: int

    def time(self, tsc: int) -> int:
        """Reference time at a TSC value."""
        return (((tsc & _MASK64) * self.scale) >> 64) + self.offset


def scale_for(frequency: int) -> int:
    """The page's scale for a TSC of ``frequency`` Hz, or 0 where it does not fit 64 bits (10 MHz and less)."""
    if frequency <= UNITS_PER_SECOND:
        return 0
    return (UNITS_PER_SECOND << 64) // frequency


def next_sequence(sequence: int) -> int:
    """A sequence number that is neither of the two special ones."""
    sequence = (sequence + 1) & 0xFFFFFFFF
    return 1 if sequence in (TSC_SEQUENCE_INVALID, TSC_SEQUENCE_RESERVED) else sequence


class ReferenceTime:
    """The partition's reference time; also a :class:`~vmbus.ports.ReferenceClock`."""

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self._floor = 0
        self._restored = False
        self.scaling: TscScaling | None = None
        self.sequence = TSC_SEQUENCE_INVALID
        """Of the page that was published last."""

    def now(self) -> int:
        """Units of 100 ns; never goes back."""
        if self.scaling is not None and self._clock.tsc_known:
            time = self.scaling.time(self._clock.guest_tsc())
        else:
            time = self._clock.now()
        self._floor = max(self._floor, time)
        return self._floor

    @property
    def stale(self) -> bool:
        """Whether the constants published are not those of the TSC as it runs now."""
        clock = self._clock
        return clock.tsc_known and (self.scaling is None or self.scaling.frequency != clock.tsc_frequency)

    def publish(self, page: GuestPages) -> None:
        """Write the reference TSC page: invalid, then the values, then a new sequence."""
        self._follow_tsc()
        if self.scaling is None:
            page.store_u32(0, TSC_SEQUENCE_INVALID)
            return
        self.sequence = next_sequence(self.sequence)
        image = REFERENCE_TSC_PAGE.build(
            ReferenceTscPage(self.sequence, self.scaling.scale, _signed64(self.scaling.offset))
        )
        page.store_u32(0, TSC_SEQUENCE_INVALID)
        page.write(_SEQUENCE_SIZE, image[_SEQUENCE_SIZE:])
        page.store_u32(0, self.sequence)

    def restore(self, scaling: TscScaling | None, sequence: int, time: int) -> None:
        """Take over saved constants; ``time`` is the reference time at the save."""
        self.scaling = scaling
        self.sequence = sequence
        self._floor = time
        self._restored = True

    def reset(self) -> None:
        """Stop following the TSC (the machine's reset may change it); time goes on."""
        self.now()
        self.scaling = None
        self._restored = False

    def _follow_tsc(self) -> None:
        """Settle on scale and offset; time at this moment is what both the old and the new ones give."""
        clock = self._clock
        scale = scale_for(clock.tsc_frequency) if clock.tsc_known else 0
        if scale == 0:
            self.scaling = None
            return
        if self.scaling is not None and self.scaling.frequency == clock.tsc_frequency:
            return
        tsc = clock.guest_tsc()
        # After a restore the old formula met another machine's TSC; the clock carries time over instead.
        now = max(clock.now(), self._floor) if self._restored else self.now()
        self._restored = False
        self.scaling = TscScaling(
            clock.tsc_frequency, scale, now - TscScaling(clock.tsc_frequency, scale, 0).time(tsc)
        )


def _signed64(value: int) -> int:
    return ((value + (1 << 63)) & _MASK64) - (1 << 63)
