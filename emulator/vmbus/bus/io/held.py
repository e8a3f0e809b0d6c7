"""The packets that one channel has in the host, and what they count against the budget of its guest.

    the guest's packet ──owe──▶ owed ──complete──▶ queued ──write──▶ in the ring
    the device's packet ──────────────send───────▶ queued ──write──▶ in the ring
                                      '──if the guest is to complete it──▶ awaited ──completed──▶ gone

A packet counts for the memory that it occupies, and for its bytes in a saved state (:mod:`vmbus.bus.budget`). Packets
for which there is no :meth:`HeldPackets.room` stay in the ring. Answers always have room, since they follow requests;
where they make the guest's saved state too large, the guest has to read them in time.
"""

from __future__ import annotations

from collections.abc import Callable

from vmbus.bus.budget import SAVED_LIMIT_BYTES, BudgetAccount, MemoryBudget
from vmbus.bus.io.output import PACKET_BYTES, Output, Transactions, memory_of
from vmbus.bus.io.ring import OutgoingRing
from vmbus.bus.io.state import ChannelIoState, IoCounters
from vmbus.errors import GuestError
from vmbus.ports import TimerHandle
from vmbus.wire.packet import Packet

OUTPUT_ALWAYS = 4096
"""Bytes that every channel may queue, also if the guest's saved state has no room for more."""
READ_TIMEOUT = 30.0
"""Seconds in which the guest has to read answers that would make its saved state too large."""
AWAITED_LIMIT = 8192
"""Packets of the host whose completion the guest may owe."""

_SAVED_BYTES = 160
"""Bytes of a packet in a saved state: 32 of its chunk, the library's record, a device's record of a short request."""
_SAVED_SHARE = 24
"""Of the memory of an owed packet, one byte in this many is saved: of ``PAGE_BYTES`` 20, a page and a range."""
_SAVED_QUEUED_BYTES = 96
"""Bytes of a packet of the output queue in a saved state, besides its own."""


