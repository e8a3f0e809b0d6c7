"""The host's end of a device's channel: drains one ring, hands packets to the device, fills the other.

Source: spec/vmbus.md 7.5-7.8; design.md "Facts about the data path".

    CLOSED --opened--> RUNNING --pause--> PAUSED --resume--> RUNNING
                          |                 |
                          +--RingError, ProtocolError, broken device--> FAILED      any --closed--> CLOSED

Work is done in turns. A doorbell only asks the event loop for one. A turn masks the guest's signals, takes at
most :data:`TURN_PACKETS` packets, hands them to the device, puts what the device sent and completed into the
other ring with one index store, and signals the guest at most once. Then:

    | the turn ends with          | next                                                                       |
    | packets left                | another turn, after everybody else's (fairness)                            |
    | an empty ring               | for a short while other turns, then unmasked and asleep until a doorbell   |
    | output that does not fit    | pending send size is set; nothing is taken until the guest makes room      |
    | too much owed, or held      | nothing is taken until the device completes something, or releases         |

How long the ring is looked at before sleeping adapts: a doorbell that comes soon after falling asleep doubles
the time, one that comes late halves it, down to nothing. So a channel with one packet a second never looks twice.

What a guest can make the host hold is bounded: :data:`OWED_LIMIT` completions, since no packet is taken beyond
it; and what devices send by themselves by :data:`OUTPUT_PACKETS` and :data:`OUTPUT_BYTES`.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from emulator.bus.device import Device
from emulator.bus.ring import IncomingRing, OutgoingRing
from emulator.errors import DeviceError, GuestError, InternalError, ProtocolError, RingError
from emulator.ports import GuestMemory, GuestPages, TimerHandle, Timers
from emulator.refusals import Refusals
from emulator.wire.packet import (
    COMPLETION_REQUESTED,
    Packet,
    PacketType,
    TransferRange,
    build_packet,
    build_transfer_pages,
)

if TYPE_CHECKING:
    from emulator.bus.channel import Channel
    from emulator.bus.gpadl import Gpadl
    from emulator.bus.offers import Offer

_log = logging.getLogger(__name__)

TURN_PACKETS = 64
"""Packets taken in one turn."""
BATCH_PACKETS = 32
"""Packets whose room is given back to the guest at once."""
OWED_LIMIT = 8192
"""Completions that a device may owe before no more packets are taken."""
OUTPUT_PACKETS = 4096
"""Packets that a device may have sent without the guest's taking them; completions do not count."""
OUTPUT_BYTES = 4 << 20
"""The same in bytes."""
AWAITED_LIMIT = 8192
"""Packets of the host's whose completion the guest may owe."""
LOOK_WINDOW = 100e-6
"""Longest time, in seconds, for which an empty ring is looked at before sleeping."""
_LEAST_WINDOW = LOOK_WINDOW / 4
_MOST_LOOKS = 64
"""Turns without a packet in a row, whatever the clock says."""


class IoState(enum.Enum):
    """States of the host's end of a channel."""

    CLOSED = "closed"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"


_COMPLETION = PacketType.COMPLETION
_RUNNING = IoState.RUNNING  # class attributes of an Enum are slow to look up


@dataclass(slots=True)
class IoCounters:
    """What passed since the channel was first offered. Bytes are ring bytes, trailers included."""

    packets_in: int = 0
    bytes_in: int = 0
    packets_out: int = 0
    bytes_out: int = 0
    doorbells: int = 0
    """Signals from the guest."""
    interrupts: int = 0
    """Signals to the guest."""
    turns: int = 0
    looks_hit: int = 0
    """Turns that found packets without a doorbell, by looking before sleeping."""
    ring_full: int = 0
    """How often the guest had to be asked for room."""
    dropped: int = 0
    """Packets that a device sent after the channel was closed or had failed."""


@dataclass(frozen=True, slots=True)
class ChannelIoState:
    """All that an open channel holds besides its rings (which are guest memory); see ``ChannelIo.state``.

    ``owed`` and ``awaited``: transaction ids and how often each; ``output``: packets built, not yet in the ring.
    """

    owed: tuple[tuple[int, int], ...] = ()
    awaited: tuple[tuple[int, int], ...] = ()
    output: tuple[bytes, ...] = ()
    held: bool = False
    failure: str = ""


