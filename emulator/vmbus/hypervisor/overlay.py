"""Guest pages that registers name: SIMP, SIEFP, VP assist page, reference TSC page, hypercall page.

Hyper-V lays pages of its own over the guest's addresses. Here the guest's RAM page is used in place, which a
guest cannot tell apart as long as it does not look below (docs/protocol/discovery.md#synic-pages).

    enable  page named           what happens
    ------  -------------------  ----------------------------------------------------------------
    0 -> 1  another than before  taken into use; zeroed if the register asks for it (SIMP, SIEFP)
    0 -> 1  the same as before   taken into use as it is (what is queued in it stays)
    1 -> 1  another              as 0 -> 1
    1 -> 0  any                  never written again
    any     not RAM              the register takes the value, the page stays out of use

"Not RAM" is accepted because an overlay of Hyper-V may lie anywhere; without RAM there is nothing to write to,
so nothing is delivered, and the refusal is counted. (HYPERCALL is the exception, see ``partition``: a guest
would jump into nothing.)
"""

from __future__ import annotations

from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, GuestMemory, GuestPages
from vmbus.refusals import Refusals
from vmbus.wire.msr import PAGE_REGISTER


class PageOverlay:
    """One page register of one virtual processor, or of the partition."""

    def __init__(self, name: str, memory: GuestMemory, refusals: Refusals, *, zeroed: bool = False) -> None:
        self.name = name
        self.value = 0
        self.pages: GuestPages | None = None
        """The page while it is enabled and RAM."""
        self._memory = memory
        self._refusals = refusals
        self._zeroed = zeroed
        self._last_gpn: int | None = None

    def write(self, value: int) -> None:
        """The guest writes the register."""
        gpn = self._place(value)
        if self.pages is not None and gpn != self._last_gpn:
            if self._zeroed:
                self.pages.write(0, bytes(PAGE_SIZE))
            self._last_gpn = gpn

    def restore(self, value: int, last_gpn: int | None) -> None:
        """Take over a saved register; the page's content is the guest's and stays."""
        self._place(value)
        self._last_gpn = last_gpn

    def reset(self) -> None:
        """Power-on state."""
        self.value = 0
        self.pages = None
        self._last_gpn = None

    @property
    def last_gpn(self) -> int | None:
        """The page that was in use last."""
        return self._last_gpn

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
