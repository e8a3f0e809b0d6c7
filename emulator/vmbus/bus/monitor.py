"""Doorbells that are bits in guest memory: monitor pages and the old interrupt page.

Source: docs/protocol/messages.md#monitor-pages.

The guest sets bits with a locked instruction; the host has no such thing on guest memory. So a word is cleared
whole, and then every channel that has a bit in it is signalled: a bit that was set between the look and the
clearing is not lost, and a signal too many is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmbus.bus.channel.channel import Channel
from vmbus.ports import GuestMemory, TimerHandle, Timers
from vmbus.wire.monitor import (
    GUEST_TO_HOST_BITS,
    HOST_TO_GUEST_BITS,
    INTERRUPT_PAGE_HALF,
    MONITOR_GROUPS,
    MONITORS_PER_GROUP,
    TRIGGER_GROUP,
    TRIGGER_GROUPS_OFFSET,
)

SHORTEST_INTERVAL = 0.001
"""Seconds between two looks at the monitor page, however short the latency that an offer asks for."""


class MonitorScan:
    """Looks at the child-to-parent monitor page while a monitored channel is open, and only then."""

    def __init__(
        self,
        memory: GuestMemory,
        timers: Timers,
        page: Callable[[], int],
        channels: Callable[[], Iterable[Channel]],
    ) -> None:
        self._memory = memory
        self._timers = timers
        self._page = page
        self._channels = channels
        self._timer: TimerHandle | None = None
        self.looks = 0

    def _monitored(self) -> list[Channel]:
        return [
            channel
            for channel in self._channels()
            if channel.monitor_id is not None and channel.is_open and channel.target_vp is not None
        ]

    def update(self) -> None:
        """A monitored channel opened or closed, or the page changed."""
        monitored = self._monitored() if self._page() else []
        if not monitored:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            latency = min(channel.offer.monitor_latency for channel in monitored) / 10_000_000
            self._timer = self._timers.call_later(max(latency, SHORTEST_INTERVAL), self._polling)

    def _polling(self) -> None:
        self._timer = None
        page = self._page()
        monitored = self._monitored() if page else []
        self.looks += 1
        for group in range(MONITOR_GROUPS):
            mine = [each for each in monitored if (each.monitor_id or 0) // MONITORS_PER_GROUP == group]
            if mine and self._take(page + TRIGGER_GROUPS_OFFSET + group * TRIGGER_GROUP.size):
                for channel in mine:
                    channel.doorbell()
        self.update()

    def _take(self, gpa: int) -> bool:
        """Whether any bit of the pending word was set; all are clear now."""
        if not any(self._memory.read(gpa, 4)):
            return False
        self._memory.write(gpa, bytes(4))
        self._memory.fence()
        return True


def set_interrupt_bit(memory: GuestMemory, page: int, relid: int) -> None:
    """Host to guest: set the bit of ``relid``; the guest only ever clears bits in this half."""
    gpa = page + HOST_TO_GUEST_BITS + relid // 8
    memory.write(gpa, bytes((memory.read(gpa, 1)[0] | 1 << relid % 8,)))
    memory.fence()


def take_interrupt_bits(memory: GuestMemory, page: int) -> set[int]:
    """Guest to host: channel ids that may have been signalled; clears what was set."""
    base = page + GUEST_TO_HOST_BITS
    relids: set[int] = set()
    for index, value in enumerate(memory.read(base, INTERRUPT_PAGE_HALF)):
        if value:
            memory.write(base + index, b"\0")
            relids.update(range(index * 8, index * 8 + 8))
    memory.fence()
    return relids