class OpenChannel(Protocol):
    """What is needed of a :class:`~emulator.bus.channel.Channel`."""

    @property
    def offer(self) -> Offer:
        """What was offered."""

    def ring_pages(self) -> tuple[GuestPages, GuestPages]:
        """Pages of the ring from the guest, and of the ring to the guest."""

    def signal_guest(self) -> None:
        """Interrupt the guest for this channel."""


class _IoTimer:
    """A timer of one opening of a channel."""

    __slots__ = ("_callback", "_cancelled", "_io", "_opening", "handle")

    def __init__(self, io: ChannelIo, callback: Callable[[], None], opening: int) -> None:
        self._io = io
        self._callback = callback
        self._opening = opening
        self._cancelled = False
        self.handle: TimerHandle | None = None

    def cancel(self) -> None:
        self._cancelled = True
        if self.handle is not None:
            self.handle.cancel()

    def fire(self) -> None:
        io = self._io
        if self._cancelled or self._opening != io._opening:
            return
        if io.state is IoState.PAUSED:
            io._late_timers.append(self)
        elif io.state is IoState.RUNNING:
            io._contain(lambda _: self._callback())


class ChannelIo:
    """One channel of ``device``; the bus calls it as the channel's endpoint, the device sends through it.

    ``timers`` is the event loop. ``clock`` gives seconds, for the look before sleeping only.
    """

    def __init__(
        self,
        device: Device,
        timers: Timers,
        *,
        clock: Callable[[], float] = time.monotonic,
        look_window: float = LOOK_WINDOW,
    ) -> None:
        self.device = device
        self.timers = timers
        self.state = IoState.CLOSED
        #: Why the channel failed: a reason of an error, or ``device-error``; empty otherwise.
        self.failure = ""
        self.counters = IoCounters()
        self.refusals = Refusals(device.name, _log)
        self.subchannels: list[ChannelIo] = []
        self._clock = clock
        self._look_window = look_window
        self._window = 0.0
        self._channel: OpenChannel | None = None
        self._incoming: IncomingRing | None = None
        self._outgoing: OutgoingRing | None = None
        self._opening = 0
        self._forget()

    def _forget(self) -> None:
        """What belongs to one opening of the channel."""
        self._opening += 1
        self._late_timers: list[_IoTimer] = []
        self._output: list[bytes] = []
        self._output_bytes = 0
        self._owed: dict[int, int] = {}
        self._owed_total = 0
        self._awaited: dict[int, int] = {}
        self._awaited_total = 0
        self._held = False
        self._blocked = False
        self._room_wanted = False
        self._scheduled = False
        self._in_turn = False
        self._asleep = False
        self._asleep_since = 0.0
        self._last_packet = 0.0
        self._looks = 0

    # --- what a device may ask ---------------------------------------------------------------------------

    @property
    def channel(self) -> Channel:
        """The channel, as of its last opening. Raises ``DeviceError`` before the first one."""
        if self._channel is None:
            raise DeviceError(f"{self.device.name}: the channel was never opened")
        return cast("Channel", self._channel)

    @property
    def memory(self) -> GuestMemory:
        """Guest memory."""
        return self.device.environment.memory

    @property
    def subchannel_index(self) -> int:
        """0 for the primary channel of the device."""
        return self.channel.offer.subchannel_index

    @property
    def backlog(self) -> int:
        """Bytes that were sent and wait for room in the ring, or for the end of the turn."""
        return self._output_bytes

    @property
    def congested(self) -> bool:
        """Whether a device that could send for ever should stop now, and call :meth:`notify_room`."""
        return (
            self._blocked
            or len(self._output) >= OUTPUT_PACKETS // 2
            or self._output_bytes >= OUTPUT_BYTES // 2
        )

    def owes(self, transaction_id: int) -> bool:
        """Whether the guest waits for a completion with this id."""
        return transaction_id in self._owed

    # --- what a device may do ----------------------------------------------------------------------------

    def send(
        self,
        payload: bytes | bytearray | memoryview,
        *,
        transaction_id: int = 0,
        completion_requested: bool = False,
        transfer_set: int | None = None,
        transfer_ranges: Sequence[TransferRange] = (),
    ) -> None:
        """Send an in-band packet, or with ``transfer_set`` one of type 7 that names ``transfer_ranges``.

        It goes out with whatever else is sent in this turn. If the channel is closed or has failed the packet
        is dropped. Raises :class:`~emulator.errors.DeviceError` when it is longer than ``device.max_packet``,
        or when the queue is full (see :attr:`congested`).
        """
        if transfer_set is None:
            packet = build_packet(
                PacketType.IN_BAND,
                payload,
                transaction_id=transaction_id,
                completion_requested=completion_requested,
            )
        else:
            packet = build_packet(
                PacketType.TRANSFER_PAGES,
                payload,
                transaction_id=transaction_id,
                completion_requested=completion_requested,
                extension=build_transfer_pages(transfer_set, transfer_ranges),
            )
        if len(self._output) >= OUTPUT_PACKETS or self._output_bytes + len(packet) > OUTPUT_BYTES:
            raise DeviceError(
                f"{self.device.name} sends faster than its guest takes: {len(self._output)} packets"
            )
        if completion_requested and self._awaited_total >= AWAITED_LIMIT:
            raise DeviceError(f"{self.device.name} waits for {self._awaited_total} completions already")
        if self._put(packet) and completion_requested:
            self._awaited[transaction_id] = self._awaited.get(transaction_id, 0) + 1
            self._awaited_total += 1

    def complete(self, transaction_id: int, payload: bytes | bytearray | memoryview = b"") -> None:
        """Complete a packet of the guest's that asked for it.

        Dropped if the channel was closed since, or has failed. Raises :class:`~emulator.errors.DeviceError` if
        no completion is owed under this id: never asked for, or given already.
        """
        if self.state is IoState.CLOSED or self.state is IoState.FAILED:
            self.counters.dropped += 1
            return
        owed = self._owed
        times = owed.get(transaction_id, 0)
        if not times:
            raise DeviceError(
                f"{self.device.name}: no completion is owed for transaction {transaction_id:#x}"
            )
        packet = build_packet(PacketType.COMPLETION, payload, transaction_id=transaction_id)
        if self._put(packet):
            if times == 1:
                del owed[transaction_id]
            else:
                owed[transaction_id] = times - 1
            self._owed_total -= 1

    def answer(self, packet: Packet, payload: bytes | bytearray | memoryview = b"") -> None:
        """Answer ``packet``: by a completion if it asked for one, else in band with its transaction id."""
        if packet.flags & COMPLETION_REQUESTED:
            self.complete(packet.transaction_id, payload)
        else:
            self.send(payload, transaction_id=packet.transaction_id)

    def flush(self) -> None:
        """Send what is queued now, with one signal, instead of in the next turn of the event loop.

        For devices that complete several requests outside of :meth:`Device.packet`. No effect inside of it.
        """
        if self.state is IoState.RUNNING and not self._in_turn and self._output:
            try:
                if self._write_out():
                    self._signal()
            except GuestError as error:
                self._fail(error.reason, error.detail)
                return
            if self._may_take() and not self._asleep:
                self._schedule()

    def notify_room(self) -> None:
        """Have ``device.writable`` called once, when everything sent is in the ring."""
        self._room_wanted = True
        self._schedule()

    def hold(self) -> None:
        """Take no more packets (they stay in the ring) until :meth:`release`; sending goes on."""
        self._held = True

    def release(self) -> None:
        """Take packets again."""
        if self._held:
            self._held = False
            self._schedule()

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` after ``delay`` seconds, if the channel is still open then and has not failed.

        What it raises fails the channel only. While the channel is paused it waits for :meth:`resume`.
        """
        timer = _IoTimer(self, callback, self._opening)
        timer.handle = self.timers.call_later(delay, timer.fire)
        return timer

    def fail(self, reason: str, detail: str = "") -> None:
        """Stop this channel until the guest opens it anew. ``reason``: a short name that never changes."""
        self._fail(reason, detail)

    def offer_subchannels(self, count: int) -> None:
        """Offer channels 1 to ``count`` beside this primary one; each gets an ``io`` of its own when opened.

        The bus revokes them when the guest closes the primary channel, as guests expect. Raises
        :class:`~emulator.errors.DeviceError` if this is no primary channel, or they are offered already.
        """
        offers = self.device.environment.offers
        if offers is None or self.subchannel_index or self.subchannels:
            raise DeviceError(f"{self.device.name}: sub-channels cannot be offered here or now")
        for index in range(1, count + 1):
            io = ChannelIo(self.device, self.timers, clock=self._clock, look_window=self._look_window)
            self.subchannels.append(io)
            io._channel = offers.offer(replace(self.channel.offer, subchannel_index=index), io)

    # --- saving --------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Touch the rings no more until :meth:`resume`. What is sent or completed meanwhile is kept.

        In a turn (a device calls this from ``packet``), packets that were not handed over yet stay in the ring.
        """
        if self.state is IoState.RUNNING:
            self.state = IoState.PAUSED

    def resume(self) -> None:
        """Go on after :meth:`pause`: nothing was lost, nothing is repeated."""
        if self.state is IoState.PAUSED:
            self.state = IoState.RUNNING
            late, self._late_timers = self._late_timers, []
            for timer in late:
                timer.fire()
            self._schedule()

    def snapshot(self) -> ChannelIoState:
        """What has to be saved of a paused (or failed, or closed) channel."""
        if self.state is IoState.RUNNING or self._in_turn:
            raise InternalError(f"{self.device.name}: a channel is paused before it is saved")
        return ChannelIoState(
            owed=tuple(self._owed.items()),
            awaited=tuple(self._awaited.items()),
            output=tuple(self._output),
            held=self._held,
            failure=self.failure,
        )

    def adopt(self, state: ChannelIoState) -> None:
        """Take over a snapshot. Before :meth:`restored`; the channel is closed until then."""
        if self.state is not IoState.CLOSED:
            raise InternalError(
                f"{self.device.name}: a state is adopted while the channel is {self.state.value}"
            )
        self._forget()
        self._owed = dict(state.owed)
        self._owed_total = sum(self._owed.values())
        self._awaited = dict(state.awaited)
        self._awaited_total = sum(self._awaited.values())
        self._output = list(state.output)
        self._output_bytes = sum([len(packet) for packet in state.output])
        self._held = state.held
        self.failure = state.failure

    # --- called by the bus: an Endpoint --------------------------------------------------------------------

    def opened(self, channel: OpenChannel) -> None:
        """The guest opened the channel. Raises GuestError or DeviceError to refuse."""
        self._forget()
        incoming, outgoing = self._attach(channel)
        incoming.initialize()
        outgoing.initialize()
        self._begin(self.device.opened)

    def restored(self, channel: OpenChannel) -> None:
        """The channel was open when it was saved; :meth:`adopt` was called, guest memory is complete."""
        self._attach(channel)
        if self.failure:
            self.state = IoState.FAILED
            return
        self._begin(self.device.resumed)
        self._signal()

    def _attach(self, channel: OpenChannel) -> tuple[IncomingRing, OutgoingRing]:
        incoming_pages, outgoing_pages = channel.ring_pages()
        memory = self.memory
        incoming = IncomingRing(incoming_pages, memory)
        outgoing = OutgoingRing(outgoing_pages, memory)
        self._channel, self._incoming, self._outgoing = channel, incoming, outgoing
        return incoming, outgoing

    def _begin(self, tell: Callable[[ChannelIo], None]) -> None:
        self.failure = ""
        self.state = IoState.RUNNING
        try:
            tell(self)
        except (GuestError, DeviceError):
            self._end()
            raise
        except Exception as error:
            self._end()
            raise DeviceError(f"{self.device.name} failed to open: {error!r}") from error
        self._schedule()

    def _end(self) -> None:
        self.state = IoState.CLOSED
        self._incoming = self._outgoing = None
        self._forget()

    def closed(self, channel: OpenChannel) -> None:
        """The guest closed the channel: the rings are its own again."""
        self._end()
        self.subchannels = []
        self._contain(self.device.closed)

    def signalled(self, channel: OpenChannel) -> None:
        """The guest's doorbell."""
        self.counters.doorbells += 1
        if self._asleep:
            self._asleep = False
            slept = self._clock() - self._asleep_since
            if slept < self._look_window:
                self._window = min(max(self._window * 2, _LEAST_WINDOW), self._look_window)
            elif self._window:
                self._window = self._window / 2 if self._window > _LEAST_WINDOW else 0.0
        self._schedule()

    def gpadl_created(self, channel: OpenChannel, gpadl: Gpadl) -> None:
        """The guest shares pages."""
        if self._channel is None:
            self._channel = channel
        self.device.gpadl_created(self, gpadl)

    def gpadl_torn_down(self, channel: OpenChannel, gpadl: Gpadl) -> None:
        """The guest wants pages back."""
        self.device.gpadl_torn_down(self, gpadl)

    def retargeted(self, channel: OpenChannel, vp: int) -> None:
        """Interrupts go to another virtual processor; the channel knows which."""

    # --- turns ---------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if not self._scheduled and self.state is IoState.RUNNING:
            self._scheduled = True
            self.timers.call_soon(self._turn)

    def _may_take(self) -> bool:
        return (
            not self._held
            and not self._blocked
            and self._owed_total < OWED_LIMIT
            and self.state is IoState.RUNNING
        )

    def _turn(self) -> None:
        if not self._scheduled:
            return  # of an opening before this one
        self._scheduled = False
        if self.state is not IoState.RUNNING:
            return
        self._in_turn = True
        self._asleep = False
        self.counters.turns += 1
        try:
            self._work()
        except GuestError as error:
            self._fail(error.reason, error.detail)
        finally:
            self._in_turn = False

    def _work(self) -> None:
        incoming = self._incoming
        if incoming is None:
            return
        incoming.mask()
        signal = False
        if self._output:
            signal = self._write_out()
        left = TURN_PACKETS
        empty = False
        try:
            while left and self._may_take():
                batch = incoming.read_batch(min(left, BATCH_PACKETS))
                if not batch:
                    empty = True
                    break
                left -= len(batch)
                done = self._deliver(batch)
                if done < len(batch):
                    incoming.untake(batch[done:])
                if incoming.commit():
                    signal = True
            if self._output and self.state is IoState.RUNNING and self._write_out():
                signal = True
            if self._room_wanted and not self._output and self.state is IoState.RUNNING:
                self._room_wanted = False
                self._contain(self.device.writable)
                if self._output and self.state is IoState.RUNNING and self._write_out():
                    signal = True
        finally:
            if signal:
                self._signal()
        if self._room_wanted and not self._blocked:
            self._schedule()
        if not self._may_take():
            return
        if not empty:
            self._last_packet = self._clock() if self._window else 0.0
            self._schedule()
        elif self._scheduled:
            pass
        else:
            self._rest(incoming, left < TURN_PACKETS)

    def _rest(self, incoming: IncomingRing, worked: bool) -> None:
        """The ring is empty: look once more in the next turn of the loop, or sleep."""
        if worked:
            if self._looks:
                self.counters.looks_hit += 1
            self._looks = 0
        if self._window:
            now = self._clock()
            if worked:
                self._last_packet = now
            if now - self._last_packet < self._window and self._looks < _MOST_LOOKS:
                self._looks += 1
                self._schedule()
                return
        self._looks = 0
        if incoming.unmask():
            self._schedule()
        else:
            self._asleep = True
            self._asleep_since = self._clock()

    def _deliver(self, batch: list[Packet]) -> int:
        """Hand packets to the device; returns how many, fewer if it held, paused or failed in between."""
        device = self.device
        owed = self._owed
        counters = self.counters
        done = 0
        for packet in batch:  # each runs through here, and through nothing else
            done += 1
            counters.bytes_in += packet.size
            try:
                try:
                    if packet.kind is _COMPLETION:
                        self._completed(packet)
                    else:
                        if packet.flags:
                            transaction_id = packet.transaction_id
                            owed[transaction_id] = owed.get(transaction_id, 0) + 1
                            self._owed_total += 1
                        if packet.error is not None:
                            raise packet.error
                        device.packet(self, packet)
                except (RingError, ProtocolError):
                    raise
                except GuestError as error:
                    self.refusals.refuse(error.reason, error.detail)
                    device.refused(self, packet, error)
            except GuestError as error:
                self._fail(error.reason, error.detail)
            except Exception as error:  # noqa: BLE001 - a device must not take the process along
                self._device_failed(error)
            if self.state is not _RUNNING or self._held:
                break
        counters.packets_in += done
        return done

    def _completed(self, packet: Packet) -> None:
        times = self._awaited.get(packet.transaction_id, 0)
        if not times:
            self.refusals.refuse("unexpected-completion", f"transaction {packet.transaction_id:#x}")
            return
        if times == 1:
            del self._awaited[packet.transaction_id]
        else:
            self._awaited[packet.transaction_id] = times - 1
        self._awaited_total -= 1
        self.device.completed(self, packet)

    def _put(self, packet: bytes) -> bool:
        """Queue a packet. False if it was dropped."""
        if self.state is IoState.CLOSED or self.state is IoState.FAILED:
            self.counters.dropped += 1
            return False
        if len(packet) > self.device.max_packet:
            raise DeviceError(
                f"{self.device.name} sends {len(packet)} bytes, at most {self.device.max_packet}"
            )
        self._output.append(packet)
        self._output_bytes += len(packet)
        if not self._in_turn:
            self._schedule()
        return True

    def _write_out(self) -> bool:
        """Move the queue to the ring, as far as it fits; returns whether the guest wants a signal."""
        outgoing = self._outgoing
        output = self._output
        signal = False
        if outgoing is None:
            return False
        for _ in range(4):
            count, wanted = outgoing.write(output)
            if count:
                signal = signal or wanted
                size = sum([len(packet) for packet in output[:count]])
                del output[:count]
                self._output_bytes -= size
                self.counters.packets_out += count
                self.counters.bytes_out += size + 8 * count
            if not output:
                self._blocked = False
                return signal
            if not outgoing.wait_for_room(len(output[0])):
                break
        else:
            self._schedule()
        if not self._blocked:
            self._blocked = True
            self.counters.ring_full += 1
        return signal

    def _signal(self) -> None:
        if self._channel is not None:
            self.counters.interrupts += 1
            self._channel.signal_guest()

    def _contain(self, tell: Callable[[ChannelIo], None]) -> None:
        try:
            tell(self)
        except GuestError as error:
            self._fail(error.reason, error.detail)
        except Exception as error:  # noqa: BLE001 - a device must not take the process along
            self._device_failed(error)

    def _device_failed(self, error: Exception) -> None:
        _log.error("%s: the device failed", self.device.name, exc_info=error)
        self._fail("device-error", repr(error))

    def _fail(self, reason: str, detail: str) -> None:
        self.refusals.refuse(reason, detail)
        if self.state is IoState.CLOSED or self.state is IoState.FAILED:
            return
        self.state = IoState.FAILED
        self.failure = reason
        self._output.clear()
        self._output_bytes = 0
        self._owed.clear()
        self._owed_total = 0
        self._awaited.clear()
        self._awaited_total = 0

    def status(self) -> dict[str, Any]:
        """For ``vmbus status``: names and plain values."""
        report: dict[str, Any] = {"state": self.state.value}
        if self.failure:
            report["failure"] = self.failure
        report |= {field.name: getattr(self.counters, field.name) for field in fields(self.counters)}
        report["owed"] = self._owed_total
        report["backlog"] = self._output_bytes
        report["refusals"] = dict(self.refusals.counts)
        return report
