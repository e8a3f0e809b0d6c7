"""The base of every synthetic device: its offer, the hooks that are called, its state.

A device is one object. It is started once, and then has any number of channels open, one after the other (a guest
that reboots or reloads its driver), or several at a time (sub-channels). Each open channel is an ``io``
(:class:`~vmbus.bus.io.channel_io.ChannelIo`), from which the device gets packets and through which it sends; a device
handles neither rings nor QEMU.

    start(environment) → { opened(io) → { started → { packet | completed }* → suspended }* → closed(io) }* → stop()

A channel is open or closed, and paused or active; ``started`` and ``suspended`` are the second of these. A migration,
a snapshot and ``vmbus channel pause`` pause it; if a guest opens a paused channel, ``started`` follows later.

All hooks are called in one thread and must not block; slow work is done in :attr:`DeviceEnvironment.workers` and ends
with ``io.complete``. An exception of a hook never ends the process:

    | raised in packet()                       | what follows                                              |
    | RingError, ProtocolError                 | the channel fails: no more packets until it is opened anew |
    | another GuestError (MalformedError, ...) | counted; refused(io, packet, error) answers                |
    | anything else                            | a bug: traceback in the log, the channel fails             |

The smallest possible device::

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
from typing import Any, ClassVar

from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.environment import DeviceEnvironment, InlineWorkers
from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.bus.io.state import PacketState
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError, GuestError
from vmbus.native import NativeLibrary
from vmbus.wire.packet import Packet

__all__ = ["ControlCommand", "Device", "DeviceEnvironment", "InlineWorkers"]

ControlCommand = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""A function that answers one command of the control socket: from the keys of the request, an object for JSON."""


