"""Interrupts into the guest: MSIs to its local APICs, through qtest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmbus.errors import QemuGone
from vmbus.machine.qemu.qtest import Qtest


class LocalApics:
    """:class:`~vmbus.ports.Interrupts`: an MSI through qtest."""

    def __init__(self, qtest: Qtest, apic_ids: Sequence[int], gone: Callable[[QemuGone], None]) -> None:
        """``gone``: told when QEMU closed its socket; requests after that have no effect."""
        self._qtest = qtest
        self._apic_ids = tuple(apic_ids)
        self._gone = gone

    def request(self, vp: int, vector: int, *, auto_eoi: bool = False) -> None:
        # The gateway ends auto-EOI interrupts by itself: see Host._Events.auto_eoi_changed.
        try:
            self._qtest.interrupt(self._apic_ids[vp], vector)
        except QemuGone as error:  # a device in the middle of its work cannot mend that
            self._gone(error)
