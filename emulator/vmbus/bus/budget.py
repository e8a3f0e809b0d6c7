"""The memory of the host that one guest may occupy, in bytes.

What a guest makes the host keep is counted here, whatever keeps it: packets that wait for their completion, packets
that wait for room in a ring, private copies of data, page lists.

    charge ──▶ held < limit: channels take packets        held ≥ limit: packets stay in the rings
                         ◀── refund: :meth:`MemoryBudget.when_free` calls those that wait ──┘

The limit slows a guest down, and loses nothing: what is not taken from a ring stays there, in guest memory. A channel
that holds nothing may always take one packet, so that no channel waits for another one for ever. So more than the
limit can be held: by one packet of each channel, and by page lists, which have limits of their own
(:mod:`vmbus.bus.channel.gpadl`).
"""

from __future__ import annotations

from collections.abc import Callable

GUEST_BYTES = 64 << 20
"""Bytes that one guest may occupy before its packets stay in the rings."""


class MemoryBudget:
    """The budget of one guest."""

    __slots__ = ("_waiting", "held", "limit", "most")

    def __init__(self, limit: int = GUEST_BYTES) -> None:
        self.limit = limit
        self.held = 0
        """Bytes that are held now."""
        self.most = 0
        """The most bytes that were held at a time."""
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.held >= self.limit

    def charge(self, size: int) -> None:
        """Count ``size`` bytes more."""
        self.held += size
        if self.held > self.most:
            self.most = self.held

    def refund(self, size: int) -> None:
        """Undo :meth:`charge`; call what waits if there is room again."""
        self.held -= size
        if self._waiting and self.held < self.limit:
            waiting, self._waiting = self._waiting, {}
            for call in waiting:
                call()

    def when_free(self, call: Callable[[], None]) -> None:
        """Call ``call`` once, as soon as there is room again. It must only schedule work."""
        self._waiting[call] = None

    def forget(self, call: Callable[[], None]) -> None:
        """Do not call ``call`` any more: what waited is gone."""
        self._waiting.pop(call, None)

    def status(self) -> dict[str, int]:
        """Return the figures for ``vmbus status``, in bytes."""
        return {"held": self.held, "most": self.most, "limit": self.limit}


class BudgetAccount:
    """What one channel holds of its guest's budget, in bytes: what its device owes, and its output queue."""

    __slots__ = ("_queued", "budget", "held")

    def __init__(self) -> None:
        self.budget = MemoryBudget()
        """Whose budget; one of its own until :meth:`move`."""
        self.held = 0
        """Bytes that are counted for the channel, those of the queue included."""
        self._queued = 0

    def charge(self, size: int) -> None:
        """Count ``size`` bytes more."""
        # What MemoryBudget.charge does, without a call: this is done for each packet.
        self.held += size
        budget = self.budget
        budget.held += size
        if budget.held > budget.most:
            budget.most = budget.held

    def refund(self, size: int) -> None:
        """Undo :meth:`charge`."""
        self.held -= size
        self.budget.refund(size)

    def set_queued(self, size: int) -> None:
        """Count ``size`` bytes for the output queue, in place of what was counted for it before."""
        if size > self._queued:
            self.charge(size - self._queued)
        elif size < self._queued:
            self.refund(self._queued - size)
        self._queued = size

    def move(self, budget: MemoryBudget) -> None:
        """Count what is held in ``budget`` from now on."""
        self.budget.refund(self.held)
        self.budget = budget
        budget.charge(self.held)

    def clear(self) -> None:
        """Hold nothing any more."""
        self.refund(self.held)
        self._queued = 0
