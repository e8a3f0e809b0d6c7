"""Reference time of a guest under TCG.

The reference counter, the reference TSC page and everything else that a guest can compare must be one function
of the guest's TSC. TCG's guest TSC is the host's TSC less an offset that changes whenever the guest is stopped;
the gateway samples that offset (:mod:`vmbus.machine.gateway.client`). Reference time is then

    now = (guest_tsc * scale) >> 64        scale = floor(10^7 * 2^64 / frequency)

the formula that a guest applies to the page, so that both agree to the last unit and time stands still
while the guest is stopped.

Until the first sample, or on a host whose TSC cannot be read, reference time is the host's monotonic clock since
the emulator started, adjusted so that it never steps back when the TSC becomes known.
"""

from __future__ import annotations

import time
from typing import Protocol

APIC_FREQUENCY = 1_000_000_000
"""Frequency in Hz of QEMU's local APIC timer."""

_UNITS_PER_SECOND = 10_000_000

SAME_TSC = 200e-6
"""Two frequencies that differ by less than this part are two measurements of one TSC."""


class TscSource(Protocol):
    """The gateway's view of the guest's TSC."""

    @property
    def tsc_frequency(self) -> int | None:
        """Frequency in Hz; ``None`` where the host has no TSC."""

    def guest_tsc_now(self) -> int | None:
        """Return the guest's TSC; ``None`` until it was sampled."""


class TcgClock:
    """:class:`~vmbus.hypervisor.reference_time.GuestClock` from the gateway's samples."""

    apic_frequency = APIC_FREQUENCY

    def __init__(self, source: TscSource) -> None:
        self._source = source
        self._last = 0
        self._frequency = 0
        # Without a TSC, time continues from here with the host's monotonic clock.
        self._free_time = 0
        self._free_since = time.monotonic_ns()
        # With one, time was _origin_time when the guest's TSC was _origin_tsc.
        self._origin_tsc = 0
        self._origin_time = 0
        self._stopped = False
        self.stopped_at: int | None = None
        """The guest's TSC when the guest was stopped, if it was known; ``None`` while the guest runs."""

    @property
    def stopped(self) -> bool:
        """Whether the guest is stopped."""
        return self._stopped

    @property
    def tsc_frequency(self) -> int:
        """Frequency in Hz, read once: every answer to the guest is the same. 0 where the host has no TSC."""
        if not self._frequency:
            self._frequency = self._source.tsc_frequency or 0
        return self._frequency

    @property
    def tsc_known(self) -> bool:
        return not self._stopped and bool(self.tsc_frequency) and self._source.guest_tsc_now() is not None

    def guest_tsc(self) -> int:
        """Return the guest's TSC now; 0 while it is not known."""
        return self._source.guest_tsc_now() or 0

    def now(self) -> int:
        """Return the reference time in units of 100 ns, never less than before."""
        if self._stopped:
            return self._last
        tsc = self._source.guest_tsc_now()
        frequency = self.tsc_frequency
        if tsc is None or not frequency:
            current = self._free_time + (time.monotonic_ns() - self._free_since) // 100
        else:
            scale = (_UNITS_PER_SECOND << 64) // frequency
            current = self._origin_time + ((tsc - self._origin_tsc) * scale >> 64)
        self._last = max(self._last, current)
        return self._last

    def stop(self) -> None:
        """Stop time, at the value returned last: the guest was stopped, and its TSC with it."""
        if not self._stopped:
            self.stopped_at = self._source.guest_tsc_now()
            self._stopped = True

    def resume(self) -> None:
        """Continue: the guest runs again, and its TSC has to be sampled anew."""
        self._free_time = self._last
        self._free_since = time.monotonic_ns()
        self._stopped = False
        self.stopped_at = None

    def restore(self, frequency: int, tsc: int, now: int, last_read: int, *, same_host: bool = False) -> bool:
        """Continue the time of a saved guest; return whether its TSC has the same frequency here.

        The guest has read that its TSC has ``frequency`` (Hz, 0: none). Reference time was ``now`` when the TSC was
        ``tsc`` (0: not known); ``last_read`` was the last value that the guest read. QEMU continues the TSC where it
        stopped. Two measurements of one TSC differ a little, and the guest must see one value: up to a difference of
        :data:`SAME_TSC`, and always on the ``same_host``, the one that the guest has read.
        """
        own = self.tsc_frequency
        same = same_host or abs(own - frequency) <= frequency * SAME_TSC
        if same:
            self._frequency = frequency
        self._last = self._free_time = last_read
        self._free_since = time.monotonic_ns()
        self._origin_tsc, self._origin_time = (tsc, now) if tsc else (0, 0)
        return same
