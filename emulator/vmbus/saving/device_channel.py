"""A device's channel on the bus, as what can be saved: ``Channel`` and its ``ChannelIo`` together.

Source: docs/saved-state.md; :mod:`vmbus.bus.io.channel_io`. What is whose:

    | state                                              | saved by                                        |
    | offer, relid, open request, GPADLs, target VP      | the bus; here as a cross-check                  |
    | packets sent and not completed, packets owed       | here: their transaction ids                     |
    | packets and completions that found no room         | here: all of them, in order                     |
    | the contents of both, and what else a device knows | the device, in the primary channel's chunks     |

``ChannelIo`` keeps ids and no contents: an OUTSTANDING or a TAKEN chunk of such a channel has no payload, its
device carries what it needs to go on in ``Device.save``, and goes on in ``Device.resumed``.

A restore leaves the ``ChannelIo`` closed, with what it adopted. When guest memory is complete the bus calls its
``restored``, and the channel runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.channel.state import ChannelCounters, OpenRequest
from vmbus.bus.channel.state import ChannelState as BusState
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.state import ChannelIoState, IoState
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError, RingError, VmbusError
from vmbus.saving.channel import ChannelSaver
from vmbus.saving.state import ChannelState, OutgoingPacket, RestorePacket, SavableChannel, SavePacket
from vmbus.saving.status import NtStatus
from vmbus.wire.packet import (
    COMPLETION_REQUESTED,
    TRAILER_SIZE,
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
)

NO_TARGET_VP = 0xFFFFFFFF
"""A guest that wants no interrupts names this virtual processor."""

REDIRECT_INTERRUPT = 1


class BusChannel(Protocol):
    """What is needed of a :class:`~vmbus.bus.channel.channel.Channel`."""

    offer: Offer
    state: BusState
    relid: int | None
    request: OpenRequest | None
    counters: ChannelCounters
    stopped: bool

    @property
    def connection_id(self) -> int | None:
        """The HvSignalEvent connection of the offer."""

    @property
    def is_open(self) -> bool:
        """Whether the device may use the rings."""

    @property
    def gpadls(self) -> Mapping[int, Gpadl]:
        """The GPADLs of this channel by id."""

    def stop(self) -> None:
        """Opens and modifications wait from now on."""

    def start(self) -> None:
        """Undo ``stop``."""


class DeviceChannel:
    """A :class:`~vmbus.saving.state.SavableChannel` over a channel of the bus and its device's end.

    One is made when the channel is offered, and used for as long as the channel exists.
    """

    is_server = True

    def __init__(self, saver: ChannelSaver, channel: BusChannel, io: ChannelIo) -> None:
        self.channel = channel
        self.io = io
        self._saver = saver
        self._view: ChannelState | None = None
        self._switched = 0
        self._changes = 0
        self._seen: tuple[object, ...] = ()

    # --- what a saver asks ---------------------------------------------------------------------------------

    @property
    def identity(self) -> ChannelIdentity:
        return ChannelIdentity(*self.channel.offer.key)

    @property
    def open(self) -> bool:
        return self.io.state is not IoState.CLOSED

    @property
    def paused(self) -> bool:
        return self.channel.stopped

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
        return None

    @property
    def restore_packet(self) -> RestorePacket | None:
        return self._restore_packet

    # --- what a saver does ---------------------------------------------------------------------------------

    def pause(self) -> None:
        self._switched += 1
        self.channel.stop()
        self.io.pause()

    def start(self) -> None:
        self._switched += 1
        self.io.resume()
        self.channel.start()

    def disable(self) -> None:
        """Forget what was adopted; taking the offer back is the bus's."""
        self._switched += 1
        self._view = None
        if self.io.state is IoState.CLOSED:
            self.io.adopt(ChannelIoState())

    def freeze(self) -> ChannelState:
        if self._view is None:
            self._view = self._polling()
        return self._view

    def unfreeze(self) -> None:
        self._view = None

    def check_restore(self, state: ChannelState) -> str | None:
        offer, saved = self.channel.offer, state.channel
        if (saved.offer_flags, saved.mmio_megabytes) != (int(offer.flags), offer.mmio_megabytes):
            return f"offered with flags {saved.offer_flags:#x} and {saved.mmio_megabytes} MiB, now otherwise"
        if saved.max_packet_size > self.io.device.max_packet:
            return f"packets of {saved.max_packet_size} bytes, {self.io.device.max_packet} here"
        if state.device and offer.subchannel_index:
            return "a sub-channel with the state of a device"
        try:
            _io_state(state)
        except (RingError, ValueError) as error:
            return f"a packet that cannot be sent: {error}"
        return None

    def apply_restore(self, state: ChannelState) -> None:
        self._switched += 1
        self.io.adopt(_io_state(state))
        if not self.channel.offer.subchannel_index:
            self.io.device.restore(state.device)

    # --- private -------------------------------------------------------------------------------------------

    def _polling(self) -> ChannelState:
        channel, io = self.channel, self.io
        if io.state is IoState.CLOSED and channel.is_open and not self._adopted():
            raise DeviceError(f"{io.device.name}: the channel is open and its device is not")
        kept = io.snapshot()
        queue = tuple(_queued(packet) for packet in kept.output)
        awaited = dict(kept.awaited)
        for each in queue:
            if isinstance(each, OutgoingPacket) and each.packet.flags & COMPLETION_REQUESTED:
                awaited[each.packet.transaction_id] -= 1
        return ChannelState(
            self._header(kept),
            tuple(OutgoingPacket(_known_by_id(number)) for number in _each(awaited)),
            queue,
            tuple(_known_by_id(number) for number in _each(dict(kept.owed))),
            self._device_state(),
        )

    def _header(self, kept: ChannelIoState) -> SavedChannel:
        channel, offer = self.channel, self.channel.offer
        request = channel.request if channel.is_open else None
        axes = ChannelAxes.ENABLED if channel.state is not BusState.RELEASED else ChannelAxes(0)
        for axis, holds in (
            (ChannelAxes.OPEN, request is not None),
            (ChannelAxes.PAUSED, channel.stopped),
            (ChannelAxes.HELD, kept.held),
        ):
            axes |= axis if holds else ChannelAxes(0)
        return SavedChannel(
            self.identity,
            axes,
            relid=channel.relid or 0,
            connection_id=channel.connection_id or 0,
            offer_flags=int(offer.flags),
            max_packet_size=self.io.device.max_packet,
            mmio_megabytes=offer.mmio_megabytes,
            mmio_megabytes_optional=offer.mmio_megabytes_optional,
            open=None if request is None else _open(request),
            gpadls=tuple(SavedGpadl(each.gpadl_id, each.page_count) for each in channel.gpadls.values()),
            failure=kept.failure,
        )

    def _device_state(self) -> bytes:
        device = self.io.device
        if self.channel.offer.subchannel_index:
            return b""
        try:
            return device.save()
        except VmbusError:
            raise
        except Exception as error:
            raise DeviceError(f"{device.name} cannot be saved: {error!r}") from error

    def _adopted(self) -> bool:
        """Whether the device's end waits for the bus to say that guest memory is complete."""
        return self._saver.restored(self)

    def _restore_packet(self, channel: SavableChannel, library: bytes, saved: bytes) -> NtStatus:
        """The device has its own state and needs no packet objects: take each for the queue it is in."""
        return self._saver.packet_restore(self._saver.packet_allocate(channel), library)


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
    return SavedPacket(PacketType.IN_BAND, COMPLETION_REQUESTED, transaction_id, b"")


