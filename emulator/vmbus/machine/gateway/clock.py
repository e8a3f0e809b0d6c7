"""The guest's TSC, from samples that the gateway takes and publishes (docs/gateway.md)."""

from __future__ import annotations

import mmap
import time

from vmbus.errors import GatewayError
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import offset_of

_SEQUENCE = offset_of(wire.CONTROL, "clock_sequence") // 4
_ARM = offset_of(wire.CONTROL, "arm") // 4
_FIELDS_AT = offset_of(wire.CONTROL, "tsc_known")
_MASK64 = (1 << 64) - 1

ClockFields = tuple[int, int, int, int, int, int, int]


class GatewayClock:
    """A :class:`~vmbus.machine.clock.TscSource`. ``words``: the shared region, as 32-bit words."""

    def __init__(self, region: mmap.mmap, words: memoryview) -> None:
        self._region = region
        self._words = words

    @property
    def tsc_frequency(self) -> int | None:
        """Ticks a second of the host's and the guest's TSC; ``None`` where the host has none."""
        known, _, _, _, _, _, frequency = self.fields()
        return frequency if known and frequency else None

    @property
    def samples(self) -> int:
        """Samples taken since :meth:`arm`, at most 64."""
        known, arm_seen, samples, *_ = self.fields()
        return samples if known and arm_seen == self._words[_ARM] else 0

    def guest_tsc_now(self) -> int | None:
        """The guest's TSC now; ``None`` until the guest has read it once since :meth:`arm`."""
        known, arm_seen, samples, offset, pair_tsc, pair_ns, frequency = self.fields()
        if not known or not samples or not frequency or arm_seen != self._words[_ARM]:
            return None
        elapsed = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - pair_ns
        return (pair_tsc + elapsed * frequency // 1_000_000_000 - offset) & _MASK64

    def arm(self) -> None:
        """Sample anew: to be called whenever the machine was continued (the offset has changed)."""
        words = self._words
        words[_ARM] = (words[_ARM] + 1) & 0xFFFFFFFF or 1

    def fields(self) -> ClockFields:
        """A consistent copy of what the gateway publishes."""
        words = self._words
        for _ in range(1000):
            sequence = words[_SEQUENCE]
            fields: ClockFields = wire.CLOCK_STRUCT.unpack_from(self._region, _FIELDS_AT)
            if not sequence & 1 and words[_SEQUENCE] == sequence:
                return fields
        raise GatewayError("the trap gateway died while it published its clock")
