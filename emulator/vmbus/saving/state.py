"""The saved state of a channel, and the protocol that a channel implements to be saved and restored.

Source: docs/protocol/saving.md#channel-axes, docs/protocol/saving.md#saved-content, docs/saved-state.md. A
:class:`ChannelState` is one consistent view; as chunks it is, in this order:

    CHANNEL      header: identity, axes, open parameters, GPADL references, limits
    OUTSTANDING  each packet of the host that is in the ring, or was read from it by the guest, and is not completed
    UNSENT       } the output queue, for which the ring had no room, in order: each packet that the host sends, and
    COMPLETION   } each completion of a packet of the guest
    TAKEN        each packet of the guest that was taken off the ring and is not completed, in order; in version 2
                 with the device's own state of it
    DEVICE       the device's own state, if it has any

The state contains no bytes or indices of a ring: those are guest memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vmbus.errors import MalformedError
from vmbus.saving.chunks import Chunk, Position, count_pages, read_chunks
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.wire.chunk import ChunkKind
from vmbus.wire.saved import (
    SAVED_PACKET,
    ChannelAxes,
    ChannelIdentity,
    SavedChannel,
    SavedCompletion,
    SavedDevice,
    SavedPacket,
    SavedTaken,
    parse_record,
)


@dataclass(frozen=True, slots=True)
class OutgoingPacket:
    """A packet that the host sent or wants to send; ``device``: the state that SavePacket gave for it."""

    packet: SavedPacket
    device: bytes = b""


@dataclass(frozen=True, slots=True)
class ChannelState:
    """Everything that a restored channel needs to continue; see the module's table."""

    channel: SavedChannel
    outstanding: tuple[OutgoingPacket, ...] = ()
    queue: tuple[OutgoingPacket | SavedCompletion, ...] = ()
    taken: tuple[SavedPacket | SavedTaken, ...] = ()
    device: bytes = b""

    def outgoing(self) -> tuple[OutgoingPacket, ...]:
        """Return the packets that SavePacket and RestorePacket are called for, in order."""
        return self.outstanding + tuple(each for each in self.queue if isinstance(each, OutgoingPacket))

    def packets(self) -> Iterator[SavedPacket]:
        """Yield every packet of either direction."""
        yield from (each.packet for each in self.outgoing())
        yield from self.taken_packets()

    def taken_packets(self) -> Iterator[SavedPacket]:
        """Yield the packets of the guest that are not completed, without the device's states of them."""
        for each in self.taken:
            yield each.packet if isinstance(each, SavedTaken) else each

    def records(self) -> Iterator[tuple[ChunkKind, Any]]:
        """Yield the records of the chunks, in order; outgoing packets as :class:`OutgoingPacket`."""
        yield ChunkKind.CHANNEL, self.channel
        for outgoing in self.outstanding:
            yield ChunkKind.OUTSTANDING, outgoing
        for waiting in self.queue:
            yield ChunkKind.UNSENT if isinstance(waiting, OutgoingPacket) else ChunkKind.COMPLETION, waiting
        for packet in self.taken:
            yield ChunkKind.TAKEN, packet
        if self.device:
            yield ChunkKind.DEVICE, SavedDevice(self.device)


_PLACES = {
    ChunkKind.CHANNEL: 0,
    ChunkKind.OUTSTANDING: 1,
    ChunkKind.UNSENT: 2,
    ChunkKind.COMPLETION: 2,
    ChunkKind.TAKEN: 3,
    ChunkKind.DEVICE: 4,
}


class SavePacketResult(NamedTuple):
    """The result of a SavePacket callback.

    ``bytes_needed``: with ``STATUS_SUCCESS``, the size of the packet's state at the start of the buffer. With a
    failure, the buffer size that it needs (more than the buffer has), or 0 if a larger buffer would not help.
    """

    status: NtStatus
    bytes_needed: int


class Packet:
    """An outgoing packet object (VMBPACKET) that a device allocates and VmbPacketRestore fills once."""

    __slots__ = ("channel", "state")

    def __init__(self, channel: SavableChannel) -> None:
        self.channel = channel
        self.state: SavedPacket | None = None


SavePacket = Callable[["SavableChannel", SavedPacket, memoryview], SavePacketResult]
"""EvtVmbChannelSavePacket: called with an empty buffer first, then with one of the size it asked for."""

RestorePacket = Callable[["SavableChannel", bytes, bytes], NtStatus]
"""EvtVmbChannelRestorePacket, called with channel, library buffer and saved buffer.

It passes the library buffer to ``ChannelSaver.packet_restore``."""


class SavableChannel(Protocol):
    """A channel that can be saved and restored. All calls come from one thread; none may block."""

    @property
    def identity(self) -> ChannelIdentity:
        """Identity of the channel, equal in every process that serves the same guest."""

    @property
    def is_server(self) -> bool:
        """Whether this is the host's end; only the host's end can be saved."""

    @property
    def open(self) -> bool:
        """Whether the guest has opened the channel and packets can be exchanged."""

    @property
    def paused(self) -> bool:
        """Whether no packets are taken; also true for a channel that was never started."""

    @property
    def changes(self) -> int:
        """A number that differs after each open, close, start, pause and revocation; not after :meth:`take_view`."""

    @property
    def save_packet(self) -> SavePacket | None:
        """The device's callback, if it registered one."""

    @property
    def restore_packet(self) -> RestorePacket | None:
        """The device's callback, if it registered one."""

    def pause(self) -> None:
        """Stop taking packets. Work on packets that were taken may continue."""

    def start(self) -> None:
        """Leave the paused state: take packets, send what is queued."""

    def disable(self) -> None:
        """Revoke the offer and drop all state."""

    def take_view(self) -> ChannelState:
        """Return a consistent view, with empty ``device`` states of outgoing packets.

        Until :meth:`drop_view` neither the rings nor the state behind the view change; the end of work that was in
        progress (a read from a disk) is handled after it. A further call returns the same view. Raises
        :class:`~vmbus.errors.DeviceError` or :class:`StateRefused`; then there is no view.
        """

    def drop_view(self) -> None:
        """Undo :meth:`take_view`: the channel is as before it, in the same axes."""

    def check_restore(self, state: ChannelState) -> str | None:
        """Return why ``state`` cannot be applied here, or ``None``; change nothing. The device is asked as well."""

    def apply_restore(self, state: ChannelState) -> None:
        """Enter ``state``, paused, without sending anything and without writing guest memory.

        Packets of ``state.taken`` are handed to the device again when the channel starts, each once. Must not fail
        for a state that :meth:`check_restore` accepted: after an exception the channel is unusable.
        """


