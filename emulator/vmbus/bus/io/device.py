"""The base of every synthetic device: what it offers, what it is told, what it may keep.

A device is one object. It is started once, and then has any number of channels open, one after the other (a
guest that reboots or reloads its driver), or several at a time (sub-channels). Each open channel is an ``io``
(:class:`~vmbus.bus.io.channel_io.ChannelIo`): the device takes packets from it and sends through it, and knows
neither rings nor the machine.

    start(environment) → { opened(io) → { packet(io, packet) | completed(io, packet) }* → closed(io) }* → stop()

All of it is called in one thread and must not block; slow work goes elsewhere, and ends with ``io.complete``.
What a method raises is contained:

    | raised in packet()                       | what follows                                              |
    | RingError, ProtocolError                 | the channel fails: no more packets until it is opened anew |
    | another GuestError (MalformedError, ...) | counted; refused(io, packet, error) answers; it goes on    |
    | anything else                            | our bug or the device's: traceback, the channel fails      |

The least device there is::

    class Echo(Device):
        name = "echo"

        def offer(self) -> Offer:
            return Offer(interface_id=ECHO_INTERFACE, instance_id=ECHO_INSTANCE, name=self.name)

        def packet(self, io: ChannelIo, packet: Packet) -> None:
            io.answer(packet, packet.payload)
"""

from __future__ import annotations

# ruff: noqa: B027 - most hooks are empty on purpose
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vmbus.errors import DeviceError, GuestError
from vmbus.ports import GuestMemory, NativeServices, Timers, Workers
from vmbus.wire.packet import Packet

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel
    from vmbus.bus.channel.endpoint import Endpoint
    from vmbus.bus.channel.gpadl import Gpadl
    from vmbus.bus.io.channel_io import ChannelIo
    from vmbus.bus.offers import Offer
    from vmbus.native import NativeLibrary


ControlCommand = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Answers one command of the control socket: given the request's keys, it returns what JSON can hold."""


class Offers(Protocol):
    """Where a device gets more channels from: the bus."""

    def offer(self, offer: Offer, endpoint: Endpoint) -> Channel:
        """Offer a channel to the guest."""

    def revoke(self, channel: Channel) -> None:
        """Take an offer back."""


class InlineWorkers:
    """:class:`~vmbus.ports.Workers` where there is no event loop to keep free: the work is done at once."""

    def run(self, work: Callable[[], None], done: Callable[[Exception | None], None], /) -> None:
        error: Exception | None = None
        try:
            work()
        except Exception as found:  # noqa: BLE001 - it is handed on
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
    """What a device may use of the machine it is in."""

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
    """Stop the guest's processors, for the reason given, until somebody lets it go on (:meth:`Device.guest_resumed`).
    ``None`` where that cannot be done."""


