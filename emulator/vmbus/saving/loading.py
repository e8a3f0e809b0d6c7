"""Reading a machine's state: everything is checked before anything is applied.

Source: docs/saved-state.md; the layout is in :mod:`vmbus.saving.stream`.

    bytes ──read_machine──▶ MachineState ──Restore(...).check──▶ every part agrees ──apply──▶ restored

``read_machine`` needs no machine: it finds damage, foreign or missing chunks and versions that are too new.
``check`` asks the channels, the bus and the hypervisor part that are there. Only ``apply`` changes something, and
only a device's callback can still fail in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmbus.saving.channel import ChannelSaver
from vmbus.saving.chunks import Chunk, Position, count_pages, read_chunks
from vmbus.saving.pages import PagesTarget, check_order
from vmbus.saving.refusal import Reason, StateRefused
from vmbus.saving.state import Assembly, ChannelState, SavableChannel
from vmbus.saving.status import NtStatus
from vmbus.wire.chunk import HEADER_SIZE, ChunkKind
from vmbus.wire.saved import SAVED_END, ChannelIdentity, SavedEnd, SavedMemory, SavedPages, SavedSection

MAX_CHANNELS = 2048
"""Channel ids are event flag numbers: there are not more."""

_ONCE = frozenset(ChunkKind) - {ChunkKind.CHANNEL_RECORDS, ChunkKind.PAGES}
"""What a machine's state has one of."""


@dataclass(frozen=True, slots=True)
class SavedChannelState:
    """One channel of a machine's state: the buffers to restore it from, and what they say."""

    records: tuple[bytes, ...]
    state: ChannelState

    @property
    def identity(self) -> ChannelIdentity:
        return self.state.channel.identity


@dataclass(frozen=True, slots=True)
class MachineState:
    """A machine's state that is sound in itself."""

    writer: str
    hypervisor: SavedSection | None
    bus: SavedSection | None
    channels: tuple[SavedChannelState, ...]
    memory: SavedMemory | None = None
    """Guest memory was not copied: what the target maps has to be this."""
    pages: tuple[SavedPages, ...] = ()
    """Guest memory that comes with the state, and is newer than what came otherwise."""


class SectionTarget(Protocol):
    """The hypervisor part or the bus, as what takes its section of a state."""

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        """Why ``section`` cannot be applied (its form, its version, what it says), or ``None``; changes nothing.

        ``channels`` are those of the same state, to be held against the section: GPADLs, open parameters.
        """

    def apply_restore(self, section: SavedSection) -> None:
        """Be in that state. Does not fail on what :meth:`check_restore` accepted."""


def read_machine(data: bytes) -> MachineState:
    """The state that ``data`` is. Raises :class:`StateRefused`, with the source's reason if it refused to save."""
    chunks, position = read_chunks(data, Position(), once=_ONCE)
    if not position.complete:
        raise StateRefused(Reason.TRUNCATED, f"{len(data)} bytes, and the last chunk is not among them")
    kinds = [chunk.kind for chunk in chunks]
    if len(chunks) < 2 or kinds[0] != ChunkKind.MACHINE or kinds[-1] != ChunkKind.END:
        raise StateRefused(Reason.INCONSISTENT, "not the state of a machine")
    if kinds[1] == ChunkKind.REFUSAL:
        refusal = chunks[1].record
        raise StateRefused(
            Reason.REFUSED_AT_SOURCE,
            f"{refusal.reason}: {refusal.detail}",
            NtStatus.STATUS_INVALID_DEVICE_STATE,
        )
    _check_end(data, chunks[-1], position.index)
    sections: dict[ChunkKind, SavedSection] = {}
    channels: dict[ChannelIdentity, SavedChannelState] = {}
    memory: SavedMemory | None = None
    pages: list[SavedPages] = []
    named = 0
    for chunk in chunks[1:-1]:
        if chunk.kind in (ChunkKind.HYPERVISOR, ChunkKind.BUS) and not (channels or pages):
            late = memory is not None or (chunk.kind == ChunkKind.HYPERVISOR and sections)
            if late:
                raise StateRefused(Reason.INCONSISTENT, f"chunk {chunk.index}: {chunk.kind.name} comes late")
            sections[chunk.kind] = chunk.record
        elif chunk.kind == ChunkKind.MEMORY and not (channels or pages):
            memory = chunk.record
        elif chunk.kind == ChunkKind.PAGES and memory is None:
            pages.append(chunk.record)
        elif chunk.kind == ChunkKind.CHANNEL_RECORDS and not pages:
            channel = _read_channel(chunk.record.identity, chunk.record.records)
            if channel.identity in channels or len(channels) == MAX_CHANNELS:
                raise StateRefused(Reason.INCONSISTENT, f"channel {channel.identity} is one too many")
            channels[channel.identity] = channel
            for packet in channel.state.packets():
                named = count_pages(packet, named)
        else:
            raise StateRefused(Reason.INCONSISTENT, f"chunk {chunk.index} has no place in a machine's state")
    check_order(pages)
    return MachineState(
        chunks[0].record.writer,
        sections.get(ChunkKind.HYPERVISOR),
        sections.get(ChunkKind.BUS),
        tuple(channels.values()),
        memory,
        tuple(pages),
    )


