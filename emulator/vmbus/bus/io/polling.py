"""How long an empty ring is looked at before the host sleeps until a doorbell.

A doorbell costs the guest a trap and the host a wake-up; a look costs a turn of the event loop. Looking pays
when the next packet comes soon, so the window follows what doorbells say (the idea of halt polling):

    | a doorbell comes              | the window                                                |
    | within ``longest`` of falling asleep | doubles, from a quarter of ``longest`` up to it     |
    | later                         | halves; below a quarter it is nothing                     |

A ring with a packet now and then is therefore never looked at twice, and a silent one costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

MAX_LOOKS = 64
"""Looks in a row that find nothing, whatever the clock says."""


class AdaptivePolling:
    """The window of one ring. ``longest`` in seconds, 0 for never; ``clock`` gives seconds."""

    __slots__ = ("_clock", "_last_packet", "_looks", "_slept_at", "hits", "longest", "window")

    def __init__(self, longest: float, clock: Callable[[], float]) -> None:
        self.longest = longest
        #: Seconds that the ring is looked at after the last packet, as of now.
        self.window = 0.0
        #: How often a look found something.
        self.hits = 0
        self._clock = clock
        self._slept_at: float | None = None
        self._last_packet = 0.0
        self._looks = 0

    @property
    def looking(self) -> bool:
        """Whether the guest usually comes back before the window is over."""
        return self.window > 0

    def doorbell(self) -> None:
        """The guest signalled."""
        if self._slept_at is None:
            return
        slept, self._slept_at = self._clock() - self._slept_at, None
        least = self.longest / 4
        if slept < self.longest:
            self.window = min(max(self.window * 2, least), self.longest)
        elif self.window:
            self.window = self.window / 2 if self.window > least else 0.0

    def awake(self) -> None:
        """Somebody else woke the host; nothing is learnt from that."""
        self._slept_at = None

    def found(self) -> None:
        """There were packets."""
        if self._looks:
            self.hits += 1
            self._looks = 0
        if self.window:
            self._last_packet = self._clock()

    def again(self) -> bool:
        """The ring is empty: whether to look once more."""
        if self.window and self._looks < MAX_LOOKS and self._clock() - self._last_packet < self.window:
            self._looks += 1
            return True
        self._looks = 0
        return False

    def sleeps(self) -> None:
        """The host goes to sleep."""
        if self.longest:
            self._slept_at = self._clock()
