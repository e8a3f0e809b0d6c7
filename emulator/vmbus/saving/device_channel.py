"""A channel of the bus and its device's end, as one channel that can be saved: ``Channel`` and ``ChannelIo``.

Source: docs/saved-state.md; :mod:`vmbus.bus.io.channel_io`. Which part saves what:

    | state                                                   | saved by                                    |
    | offer, relid, open request, GPADLs, target VP           | the bus; this module saves a cross-check    |
    | packets sent and taken, not completed                   | this module: their transaction ids          |
    | packets and completions for which the ring had no room  | this module: all of them, in order          |
    | what the device knows of each of these packets          | ``Device.save_packets``, in the packet's chunk|
    | the device's state                                      | the device, in the primary channel's chunks |

``ChannelIo`` keeps transaction ids but no payloads: OUTSTANDING and TAKEN chunks of such a channel have an empty
payload. The device saves what it needs to continue in ``Device.save_packets`` and ``Device.save``, and continues in
``Device.restored``.

A restore leaves the ``ChannelIo`` closed, with the restored state. When guest memory is complete the bus calls its
``restored``, and the channel runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.channel.opening import OpenRequest
from vmbus.bus.channel.state import ChannelCounters
from vmbus.bus.channel.state import ChannelState as BusState
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.state import ChannelIoState, IoState, PacketState, RingPositions
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError, RingError, VmbusError
from vmbus.saving.channel import ChannelSaver
from vmbus.saving.state import (
    ChannelState,
    OutgoingPacket,
    RestorePacket,
    SavableChannel,
    SavePacket,
    SavePacketResult,
)
from vmbus.saving.status import NtStatus
from vmbus.wire.packet import (
    COMPLETION_REQUESTED,
    TRAILER_SIZE,
    Packet,
    PacketType,
    build_packet,
    build_transfer_pages,
    parse_packet,
)
from vmbus.wire.saved import (
    ChannelAxes,
    ChannelIdentity,
    SavedChannel,
    SavedCompletion,
    SavedGpadl,
    SavedOpen,
    SavedPacket,
    SavedTaken,
)

NO_TARGET_VP = 0xFFFFFFFF
"""The virtual processor that a guest names if it wants no interrupts."""

REDIRECT_INTERRUPT = 1
"""Flag of a saved open request: the guest asked for interrupt redirection."""


class BusChannel(Protocol):
    """The part of :class:`~vmbus.bus.channel.channel.Channel` that is used here."""

    offer: Offer
    state: BusState
    request: OpenRequest | None
    counters: ChannelCounters
    lost: bool
    """Whether the channel is to be rescinded and offered anew when its bus resumes."""

    @property
    def relid(self) -> int | None:
        """Channel id, None while the channel is released."""

    @property
    def connection_id(self) -> int | None:
        """Connection id of the offer, for HvSignalEvent."""

    @property
    def is_open(self) -> bool:
        """Whether the device may use the rings."""

    @property
    def gpadls(self) -> Mapping[int, Gpadl]:
        """The GPADLs of this channel by id."""

    def continue_endpoint(self) -> None:
        """Have the endpoint of an open channel continue with the state that was restored into it."""


class DeviceChannel:
    """A :class:`~vmbus.saving.state.SavableChannel` over a channel of the bus and its device's end.

    There is one for each channel, for as long as the channel exists.
    """

    is_server = True

    def __init__(self, saver: ChannelSaver, channel: BusChannel, io: ChannelIo) -> None:
        self.channel = channel
        self.io = io
        self._saver = saver
        self._view: ChannelState | None = None
        self._sent: dict[int, deque[bytes]] = {}
        """Of the view: the device's states of packets that it sent, by transaction id."""
        self._switched = 0
        self._changes = 0
        self._seen: tuple[object, ...] = ()
        self._detached = False
        self.positions: RingPositions | None = None
        """Where the process stood that the next restore is of, if it was killed; see :meth:`captured`."""
        self._applied = False
        """Whether a state was applied, or begun to be, and the channel was not started since."""

    # --- SavableChannel: properties ---

    @property
    def identity(self) -> ChannelIdentity:
        return ChannelIdentity(*self.channel.offer.key)

    @property
    def open(self) -> bool:
        return self.io.state is not IoState.CLOSED

    @property
    def paused(self) -> bool:
        return self.io.paused

    @property
    def changes(self) -> int:
        channel = self.channel
        seen = (self._switched, channel.counters.opens, channel.state, self.io.state)
        if seen != self._seen:
            self._seen = seen
            self._changes += 1
        return self._changes

    @property
    def save_packet(self) -> SavePacket | None:
        return self._save_packet

    @property
    def restore_packet(self) -> RestorePacket | None:
        return self._restore_packet

    # --- SavableChannel: operations ---

    def pause(self) -> None:
        self._switched += 1
        self.io.pause()

    def start(self) -> None:
        self._switched += 1
        self.io.resume()
        detached, self._detached, self._applied = self._detached, False, False
        if (
            detached and self.channel.is_open and self.io.state is IoState.CLOSED
        ):  # not closed, or opened anew
            self.channel.continue_endpoint()

    def detach(self) -> None:
        """Put the device's end of a paused channel into the state of a new process; its guest does not notice.

        Nothing of the device may be under way. Restore a state then: the guest's channel is still open.
        """
        self._detached = self.channel.is_open
        self.io.detach()

    def disable(self) -> None:
        """Drop the restored state; the bus revokes the offer."""
        self._switched += 1
        self._view = None
        if self._applied:
            self.io.give_up_restore()
        self._applied = False

    def taken_again(self, state: ChannelState, packets: Sequence[Packet]) -> ChannelState:
        """Return ``state`` with packets of the guest that are to be executed again, behind those that it has.

        Raises :class:`~vmbus.errors.DeviceError`.
        """
        device = self.io.device
        taken = [SavedTaken(_known_by_id(each.transaction_id), device.packet_state(each)) for each in packets]
        return replace(state, taken=(*state.taken, *taken))

    def take_view(self) -> ChannelState:
        if self._view is None:
            self._view = self._state(self.io.save(), self.io.device.save)
            sent = self._view.outgoing()
            self._sent = self._packet_states(from_guest=False) if sent else {}
        return self._view

    def drop_view(self) -> None:
        self._view = None

    @property
    def device_bytes(self) -> int:
        """Bytes of all that the device gave for the view, of itself and of packets; 0 without a view."""
        view = self._view
        if view is None:
            return 0
        packets = [each.device for each in view.taken if isinstance(each, SavedTaken)]
        packets += [state for states in self._sent.values() for state in states]
        return len(view.device) + sum(map(len, packets))

    def check_restore(self, state: ChannelState) -> str | None:
        offer, saved = self.channel.offer, state.channel
        if (saved.offer_flags, saved.mmio_megabytes) != (int(offer.flags), offer.mmio_megabytes):
            return (
                f"its offer had flags {saved.offer_flags:#x} and {saved.mmio_megabytes} MiB of MMIO space, "
                f"here it has {int(offer.flags):#x} and {offer.mmio_megabytes} MiB"
            )
        if saved.max_packet_size > self.io.device.max_packet:
            return f"its packets have up to {saved.max_packet_size} bytes, here at most {self.io.device.max_packet}"
        if state.device and offer.subchannel_index:
            return "a sub-channel has the state of a device"
        try:
            _io_state(state)
        except (RingError, ValueError) as error:
            return f"it has a packet that cannot be sent: {error}"
        if state.channel.identity.subchannel_index:
            return None
        try:
            self.io.device.check_restore(state.device)
        except VmbusError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - a device of a third party
            return f"{self.io.device.name} cannot be restored: Device.check_restore raised {error!r}"
        return None

    def apply_restore(self, state: ChannelState) -> None:
        self._switched += 1
        io, device = self.io, self.io.device
        positions, self.positions = self.positions, None
        io.restore(_io_state(state), positions)
        self._applied = True
        if not self.channel.offer.subchannel_index:
            device.restore(state.device)
        for saved in state.taken:
            if isinstance(saved, SavedTaken):
                device.restore_packet(io, PacketState(saved.packet.transaction_id, saved.device))

    def captured(self) -> ChannelState:
        """Return the state as it is now, between two packets, of a channel that may run; see ``Device.captured``.

        The device's states of packets that it sent are in it. What the state says to be queued may be in the ring
        soon afterwards; :attr:`positions` is how a restore finds out.
        """
        state = self._state(self.io.captured(), self.io.device.captured)
        if not state.outgoing():
            return state
        states = self._packet_states(from_guest=False)

        def with_device(each: OutgoingPacket) -> OutgoingPacket:
            mine = states.get(each.packet.transaction_id)
            return OutgoingPacket(each.packet, mine[0]) if mine else each

        return replace(
            state,
            outstanding=tuple(with_device(each) for each in state.outstanding),
            queue=tuple(
                with_device(each) if isinstance(each, OutgoingPacket) else each for each in state.queue
            ),
        )

    def captured_device(self) -> bytes:
        """Return the device's part of :meth:`captured`; of a sub-channel nothing, for the primary channel has it."""
        return self._device_state(self.io.device.captured)

    # --- private ---

    def _state(self, kept: ChannelIoState, device_state: Callable[[], bytes]) -> ChannelState:
        channel, io = self.channel, self.io
        if io.state is IoState.CLOSED and channel.is_open and not self._restored():
            raise DeviceError(f"{io.device.name} cannot be saved: its channel is open, but the device is not")
        queue = tuple(queued(packet) for packet in kept.output)
        awaited = dict(kept.awaited)
        for each in queue:
            if isinstance(each, OutgoingPacket) and each.packet.flags & COMPLETION_REQUESTED:
                number = each.packet.transaction_id
                awaited[number] = max(
                    awaited.get(number, 0) - 1, 0
                )  # a guest can complete what it has not seen
        return ChannelState(
            self._header(kept),
            tuple(OutgoingPacket(_known_by_id(number)) for number in _each(awaited)),
            queue,
            self._taken(kept),
            self._device_state(device_state),
        )

    def _taken(self, kept: ChannelIoState) -> tuple[SavedPacket | SavedTaken, ...]:
        states = self._packet_states(from_guest=True) if kept.owed else {}
        found: list[SavedPacket | SavedTaken] = []
        for number in _each(dict(kept.owed)):
            packet, mine = _known_by_id(number), states.get(number)
            found.append(SavedTaken(packet, mine.popleft()) if mine else packet)
        return tuple(found)

    def _packet_states(self, *, from_guest: bool) -> dict[int, deque[bytes]]:
        """Return the device's states of packets by transaction id, in order."""
        device = self.io.device
        try:
            packets = device.save_packets(self.io)
        except VmbusError:
            raise
        except Exception as error:
            raise DeviceError(
                f"{device.name} cannot be saved: Device.save_packets raised {error!r}"
            ) from error
        states: dict[int, deque[bytes]] = {}
        for packet in packets:
            if packet.from_guest is from_guest and packet.state:
                states.setdefault(packet.transaction_id, deque()).append(packet.state)
        return states

    def _header(self, kept: ChannelIoState) -> SavedChannel:
        channel, offer = self.channel, self.channel.offer
        # A guest that arrived and stays stopped: the bus opens the channel when it is resumed.
        stopped = channel.state is BusState.OPEN and self._restored()
        request = channel.request if channel.is_open or stopped else None
        axes = ChannelAxes.ENABLED if channel.state is not BusState.RELEASED else ChannelAxes(0)
        for axis, holds in (
            (ChannelAxes.OPEN, request is not None),
            (ChannelAxes.PAUSED, self.paused),
            (ChannelAxes.INPUT_PAUSED, kept.input_paused),
        ):
            axes |= axis if holds else ChannelAxes(0)
        return SavedChannel(
            self.identity,
            axes,
            relid=channel.relid or 0,
            connection_id=channel.connection_id or 0,
            offer_flags=int(offer.flags),
            max_packet_size=self.io.device.max_packet,
            transaction_quota=min(kept.transaction_quota, 0xFFFFFFFF),
            mmio_megabytes=offer.mmio_megabytes,
            mmio_megabytes_optional=offer.mmio_megabytes_optional,
            open=None if request is None else _open(request),
            gpadls=tuple(SavedGpadl(each.gpadl_id, each.page_count) for each in channel.gpadls.values()),
            failure=kept.failure,
        )

    def _device_state(self, device_state: Callable[[], bytes]) -> bytes:
        device = self.io.device
        if self.channel.offer.subchannel_index:
            return b""
        try:
            return device_state()
        except VmbusError:
            raise
        except Exception as error:
            raise DeviceError(f"{device.name} cannot be saved: Device.save raised {error!r}") from error

    def _restored(self) -> bool:
        """Return whether the device's end was restored and waits until guest memory is complete."""
        return self._saver.restored(self)

    def _restore_packet(self, channel: SavableChannel, library: bytes, saved: bytes) -> NtStatus:
        """Fill a packet object, which is dropped: the end of the channel keeps its transaction id."""
        packet = self._saver.packet_allocate(channel)
        status = self._saver.packet_restore(packet, library)
        if status == NtStatus.STATUS_SUCCESS and saved and packet.state is not None:
            self.io.device.restore_packet(
                self.io, PacketState(packet.state.transaction_id, saved, from_guest=False)
            )
        return status

    def _save_packet(
        self, channel: SavableChannel, packet: SavedPacket, buffer: memoryview
    ) -> SavePacketResult:
        found = self._sent.get(packet.transaction_id)
        state = found[0] if found else b""
        if len(state) > len(buffer):
            return SavePacketResult(NtStatus.STATUS_BUFFER_TOO_SMALL, len(state))
        buffer[: len(state)] = state
        return SavePacketResult(NtStatus.STATUS_SUCCESS, len(state))


