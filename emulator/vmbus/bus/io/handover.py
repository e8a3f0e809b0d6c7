"""Whose the rings of a channel are: Python's, or those of a thread of compiled code between two turns.

    Python ──give──→ the thread ──recall──→ Python

A turn begins with a recall and ends with a give, so everything that makes a turn necessary (a completion by Python, a
packet that the thread left) takes the channel back first. Where the thread leaves the first packet again and again,
as for a disk that it cannot serve, the channel is given less often.

If a journal is kept, it has the channel as of the last recall before there is another give, and the thread keeps what
it has passed on until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vmbus.bus.channel.endpoint import EndpointChannel
from vmbus.bus.io.held import HeldPackets
from vmbus.bus.io.ring import IncomingRing, OutgoingRing
from vmbus.bus.io.state import IoCounters
from vmbus.errors import InternalError
from vmbus.ports import (
    PAGE_SIZE,
    FastChannel,
    FastLink,
    GivenChannel,
    GivenRing,
    GuestPages,
)

MAX_KEPT = 256
"""Turns at most for which a channel is kept after the thread could do nothing for it."""


class _Opening(NamedTuple):
    """What is handed over: the rings of one opening of a channel."""

    channel: EndpointChannel
    incoming: IncomingRing
    outgoing: OutgoingRing


class Handover:
    """The compiled path of one channel, and who has the rings of its present opening.

    ``ready`` returns whether the device lets compiled code have packets, ``room`` how many packets may be taken;
    ``schedule`` schedules a turn, which goes on with what is in ``held``. ``record`` records the channel, if there is
    a journal, and calls :meth:`recorded`.
    """

    def __init__(
        self,
        held: HeldPackets,
        counters: IoCounters,
        *,
        ready: Callable[[], bool],
        room: Callable[[], int],
        schedule: Callable[[], None],
        record: Callable[[], None],
    ) -> None:
        self.fast: FastChannel | None = None
        """The compiled path of this opening, if the device has one."""
        self.given = False
        """Whether its thread has the rings: nobody else touches them."""
        self._before: FastChannel | None = None
        """That of the opening before; its requests may be under way."""
        self._held = held
        self._counters = counters
        self._ready = ready
        self._room = room
        self._schedule = schedule
        self._record = record
        self._recorded: FastLink | None = None
        """What the journal says of this opening."""
        self._opening: _Opening | None = None
        self._keep = 0
        """Turns for which the channel is kept."""
        self._kept = 0
        """For how many it was kept last."""

    def begin(self, channel: EndpointChannel, incoming: IncomingRing, outgoing: OutgoingRing) -> None:
        """Begin an opening of the channel."""
        self._opening = _Opening(channel, incoming, outgoing)

    def end(self) -> None:
        """End the opening, after a recall."""
        if self.fast is not None:
            self.fast.close()
            self._before, self.fast = self.fast, None
        self._opening = self._recorded = None
        self.given = False
        self._keep = self._kept = 0

    @property
    def in_flight(self) -> int:
        """Requests in flight in compiled code, those of an earlier opening included."""
        return sum([each.outstanding for each in (self.fast, self._before) if each is not None])

    @property
    def _wanted(self) -> bool:
        """Whether this turn may end with a give; each call counts as a turn."""
        if self._keep:
            self._keep -= 1
            return False
        return True

    def give(self) -> bool:
        """Give the rings to compiled code, at the end of a turn; return whether it has them."""
        fast, opening = self.fast, self._opening
        if fast is None or opening is None or not self._ready() or not self._wanted:
            return False
        fast.look()
        if self._held.output.packets:
            self._schedule()
            return False
        channel, incoming, outgoing = opening
        target, relid = channel.signal_target(), channel.relid
        if target is None or relid is None or not self._room():
            return False
        pages_in, pages_out = _addresses(incoming.pages), _addresses(outgoing.pages)
        if not pages_in or not pages_out:
            return False
        link = fast.link
        if link is not None and (self._recorded is None or self._recorded[:-1] != link[:-1]):
            self._record()  # so that the journal is never older than the give before
        self.given = fast.give(
            GivenChannel(
                GivenRing(pages_in, incoming.index), GivenRing(pages_out, outgoing.index), relid, target
            )
        )
        if self.given and self._held.output.packets:  # something has ended in between
            self._schedule()
        return self.given

    @property
    def link(self) -> FastLink | None:
        """What a journal has to say of the channel as it is now."""
        return None if self.fast is None else self.fast.link

    def recorded(self) -> None:
        """Note that a journal has the channel as it is now."""
        if self.fast is not None:
            self._recorded = self.fast.link
            self.fast.recorded()

    def recall(self) -> bool:
        """Take the given rings back; return whether the next packet is one for Python.

        Counts what was done meanwhile, and passes on what has ended. Raises :class:`~vmbus.errors.InternalError` if
        there is nothing to take back.
        """
        fast, opening, counters = self.fast, self._opening, self._counters
        if fast is None or opening is None or not self.given:
            raise InternalError("rings are recalled that were not given")
        recalled = fast.recall()
        self.given = False
        opening.incoming.go_on(recalled.read_index)
        opening.outgoing.go_on(recalled.write_index)
        for name in ("packets_in", "bytes_in", "packets_out", "bytes_out", "doorbells", "ring_full"):
            setattr(counters, name, getattr(counters, name) + getattr(recalled, name))
        counters.interrupts += recalled.signals
        opening.channel.count_signals(recalled.doorbells, recalled.signals)
        if recalled.was_left and not recalled.packets_in:
            self._kept = min(2 * self._kept + 1, MAX_KEPT)
        else:
            self._kept //= 2
        self._keep = self._kept if recalled.was_left else 0
        fast.look()
        return recalled.was_left


def _addresses(pages: GuestPages) -> tuple[int, ...]:
    """Return the address of each page in this process; nothing if one of them has none."""
    found = tuple(pages.address_u32(offset) for offset in range(0, pages.size, PAGE_SIZE))
    return found if all(found) else ()