class HeldPackets:
    """The packets of one opening of a channel after the other.

    ``schedule`` schedules a turn. ``call_later`` is the channel's: a GuestError of what it calls fails the channel.
    """

    __slots__ = (
        "_account",
        "_awaited",
        "_call_later",
        "_deadline",
        "_owed",
        "_schedule",
        "budget",
        "changed",
        "output",
    )

    def __init__(
        self,
        *,
        schedule: Callable[[], None],
        call_later: Callable[[float, Callable[[], None]], TimerHandle],
    ) -> None:
        self._schedule = schedule
        self._call_later = call_later
        self._account = BudgetAccount()
        self.budget = self._account.budget
        """The guest's budget; see :meth:`begin`."""
        self.output = Output()
        """What waits for room in the ring, or for the end of the turn."""
        self._owed = Transactions()
        self._awaited = Transactions()
        self.changed = False
        """Whether a packet came or went since this was last set to False; what is written to the ring stays told."""
        self._deadline: TimerHandle | None = None
        """Ends the channel unless the guest reads the answers that wait for it."""

    # --- openings ---

    def begin(self, budget: MemoryBudget) -> None:
        """Count against ``budget`` from now on, with what was restored: a channel opens."""
        self._account.move(budget)
        self.budget = budget
        self._account.set_queued(self.output.memory)
        self._count_saved()

    def clear(self) -> None:
        """Hold nothing: another opening of the channel begins, or none."""
        self.budget.forget(self._schedule)
        self._account.clear()
        self.forget_deadline()
        self._drop()

    def fail(self) -> None:
        """Hold no packet any more; the memory of requests counts further, because the device may still use them."""
        self._drop()
        self._account.set_queued(0)
        self._count_saved()

    def _drop(self) -> None:
        self.output, self._owed, self._awaited = Output(), Transactions(), Transactions()

    def save(self, *, input_paused: bool, failure: str, transaction_quota: int) -> ChannelIoState:
        """Return a channel's state: what is held, with the rest as it is given."""
        return ChannelIoState(
            owed=self._owed.items(),
            awaited=self._awaited.items(),
            output=tuple(self.output.packets),
            input_paused=input_paused,
            failure=failure,
            transaction_quota=transaction_quota,
        )

    def restore(self, state: ChannelIoState) -> None:
        """Hold what a saved state says, in place of nothing; :meth:`begin` counts all of it."""
        self._owed = Transactions(state.owed, PACKET_BYTES)
        self._awaited = Transactions(state.awaited)
        self.output = Output(state.output)
        self._account.charge(PACKET_BYTES * self._owed.total)

    # --- requests of the guest ---

    def room(self, limit: int) -> int:
        """Return how many packets may be taken from the ring; ``limit``: completions that may be owed."""
        if self.output.blocked:
            return 0
        owed = self._owed.total
        if self.budget.full if owed else self.budget.full_for_first:
            return 0
        return limit - owed if limit > owed else 0

    def wait_for_budget(self) -> None:
        """If the guest's budget is used up, schedule a turn as soon as it has room."""
        if self.budget.full:
            self.budget.when_free(self._schedule)

    def owe(self, packet: Packet) -> None:
        """Take a packet of the guest that requests a completion."""
        self.changed = True
        cost = memory_of(packet)
        self._owed.add(packet.transaction_id, cost)
        self._account.charge(cost)
        self._count_saved()

    def owes(self, transaction_id: int) -> bool:
        """Return whether the guest waits for a completion with this id."""
        return transaction_id in self._owed

    def complete(self, transaction_id: int, completion: bytes) -> bool:
        """Queue a completion (see ``build_packet``); False, and nothing is done, if none is owed with this id."""
        cost = self._owed.remove(transaction_id)
        if cost is None:
            return False
        self._account.refund(cost)
        self.changed = True
        self.output.put(completion)
        self._count_saved()
        return True

    # --- what the device sends by itself ---

    @property
    def congested(self) -> bool:
        """Whether a device with unlimited data should wait."""
        output = self.output
        return output.congested or (output.bytes >= OUTPUT_ALWAYS and self.budget.full)

    @property
    def awaits_too_many(self) -> bool:
        """Whether the guest owes as many completions as it may."""
        return self._awaited.total >= AWAITED_LIMIT

    def send(self, packet: bytes, awaited: int | None) -> bool:
        """Queue a packet; ``awaited``: its transaction id if the guest is to complete it.

        False, and nothing is done, if the device has sent as much as it may.
        """
        output = self.output
        if output.full or (output.bytes >= OUTPUT_ALWAYS and self.budget.full_for_first):
            return False
        if awaited is not None:
            self._awaited.add(awaited)
        self.changed = True
        output.put(packet)
        self._count_saved()
        return True

    def completed(self, transaction_id: int) -> bool:
        """Take the guest's completion of a packet; return whether one was awaited with this id."""
        self.changed = True
        return self._awaited.remove(transaction_id) is not None

    # --- the queue ---

    def write(self, ring: OutgoingRing, counters: IoCounters) -> bool:
        """Move the queue to the ring, as far as it fits; return whether the guest wants a signal.

        A turn is scheduled if room keeps appearing. Raises :class:`~vmbus.errors.RingError`.
        """
        output = self.output
        signal = output.write(ring, counters)
        self._account.set_queued(output.memory)
        self._count_saved()
        if not self._unread_too_much:
            self.forget_deadline()
        elif self._deadline is None:
            self._deadline = self._call_later(READ_TIMEOUT, self._not_read)
        if output.packets and not output.blocked:
            self._schedule()
        return signal

    @property
    def _unread_too_much(self) -> bool:
        """Whether answers of this channel wait for the guest, and the guest's state has no room for them."""
        return self.output.blocked and self.budget.saved_packets > SAVED_LIMIT_BYTES

    def _not_read(self) -> None:
        self._deadline = None
        if self._unread_too_much:
            raise GuestError(
                "answers-not-read",
                f"{self.output.bytes} bytes have waited for {READ_TIMEOUT:g} s in the host",
            )

    def forget_deadline(self) -> None:
        """Give the guest the whole time again: it has read, or may have been stopped."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _count_saved(self) -> None:
        """Count the bytes that the packets of this channel would have in a saved state, at most.

        Devices save of a request its header and pages.
        """
        account, output = self._account, self.output
        account.set_saved(
            _SAVED_BYTES * (self._owed.total + self._awaited.total)
            + (account.held - account.queued) // _SAVED_SHARE
            + output.bytes
            + _SAVED_QUEUED_BYTES * len(output.packets)
        )

    def status(self) -> dict[str, int]:
        """Return the figures for ``vmbus status``: packets, and bytes that are held and queued."""
        return {
            "owed": self._owed.total,
            "awaited": self._awaited.total,
            "held": self._account.held,
            "backlog": self.output.bytes,
        }
