"""Resets that wait: each is answered when no command is left, at the latest after a while.

ask() --nothing under way--> answered
      --commands left------> waiting --settled(), or RESET_LIMIT--> answered        --forget(), stop()--> gone
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.ports import TimerHandle, Timers
from vmbus.wire.packet import Packet

if TYPE_CHECKING:
    from vmbus.bus.io.channel_io import ChannelIo

RESET_LIMIT = 4.0
"""Seconds after which a reset is answered although commands are left: Linux waits five."""


class Resets:
    """The resets of one controller; ``answer`` completes one."""

    def __init__(self, answer: Callable[[ChannelIo, Packet], None]) -> None:
        #: Asked for so far.
        self.count = 0
        #: Not answered yet, in order.
        self.waiting: list[tuple[ChannelIo, Packet]] = []
        self._answer = answer
        self._timer: TimerHandle | None = None

    def ask(self, io: ChannelIo, packet: Packet, timers: Timers) -> None:
        """The guest asked for one; :meth:`settled` is called by who asks here, if nothing is under way."""
        self.count += 1
        self.waiting.append((io, packet))
        if self._timer is None:
            self._timer = timers.call_later(RESET_LIMIT, self.settled)

    def settled(self) -> None:
        """No command is left, or it took too long."""
        waiting, self.waiting = self.waiting, []
        self.stop()
        for io, packet in waiting:
            self._answer(io, packet)

    def forget(self, io: ChannelIo) -> None:
        """A channel closed: nobody waits there."""
        self.waiting = [each for each in self.waiting if each[0] is not io]

    def stop(self) -> None:
        """Answer nothing by itself any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
