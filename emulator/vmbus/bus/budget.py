"""The memory of the host that one guest may occupy, in bytes.

What a guest makes the host keep is counted here, whatever keeps it: packets that wait for their completion, packets
that wait for room in a ring, private copies of data, page lists.

    charge ──▶ held < limit: channels take packets        held ≥ limit: packets stay in the rings
                         ◀── refund: :meth:`MemoryBudget.when_free` calls those that wait ──┘

The limit slows a guest down, and loses nothing: what is not taken from a ring stays there, in guest memory. A channel
that holds nothing may always take one packet, so that no channel waits for another one for ever. So more than the
limit can be held: by one packet of each channel, and by page lists, which have limits of their own
(:mod:`vmbus.bus.channel.gpadl`).

The same is done for the bytes that the guest's *saved state* would have: what is held is saved, and a state that
QEMU's carrier does not take (1 MiB) could not be migrated, so a guest could refuse to leave. What a guest can add:

    | part                                            | bound                                                |
    | page lists (GPADLs), in progress and complete   | ``SAVED_GPADL_BYTES``: more lists are refused        |
    | packets that are owed, awaited or queued        | ``SAVED_PACKET_BYTES``: more stay in the rings       |
    | the first packet of channels that hold none     | ``SAVED_FIRST_BYTES``, and one packet                |
    | all of these packets, with large answers        | ``SAVED_LIMIT_BYTES``: read in time, or it fails     |
    | channels, devices, processors, messages         | the rest of 1 MiB: 112 KiB                           |
"""

from __future__ import annotations

from collections.abc import Callable

GUEST_BYTES = 64 << 20
"""Bytes that one guest may occupy before its packets stay in the rings."""

SAVED_GPADL_BYTES = 400 << 10
"""Bytes of saved state of all page lists. A page takes at most 5 bytes in a guest of up to 1 TiB, and pages in a row
take them together: the largest user known, a network device for a program in user space (13 056 pages, 64
sub-channels with 4 MiB of rings each), needs 387 KiB if no two of its pages are neighbours."""
SAVED_PACKET_BYTES = 320 << 10
"""Bytes of saved state of packets beyond which packets stay in the rings: some 1500 requests of 4 KiB, or 110 of
512 KiB. Requests of the compiled path are never saved, and do not count."""
SAVED_FIRST_BYTES = 64 << 10
"""The same for channels that hold nothing yet: each may take one packet beyond ``SAVED_PACKET_BYTES``, so that none
waits for another one."""

SAVED_LIMIT_BYTES = 512 << 10
"""The same beyond which a channel fails whose answers do not fit into the guest's ring, unless the guest reads them
in time: one answer may be large, and a device may give many at once."""


class MemoryBudget:
    """The budget of one guest."""

    __slots__ = ("_waiting", "held", "limit", "most", "saved_gpadls", "saved_packets")

    def __init__(self, limit: int = GUEST_BYTES) -> None:
        self.limit = limit
        self.held = 0
        """Bytes that are held now."""
        self.most = 0
        """The most bytes that were held at a time."""
        self.saved_packets = 0
        """Bytes that packets would have in a saved state, at most."""
        self.saved_gpadls = 0
        """The same of page lists."""
        self._waiting: dict[Callable[[], None], None] = {}

    @property
    def full(self) -> bool:
        """Whether a limit is reached: packets stay in the rings."""
        return self.held >= self.limit or self.saved_packets >= SAVED_PACKET_BYTES

    @property
    def full_for_first(self) -> bool:
        """Whether a channel that holds nothing may not take a packet either."""
        return self.saved_packets >= SAVED_PACKET_BYTES + SAVED_FIRST_BYTES

    def charge(self, size: int) -> None:
        """Count ``size`` bytes more."""
        self.held += size
        if self.held > self.most:
            self.most = self.held

    def refund(self, size: int) -> None:
        """Undo :meth:`charge`; call what waits if there is room again."""
        self.held -= size
        if self._waiting:
            self._wake()

    def count_saved_packets(self, change: int) -> None:
        """Count ``change`` bytes of saved state more, or less."""
        self.saved_packets += change
        if self._waiting and change < 0:
            self._wake()

    def _wake(self) -> None:
        if not self.full:
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
        return {
            "held": self.held,
            "most": self.most,
            "limit": self.limit,
            "saved_packets": self.saved_packets,
            "saved_gpadls": self.saved_gpadls,
        }


class BudgetAccount:
    """What one channel holds of its guest's budget, in bytes: what its device owes, and its output queue."""

    __slots__ = ("budget", "held", "queued", "saved")

    def __init__(self) -> None:
        self.budget = MemoryBudget()
        """Whose budget; one of its own until :meth:`move`."""
        self.held = 0
        """Bytes that are counted for the channel, those of the queue included."""
        self.queued = 0
        """Those of them that are of the queue."""
        self.saved = 0
        """Bytes that the channel's packets would have in a saved state, at most."""

    def set_saved(self, size: int) -> None:
        """Count ``size`` bytes of saved state, in place of what was counted before."""
        if size != self.saved:
            change, self.saved = size - self.saved, size
            self.budget.count_saved_packets(change)

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
        if size > self.queued:
            self.charge(size - self.queued)
        elif size < self.queued:
            self.refund(self.queued - size)
        self.queued = size

    def move(self, budget: MemoryBudget) -> None:
        """Count what is held in ``budget`` from now on."""
        self.budget.refund(self.held)
        self.budget.count_saved_packets(-self.saved)
        self.budget = budget
        budget.charge(self.held)
        budget.count_saved_packets(self.saved)

    def clear(self) -> None:
        """Hold nothing any more."""
        self.refund(self.held)
        self.queued = 0
        self.set_saved(0)