class Device(ABC):
    """A synthetic device. A subclass must define :meth:`offer` and :meth:`packet`."""

    name: str
    """A short name, unique among the devices of a machine, for counters and logs."""

    max_packet: ClassVar[int] = 4096
    """The longest packet, in bytes without trailer, that the guest's driver accepts.

    Source: docs/protocol/devices.md#largest-packet.

    After a longer one the guest cannot find the next packet in the ring any more, so sending one is an error.
    """

    max_owed: ClassVar[int] = 1024
    """Completions that the device may owe on one channel; the guest's packets beyond them stay in the ring."""

    poll_window: ClassVar[float] = 100e-6
    """The longest time, in seconds, for which an empty ring is polled before the host sleeps.

    See :mod:`vmbus.bus.io.polling`. Set it where a guest usually takes longer to send the next packet.
    """

    native_libraries: ClassVar[Sequence[NativeLibrary]] = ()
    """The libraries that ``vmbus setup`` compiles for this device, and ``vmbus doctor`` reports."""

    line: str = ""
    """The argument of ``--device``; empty for a device that was made by code."""

    _environment: DeviceEnvironment | None = None

    @property
    def environment(self) -> DeviceEnvironment:
        """The argument of :meth:`start`. Raises :class:`~vmbus.errors.DeviceError` before that."""
        if self._environment is None:
            raise DeviceError(f"{self.name} is not started: an overriding start() must call super().start()")
        return self._environment

    @property
    def was_started(self) -> bool:
        """Whether a host got the device; it stops the device when it is closed."""
        return self._environment is not None

    def lines(self) -> list[str]:
        """Return the ``--device`` arguments of devices that could take over from this one, as it is now."""
        return [self.line] if self.line else []

    @abstractmethod
    def offer(self) -> Offer:
        """Return the offer for the guest; the same each time."""

    def start(self, environment: DeviceEnvironment) -> None:
        """Prepare the device. Called once, before the offer is made; an override must call this method first."""
        self._environment = environment

    def claim(self) -> None:
        """Take what only one machine may use at a time (images), before the guest uses it.

        Called in another thread, so it may block; before or after :meth:`start`, and not for a guest that arrives
        from elsewhere, where the source still has it. Raise :class:`~vmbus.errors.UserError` to refuse.
        """

    def stop(self) -> None:
        """Cancel timers, close files: the machine ends, every channel is closed already. Must not block."""

    def wait_closed(self, timeout: float) -> bool:
        """Wait for outstanding work after :meth:`stop`, in another thread; return False on timeout (seconds)."""
        return True

    def opened(self, io: ChannelIo) -> None:
        """Begin to serve a channel that the guest opened (``io.subchannel_index`` 0: the primary one).

        Sending is possible from now on. Raise a GuestError or DeviceError to refuse; ``closed`` is not called then.
        """

    def needed(self, packet: Packet) -> Packet:
        """Return what the device needs of a packet until it completes it: by default all of it.

        Called for packets of more than 4096 bytes in the ring that request a completion, before :meth:`packet`. A
        device that completes requests later cuts off here what its protocol does not use: what is kept counts
        against the guest's budget of memory.
        """
        return packet

    def started(self, io: ChannelIo) -> None:
        """Begin, or begin again, to send: packets of the guest follow (EvtVmbChannelStarted).

        Called after ``opened`` or ``restored``, and after each pause. Do not raise: the channel would fail.
        """

    def post_started(self, io: ChannelIo) -> None:
        """Send requests that need an answer: packets are taken now (EvtVmbChannelPostStarted).

        Called from the event loop after ``started``, unless the channel was suspended, closed or failed meanwhile.
        """

    def suspended(self, io: ChannelIo) -> None:
        """Retire what is held for an active channel: no packet follows until ``started`` (EvtVmbChannelSuspend).

        Called once for each ``started``: when the channel is paused, and before ``closed``. Packets that were passed
        are completed in time, or saved. What is sent meanwhile is queued. ``io.paused`` tells a pause from a close.
        """

    @abstractmethod
    def packet(self, io: ChannelIo, packet: Packet) -> None:
        """Handle an in-band, GPA-direct or transfer-page packet: its shape is checked, its page numbers are not.

        If ``packet.completion_requested``, complete it once: now, or later with ``io.complete``.
        """

    def batch_ended(self, io: ChannelIo) -> None:
        """Finish a batch: all packets that were taken together were passed to :meth:`packet`; more may follow.

        Work that several of them started can be submitted here at once. Must not raise.
        """

    def fast_ready(self, io: ChannelIo) -> bool:
        """Return whether ``io.fast`` may take packets; everything that it was configured with must be valid."""
        return False

    def fast_ended(self, io: ChannelIo) -> None:
        """Note that requests which ``io.fast`` had taken have ended; their answers are queued."""

    def completed(self, io: ChannelIo, packet: Packet) -> None:
        """Handle the guest's completion of a packet that was sent with ``completion_requested``."""

    def refused(self, io: ChannelIo, packet: Packet, error: GuestError) -> None:
        """Answer a packet that was refused: its ranges are malformed, or :meth:`packet` raised ``error``.

        By default the guest gets an empty completion, if it waits for one. Override this where the protocol has a
        status for it.
        """
        if packet.completion_requested and io.owes(packet.transaction_id):
            io.complete(packet.transaction_id)

    def writable(self, io: ChannelIo) -> None:
        """Send more: everything sent is in the ring. Called once after ``io.notify_room()``."""

    def closed(self, io: ChannelIo) -> None:
        """Forget what belongs to a channel that the guest closed. Nothing can be sent any more.

        While work on guest memory is under way call ``io.channel.defer_close()``, and ``finish_close()`` later.
        """

    def guest_saved(self) -> None:
        """Release what the process that continues the guest will use (files, locks): the guest leaves.

        Called after all channels of the machine were saved for a migration, and before the state is sent; not for a
        snapshot, and not for a channel that is saved by hand. If the guest stays after all, :meth:`guest_resumed`
        follows. Must not raise: what can fail belongs into :meth:`save`.
        """

    def guest_resumed(self) -> None:
        """Continue: the guest was stopped (``vmbus cont``, a migration) and runs again, in this process."""

    def gpadl_created(self, io: ChannelIo, gpadl: Gpadl) -> None:
        """Take note of pages that the guest shares over this channel (rings included). Raise to refuse them."""

    def gpadl_torn_down(self, io: ChannelIo, gpadl: Gpadl) -> None:
        """Stop using shared pages: they belong to the guest again."""

    def status(self) -> dict[str, Any]:
        """Return what ``vmbus status`` shows: names and plain values."""
        return {}

    def figures(self) -> dict[str, Any]:
        """Return the counters of :meth:`status` that no saved state has, for :meth:`add_figures`: plain values."""
        return {}

    def add_figures(self, figures: Mapping[str, Any]) -> None:
        """Go on counting from what :meth:`figures` returned in the process that served the guest before.

        It may have been of another release: what is missing counts as 0. Called after :meth:`restore`.
        """

    def bound_to_process(self) -> Sequence[str]:
        """Return names of what ends with this process and that the guest would miss, such as disks in memory.

        A guest that has any can neither be migrated nor be passed to another emulator.
        """
        return ()

    def lost_with_process(self) -> Sequence[str]:
        """Return names of what a process that is killed takes along, or leaves under way, such as disks of a daemon.

        A guest whose emulator keeps a journal can have none: the next one would not find what the guest was told.
        """
        return self.bound_to_process()

    def outside_snapshots(self) -> Sequence[str]:
        """Return names of what the guest can write to and no snapshot holds, such as disks.

        Loading a snapshot rewinds the guest's memory and not these, so ``vmbus snapshot`` refuses a guest that has
        any.
        """
        return ()

    def snapshot_disks(self) -> Mapping[str, SnapshotDisk]:
        """Return what ``vmbus snapshot`` saves and loads together with the guest, by names for messages.

        None of it is in :meth:`outside_snapshots`. Called before and while the guest is stopped.
        """
        return {}

    def control_commands(self) -> Mapping[str, ControlCommand]:
        """Return the commands of the guest's control socket that this device answers, by name.

        ``vmbus shutdown`` sends ``shutdown`` (keys ``action``: ``shutdown``, ``restart`` or ``hibernate``, and
        ``force``) to the first device that has a command of that name, and expects ``result`` (text) and ``agreed``
        (bool). Any other name is the device's own. A command raises :class:`~vmbus.errors.UserError` to refuse.
        """
        return {}

    def settled(self, io: ChannelIo) -> bool:
        """Return whether no work is under way that would end with ``io.complete`` while ``io`` is paused.

        Work in a thread is under way; a request that waits for a timer of ``io`` is not, because such timers wait for
        the end of the pause. Only a settled channel is saved or restored by hand (``vmbus channel``).
        """
        return True

    def save_packets(self, io: ChannelIo) -> Sequence[PacketState]:
        """Return what only the device knows of packets of ``io`` that are not completed, in either direction.

        This is EvtVmbChannelSavePacket for all of them: the channel itself saves their transaction ids, and a packet
        of which the device has nothing to save is left out. If a guest uses a transaction id twice, the first of the
        device's packets with it is the first of the guest's.
        """
        return ()

    def packet_state(self, packet: Packet) -> bytes:
        """Return what :meth:`save_packets` would, of a packet that ``io.fast`` had taken when its process ended.

        It is passed to :meth:`restore_packet`. Raise :class:`~vmbus.errors.DeviceError` to refuse.
        """
        raise DeviceError(f"{self.name} has no compiled code, but packets were left by such code")

    def restore_packet(self, io: ChannelIo, packet: PacketState) -> None:
        """Take over a packet that :meth:`save_packets` returned (EvtVmbChannelRestorePacket).

        Called after :meth:`restore`, in the order of the save; ``io`` cannot send yet: continue in :meth:`restored`.
        If the restore is given up, :meth:`closed` follows. Raise :class:`~vmbus.errors.DeviceError` to refuse.
        """
        raise DeviceError(
            f"{self.name} saves no packets, but the stream has {len(packet.state)} bytes for one"
        )

    def save(self) -> bytes:
        """Return the device's state in a versioned format of its own; channels are paused meanwhile."""
        return b""

    def captured(self) -> bytes:
        """Return the state as :meth:`save` would, at any time between two packets, while the device works.

        For the journal of a guest: must not wait. A packet that is under way then is restored as if it had just been
        taken, after this process has ended; what was done of it is done once more.
        """
        return self.save()

    def restore(self, state: bytes) -> None:
        """Take over a state that :meth:`save` returned, perhaps in another process and of an older version.

        Raise :class:`~vmbus.errors.DeviceError` to refuse. Called before any ``restored``.
        """
        if state:
            raise DeviceError(
                f"{self.name} has no saved state, but the stream holds {len(state)} bytes for it"
            )

    def check_restore(self, state: bytes) -> None:
        """Raise :class:`~vmbus.errors.DeviceError` if :meth:`restore` would refuse ``state``; change nothing.

        Called while the device may be at work, so that nothing is given up for a state that does not fit. A device
        that does not override this method refuses in :meth:`restore` only.
        """

    def restored(self, io: ChannelIo) -> None:
        """Continue a channel that was open when it was saved; called in place of ``opened``.

        ``io`` has what the device had sent and which completions it owes; only the device's own work must be resumed.
        """
