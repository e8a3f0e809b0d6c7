"""A timer of one opening of a channel: nothing of it is left when the channel closes."""

from __future__ import annotations

from collections.abc import Callable

from vmbus.ports import TimerHandle, Timers


class IoTimer:
    """Calls ``due(timer)`` after ``delay`` seconds, unless cancelled; the rest is kept for it."""

    __slots__ = ("_cancelled", "_due", "_handle", "callback", "opening")

    def __init__(
        self,
        timers: Timers,
        delay: float,
        due: Callable[[IoTimer], None],
        callback: Callable[[], None],
        opening: int,
    ) -> None:
        self.callback = callback
        self.opening = opening
        self._due = due
        self._cancelled = False
        self._handle: TimerHandle = timers.call_later(delay, self.fire)

    def cancel(self) -> None:
        self._cancelled = True
        self._handle.cancel()

    def fire(self) -> None:
        """It is time, or was while nobody could be told."""
        if not self._cancelled:
            self._due(self)
