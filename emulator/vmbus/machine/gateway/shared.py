"""What the gateway publishes in the shared memory: samples of the guest's TSC, and pages with translated code.

The layout is in ``plugin/shared.h`` and :mod:`vmbus.wire.gateway` (docs/gateway.md).
"""

from __future__ import annotations

import mmap
import time

from vmbus.errors import GatewayError
from vmbus.machine.io.addresses import address_of
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import offset_of

_SEQUENCE = offset_of(wire.CONTROL, "clock_sequence") // 4
_ARM = offset_of(wire.CONTROL, "arm") // 4
_FIELDS_AT = offset_of(wire.CONTROL, "tsc_known")
_MASK64 = (1 << 64) - 1

ClockFields = tuple[int, int, int, int, int, int, int]


def reclaim_doorbells(region: mmap.mmap, offset: int) -> None:
    """Take over the doorbells of the engine of an emulator that has ended: they count as rung."""
    for at, value in enumerate(region[offset : offset + wire.DOORBELLS]):
        if value & wire.DOORBELL_ENGINE:
            region[offset + at] = wire.DOORBELL_RUNG


class GatewayClock:
    """The guest's TSC, a :class:`~vmbus.machine.clock.TscSource`. ``words``: the shared region as 32-bit words."""

    def __init__(self, region: mmap.mmap, words: memoryview) -> None:
        self._region = region
        self._words = words

    @property
    def tsc_frequency(self) -> int | None:
        """Frequency in Hz of the host's and the guest's TSC; ``None`` where the host has no TSC."""
        known, _, _, _, _, _, frequency = self.fields()
        return frequency if known and frequency else None

    @property
    def samples(self) -> int:
        """Number of samples taken since :meth:`arm`, at most 64."""
        known, arm_seen, samples, *_ = self.fields()
        return samples if known and arm_seen == self._words[_ARM] else 0

    def guest_tsc_now(self) -> int | None:
        """Return the guest's TSC now; ``None`` until the guest has read it once since :meth:`arm`."""
        known, arm_seen, samples, offset, pair_tsc, pair_ns, frequency = self.fields()
        if not known or not samples or not frequency or arm_seen != self._words[_ARM]:
            return None
        elapsed = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - pair_ns
        return (pair_tsc + elapsed * frequency // 1_000_000_000 - offset) & _MASK64

    def arm(self) -> None:
        """Have the gateway sample anew. Call it whenever the machine was resumed: the offset has changed."""
        words = self._words
        words[_ARM] = (words[_ARM] + 1) & 0xFFFFFFFF or 1

    def fields(self) -> ClockFields:
        """Return a consistent copy of what the gateway publishes."""
        words = self._words
        for _ in range(1000):
            sequence = words[_SEQUENCE]
            fields: ClockFields = wire.CLOCK_STRUCT.unpack_from(self._region, _FIELDS_AT)
            if not sequence & 1 and words[_SEQUENCE] == sequence:
                return fields
        raise GatewayError(
            "the trap gateway ended while it published its clock: QEMU has crashed or was killed"
        )


class CodePages:
    """Guest pages that code was translated from: one byte for each page, set by the gateway, cleared here."""

    def __init__(self, region: mmap.mmap, offset: int, pages: int) -> None:
        self._region = region
        self._offset = offset
        self._pages = pages

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        """Return those of ``count`` pages from ``first_pfn`` that are noted, and clear their notes.

        Pages beyond those that the gateway notes (its ``ram-limit``) are always returned.
        """
        region = self._region
        start = self._offset + first_pfn
        if first_pfn + count > self._pages:
            inside = max(0, self._pages - first_pfn)
            noted = self.test_and_clear(first_pfn, inside) if inside else []
            return noted + list(range(first_pfn + inside, first_pfn + count))
        if count == 1:
            if not region[start]:
                return []
            region[start] = 0
            return [first_pfn]
        notes = region[start : start + count]
        at = notes.find(1)
        found: list[int] = []
        while at >= 0:
            region[start + at] = 0
            found.append(first_pfn + at)
            at = notes.find(1, at + 1)
        return found

    def native(self) -> tuple[int, int]:
        """Return the address of the notes in this process, and the number of pages that have one."""
        return address_of(self._region) + self._offset, self._pages
