"""Guest pages that registers name: SIMP, SIEFP, VP assist page, reference TSC page.

Source: docs/protocol/discovery.md#synic-pages.

Hyper-V overlays the named guest address with a page of its own. This emulator uses the guest's RAM page in place. A
guest can see the difference only if it disables the overlay and reads the RAM below it.

    enable  page named           what happens
    ------  -------------------  ----------------------------------------------------------------
    0 -> 1  another than before  taken into use; zeroed if the register asks for it (SIMP, SIEFP)
    0 -> 1  the same as before   taken into use as it is (what is queued in it stays)
    1 -> 1  another              as 0 -> 1
    1 -> 0  any                  not written any more
    any     not RAM              the register takes the value, the page is not in use

A page that is not RAM is accepted because Hyper-V's overlays may lie at any address. There is no memory to write to,
so nothing is delivered, and a refusal is counted. HYPERCALL does not use this class: it raises #GP for such a page
(:mod:`vmbus.hypervisor.partition`), because the guest would execute an address without memory.
"""

from __future__ import annotations

from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, GuestMemory, GuestPages
from vmbus.refusals import Refusals
from vmbus.wire.msr import PAGE_REGISTER


class PageOverlay:
    """One page register of a virtual processor or of the partition.

    ``name`` is for log lines. ``zeroed``: a page is filled with zeros when it is taken into use.
    """

    def __init__(self, name: str, memory: GuestMemory, refusals: Refusals, *, zeroed: bool = False) -> None:
        self.name = name
        self.value = 0
        self.pages: GuestPages | None = None
        """The page, while it is enabled and is RAM; otherwise None."""
        self._memory = memory
        self._refusals = refusals
        self._zeroed = zeroed
        self._last_gpn: int | None = None

    def write(self, value: int) -> None:
        """Write the register, as the guest does."""
        gpn = self._place(value)
        if self.pages is not None and gpn != self._last_gpn:
            if self._zeroed:
                self.pages.write(0, bytes(PAGE_SIZE))
            self._last_gpn = gpn

    def restore(self, value: int, last_gpn: int | None) -> None:
        """Put a saved register back; the content of the page is guest memory and is not changed."""
        self._place(value)
        self._last_gpn = last_gpn

    def reset(self) -> None:
        """Return to the power-on state."""
        self.value = 0
        self.pages = None
        self._last_gpn = None

    @property
    def last_gpn(self) -> int | None:
        """Number of the page that was in use last, or None."""
        return self._last_gpn

    @property
    def gpn_in_use(self) -> int | None:
        """Number of the page while it is in use, otherwise None."""
        return self._last_gpn if self.pages is not None else None

    def _place(self, value: int) -> int:
        register = PAGE_REGISTER.parse(value)
        self.value = value
        self.pages = None
        if register.enable:
            try:
                self.pages = self._memory.pages((register.gpn,))
            except GuestAddressError as error:
                self._refusals.refuse("page-not-ram", f"{self.name}: {error}")
        return register.gpn