def _open(request: OpenRequest) -> SavedOpen:
    return SavedOpen(
        request.open_id,
        request.ring_gpadl_id,
        NO_TARGET_VP if request.target_vp is None else request.target_vp,
        request.downstream_offset,
        request.user_data.rstrip(b"\0"),
        REDIRECT_INTERRUPT if request.redirect_interrupt else 0,
        request.event_flag,
        request.connection_id,
    )


def _known_by_id(transaction_id: int) -> SavedPacket:
    """Return the record of a packet of which only the transaction id is kept."""
    return SavedPacket(PacketType.IN_BAND, COMPLETION_REQUESTED, transaction_id, b"")


def _each(times: dict[int, int]) -> list[int]:
    """Invert :func:`_count`."""
    return [number for number, count in times.items() for _ in range(count)]


def _count(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Return (number, how often it occurs), in order of first occurrence."""
    times: dict[int, int] = {}
    for number in numbers:
        times[number] = times.get(number, 0) + 1
    return tuple(times.items())


def queued(packet: bytes) -> OutgoingPacket | SavedCompletion:
    """Return the record of a packet of the output queue, which has no trailer.

    Raises :class:`~vmbus.errors.DeviceError` or :class:`~vmbus.errors.RingError` for bytes that are no packet.
    """
    size = len(packet) + TRAILER_SIZE
    found = parse_packet(packet + bytes(TRAILER_SIZE), 0, size)
    if found is None or found.error is not None:
        raise DeviceError(f"the output queue has {len(packet)} bytes that are not a valid packet")
    if found.kind is PacketType.COMPLETION:
        return SavedCompletion(found.transaction_id, found.payload)
    return OutgoingPacket(
        SavedPacket(
            found.kind,
            found.flags,
            found.transaction_id,
            found.payload,
            found.ranges,
            found.transfer_pages,
        )
    )


def _built(each: OutgoingPacket | SavedCompletion) -> bytes:
    """Invert :func:`queued`. Raises RingError, or ValueError for a packet that no host sends."""
    if isinstance(each, SavedCompletion):
        return build_packet(PacketType.COMPLETION, each.payload, transaction_id=each.transaction_id)
    packet = each.packet
    extension = b""
    if packet.transfer_pages is not None:
        extension = build_transfer_pages(*packet.transfer_pages)
    kind = PacketType(packet.kind)
    if kind not in (PacketType.IN_BAND, PacketType.TRANSFER_PAGES) or packet.ranges:
        raise ValueError(f"kind {packet.kind} with {len(packet.ranges)} GPA ranges")
    if (kind is PacketType.TRANSFER_PAGES) != (packet.transfer_pages is not None):
        raise ValueError(
            f"kind {packet.kind} {'without' if packet.transfer_pages is None else 'with'} transfer pages"
        )
    return build_packet(
        kind,
        packet.payload,
        transaction_id=packet.transaction_id,
        completion_requested=bool(packet.flags & COMPLETION_REQUESTED),
        extension=extension,
    )


def _io_state(state: ChannelState) -> ChannelIoState:
    """Return the state that a ``ChannelIo`` restores. Raises RingError or ValueError."""
    awaited = [each.packet.transaction_id for each in state.outstanding]
    for each in state.queue:
        if isinstance(each, OutgoingPacket) and each.packet.flags & COMPLETION_REQUESTED:
            awaited.append(each.packet.transaction_id)
    return ChannelIoState(
        owed=_count([packet.transaction_id for packet in state.taken_packets()]),
        awaited=_count(awaited),
        output=tuple(_built(each) for each in state.queue),
        input_paused=bool(state.channel.axes & ChannelAxes.INPUT_PAUSED),
        failure=state.channel.failure,
        transaction_quota=state.channel.transaction_quota,
    )
