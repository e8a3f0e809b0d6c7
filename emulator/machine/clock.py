"""Reference time of a guest under TCG.

The reference counter, the reference TSC page and everything else that a guest can compare must be one function
of the guest's TSC. TCG's guest TSC is the host's TSC less an offset that changes whenever the guest is stopped;
the gateway samples that offset (:mod:`emulator.machine.gateway`). Reference time is then

    now = (guest_tsc * scale) >> 64        scale = floor(10^7 * 2^64 / frequency)

the formula that a guest applies to the page, so that both agree to the last unit and time stands still
while the guest is stopped.

Until the first sample, or on a host whose TSC cannot be read, reference time is the host's monotonic clock since
the emulator began, moved so that it never steps back when the TSC becomes known.
"""

from __future__ import annotations

import time
from typing import Protocol

#: QEMU's local APIC timer counts nanoseconds.
APIC_FREQUENCY = 1_000_000_000

_UNITS_PER_SECOND = 10_000_000


class TscSource(Protocol):
    """The gateway's view of the guest's TSC."""

    @property
    def tsc_frequency(self) -> int | None:
        """Ticks a second; ``None`` where the host has no TSC."""

    def guest_tsc_now(self) -> int | None:
        """The guest's TSC; ``None`` until it was sampled."""


class TcgClock:
    """:class:`~emulator.hypervisor.reference_time.GuestClock` from the gateway's samples."""

    apic_frequency = APIC_FREQUENCY

    def __init__(self, source: TscSource) -> None:
        self._source = source
        self._start = time.monotonic_ns()
        self._last = 0
        self._frequency = 0

    @property
    def tsc_frequency(self) -> int:
        """Hz; read once, so that every answer to the guest is the same. 0 where the host has no TSC."""
        if not self._frequency:
            self._frequency = self._source.tsc_frequency or 0
        return self._frequency

    @property
    def tsc_known(self) -> bool:
        return bool(self.tsc_frequency) and self._source.guest_tsc_now() is not None

    def guest_tsc(self) -> int:
        """The guest's TSC now; 0 while it is not known."""
        return self._source.guest_tsc_now() or 0

    def now(self) -> int:
        """Reference time in units of 100 ns; never less than what was returned before."""
        tsc = self._source.guest_tsc_now()
        frequency = self.tsc_frequency
        if tsc is None or not frequency:
            current = (time.monotonic_ns() - self._start) // 100
        else:
            current = (tsc * ((_UNITS_PER_SECOND << 64) // frequency)) >> 64
        self._last = max(self._last, current)
        return self._last
