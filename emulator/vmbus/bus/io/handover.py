"""Whose the rings of a channel are: Python's, or those of a thread of compiled code between two turns.

    Python ──give──→ the thread ──recall──→ Python

A turn begins with a recall and ends with a give, so everything that makes a turn necessary (a completion by Python, a
packet that the thread left) takes the channel back first. Where the thread leaves the first packet again and again,
as for a disk that it cannot serve, the channel is given less often.
"""

from __future__ import annotations

from vmbus.bus.io.ring import IncomingRing, OutgoingRing
from vmbus.bus.io.state import IoCounters
from vmbus.ports import (
    PAGE_SIZE,
    FastChannel,
    GivenChannel,
    GivenRing,
    GuestPages,
    RecalledChannel,
    SignalTarget,
)

MAX_KEPT = 256
"""Turns at most for which a channel is kept after the thread could do nothing for it."""


class Handover:
    """The rings of one opening of a channel."""

    def __init__(self) -> None:
        self.given = False
        """Whether the thread has them: nobody else touches them."""
        self._keep = 0
        """Turns for which the channel is kept."""
        self._kept = 0
        """For how many it was kept last."""

    @property
    def wanted(self) -> bool:
        """Whether this turn may end with :meth:`give`; each call counts as a turn."""
        if self._keep:
            self._keep -= 1
            return False
        return True

    def give(
        self,
        fast: FastChannel,
        incoming: IncomingRing,
        outgoing: OutgoingRing,
        target: SignalTarget,
        relid: int,
    ) -> bool:
        """Give the rings; return whether they are given."""
        pages_in, pages_out = _addresses(incoming.pages), _addresses(outgoing.pages)
        if not pages_in or not pages_out:
            return False
        channel = GivenChannel(
            GivenRing(pages_in, incoming.index), GivenRing(pages_out, outgoing.index), relid, target
        )
        self.given = fast.give(channel)
        return self.given

    def recall(
        self, fast: FastChannel, incoming: IncomingRing, outgoing: OutgoingRing, counters: IoCounters
    ) -> RecalledChannel:
        """Take the rings back, and count what was done meanwhile."""
        recalled = fast.recall()
        self.given = False
        incoming.go_on(recalled.read_index)
        outgoing.go_on(recalled.write_index)
        for name in ("packets_in", "bytes_in", "packets_out", "bytes_out", "doorbells", "ring_full"):
            setattr(counters, name, getattr(counters, name) + getattr(recalled, name))
        counters.interrupts += recalled.signals
        if recalled.was_left and not recalled.packets_in:
            self._kept = min(2 * self._kept + 1, MAX_KEPT)
        else:
            self._kept //= 2
        self._keep = self._kept if recalled.was_left else 0
        return recalled


def _addresses(pages: GuestPages) -> tuple[int, ...]:
    """Return the address of each page in this process; nothing if one of them has none."""
    found = tuple(pages.address_u32(offset) for offset in range(0, pages.size, PAGE_SIZE))
    return found if all(found) else ()
