"""Reference time, and the page that lets a guest compute it from its TSC.

Source: docs/protocol/discovery.md#reference-tsc-page, TLFS 12.5 to 12.7.

    time = (tsc * scale >> 64) + offset      in units of 100 ns, 128-bit product

While a valid page is published, TIME_REF_COUNT is computed by the same formula, so that both readings agree. Before
that, reference time is the clock's.

    state        time is        becomes
    -----------  -------------  -------------------------------------------------------------------
    free         clock.now()    following when a page is published and the guest's TSC is known
    following    the formula    free on reset; new scale and offset when the TSC's frequency changed

No transition lets time go back.
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
    """The clocks of the machine that the guest runs on."""

    def now(self) -> int:
        """Return reference time in units of 100 ns since the partition was created; it never goes back."""

    def guest_tsc(self) -> int:
        """Return the guest's time-stamp counter now, as RDTSC in the guest would read it."""

    @property
    def tsc_frequency(self) -> int:
        """Frequency of the guest's TSC in Hz; 0 if it is not known."""

    @property
    def apic_frequency(self) -> int:
        """Input frequency of the local APIC's timer before its divider, in Hz."""

    @property
    def tsc_known(self) -> bool:
        """Whether ``guest_tsc`` and ``tsc_frequency`` are exact enough for the reference TSC page."""


@dataclass(frozen=True, slots=True)
class TscScaling:
    """The formula's constants for a TSC of ``frequency`` Hz; ``offset`` in units of 100 ns."""

    frequency: int
    scale: int
    offset: int

    def time(self, tsc: int) -> int:
        """Return reference time, in units of 100 ns, at the TSC value ``tsc``."""
        return (((tsc & _MASK64) * self.scale) >> 64) + self.offset


def scale_for(frequency: int) -> int:
    """Return the page's scale for a TSC of ``frequency`` Hz, or 0 if it does not fit 64 bits (10 MHz and less)."""
    if frequency <= UNITS_PER_SECOND:
        return 0
    return (UNITS_PER_SECOND << 64) // frequency


def next_sequence(sequence: int) -> int:
    """Return the sequence number after ``sequence``, skipping the two with a special meaning."""
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
        """Sequence number of the page that was published last."""

    def now(self) -> int:
        """Return reference time in units of 100 ns; it never goes back."""
        if self.scaling is not None and self._clock.tsc_known:
            time = self.scaling.time(self._clock.guest_tsc())
        else:
            time = self._clock.now()
        self._floor = max(self._floor, min(time, _MASK64))
        return self._floor

    @property
    def stale(self) -> bool:
        """Whether the constants published do not match the present frequency of the TSC."""
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
        """Put saved constants back; ``time`` is the reference time at the save, in units of 100 ns."""
        self.scaling = scaling
        self.sequence = sequence
        self._floor = time
        self._restored = True

    def reset(self) -> None:
        """Stop following the TSC, which a reset of the machine may change; reference time continues."""
        self.now()
        self.scaling = None
        self._restored = False

    def _follow_tsc(self) -> None:
        """Choose scale and offset so that the present time is the same by the old and the new constants."""
        clock = self._clock
        scale = scale_for(clock.tsc_frequency) if clock.tsc_known else 0
        if scale == 0:
            self.scaling = None
            return
        if self.scaling is not None and self.scaling.frequency == clock.tsc_frequency:
            return
        tsc = clock.guest_tsc()
        # After a restore the old constants belong to the TSC of another machine, so that only the clock has the time.
        now = max(clock.now(), self._floor) if self._restored else self.now()
        self._restored = False
        self.scaling = TscScaling(
            clock.tsc_frequency, scale, now - TscScaling(clock.tsc_frequency, scale, 0).time(tsc)
        )


def _signed64(value: int) -> int:
    return ((value + (1 << 63)) & _MASK64) - (1 << 63)