@dataclass(frozen=True, slots=True)
class Restore:
    """A machine that a state is to be restored into: its channels paused and not open."""

    saver: ChannelSaver
    channels: Sequence[SavableChannel]
    hypervisor: SectionTarget | None = None
    bus: SectionTarget | None = None
    memory: PagesTarget | None = None

    def check(self, state: MachineState) -> None:
        """Whether all of ``state`` has its place here. Raises :class:`StateRefused`; changes nothing.

        Channels that are here and not in the state are left as they are: they were added since.
        """
        there = self._by_identity()
        for saved in state.channels:
            channel = there.get(saved.identity)
            if channel is None:
                raise StateRefused(Reason.NOT_THERE, f"no channel {saved.identity} is offered here")
            try:
                self.saver.check_restore(channel, saved.records)
            except StateRefused as error:
                raise StateRefused(
                    error.reason, f"channel {saved.identity}: {error.detail}", error.status
                ) from error
        states = [saved.state for saved in state.channels]
        for name, section, target in self._sections(state):
            if target is None:
                raise StateRefused(Reason.NOT_THERE, f"nothing here takes the state of the {name}")
            why = target.check_restore(section, states)
            if why is not None:
                raise StateRefused(Reason.NOT_ACCEPTED, f"{name}: {why}")
        if state.pages:
            if self.memory is None:
                raise StateRefused(Reason.NOT_THERE, "nothing here takes pages of guest memory")
            why = self.memory.check_pages(state.pages)
            if why is not None:
                raise StateRefused(Reason.NOT_ACCEPTED, f"guest memory: {why}")

    def apply(self, state: MachineState) -> None:
        """Check, then restore: pages of guest memory, hypervisor part, bus, channels, which stay paused until
        ``saver.start``.

        Raises :class:`StateRefused`; ``changed`` tells whether anything was applied before.
        """
        self.check(state)
        if self.memory is not None:
            self.memory.apply_pages(state.pages)
        for _, section, target in self._sections(state):
            if target is not None:
                target.apply_restore(section)
        there = self._by_identity()
        for saved in state.channels:
            self._restore_channel(there[saved.identity], saved)

    def _restore_channel(self, channel: SavableChannel, saved: SavedChannelState) -> None:
        for record in saved.records:
            status = self.saver.restore_from_buffer(channel, record)
            if status not in (NtStatus.STATUS_SUCCESS, NtStatus.STATUS_MORE_PROCESSING_REQUIRED):
                why = self.saver.refusal(channel)
                raise StateRefused(
                    why.reason if why else Reason.DEVICE_FAILED,
                    f"channel {saved.identity}: {why.detail if why else status!s}",
                    status,
                    changed=True,
                )

    def _by_identity(self) -> dict[ChannelIdentity, SavableChannel]:
        return {channel.identity: channel for channel in self.channels}

    def _sections(self, state: MachineState) -> Iterable[tuple[str, SavedSection, SectionTarget | None]]:
        if state.hypervisor is not None:
            yield "hypervisor part", state.hypervisor, self.hypervisor
        if state.bus is not None:
            yield "bus", state.bus, self.bus


def _read_channel(identity: ChannelIdentity, records: tuple[bytes, ...]) -> SavedChannelState:
    assembly = Assembly()
    try:
        for record in records:
            assembly = assembly.take(record)
        state = assembly.state()
    except StateRefused as error:
        raise StateRefused(error.reason, f"channel {identity}: {error.detail}", error.status) from error
    if state.channel.identity != identity:
        raise StateRefused(Reason.FOREIGN_CHANNEL, f"{state.channel.identity} under the name of {identity}")
    return SavedChannelState(records, state)


def _check_end(data: bytes, end: Chunk, count: int) -> None:
    size = len(data) - HEADER_SIZE - SAVED_END.size
    if not end.last or end.record != SavedEnd(count - 1, size):
        raise StateRefused(
            Reason.INCONSISTENT,
            f"{count - 1} chunks in {size} bytes are not the {end.record!r} that were written",
        )
