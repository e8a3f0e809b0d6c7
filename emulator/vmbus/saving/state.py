"""What is saved of a channel, and what a channel must be able to do to be saved and restored.

Source: docs/protocol/saving.md#channel-axes, docs/protocol/saving.md#saved-content, docs/saved-state.md. A
:class:`ChannelState` is one consistent view; as chunks it is, in this order:

    CHANNEL      header: identity, axes, open parameters, GPADL references, limits
    OUTSTANDING  each packet that is in the ring (or was read from it by the guest) and not completed
    UNSENT       } what found no room in the ring, in one queue: each packet that the host sends,
    COMPLETION   } and each completion that it owes the guest
    TAKEN        each packet that was taken off the ring and not completed, in order
    DEVICE       the device's own state, if it has any

It never contains bytes or indices of a ring: those are guest memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vmbus.errors import MalformedError
from vmbus.saving.chunks import Chunk, Position, count_pages, read_chunks
from vmbus.saving.refusal import Reason, StateRefused
from vmbus.saving.status import NtStatus
from vmbus.wire.chunk import ChunkKind
from vmbus.wire.saved import (
    SAVED_PACKET,
    ChannelAxes,
    ChannelIdentity,
    SavedChannel,
    SavedCompletion,
    SavedDevice,
    SavedPacket,
    parse_record,
)


@dataclass(frozen=True, slots=True)
class OutgoingPacket:
    """A packet that the host sent or wants to send, and what its device keeps about it."""

    packet: SavedPacket
    device: bytes = b""


@dataclass(frozen=True, slots=True)
class ChannelState:
    """Everything that a restored channel needs to go on; see the module's table."""

    channel: SavedChannel
    outstanding: tuple[OutgoingPacket, ...] = ()
    queue: tuple[OutgoingPacket | SavedCompletion, ...] = ()
    taken: tuple[SavedPacket, ...] = ()
    device: bytes = b""

    def outgoing(self) -> tuple[OutgoingPacket, ...]:
        """The packets that SavePacket and RestorePacket are called for, in order."""
        return self.outstanding + tuple(each for each in self.queue if isinstance(each, OutgoingPacket))

    def packets(self) -> Iterator[SavedPacket]:
        """Every packet of either direction."""
        yield from (each.packet for each in self.outgoing())
        yield from self.taken

    def records(self) -> Iterator[tuple[ChunkKind, Any]]:
        """What the chunks carry, in order; of outgoing packets the :class:`OutgoingPacket` itself."""
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
    """What a SavePacket callback answers.

    ``bytes_needed``: with ``STATUS_SUCCESS`` how many bytes of the buffer are the packet's state; with a failure
    how many it would take (more than the buffer has), or 0 when more room would not help.
    """

    status: NtStatus
    bytes_needed: int


class Packet:
    """An outgoing packet object (VMBPACKET) that a device allocated and VmbPacketRestore fills, once."""

    __slots__ = ("channel", "state")

    def __init__(self, channel: SavableChannel) -> None:
        self.channel = channel
        self.state: SavedPacket | None = None


SavePacket = Callable[["SavableChannel", SavedPacket, memoryview], SavePacketResult]
"""EvtVmbChannelSavePacket: called with an empty buffer first, then with one of the size it asked for."""

RestorePacket = Callable[["SavableChannel", bytes, bytes], NtStatus]
"""EvtVmbChannelRestorePacket(channel, library buffer, saved buffer): see ``ChannelSaver.packet_restore``."""


class SavableChannel(Protocol):
    """A channel as saving sees it. All calls come from one thread; none blocks."""

    @property
    def identity(self) -> ChannelIdentity:
        """What makes it the same channel in another process."""

    @property
    def is_server(self) -> bool:
        """Whether this is the host's end; only that can be saved."""

    @property
    def open(self) -> bool:
        """Whether the guest has it open, and traffic can flow over this object."""

    @property
    def paused(self) -> bool:
        """Whether new packets are held back; true as well for one that was never started."""

    @property
    def changes(self) -> int:
        """Another number after each open, close, start, pause and revocation; freezing is none of these."""

    @property
    def save_packet(self) -> SavePacket | None:
        """The device's callback, if it registered one."""

    @property
    def restore_packet(self) -> RestorePacket | None:
        """The device's callback, if it registered one."""

    def pause(self) -> None:
        """Take no more packets. Work on those already taken may go on."""

    def start(self) -> None:
        """Leave the paused state: take packets, write what is queued."""

    def disable(self) -> None:
        """Revoke the offer, forget everything."""

    def freeze(self) -> ChannelState:
        """Stand still and say what there is, with empty ``device`` blobs of outgoing packets.

        Until :meth:`unfreeze` neither the rings nor anything of the view change; what ends meanwhile (a read
        from a disk) waits inside. Called on a frozen channel it gives the same view again. Raises
        :class:`~vmbus.errors.DeviceError` or :class:`StateRefused` and is then not frozen.
        """

    def unfreeze(self) -> None:
        """As before :meth:`freeze`, in the same axes."""

    def check_restore(self, state: ChannelState) -> str | None:
        """Why ``state`` cannot be applied here, or ``None``; changes nothing, asks the device as well."""

    def apply_restore(self, state: ChannelState) -> None:
        """Be in ``state``, paused, with nothing sent and no guest memory written.

        Packets of ``state.taken`` are handed to the device again when the channel starts, each once. Does not
        fail on a state that :meth:`check_restore` accepted; what it raises leaves the channel unusable.
        """


