"""What a device may use of the machine that it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vmbus.bus.budget import MemoryBudget
from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.endpoint import Endpoint
from vmbus.bus.offers import Offer
from vmbus.ports import GuestMemory, NativeServices, Timers, Workers


class Offers(Protocol):
    """Offers more channels of a device: the bus."""

    def offer(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """Offer a channel to the guest."""

    def revoke(self, channel: Channel) -> None:
        """Take an offer back."""


class InlineWorkers:
    """:class:`~vmbus.ports.Workers` that do the work at once, where no event loop must be kept free."""

    def run(self, work: Callable[[], None], done: Callable[[Exception | None], None], /) -> None:
        error: Exception | None = None
        try:
            work()
        except Exception as found:  # noqa: BLE001 - it is passed to done
            error = found
        done(error)

    def transfer(
        self,
        fd: int,
        offset: int,
        views: Sequence[memoryview],
        write: bool,
        flags: int,
        done: Callable[[int], None],
        /,
    ) -> bool:
        return False

    def watch(self, fd: int, readable: Callable[[], None], /) -> Callable[[], None] | None:
        return None

    def expect(
        self, done: Callable[[Exception | None], None], /
    ) -> Callable[[Exception | None], None] | None:
        return None

    def submit(self) -> None:
        """There are no transfers."""


@dataclass(frozen=True, slots=True)
class DeviceEnvironment:
    """What a device may use of the machine that it is in."""

    memory: GuestMemory
    timers: Timers
    reference_time: Callable[[], int] | None
    """Reference time of the partition, in units of 100 ns; ``None`` where it cannot be read."""
    offers: Offers | None = None
    """``None`` where no sub-channels can be offered."""
    workers: Workers = field(default_factory=InlineWorkers)
    """Threads for what blocks."""
    native: NativeServices | None = None
    """For compiled code of the device; ``None`` where guest memory has no address in this process."""
    stop_guest: Callable[[str], None] | None = None
    """Stop the guest's processors, for the reason given, until the user resumes the guest (``vmbus cont``, then
    :meth:`Device.guest_resumed`). ``None`` where that cannot be done."""
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    """The memory of this process that the guest may occupy, with all devices together."""
