"""Adaptive polling: how long an empty ring is polled before the host sleeps until a doorbell.

A doorbell costs the guest a trap and the host a wake-up; a poll costs a turn of the event loop. Polling pays off when
the next packet comes soon, so the poll window follows the time between sleep and doorbell (as halt polling does):

    | a doorbell comes              | the window                                                |
    | within ``longest`` of falling asleep | doubles, from a quarter of ``longest`` up to it     |
    | later                         | halves; below a quarter it is nothing                     |

A ring with a packet now and then is therefore never polled twice, and an idle one costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_POLLS = 64
"""Polls in a row that find nothing, however long the window is."""


class AdaptivePolling:
    """The poll window of one ring. ``longest`` in seconds, 0: never poll; ``clock`` returns seconds."""

    __slots__ = ("_clock", "_last_packet", "_polls", "_slept_at", "hits", "longest", "window")

    def __init__(self, longest: float, clock: Callable[[], float]) -> None:
        self.longest = longest
        self.window = 0.0
        """Seconds after the last packet for which the ring is polled at present."""
        self.hits = 0
        """How often polling found packets."""
        self._clock = clock
        self._slept_at: float | None = None
        self._last_packet = 0.0
        self._polls = 0

    def doorbell(self) -> None:
        """Adapt the window to the time slept: the guest signalled."""
        if self._slept_at is None:
            return
        slept, self._slept_at = self._clock() - self._slept_at, None
        least = self.longest / 4
        if slept < self.longest:
            self.window = min(max(self.window * 2, least), self.longest)
        elif self.window:
            self.window = self.window / 2 if self.window > least else 0.0

    def awake(self) -> None:
        """Forget when the host went to sleep: something else than a doorbell woke it."""
        self._slept_at = None

    def found(self) -> None:
        """Begin the window anew: there were packets."""
        if self._polls:
            self.hits += 1
            self._polls = 0
        if self.window:
            self._last_packet = self._clock()

    def again(self) -> bool:
        """Return whether to poll an empty ring once more."""
        if self.window and self._polls < MAX_POLLS and self._clock() - self._last_packet < self.window:
            self._polls += 1
            return True
        self._polls = 0
        return False

    def sleeps(self) -> None:
        """Note that the host goes to sleep."""
        if self.longest:
            self._slept_at = self._clock()
