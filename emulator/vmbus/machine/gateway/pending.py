"""Interrupts that a vCPU raises by itself before it halts: the words of the shared memory that say so.

docs/gateway.md#interrupts-before-hlt has the protocol. Vectors are set and taken by compiled code
(:class:`vmbus.machine.engine.library.VcpuSignals`), because other threads change the same words.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from vmbus.machine.io.addresses import address_of
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import offset_of

_WORDS = wire.VECTORS // 64
_MSI_BASE = 0xFEE00000
_MAX_APIC_ID = 0xFE
"""An MSI reaches no higher id; 0xFF addresses all processors."""


class PendingInterrupts:
    """``quads``: the region as 64-bit words; ``vcpus``: offset in it, in bytes, of each vCPU's part."""

    def __init__(self, region: mmap.mmap, quads: memoryview, vcpus: Sequence[int]) -> None:
        self._quads = quads
        self._failures_at = offset_of(wire.CONTROL, "raise_failures")
        self._failures = self._read_failures()
        self._vcpus = tuple(vcpus)
        self._region = region
        self._pending_at = [(base + offset_of(wire.VCPU, "pending")) // 8 for base in vcpus]

    def addresses(self) -> list[tuple[int, int, int]]:
        """Return for each vCPU the addresses in this process of its words ``idle``, ``pending`` and ``missed``."""
        idle, pending, missed = (offset_of(wire.VCPU, name) for name in ("idle", "pending", "missed"))
        start = address_of(self._region)
        return [(start + base + idle, start + base + pending, start + base + missed) for base in self._vcpus]

    def set_apic_ids(self, apic_ids: Sequence[int]) -> None:
        """Say where an MSI reaches each vCPU; one that cannot be reached never polls."""
        at = offset_of(wire.VCPU, "msi_address")
        for base, apic_id in zip(self._vcpus, apic_ids, strict=False):
            self._quads[(base + at) // 8] = _MSI_BASE | apic_id << 12 if apic_id <= _MAX_APIC_ID else 0

    def failed(self) -> bool:
        """Return whether a vCPU could not raise an interrupt since the last call: it is among :meth:`waiting`."""
        before, self._failures = self._failures, self._read_failures()
        return before != self._failures

    def _read_failures(self) -> int:
        at = self._failures_at  # the other half of its 64-bit word counts resets
        return int(self._quads[at // 8] >> 8 * (at % 8) & 0xFFFFFFFF)

    def waiting(self) -> list[tuple[int, int]]:
        """Return ``(vCPU, vector)`` of the interrupts that nobody has raised yet."""
        found = []
        for vcpu, at in enumerate(self._pending_at):
            for word, bits in enumerate(self._quads[at : at + _WORDS].tolist()):
                found += [(vcpu, 64 * word + bit) for bit in range(64) if bits >> bit & 1]
        return found

    def forget(self) -> None:
        """Drop what is pending: it belongs to a guest that was reset, or to an emulator that has ended."""
        for at in self._pending_at:
            for word in range(_WORDS):
                self._quads[at + word] = 0