def _each(times: dict[int, int]) -> list[int]:
    return [number for number, count in times.items() for _ in range(count)]


def _count(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    times: dict[int, int] = {}
    for number in numbers:
        times[number] = times.get(number, 0) + 1
    return tuple(times.items())


def _queued(packet: bytes) -> OutgoingPacket | SavedCompletion:
    """A packet of the output queue, without trailer."""
    size = len(packet) + TRAILER_SIZE
    found = parse_packet(packet + bytes(TRAILER_SIZE), 0, size)
    if found is None or found.error is not None:
        raise DeviceError(f"a packet of {len(packet)} bytes in the output queue is none")
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
    """The inverse of :func:`_queued`. Raises RingError, or ValueError for a packet that no host sends."""
    if isinstance(each, SavedCompletion):
        return build_packet(PacketType.COMPLETION, each.payload, transaction_id=each.transaction_id)
    packet = each.packet
    extension = b""
    if packet.transfer_pages is not None:
        extension = build_transfer_pages(*packet.transfer_pages)
    kind = PacketType(packet.kind)
    if kind not in (PacketType.IN_BAND, PacketType.TRANSFER_PAGES) or packet.ranges:
        raise ValueError(f"a packet of kind {packet.kind} with {len(packet.ranges)} ranges")
    if (kind is PacketType.TRANSFER_PAGES) != (packet.transfer_pages is not None):
        raise ValueError(f"a packet of kind {packet.kind}, and its transfer pages")
    return build_packet(
        kind,
        packet.payload,
        transaction_id=packet.transaction_id,
        completion_requested=bool(packet.flags & COMPLETION_REQUESTED),
        extension=extension,
    )


def _io_state(state: ChannelState) -> ChannelIoState:
    """What a ``ChannelIo`` adopts. Raises RingError or ValueError."""
    awaited = [each.packet.transaction_id for each in state.outstanding]
    for each in state.queue:
        if isinstance(each, OutgoingPacket) and each.packet.flags & COMPLETION_REQUESTED:
            awaited.append(each.packet.transaction_id)
    return ChannelIoState(
        owed=_count([packet.transaction_id for packet in state.taken]),
        awaited=_count(awaited),
        output=tuple(_built(each) for each in state.queue),
        held=bool(state.channel.axes & ChannelAxes.HELD),
        failure=state.channel.failure,
    )
