"""The timers of a channel's device, which end with the opening of the channel and wait while it is paused.

call_later ──delay──▶ channel runs: called
                      channel is paused ──resume──▶ called
                      closed, failed, or opened anew since: dropped        cancel(): dropped at any time
"""

from __future__ import annotations

from collections.abc import Callable

from vmbus.bus.io.state import IoState
from vmbus.ports import TimerHandle, Timers


class IoTimer:
    """A timer of one opening of a channel: calls ``due(timer)`` after ``delay`` seconds, unless cancelled."""

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
        """Call nothing any more."""
        self._cancelled = True
        self._handle.cancel()

    def fire(self) -> None:
        """Call ``due``: the delay has passed, now or while the channel was paused."""
        if not self._cancelled:
            self._due(self)


class ChannelTimers:
    """The timers of one channel; ``state`` returns its state, ``call`` calls what is due."""

    def __init__(
        self, timers: Timers, state: Callable[[], IoState], call: Callable[[Callable[[], None]], None]
    ) -> None:
        self._timers = timers
        self._state = state
        self._call = call
        self._opening = 0
        self._due_when_resumed: list[IoTimer] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` after ``delay`` seconds in this opening of the channel."""
        return IoTimer(self._timers, delay, self._due, callback, self._opening)

    def resume(self) -> None:
        """Call what came due while the channel was paused."""
        due, self._due_when_resumed = self._due_when_resumed, []
        for timer in due:
            timer.fire()

    def forget(self) -> None:
        """Drop all timers: another opening of the channel begins, or none."""
        self._opening += 1
        self._due_when_resumed = []

    def _due(self, timer: IoTimer) -> None:
        if timer.opening != self._opening:
            return
        state = self._state()
        if state is IoState.PAUSED:
            self._due_when_resumed.append(timer)
        elif state is IoState.RUNNING:
            self._call(timer.callback)