class Device(ABC):
    """A synthetic device. Only :meth:`offer` and :meth:`packet` must be there."""

    name: str
    """Short and unique among the devices of a machine; counters and logs are kept under it."""

    max_packet: ClassVar[int] = 4096
    """Longest packet, in bytes without trailer, that the guest's driver takes.

    Source: docs/protocol/devices.md#largest-packet.

    A guest that is sent a longer one loses its place in the ring for good, so sending one is an error.
    """

    poll_window: ClassVar[float] = 100e-6
    """Longest time, in seconds, for which an empty ring is looked at before the host sleeps.

    See :mod:`vmbus.bus.io.polling`. Worth setting where a guest usually takes longer to come back.
    """

    native_libraries: ClassVar[Sequence[NativeLibrary]] = ()
    """What `vmbus setup` compiles for this device, and `vmbus doctor` reports."""

    line: str = ""
    """What stood after ``--device``; empty for a device that code has made."""

    _environment: DeviceEnvironment | None = None

    @property
    def environment(self) -> DeviceEnvironment:
        """The surroundings that :meth:`start` was given. Raises :class:`~vmbus.errors.DeviceError` before."""
        if self._environment is None:
            raise DeviceError(f"{self.name} is not started (a start() of its own must call super().start())")
        return self._environment

    def lines(self) -> list[str]:
        """What to say after ``--device`` for another one that can go on for this one, as it is now."""
        return [self.line] if self.line else []

    @abstractmethod
    def offer(self) -> Offer:
        """What the guest is offered; the same each time."""

    def start(self, environment: DeviceEnvironment) -> None:
        """Called once, before the offer is made. An override calls this one first."""
        self._environment = environment

    def stop(self) -> None:
        """The machine goes; every channel is closed already. Cancel timers, close files. Must not block."""

    def wait_closed(self, timeout: float) -> bool:
        """Wait for outstanding work after :meth:`stop`, in another thread; return False on timeout (seconds)."""
        return True

    def opened(self, io: ChannelIo) -> None:
        """The guest opened a channel (``io.subchannel_index``, 0 for the primary one); sending is possible.

        Raise a GuestError or DeviceError to refuse; ``closed`` is not called then.
        """

    @abstractmethod
    def packet(self, io: ChannelIo, packet: Packet) -> None:
        """An in-band, GPA-direct or transfer-page packet, its shape checked; page numbers are not.

        If ``packet.completion_requested``, complete it once: now, or later with ``io.complete``.
        """

    def batch_ended(self, io: ChannelIo) -> None:
        """The packets that were taken together are handed over; more may follow at once.

        What several of them started can be handed on here, all together. Raises nothing.
        """

    def fast_ready(self, io: ChannelIo) -> bool:
        """Before packets are taken by ``io.fast``: whether it may take any; what it knows has to be true now."""
        return False

    def fast_ended(self, io: ChannelIo) -> None:
        """Requests that ``io.fast`` had taken have ended; their answers are on their way."""

    def completed(self, io: ChannelIo, packet: Packet) -> None:
        """The guest completes a packet that was sent with ``completion_requested``."""

    def refused(self, io: ChannelIo, packet: Packet, error: GuestError) -> None:
        """A packet could not be taken: its ranges are malformed, or :meth:`packet` raised ``error``.

        As it stands, the guest gets an empty completion, if it waits for one. Devices whose protocol has a
        status for this override it.
        """
        if packet.completion_requested and io.owes(packet.transaction_id):
            io.complete(packet.transaction_id)

    def writable(self, io: ChannelIo) -> None:
        """All that was sent is in the ring; called once after ``io.notify_room()``."""

    def closed(self, io: ChannelIo) -> None:
        """The guest closed the channel: forget what belongs to it. Nothing can be sent any more.

        While work on guest memory is under way call ``io.channel.defer_close()``, and ``finish_close()`` later.
        """

    def guest_resumed(self) -> None:
        """The guest was stopped and runs again, here."""

    def gpadl_created(self, io: ChannelIo, gpadl: Gpadl) -> None:
        """The guest shares pages over this channel (also those of its rings). Raise to refuse."""

    def gpadl_torn_down(self, io: ChannelIo, gpadl: Gpadl) -> None:
        """The guest wants its pages back; do not touch them again."""

    def status(self) -> dict[str, Any]:
        """What ``vmbus status`` shows: names and plain values."""
        return {}

    def control_commands(self) -> Mapping[str, ControlCommand]:
        """Return the commands of the guest's control socket that this device answers, by name.

        ``vmbus shutdown`` sends ``shutdown`` (keys ``action``: ``shutdown``, ``restart`` or ``hibernate``, and
        ``force``) to the first device that has a command of that name, and expects ``result`` (text) and ``agreed``
        (bool). Any other name is the device's own. A command raises :class:`~vmbus.errors.UserError` to refuse.
        """
        return {}

    def save(self) -> bytes:
        """What the device holds, in a form of its own with a version in it; channels are paused meanwhile."""
        return b""

    def restore(self, state: bytes) -> None:
        """Take over what :meth:`save` gave, perhaps in another process and an older version.

        Raise :class:`~vmbus.errors.DeviceError` to refuse. Called before any ``resumed``.
        """
        if state:
            raise DeviceError(f"{self.name} keeps no state, but was given {len(state)} bytes")

    def resumed(self, io: ChannelIo) -> None:
        """In place of ``opened``: this channel was open when it was saved, and goes on.

        What the device had sent and what it owes is in ``io``; only its own work has to be taken up.
        """
