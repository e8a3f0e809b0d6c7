"""The turns of a channel: when its ring is read, how much of it at a time, and when the host sleeps.

Source: docs/protocol/rings.md#reading.

A doorbell only schedules a turn in the event loop. A turn masks the guest's signals, takes at most
:data:`TURN_PACKETS` packets, passes them to the device, puts what the device sent and completed into the other
ring with one index store, and signals the guest at most once for each batch. Then:

    | the turn ends with            | next                                                                     |
    | packets left                  | another turn, after those of all other channels (fairness)               |
    | an empty ring                 | more turns for a short while, then unmasked and asleep until a doorbell  |
    | output that does not fit      | pending send size is set; nothing is taken until the guest makes room    |
    | too much owed, input paused   | nothing is taken until the device completes something, or resumes input  |
    | the guest's budget used up    | nothing is taken until the guest's devices hold less                     |
    | output that cannot be saved   | the channel fails: its guest does not read its answers                   |
    | a thread of compiled code     | it has both rings until the next turn (:mod:`vmbus.bus.io.handover`)     |

How long an empty ring is polled before the host sleeps adapts (:mod:`vmbus.bus.io.polling`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmbus.bus.io.polling import AdaptivePolling
from vmbus.bus.io.ring import IncomingRing
from vmbus.bus.io.state import IoCounters
from vmbus.errors import GuestError
from vmbus.ports import Timers
from vmbus.wire.packet import Packet

TURN_PACKETS = 64
"""Packets taken in one turn."""
BATCH_PACKETS = 8
"""Packets that are taken, and answered, together: the guest handles one batch while the host handles the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnCalls:
    """What a turn calls of its channel."""

    room: Callable[[], int]
    """Return how many packets may be taken now; 0 as well if the channel does not run."""
    record: Callable[[], None]
    """Record what is about to become visible to the guest, if somebody keeps a journal of the channel."""
    wait_for_budget: Callable[[], None]
    """If the guest's budget is used up, schedule a turn as soon as it has room."""
    deliver: Callable[[list[Packet]], int]
    """Pass packets to the device; return how many: fewer if it paused or failed in between."""
    batch_ended: Callable[[], None]
    """Have the device finish a batch."""
    write_out: Callable[[], bool]
    """Move the output to the ring, as far as it fits; return whether the guest wants a signal."""
    tell_room: Callable[[], bool]
    """Tell the device, which waits for that, that all is sent, if it is; return whether the guest wants a signal."""
    signal: Callable[[], None]
    """Signal the guest."""
    failed: Callable[[GuestError], None]
    """Fail the channel, because of what the guest did."""
    broken: Callable[[Exception], None]
    """Fail the channel, because of an error of the host's: the event loop would only log it, and no turn follow."""
    recall: Callable[[], int]
    """Take the rings back from a thread of compiled code; return how many packets this turn may take at most."""
    give: Callable[[], bool]
    """Give the rings to such a thread if there is one; return whether it has them."""


class Turns:
    """The turns of one channel, of which :meth:`begin` says when it is open."""

    def __init__(
        self, timers: Timers, polling: AdaptivePolling, counters: IoCounters, calls: TurnCalls
    ) -> None:
        self.incoming: IncomingRing | None = None
        """The ring that is read; ``None`` while the channel is closed."""
        self.running = False
        """Whether the channel is open, and neither paused nor failed."""
        self.active = False
        """Whether a turn is being performed: what is sent meanwhile goes out with it."""
        self.room_wanted = False
        """Whether the device waits until all that it sent is in the ring."""
        self._timers = timers
        self._polling = polling
        self._counters = counters
        self._calls = calls
        self._scheduled = False

    def begin(self, incoming: IncomingRing) -> None:
        """Read ``incoming``: the channel is open."""
        self.incoming = incoming

    def end(self) -> None:
        """Read nothing any more; a turn that is being performed ends, and one that is scheduled has no effect."""
        self.incoming = None
        self._scheduled = self.active = self.room_wanted = False

    def schedule(self) -> None:
        """Perform a turn soon, if the channel runs."""
        if self.running and not self._scheduled:
            self._scheduled = True
            self._timers.call_soon(self.run)

    def run(self) -> None:
        """Perform the turn that is scheduled."""
        if not self._scheduled:
            return  # scheduled before the channel was opened anew
        self._scheduled = False
        if self.incoming is None or not self.running:
            return
        self.active = True
        self._polling.awake()
        self._counters.turns += 1
        try:
            limit = self._calls.recall()
            if self.running:
                self._work(self.incoming, limit)
        except GuestError as error:
            self._calls.failed(error)
        except Exception as error:  # noqa: BLE001 - it costs this channel only
            self._calls.broken(error)
        finally:
            self.active = False

    def _work(self, incoming: IncomingRing, limit: int) -> None:
        calls = self._calls
        incoming.mask()
        signal = False
        empty = False
        left = limit
        try:
            signal = calls.write_out()
            while left and (room := calls.room()):
                taken, still_open = self._take(incoming, min(left, BATCH_PACKETS, room))
                if not still_open:
                    return
                if not taken:
                    empty = True
                    break
                left -= taken
                calls.batch_ended()
                calls.record()
                signal = incoming.commit() or signal
                signal = calls.write_out() or signal
                if signal:
                    signal = False
                    calls.signal()
            if self.room_wanted:
                signal = calls.tell_room() or signal
        finally:
            if signal:
                calls.signal()
        if left < limit:
            self._polling.found()
        if not self._scheduled and calls.room():
            if calls.give() or self._scheduled:
                return
            if not empty or self._polling.again() or incoming.unmask():
                self.schedule()
            else:
                self._polling.sleeps()
        else:
            calls.wait_for_budget()

    def _take(self, incoming: IncomingRing, limit: int) -> tuple[int, bool]:
        """Take a batch and deliver it.

        Return how many packets were taken, and False if the device caused the channel to be closed meanwhile.
        """
        batch = incoming.read_batch(limit)
        if not batch:
            return 0, True
        done = self._calls.deliver(batch)
        if self.incoming is not incoming:
            return done, False
        if done < len(batch):
            incoming.untake(batch[done:])
        return len(batch), True
