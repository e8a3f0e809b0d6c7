"""The host's end of a device's channel: drains one ring, hands packets to the device, fills the other.

Source: docs/protocol/rings.md#writing, docs/protocol/rings.md#reading.

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

How long the ring is looked at before sleeping adapts (:mod:`vmbus.bus.io.polling`).

What a guest can make the host hold is bounded: :data:`OWED_LIMIT` completions, since no packet is taken beyond
it; and what devices send by themselves by :data:`OUTPUT_PACKETS` and :data:`OUTPUT_BYTES`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

from vmbus.bus.io.device import Device
from vmbus.bus.io.io_timer import IoTimer
from vmbus.bus.io.output import Output, Transactions
from vmbus.bus.io.polling import AdaptivePolling
from vmbus.bus.io.ring import IncomingRing, OutgoingRing, ring_status
from vmbus.bus.io.state import ChannelIoState, IoCounters, IoState, OpenChannel
from vmbus.errors import DeviceError, GuestError, InternalError, ProtocolError, RingError
from vmbus.ports import FastChannel, GuestMemory, TimerHandle, Timers
from vmbus.refusals import Refusals
from vmbus.wire.packet import (
    COMPLETION_REQUESTED,
    DESCRIPTOR_SIZE,
    TRAILER_SIZE,
    Packet,
    PacketType,
    TransferRange,
    build_packet,
    build_trailer,
    build_transfer_pages,
    parse_packet,
)

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel
    from vmbus.bus.channel.gpadl import Gpadl

_logger = logging.getLogger(__name__)

TURN_PACKETS = 64
"""Packets taken in one turn."""
BATCH_PACKETS = 8
"""Packets that are taken, and answered, at once: the guest works on one batch while the host works on the next."""
OWED_LIMIT = 8192
"""Completions that a device may owe before no more packets are taken."""
OUTPUT_PACKETS = 4096
"""Packets that a device may have sent without the guest's taking them; completions do not count."""
OUTPUT_BYTES = 4 << 20
"""The same in bytes."""
AWAITED_LIMIT = 8192
"""Packets of the host's whose completion the guest may owe."""

