"""Doorbells that are bits in guest memory: monitor pages and the old interrupt page.

Source: docs/protocol/messages.md#monitor-pages.

The guest sets bits with a locked instruction; the host has no locked instruction on guest memory. So the host clears
a whole word, and then signals every channel that has a bit in it: a bit that was set between the load and the
clearing store is not lost, and a spurious signal is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmbus.bus.channel.channel import Channel
from vmbus.ports import PAGE_SIZE, GuestMemory, TimerHandle, Timers
from vmbus.wire.monitor import (
    GUEST_TO_HOST_BITS,
    HOST_TO_GUEST_BITS,
    INTERRUPT_PAGE_HALF,
    MONITOR_GROUPS,
    MONITORS_PER_GROUP,
    TRIGGER_GROUP,
    TRIGGER_GROUPS_OFFSET,
)

MIN_INTERVAL = 0.001
"""Seconds between two polls of the monitor page, however short the latency that an offer asks for."""


class MonitorScan:
    """Polls the child-to-parent monitor page while a monitored channel is open.

    ``page`` returns the page's address (0: none), ``channels`` the channels that have an id.
    """

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
        self.polls = 0

    def _monitored(self) -> list[Channel]:
        return [
            channel
            for channel in self._channels()
            if channel.monitor_id is not None and channel.is_open and channel.target_vp is not None
        ]

    def update(self) -> None:
        """Start or stop polling: a monitored channel was opened or closed, or the page changed."""
        monitored = self._monitored() if self._page() else []
        if not monitored:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            latency = min(channel.offer.monitor_latency for channel in monitored) / 10_000_000
            self._timer = self._timers.call_later(max(latency, MIN_INTERVAL), self._poll)

    def stop(self) -> None:
        """Stop polling: guest memory is about to be unmapped."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        self._timer = None
        page = self._page()
        monitored = self._monitored() if page else []
        self.polls += 1
        for group in range(MONITOR_GROUPS):
            mine = [each for each in monitored if (each.monitor_id or 0) // MONITORS_PER_GROUP == group]
            if mine and self._take(page + TRIGGER_GROUPS_OFFSET + group * TRIGGER_GROUP.size):
                for channel in mine:
                    channel.doorbell()
        self.update()

    def _take(self, gpa: int) -> bool:
        """Clear the pending word; return whether any bit of it was set."""
        if not any(self._memory.read(gpa, 4)):
            return False
        self._memory.write(gpa, bytes(4))
        self._memory.fence()
        return True


def set_interrupt_bit(memory: GuestMemory, page: int, relid: int) -> None:
    """Set the bit of ``relid`` in the half from host to guest, in which the guest only clears bits."""
    offset = HOST_TO_GUEST_BITS + relid // 32 * 4
    memory.pages([page // PAGE_SIZE]).set_bits_u32(offset, 1 << relid % 32)


def take_interrupt_bits(memory: GuestMemory, page: int) -> set[int]:
    """Clear the half from guest to host; return the channel ids that may have been signalled."""
    base = page + GUEST_TO_HOST_BITS
    relids: set[int] = set()
    for index, value in enumerate(memory.read(base, INTERRUPT_PAGE_HALF)):
        if value:
            memory.write(base + index, b"\0")
            relids.update(range(index * 8, index * 8 + 8))
    memory.fence()
    return relids
