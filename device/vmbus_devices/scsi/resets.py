"""Resets without an answer: each is answered when no command is left, at the latest after a timeout.

ask() --nothing under way--> answered
      --commands left------> waiting --settled(), or RESET_TIMEOUT--> answered        --forget(), stop()--> gone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.ports import TimerHandle, Timers
from vmbus.wire.packet import Packet

if TYPE_CHECKING:
    from vmbus.bus.io.channel_io import ChannelIo

RESET_TIMEOUT = 4.0
"""Seconds after which a reset is answered although commands are left: Linux waits five."""


class Resets:
    """The resets of one controller; ``answer`` completes one."""

    def __init__(self, answer: Callable[[ChannelIo, Packet], None]) -> None:
        self.count = 0
        """Requested so far."""
        self.waiting: list[tuple[ChannelIo, Packet]] = []
        """Without an answer, oldest first."""
        self._answer = answer
        self._timer: TimerHandle | None = None

    def ask(self, io: ChannelIo, packet: Packet, timers: Timers) -> None:
        """Add a reset that the guest requested; the caller calls :meth:`settled` if no command is under way."""
        self.count += 1
        self.waiting.append((io, packet))
        if self._timer is None:
            self._timer = timers.call_later(RESET_TIMEOUT, self.settled)

    def settled(self) -> None:
        """Answer all resets: no command is left, or the timeout has passed."""
        waiting, self.waiting = self.waiting, []
        self.stop()
        for io, packet in waiting:
            self._answer(io, packet)

    def forget(self, io: ChannelIo) -> None:
        """Drop the resets of a channel that closed."""
        self.waiting = [each for each in self.waiting if each[0] is not io]

    def stop(self) -> None:
        """Cancel the timeout."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
