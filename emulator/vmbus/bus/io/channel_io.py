"""The host's end of a device's channel: empties one ring, passes packets to the device, fills the other ring.

Source: docs/protocol/rings.md#writing, docs/protocol/rings.md#reading.

    CLOSED --opened--> RUNNING --pause--> PAUSED --resume--> RUNNING
                          |                 |
                          +--RingError, ProtocolError, broken device--> FAILED      any --closed--> CLOSED

A channel that is paused while it is closed opens into PAUSED: whether it is open and whether it is paused do not
depend on each other (docs/protocol/saving.md#channel-axes).

Work is done in turns (:mod:`vmbus.bus.io.turns`), which say when packets are taken and when the guest is signalled.

What a guest can make the host hold is bounded: by ``device.max_owed`` completions and by the bytes of the guest's
:class:`~vmbus.bus.budget.MemoryBudget`, since no packet is taken beyond them; and what devices send on their own by
:meth:`HeldPackets.send <vmbus.bus.io.held.HeldPackets.send>`. The packets behind a limit stay in the ring.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from vmbus.bus.budget import MemoryBudget
from vmbus.bus.channel.endpoint import EndpointChannel
from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.io.calls import DeviceCalls
from vmbus.bus.io.handover import Handover
from vmbus.bus.io.held import AWAITED_LIMIT, HeldPackets
from vmbus.bus.io.hooks import DeviceHooks
from vmbus.bus.io.polling import AdaptivePolling
from vmbus.bus.io.ring import IncomingRing, OutgoingRing, ring_status
from vmbus.bus.io.state import ChannelIoState, IoCounters, IoState, RingPositions
from vmbus.bus.io.timers import ChannelTimers
from vmbus.bus.io.turns import TURN_PACKETS, TurnCalls, Turns
from vmbus.errors import DeviceError, GuestError, InternalError, ProtocolError, RingError
from vmbus.ports import FastChannel, FastLink, GuestMemory, TimerHandle, Timers
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

_logger = logging.getLogger(__name__)

LARGE_PACKET = 4096
"""Bytes in the ring above which a device is asked what it needs of a packet (``Device.needed``)."""

_COMPLETION = PacketType.COMPLETION
_RUNNING = IoState.RUNNING  # class attributes of an Enum are slow to look up


class ChannelIo:
    """One channel of ``device``: the endpoint that the bus calls, and the object through which the device sends.

    ``timers`` is the event loop. ``clock`` returns seconds; only the polling before sleeping uses it.
    """

    def __init__(
        self,
        device: DeviceHooks[ChannelIo],
        timers: Timers,
        *,
        clock: Callable[[], float] = time.monotonic,
        poll_window: float | None = None,
        record: Callable[[ChannelIo], None] | None = None,
    ) -> None:
        """``record`` is called before the guest can see more of what this end of the channel has done, if it changed.

        See :mod:`vmbus.machine.journal`.
        """
        self.device = device
        self.timers = timers
        self.state = IoState.CLOSED
        self.paused = False
        """Whether :meth:`pause` was called and :meth:`resume` was not, whatever the guest opened or closed since."""
        self.failure = ""
        """Why the channel failed: the reason of an error, or ``device-error``; empty otherwise."""
        self.counters = IoCounters()
        self.refusals = Refusals(device.name, _logger)
        self.subchannels: list[ChannelIo] = []
        self._clock = clock
        self._record_change = record
        self._positions: RingPositions | None = None
        self._polling = AdaptivePolling(device.poll_window if poll_window is None else poll_window, clock)
        self._channel: EndpointChannel | None = None
        self._outgoing: OutgoingRing | None = None
        self.transaction_quota = 0
        """See :meth:`set_transaction_quota`; 0 if it was not called."""
        self._calls = DeviceCalls(device, self, timers, self._fail)
        self._io_timers = ChannelTimers(
            timers, lambda: self.state, lambda callback: self._calls.contain(lambda _: callback())
        )
        self._held = HeldPackets(schedule=self._schedule, call_later=self._io_timers.call_later)
        self._handover = Handover(
            self._held,
            self.counters,
            ready=self._may_be_given,
            room=self._room,
            schedule=self._schedule,
            record=self._record,
        )
        self._turns = Turns(
            timers,
            self._polling,
            self.counters,
            TurnCalls(
                room=self._room,
                record=self._record,
                wait_for_budget=self._held.wait_for_budget,
                deliver=self._deliver,
                batch_ended=lambda: self.device.batch_ended(self),
                write_out=self._write_out,
                tell_room=self._tell_room,
                signal=self._signal,
                failed=lambda error: self._fail(error.reason, error.detail),
                broken=self._calls.broken,
                recall=self._recall_for_turn,
                give=self._handover.give,
            ),
        )
        self._forget()

    def _forget(self) -> None:
        """Reset what belongs to one opening of the channel."""
        self._positions = None
        self._handover.end()
        self._held.clear()
        self._io_timers.forget()
        self._turns.end()
        self._input_paused = False

    # --- what a device may read ---

    @property
    def channel(self) -> EndpointChannel:
        """The channel, as of its last opening. Raises ``DeviceError`` before the first opening."""
        if self._channel is None:
            raise DeviceError(f"{self.device.name}: the channel was never opened")
        return self._channel

    @property
    def memory(self) -> GuestMemory:
        """Guest memory."""
        return self.device.environment.memory

    @property
    def budget(self) -> MemoryBudget:
        """The budget that private copies of a device count against."""
        return self.device.environment.budget

    @property
    def subchannel_index(self) -> int:
        """0 for the primary channel of the device."""
        return self.channel.offer.subchannel_index

    @property
    def backlog(self) -> int:
        """Bytes that were sent, and wait for room in the ring or for the end of the turn."""
        return self._held.output.bytes

    @property
    def congested(self) -> bool:
        """Whether a device with unlimited data should stop sending, and call :meth:`notify_room`."""
        return self._held.congested

    def owes(self, transaction_id: int) -> bool:
        """Return whether the guest waits for a completion with this id."""
        return self._held.owes(transaction_id)

    @property
    def fast(self) -> FastChannel | None:
        """The compiled fast path, if the device has one; the requests that it took are not counted as owed."""
        return self._handover.fast

    @fast.setter
    def fast(self, fast: FastChannel | None) -> None:
        self._handover.fast = fast

    @property
    def fast_link(self) -> FastLink | None:
        """What a journal has to say of the compiled fast path."""
        return self._handover.link

    @property
    def fast_in_flight(self) -> int:
        """Requests in flight in the compiled fast path, those of an earlier opening included."""
        return self._handover.in_flight

    # --- what a device may do ---

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

        The packet goes out with everything else that is sent in this turn; if the channel is closed or has failed it
        is dropped. Raises :class:`~vmbus.errors.DeviceError` when it is longer than ``device.max_packet``,
        or when the queue is full (see :attr:`congested`).
        """
        kind, extension = PacketType.IN_BAND, b""
        if transfer_set is not None:
            kind, extension = PacketType.TRANSFER_PAGES, build_transfer_pages(transfer_set, transfer_ranges)
        if not self._accepts(len(extension) + len(payload)):
            return
        held = self._held
        if completion_requested and held.awaits_too_many:
            raise DeviceError(f"{self.device.name} already waits for {AWAITED_LIMIT} completions")
        packet = build_packet(
            kind,
            payload,
            transaction_id=transaction_id,
            completion_requested=completion_requested,
            extension=extension,
        )
        if not held.send(packet, transaction_id if completion_requested else None):
            raise DeviceError(
                f"{self.device.name} sends faster than the guest reads: {held.output.bytes} bytes are queued"
            )
        if not self._turns.active:
            self._schedule()

    def complete(self, transaction_id: int, payload: bytes | bytearray | memoryview = b"") -> None:
        """Complete a packet of the guest that requested a completion.

        The completion is dropped if the channel was closed since, or has failed. Raises
        :class:`~vmbus.errors.DeviceError` if none is owed under this id: not requested, or given already.
        """
        if not self._accepts(len(payload)):
            return
        completion = build_packet(_COMPLETION, payload, transaction_id=transaction_id)
        if not self._held.complete(transaction_id, completion):
            raise DeviceError(
                f"{self.device.name}: no completion is owed for transaction {transaction_id:#x}"
            )
        if not self._turns.active:
            self._schedule()

    def _accepts(self, length: int) -> bool:
        """Return whether a packet of ``length`` bytes behind its descriptor can be queued, and count it if not.

        Raises ``DeviceError`` for a packet that is too long.
        """
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
        """Send now what is queued, with one signal, instead of in the next turn of the event loop.

        For devices that complete several requests outside :meth:`Device.packet`; inside it there is no effect.
        """
        if self.state is not _RUNNING or self._turns.active or not self._held.output.packets:
            return
        if self._handover.given or self._record_change is not None:  # the journal may not have begun yet
            self._schedule()
            return
        try:
            if self._write_out():
                self._signal()
        except GuestError as error:
            self._fail(error.reason, error.detail)

    def notify_room(self) -> None:
        """Call ``device.writable`` once, as soon as everything sent is in the ring."""
        self._turns.room_wanted = True
        self._schedule()

    def pause_input(self) -> None:
        """Take no more packets, which stay in the ring, until :meth:`resume_input`; sending continues."""
        self.recall()
        self._input_paused = True

    def resume_input(self) -> None:
        """Take packets again."""
        if self._input_paused:
            self._input_paused = False
            self._schedule()

    def set_transaction_quota(self, quota: int) -> None:
        """Take no packet while ``quota`` completions are owed, also over openings (VmbChannelSetTransactionQuota).

        The quota may be below what is owed now. It does not raise the limit that every channel has. Raises
        :class:`~vmbus.errors.DeviceError` for a quota below 1.
        """
        if quota < 1:
            raise DeviceError(f"{self.device.name}: a transaction quota of {quota}, at least 1 is needed")
        self.transaction_quota = quota
        self._schedule()

    def call_later(self, delay: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` after ``delay`` seconds, if the channel is still open then and has not failed.

        An exception of ``callback`` fails this channel only. While the channel is paused, the call waits for
        :meth:`resume`.
        """
        return self._io_timers.call_later(delay, callback)

    def fail(self, reason: str, detail: str = "") -> None:
        """Fail this channel until the guest opens it anew. ``reason``: a short name that never changes."""
        self._fail(reason, detail)

    def offer_subchannels(self, count: int) -> None:
        """Offer sub-channels 1 to ``count`` of this primary channel; each has an ``io`` of its own.

        The bus revokes them when the guest closes the primary channel, as guests expect. Raises
        :class:`~vmbus.errors.DeviceError` if this is no primary channel, if sub-channels are offered already, or
        where the device's environment cannot offer any.
        """
        offers = self.device.environment.offers
        if offers is None:
            raise DeviceError(f"{self.device.name}: its DeviceEnvironment has no offers, so no sub-channels")
        if self.subchannel_index or self.subchannels:
            raise DeviceError(
                f"{self.device.name}: sub-channels need a primary channel, and can be offered once per opening"
            )
        for index in range(1, count + 1):
            io = ChannelIo(
                self.device,
                self.timers,
                clock=self._clock,
                poll_window=self._polling.longest,
                record=self._record_change,
            )
            self.subchannels.append(io)
            io._channel = offers.offer(replace(self.channel.offer, subchannel_index=index), io)

    # --- the compiled fast path ---

    def recall(self) -> None:
        """Take the rings back from compiled code, which gets them again at the end of a turn; that is scheduled.

        For a device that is about to change what compiled code uses.
        """
        if self._handover.given:
            self._handover.recall()
            self._schedule()

    def _recall_for_turn(self) -> int:
        if self._handover.given:
            return 1 if self._handover.recall() else 0
        return TURN_PACKETS

    def _may_be_given(self) -> bool:
        return not (self.transaction_quota or self._turns.room_wanted) and self.device.fast_ready(self)

    # --- called by it: a FastOwner ---

    def fast_answered(self, channel: FastChannel, answer: bytes) -> None:
        """Send a completion that the fast path has built; see :class:`~vmbus.ports.FastOwner`."""
        if channel is self.fast and (self.state is _RUNNING or self.state is IoState.PAUSED):
            self._held.changed = True
            self._held.output.put(answer)
            self._calls.contain(ChannelIo.flush)
        else:
            self.counters.dropped += 1
        self._calls.contain(self.device.fast_ended)

    def fast_ended(self, channel: FastChannel) -> None:
        """Tell the device; see :class:`~vmbus.ports.FastOwner`."""
        self._calls.contain(self.device.fast_ended)

    def fast_left(self, channel: FastChannel) -> None:
        """Take the rings back in a turn; see :class:`~vmbus.ports.FastOwner`."""
        if channel is self.fast:
            self._schedule()

    def fast_returned(self, channel: FastChannel, packet: bytes) -> None:
        """Pass a packet that the fast path returns to the device; see :class:`~vmbus.ports.FastOwner`."""
        if channel is self.fast and (self.state is _RUNNING or self.state is IoState.PAUSED):
            again = parse_packet(packet + build_trailer(0, 0), 0, len(packet) + TRAILER_SIZE)
            if again is not None:
                self._dispatch(again)
                if not self._turns.active:
                    self._schedule()
        self._calls.contain(self.device.fast_ended)

    def fast_failed(self, channel: FastChannel, error: Exception) -> None:
        """Fail the channel; see :class:`~vmbus.ports.FastOwner`."""
        if channel is self.fast:
            self._calls.broken(error)
        else:
            _logger.error("%s: a request of an earlier opening failed", self.device.name, exc_info=error)

    # --- pausing and saving ---

    def pause(self) -> None:
        """Do not touch the rings until :meth:`resume`. What is sent or completed meanwhile is queued.

        In a turn (a device calls this from ``packet``), packets that were not passed to the device stay in the ring.
        """
        self.recall()
        self.paused = True
        if self.state is IoState.RUNNING:
            self._enter(IoState.PAUSED)
        self._calls.suspend()

    def resume(self) -> None:
        """Undo :meth:`pause`; nothing was lost, nothing is repeated."""
        self.paused = False
        if self.state is IoState.PAUSED:
            self._enter(IoState.RUNNING)
            self._held.forget_deadline()  # the guest may have been stopped: it gets the whole time again
            self._start()
            self._io_timers.resume()

    def save(self) -> ChannelIoState:
        """Return the state of a paused (or failed, or closed) channel."""
        if self.state is IoState.RUNNING or self._turns.active:
            raise InternalError(f"{self.device.name}: pause a channel before saving it")
        return self.captured()

    def captured(self) -> ChannelIoState:
        """Return the state as it is now, between two packets."""
        return self._held.save(
            input_paused=self._input_paused,
            failure=self.failure,
            transaction_quota=self.transaction_quota,
        )

    @property
    def positions(self) -> RingPositions | None:
        """Where the host stands in both rings, with all that was taken; ``None`` while the channel has none."""
        incoming, outgoing = self._turns.incoming, self._outgoing
        if incoming is None or outgoing is None:
            return None
        return RingPositions(incoming.taken, outgoing.index)

    def give_up_restore(self) -> None:
        """Drop the state of :meth:`restore`, and have the device forget what it was given for this channel."""
        if self.state is IoState.CLOSED:
            self._end()
            self.failure = ""
            self.subchannels = []
            self._calls.contain(self.device.closed)

    def restore(self, state: ChannelIoState, positions: RingPositions | None = None) -> None:
        """Take over a saved state; the channel stays closed until the bus calls :meth:`restored`.

        ``positions``: where the host stood when the state was captured, if it has ended since without a word. It may
        have written a part of the output, and may not have freed the room of what it had taken.
        """
        if self.state is not IoState.CLOSED:
            raise InternalError(
                f"{self.device.name}: a channel that is {self.state.value} cannot take over a saved state"
            )
        self._forget()
        self._held.restore(state)
        self._positions = positions
        self._input_paused = state.input_paused
        self.failure = state.failure
        self.transaction_quota = state.transaction_quota or self.transaction_quota

    def detach(self) -> None:
        """Forget the opening, as if this process had never had it; the rings are not touched.

        For a channel that is paused or has failed, and whose device is settled. The guest does not notice: its
        channel is still open, and :meth:`restore` and :meth:`restored` continue it.
        """
        if self.state is IoState.RUNNING or self._turns.active:
            raise InternalError(f"{self.device.name}: pause a channel before detaching it")
        if self.state is not IoState.CLOSED:
            if self.fast_link is not None:
                self._record()
            self._end()
            self._calls.contain(self.device.closed)

    # --- called by the bus: an Endpoint ---

    def opened(self, channel: EndpointChannel) -> None:
        """Initialize the rings, and run. Raises GuestError or DeviceError to refuse."""
        self._forget()
        incoming, outgoing = self._attach(channel)
        incoming.initialize()
        outgoing.initialize()
        self._begin(self.device.opened)

    def restored(self, channel: EndpointChannel) -> None:
        """Run with the state of :meth:`restore`: the channel was open when saved, guest memory is complete."""
        self._attach(channel)
        if self.failure:
            self._enter(IoState.FAILED)
            return
        self._begin(self.device.restored)
        self._signal()

    def _attach(self, channel: EndpointChannel) -> tuple[IncomingRing, OutgoingRing]:
        incoming_pages, outgoing_pages = channel.ring_pages()
        memory = self.memory
        incoming = IncomingRing(incoming_pages, memory)
        outgoing = OutgoingRing(outgoing_pages, memory)
        self._channel, self._outgoing = channel, outgoing
        if (positions := self._positions) is not None:
            self._positions = None
            incoming.continue_at(positions.read)
            self._held.output.forget_written(outgoing.written_since(positions.write))
        self._turns.begin(incoming)
        self._handover.begin(channel, incoming, outgoing)
        self._held.begin(self.device.environment.budget)
        return incoming, outgoing

    def _begin(self, hook: Callable[[ChannelIo], None]) -> None:
        self.failure = ""
        self._enter(IoState.PAUSED if self.paused else IoState.RUNNING)
        try:
            hook(self)
        except (GuestError, DeviceError):
            self._end()
            raise
        except Exception as error:
            self._end()
            raise DeviceError(f"{self.device.name} failed to open: {error!r}") from error
        if self.state is _RUNNING:
            self._start()

    def _start(self) -> None:
        """Have the device send, take packets, and then tell it so."""
        self._calls.start()
        if self.state is _RUNNING:
            self._schedule()
            self._calls.post_start_soon()

    def _enter(self, state: IoState) -> None:
        self.state = state
        self._turns.running = state is _RUNNING

    def _end(self) -> None:
        self._enter(IoState.CLOSED)
        self.recall()  # the answers that it had are dropped: the rings may be the guest's again
        self._outgoing = None
        self._forget()

    def closed(self, channel: EndpointChannel) -> None:
        """Forget the rings: they belong to the guest again."""
        self._calls.suspend()
        self._end()
        self.subchannels = []
        self._calls.contain(self.device.closed)

    def signalled(self, channel: EndpointChannel) -> None:
        """Schedule a turn: the guest rang the doorbell."""
        self.counters.doorbells += 1
        self._polling.doorbell()
        self._schedule()

    def gpadl_created(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        """Pass shared pages on to the device."""
        if self._channel is None:
            self._channel = channel
        self.device.gpadl_created(self, gpadl)

    def gpadl_torn_down(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        """Take shared pages back from the device."""
        self.device.gpadl_torn_down(self, gpadl)

    def retargeted(self, channel: EndpointChannel, vp: int) -> None:
        """Have compiled code signal there, too; the channel itself keeps the target."""
        self.recall()

    # --- called in turns ---

    def _schedule(self) -> None:
        self._turns.schedule()

    def _room(self) -> int:
        if self.state is _RUNNING and not self._input_paused:
            limit, quota = self.device.max_owed, self.transaction_quota
            return self._held.room(quota if quota and quota < limit else limit)
        return 0

    def _tell_room(self) -> bool:
        signal = False
        if not self._held.output.packets and self.state is _RUNNING:
            self._turns.room_wanted = False
            self._calls.contain(self.device.writable)
            signal = self._write_out()
        if self._turns.room_wanted and not self._held.output.blocked:
            self._schedule()
        return signal

    def _deliver(self, batch: list[Packet]) -> int:
        """Pass packets to the device; return how many: fewer if it paused or failed in between."""
        counters = self.counters
        budget = self._held.budget
        done = 0
        for packet in batch:
            done += 1
            counters.bytes_in += packet.size
            self._dispatch(packet)
            if self.state is not _RUNNING or self._input_paused or budget.full:
                break
        counters.packets_in += done
        return done

    def _dispatch(self, packet: Packet) -> None:
        device = self.device
        try:
            try:
                if packet.kind is _COMPLETION:
                    self._completed(packet)
                else:
                    if packet.flags:
                        if packet.size > LARGE_PACKET:
                            packet = device.needed(packet)
                        self._held.owe(packet)
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
        except Exception as error:  # noqa: BLE001 - a bug of a device must not end the process
            self._calls.broken(error)

    def _completed(self, packet: Packet) -> None:
        if self._held.completed(packet.transaction_id):
            self.device.completed(self, packet)
        else:
            self.refusals.refuse("unexpected-completion", f"transaction {packet.transaction_id:#x}")

    def _record(self) -> None:
        """Record what is about to become visible to the guest; without a journal of this channel, do nothing."""
        if self._record_change is not None:
            self._held.changed = False
            self._record_change(self)
            self._handover.recorded()

    def _write_out(self) -> bool:
        """Move the queue to the ring, as far as it fits; return whether the guest wants a signal."""
        held = self._held
        if not held.output.packets or self.state is not _RUNNING or self._outgoing is None:
            return False
        if held.changed:
            self._record()
        signal = held.write(self._outgoing, self.counters)
        held.changed = bool(held.output.packets)  # the rest is written at another position
        return signal

    def _signal(self) -> None:
        if self._channel is not None:
            self.counters.interrupts += 1
            self._channel.signal_guest()

    # --- failures ---

    def _fail(self, reason: str, detail: str) -> None:
        self.refusals.refuse(reason, detail)
        if self.state is _RUNNING or self.state is IoState.PAUSED:
            self._enter(IoState.FAILED)
            self.recall()
            self.failure = reason
            self._calls.drop_post_start()
            self._held.fail()
            if self.fast_link is not None:
                self._record()  # or compiled code would keep the requests that were dropped here

    def status(self) -> dict[str, Any]:
        """Return the channel's part of ``vmbus status``: names and plain values."""
        self.recall()
        report: dict[str, Any] = {"state": self.state.value}
        if self.failure:
            report["failure"] = self.failure
        report |= {field.name: getattr(self.counters, field.name) for field in fields(self.counters)}
        report["looks_hit"] = self._polling.hits
        report |= self._held.status()
        report["refusals"] = dict(self.refusals.counts)
        if self._turns.incoming is not None and self._outgoing is not None:
            report["rings"] = ring_status(self._turns.incoming, self._outgoing)
        return report


ChannelDevice = DeviceHooks[ChannelIo]
"""What a channel calls of its device."""
