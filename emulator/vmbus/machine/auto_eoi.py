"""Interrupts that the host ends for the guest, and guests for which it cannot.

Source: docs/gateway.md#auto-eoi.

A SINT with auto-EOI belongs to a guest that does not write EOI. The gateway writes it, through the memory page of the
local APIC. In x2APIC mode there is no such page: the vector stays in service, and the vCPU gets no interrupt of its
priority or below any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Protocol

from vmbus.machine.problems import Problems


class AutoEoiGateway(Protocol):
    """What is used of the gateway."""

    def set_auto_eoi(self, vcpu: int, vectors: Iterable[int]) -> None:
        """Set the vectors of ``vcpu`` that the gateway ends."""

    def auto_eoi_failures(self, vcpu: int) -> int:
        """Return how many interrupts of ``vcpu`` could not be looked at."""


class AutoEoi:
    """Passes the vectors on to the gateway, and reports vCPUs whose interrupts it cannot end."""

    def __init__(self, gateway: AutoEoiGateway, problems: Problems) -> None:
        self._gateway = gateway
        self._problems = problems
        self.watched: dict[int, int] = {}
        """vCPUs with vectors to end that had no failure since they were set: the number of failures before."""

    def changed(self, vp: int, vectors: AbstractSet[int]) -> None:
        """Let the gateway end ``vectors`` of ``vp`` from now on, and no others."""
        self._problems.withdraw(f"auto-eoi-{vp}")
        if vectors:
            self.watched[vp] = self._gateway.auto_eoi_failures(vp)
        else:
            self.watched.pop(vp, None)
        self._gateway.set_auto_eoi(vp, vectors)

    def look(self) -> None:
        """Report the vCPUs whose interrupts cannot be ended, each once."""
        for vp, before in tuple(self.watched.items()):
            if self._gateway.auto_eoi_failures(vp) != before:
                del self.watched[vp]
                self._problems.report(
                    f"auto-eoi-{vp}",
                    f"the guest uses auto-EOI on vCPU {vp} with its local APIC in x2APIC mode, in which interrupts "
                    "cannot be ended from outside, so that it hangs; start QEMU with -cpu max,-x2apic (or run the "
                    "guest with --cpu max,-x2apic)",
                )