_COMPLETION = PacketType.COMPLETION
_RUNNING = IoState.RUNNING  # class attributes of an Enum are slow to look up


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
        poll_window: float | None = None,
    ) -> None:
        self.device = device
        self.timers = timers
        self.state = IoState.CLOSED
        #: Why the channel failed: a reason of an error, or ``device-error``; empty otherwise.
        self.failure = ""
        self.counters = IoCounters()
        self.refusals = Refusals(device.name, _logger)
        self.subchannels: list[ChannelIo] = []
        #: Compiled code that takes plain packets, if the device has any; its requests are not among the owed.
        self.fast: FastChannel | None = None
        self._fast_before: FastChannel | None = None
        self._clock = clock
        self._polling = AdaptivePolling(device.poll_window if poll_window is None else poll_window, clock)
        self._channel: OpenChannel | None = None
        self._incoming: IncomingRing | None = None
        self._outgoing: OutgoingRing | None = None
        self._opening = 0
        self._forget()

    def _forget(self) -> None:
        """What belongs to one opening of the channel."""
        if self.fast is not None:
            self.fast.close()
            self._fast_before = self.fast
            self.fast = None
        self._opening += 1
        self._due_when_resumed: list[IoTimer] = []
        self._output = Output()
        self._owed = Transactions()
        self._awaited = Transactions()
        self._held = False
        self._room_wanted = False
        self._scheduled = False
        self._in_turn = False

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
        return self._output.bytes

    @property
    def congested(self) -> bool:
        """Whether a device that could send for ever should stop now, and call :meth:`notify_room`."""
        output = self._output
        return (
            output.blocked or len(output.packets) >= OUTPUT_PACKETS // 2 or output.bytes >= OUTPUT_BYTES // 2
        )

    def owes(self, transaction_id: int) -> bool:
        """Whether the guest waits for a completion with this id."""
        return transaction_id in self._owed

    @property
    def fast_in_flight(self) -> int:
        """Requests that compiled code has under way, those of an opening that is over included."""
        return sum([each.in_flight for each in (self.fast, self._fast_before) if each is not None])

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
        is dropped. Raises :class:`~vmbus.errors.DeviceError` when it is longer than ``device.max_packet``,
        or when the queue is full (see :attr:`congested`).
        """
        kind, extension = PacketType.IN_BAND, b""
        if transfer_set is not None:
            kind, extension = PacketType.TRANSFER_PAGES, build_transfer_pages(transfer_set, transfer_ranges)
        if not self._takes(len(extension) + len(payload)):
            return
        output = self._output
        if len(output.packets) >= OUTPUT_PACKETS or output.bytes >= OUTPUT_BYTES:
            raise DeviceError(f"{self.device.name} sends faster than its guest takes: {output.bytes} bytes")
        if completion_requested:
            if self._awaited.total >= AWAITED_LIMIT:
                raise DeviceError(f"{self.device.name} waits for {AWAITED_LIMIT} completions already")
            self._awaited.add(transaction_id)
        output.put(
            build_packet(
                kind,
                payload,
                transaction_id=transaction_id,
                completion_requested=completion_requested,
                extension=extension,
            )
        )
        if not self._in_turn:
            self._schedule()

    def complete(self, transaction_id: int, payload: bytes | bytearray | memoryview = b"") -> None:
        """Complete a packet of the guest's that asked for it.

        Dropped if the channel was closed since, or has failed. Raises :class:`~vmbus.errors.DeviceError` if
        no completion is owed under this id: never asked for, or given already.
        """
        if not self._takes(len(payload)):
            return
        if not self._owed.remove(transaction_id):
            raise DeviceError(
                f"{self.device.name}: no completion is owed for transaction {transaction_id:#x}"
            )
        self._output.put(build_packet(_COMPLETION, payload, transaction_id=transaction_id))
        if not self._in_turn:
            self._schedule()

    def _takes(self, length: int) -> bool:
        """Whether a packet of ``length`` bytes behind its descriptor is taken. Raises ``DeviceError`` if too long."""
        if length + DESCRIPTOR_SIZE > self.device.max_packet:
            raise DeviceError(
                f"{self.device.name} sends {length + DESCRIPTOR_SIZE} bytes, at most {self.device.max_packet}"
            )
        if self.state is _RUNNING or self.state is IoState.PAUSED:
            return True
        self.counters.dropped += 1
        return False

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
        if self.state is not _RUNNING or self._in_turn or not self._output.packets:
            return
        try:
            if self._write_out():
                self._signal()
        except GuestError as error:
            self._fail(error.reason, error.detail)

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
        return IoTimer(self.timers, delay, self._timer_due, callback, self._opening)

    def _timer_due(self, timer: IoTimer) -> None:
        if timer.opening != self._opening:
            return
        if self.state is IoState.PAUSED:
            self._due_when_resumed.append(timer)
        elif self.state is _RUNNING:
            self._contain(lambda _: timer.callback())

    def fail(self, reason: str, detail: str = "") -> None:
        """Stop this channel until the guest opens it anew. ``reason``: a short name that never changes."""
        self._fail(reason, detail)

    def offer_subchannels(self, count: int) -> None:
        """Offer channels 1 to ``count`` beside this primary one; each gets an ``io`` of its own when opened.

        The bus revokes them when the guest closes the primary channel, as guests expect. Raises
        :class:`~vmbus.errors.DeviceError` if this is no primary channel, or they are offered already.
        """
        offers = self.device.environment.offers
        if offers is None or self.subchannel_index or self.subchannels:
            raise DeviceError(f"{self.device.name}: sub-channels cannot be offered here or now")
        for index in range(1, count + 1):
            io = ChannelIo(self.device, self.timers, clock=self._clock, poll_window=self._polling.longest)
            self.subchannels.append(io)
            io._channel = offers.offer(replace(self.channel.offer, subchannel_index=index), io)

    # --- what compiled code did: a FastOwner -----------------------------------------------------------------

    def fast_answers(self, channel: FastChannel, packets: list[bytes]) -> None:
        if channel is self.fast and (self.state is _RUNNING or self.state is IoState.PAUSED):
            output = self._output
            output.packets += packets
            output.bytes += sum(map(len, packets))
            self.flush()
        else:
            self.counters.dropped += len(packets)
        self.device.fast_ended(self)

    def fast_returned(self, channel: FastChannel, packet: bytes) -> None:
        if channel is self.fast and (self.state is _RUNNING or self.state is IoState.PAUSED):
            again = parse_packet(packet + build_trailer(0, 0), 0, len(packet) + TRAILER_SIZE)
            if again is not None:
                self._hand_over(again)
                if not self._in_turn:
                    self._schedule()
        self.device.fast_ended(self)

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
            due, self._due_when_resumed = self._due_when_resumed, []
            for timer in due:
                timer.fire()
            self._schedule()

    def snapshot(self) -> ChannelIoState:
        """What has to be saved of a paused (or failed, or closed) channel."""
        if self.state is IoState.RUNNING or self._in_turn:
            raise InternalError(f"{self.device.name}: a channel is paused before it is saved")
        return ChannelIoState(
            owed=self._owed.items(),
            awaited=self._awaited.items(),
            output=tuple(self._output.packets),
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
        self._owed = Transactions(state.owed)
        self._awaited = Transactions(state.awaited)
        self._output = Output(state.output)
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
        self._polling.doorbell()
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
        if not self._scheduled and self.state is _RUNNING:
            self._scheduled = True
            self.timers.call_soon(self._turn)

    def _may_take(self) -> bool:
        return (
            self.state is _RUNNING
            and not self._held
            and not self._output.blocked
            and self._owed.total < OWED_LIMIT
        )

    def _take(self, incoming: IncomingRing, limit: int) -> tuple[int, bool]:
        """Take a batch and hand it over; how many packets, and whether the ring is this opening's still."""
        fast = self.fast
        if fast is not None and self.device.fast_ready(self):
            if taken := incoming.take_with(fast.take, limit):
                self.counters.packets_in += taken
                return taken, True
            limit = 1  # what is not plain; behind it there may be more that is
        batch = incoming.read_batch(limit)
        if not batch:
            return 0, True
        done = self._deliver(batch)
        if self._incoming is not incoming:
            return done, False  # the device had its own channel taken away
        if done < len(batch):
            incoming.untake(batch[done:])
        return len(batch), True

    def _turn(self) -> None:
        if not self._scheduled:
            return  # asked for before the channel was opened anew
        self._scheduled = False
        if self.state is not _RUNNING or self._incoming is None:
            return
        self._in_turn = True
        self._polling.awake()
        self.counters.turns += 1
        try:
            self._work(self._incoming)
        except GuestError as error:
            self._fail(error.reason, error.detail)
        finally:
            if self.fast is not None and self.fast.sleeps():
                self.fast.submit()
                self._schedule()
            self._in_turn = False

    def _work(self, incoming: IncomingRing) -> None:
        incoming.mask()
        signal = False
        empty = False
        left = TURN_PACKETS
        looked = False
        try:
            signal = self._write_out()
            while left and self._may_take():
                taken, ours = self._take(incoming, min(left, BATCH_PACKETS))
                if not ours:
                    return
                if taken:
                    left -= taken
                    self.device.batch_ended(self)
                    signal = incoming.commit() or signal
                elif self._fast_looks(incoming, looked):
                    left -= 1
                    looked = True
                else:
                    empty = True
                    break
                if self._output.packets:
                    signal = self._write_out() or signal
                if signal:
                    signal = False
                    self._signal()
            if self._room_wanted and not self._output.packets and self.state is _RUNNING:
                self._room_wanted = False
                self._contain(self.device.writable)
                signal = self._write_out() or signal
        finally:
            if signal:
                self._signal()
        if left < TURN_PACKETS:
            self._polling.found()
        if self._room_wanted and not self._output.blocked:
            self._schedule()
        if self._may_take() and not self._scheduled:
            if not empty or self._polling.again() or incoming.unmask():
                self._schedule()
            else:
                self._polling.sleeps()

    def _fast_looks(self, incoming: IncomingRing, looked: bool) -> bool:
        """The ring is empty: look for what compiled code has under way, or once a turn for the guest to come back.

        Whether there is anything new.
        """
        fast = self.fast
        if fast is None or not (fast.in_flight or (self._polling.looking and not looked)):
            return False
        return fast.wait(incoming.watched()) or incoming.available > 0

    def _deliver(self, batch: list[Packet]) -> int:
        """Hand packets to the device; returns how many, fewer if it held, paused or failed in between."""
        counters = self.counters
        done = 0
        for packet in batch:
            done += 1
            counters.bytes_in += packet.size
            self._hand_over(packet)
            if self.state is not _RUNNING or self._held:
                break
        counters.packets_in += done
        return done

    def _hand_over(self, packet: Packet) -> None:
        device = self.device
        try:
            try:
                if packet.kind is _COMPLETION:
                    self._completed(packet)
                else:
                    if packet.flags:
                        self._owed.add(packet.transaction_id)
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

    def _completed(self, packet: Packet) -> None:
        if self._awaited.remove(packet.transaction_id):
            self.device.completed(self, packet)
        else:
            self.refusals.refuse("unexpected-completion", f"transaction {packet.transaction_id:#x}")

    def _write_out(self) -> bool:
        """Move the queue to the ring, as far as it fits; returns whether the guest wants a signal."""
        output = self._output
        if not output.packets or self.state is not _RUNNING or self._outgoing is None:
            return False
        signal = output.write(self._outgoing, self.counters)
        if output.packets and not output.blocked:
            self._schedule()
        return signal

    def _signal(self) -> None:
        if self._channel is not None:
            self.counters.interrupts += 1
            self._channel.signal_guest()

    # --- when something breaks -----------------------------------------------------------------------------

    def _contain(self, tell: Callable[[ChannelIo], None]) -> None:
        """Call a device, outside of :meth:`_deliver`."""
        try:
            tell(self)
        except GuestError as error:
            self._fail(error.reason, error.detail)
        except Exception as error:  # noqa: BLE001 - a device must not take the process along
            self._device_failed(error)

    def _device_failed(self, error: Exception) -> None:
        _logger.error("%s: the device failed", self.device.name, exc_info=error)
        self._fail("device-error", repr(error))

    def _fail(self, reason: str, detail: str) -> None:
        self.refusals.refuse(reason, detail)
        if self.state is _RUNNING or self.state is IoState.PAUSED:
            self.state = IoState.FAILED
            self.failure = reason
            self._output, self._owed, self._awaited = Output(), Transactions(), Transactions()

    def status(self) -> dict[str, Any]:
        """For ``vmbus status``: names and plain values."""
        report: dict[str, Any] = {"state": self.state.value}
        if self.failure:
            report["failure"] = self.failure
        report |= {field.name: getattr(self.counters, field.name) for field in fields(self.counters)}
        report["looks_hit"] = self._polling.hits
        report["owed"] = self._owed.total
        report["backlog"] = self._output.bytes
        report["refusals"] = dict(self.refusals.counts)
        if self._incoming is not None and self._outgoing is not None:
            report["rings"] = ring_status(self._incoming, self._outgoing)
        return report