@dataclass(frozen=True, slots=True)
class Assembly:
    """The chunks of one channel so far. Taking a buffer gives a new one: what is refused has no effect."""

    position: Position = field(default_factory=Position)
    chunks: tuple[Chunk, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the last chunk has come."""
        return self.position.complete

    def take(self, buffer: bytes | bytearray | memoryview) -> Assembly:
        """With all chunks of ``buffer``, in whole chunks. Raises :class:`StateRefused`."""
        return _first(bytes(buffer)) if self == Assembly() else self._take(buffer)

    def _take(self, buffer: bytes | bytearray | memoryview) -> Assembly:
        found, position = read_chunks(buffer, self.position)
        chunks = self.chunks + tuple(found)
        rank = 0
        for index, chunk in enumerate(chunks):
            kind = chunk.kind
            if kind >= ChunkKind.MACHINE:
                raise StateRefused(Reason.INCONSISTENT, f"chunk {chunk.index} is not one of a channel")
            if (kind == ChunkKind.CHANNEL) != (index == 0):
                raise StateRefused(Reason.INCONSISTENT, f"chunk {chunk.index} is a {kind.name} record")
            place = _PLACES[kind]
            if place < rank or place == rank == _PLACES[ChunkKind.DEVICE]:
                raise StateRefused(
                    Reason.INCONSISTENT, f"chunk {chunk.index}: a {kind.name} record comes late"
                )
            rank = place
        if position.complete and not chunks:
            raise StateRefused(Reason.INCONSISTENT, "no channel header")
        return Assembly(position, chunks)

    @property
    def header(self) -> SavedChannel | None:
        """The channel header, once it is there."""
        return self.chunks[0].record if self.chunks else None

    @property
    def has_packets(self) -> bool:
        """Whether there is a packet that a RestorePacket callback has to take."""
        return any(chunk.kind in (ChunkKind.OUTSTANDING, ChunkKind.UNSENT) for chunk in self.chunks)

    def state(self) -> ChannelState:
        """The state that the chunks are. Raises :class:`StateRefused` if they contradict each other."""
        header = self.header
        if header is None or not self.complete:
            raise StateRefused(Reason.TRUNCATED, f"{len(self.chunks)} chunks, and none is the last")
        outstanding: list[OutgoingPacket] = []
        queue: list[OutgoingPacket | SavedCompletion] = []
        taken: list[SavedPacket] = []
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


@functools.lru_cache(maxsize=2048)
def _first(buffer: bytes) -> Assembly:
    """A machine's state is read, then checked, then restored, while its guest stands still: it is parsed once."""
    return Assembly()._take(buffer)


def forget_parsed() -> None:
    """Nobody needs the parsed buffers any more."""
    _first.cache_clear()


def _outgoing(chunk: Chunk) -> OutgoingPacket:
    try:
        return OutgoingPacket(parse_record(SAVED_PACKET, chunk.record.library), chunk.record.device)
    except MalformedError as error:
        raise StateRefused(
            Reason.DAMAGED, f"chunk {chunk.index}: library state of a packet: {error.detail}"
        ) from error


def _check(state: ChannelState) -> None:
    """Contradictions that can be seen without the channel."""
    header = state.channel
    if bool(header.axes & ChannelAxes.OPEN) != (header.open is not None):
        raise StateRefused(Reason.INCONSISTENT, "open, and no open parameters, or the reverse")
    gpadls = [each.gpadl_id for each in header.gpadls]
    if len(set(gpadls)) != len(gpadls):
        raise StateRefused(Reason.INCONSISTENT, "a GPADL that is listed twice")
    if header.open is not None and header.open.ring_gpadl not in gpadls:
        raise StateRefused(Reason.INCONSISTENT, f"the rings' GPADL {header.open.ring_gpadl:#x} is not listed")
    owed = any(isinstance(each, SavedCompletion) for each in state.queue)
    if header.open is None and (state.outstanding or state.taken or owed):
        raise StateRefused(Reason.INCONSISTENT, "transactions of a channel that is not open")