@dataclass(frozen=True, slots=True)
class Assembly:
    """The chunks of one channel so far; immutable, so that a refused buffer has no effect.

    ``_all``: a list that the assemblies of one save run share and only append to; the first ``count`` chunks of it
    are this one's. So each buffer costs what its own chunks do, however many came before. ``rank``: place of the last
    chunk's kind in the order.
    """

    position: Position = field(default_factory=Position)
    count: int = 0
    rank: int = 0
    has_packets: bool = False
    """Whether there is a packet that RestorePacket must be called for."""
    _all: list[Chunk] = field(default_factory=list, compare=False, repr=False)

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks, in order."""
        return self._all[: self.count]

    @property
    def complete(self) -> bool:
        """Whether the last chunk has been read."""
        return self.position.complete

    def take(self, buffer: bytes | bytearray | memoryview) -> Assembly:
        """Return a new assembly with the whole chunks of ``buffer`` added. Raises :class:`StateRefused`."""
        found, position = read_chunks(buffer, self.position)
        rank, has_packets = self.rank, self.has_packets
        for index, chunk in enumerate(found, self.count):
            kind = chunk.kind
            if kind >= ChunkKind.MACHINE:
                raise StateRefused(
                    Reason.INCONSISTENT,
                    f"chunk {chunk.index} is a {kind.name} record, which channels do not have",
                )
            if (kind == ChunkKind.CHANNEL) != (index == 0):
                raise StateRefused(
                    Reason.INCONSISTENT,
                    f"chunk {chunk.index} is a {kind.name} record, a channel header must be first",
                )
            place = _PLACES[kind]
            if place < rank or place == rank == _PLACES[ChunkKind.DEVICE]:
                raise StateRefused(
                    Reason.INCONSISTENT,
                    f"chunk {chunk.index}: a {kind.name} record after records that it must precede",
                )
            rank = place
            has_packets = has_packets or kind in (ChunkKind.OUTSTANDING, ChunkKind.UNSENT)
        count = self.count + len(found)
        if position.complete and not count:
            raise StateRefused(Reason.INCONSISTENT, "the state has no channel header")
        chunks = self._all if len(self._all) == self.count else self.chunks
        chunks += found
        return Assembly(position, count, rank, has_packets, chunks)

    @property
    def header(self) -> SavedChannel | None:
        """The channel header, None before it has been read."""
        return self._all[0].record if self.count else None

    def state(self) -> ChannelState:
        """Return the channel's state. Raises :class:`StateRefused` if the chunks contradict each other."""
        header = self.header
        if header is None or not self.complete:
            raise StateRefused(Reason.TRUNCATED, f"{self.count} chunks without the last one")
        outstanding: list[OutgoingPacket] = []
        queue: list[OutgoingPacket | SavedCompletion] = []
        taken: list[SavedPacket | SavedTaken] = []
        device = b""
        pages = self.position.pages
        for chunk in self.chunks:
            if chunk.kind in (ChunkKind.OUTSTANDING, ChunkKind.UNSENT):
                packet = _outgoing(chunk)
                pages = count_pages(packet.packet, pages)
                (outstanding if chunk.kind == ChunkKind.OUTSTANDING else queue).append(packet)
            elif chunk.kind == ChunkKind.COMPLETION:
                queue.append(chunk.record)
            elif chunk.kind == ChunkKind.TAKEN:
                taken.append(chunk.record)
            elif chunk.kind == ChunkKind.DEVICE:
                device = chunk.record.state
        state = ChannelState(header, tuple(outstanding), tuple(queue), tuple(taken), device)
        _check(state)
        return state


def _outgoing(chunk: Chunk) -> OutgoingPacket:
    try:
        return OutgoingPacket(parse_record(SAVED_PACKET, chunk.record.library), chunk.record.device)
    except MalformedError as error:
        raise StateRefused(
            Reason.DAMAGED, f"chunk {chunk.index}: the library state of a packet is not valid: {error.detail}"
        ) from error


def _check(state: ChannelState) -> None:
    """Refuse contradictions that can be found without the channel."""
    header = state.channel
    if bool(header.axes & ChannelAxes.OPEN) != (header.open is not None):
        raise StateRefused(Reason.INCONSISTENT, "the open axis and the open parameters contradict each other")
    gpadls = [each.gpadl_id for each in header.gpadls]
    if len(set(gpadls)) != len(gpadls):
        raise StateRefused(Reason.INCONSISTENT, "a GPADL is listed twice")
    if header.open is not None and header.open.ring_gpadl not in gpadls:
        raise StateRefused(Reason.INCONSISTENT, f"the rings' GPADL {header.open.ring_gpadl:#x} is not listed")
    owed = any(isinstance(each, SavedCompletion) for each in state.queue)
    if header.open is None and (state.outstanding or state.taken or owed):
        raise StateRefused(Reason.INCONSISTENT, "packets or completions of a channel that is not open")
