"""Reading and restoring of a machine's state: everything is checked before anything is applied.

Source: docs/saved-state.md; the layout is in :mod:`vmbus.saving.stream`.

    bytes ──read_machine──▶ MachineState ──Restore(...).check──▶ accepted by all parts ──apply──▶ restored

``read_machine`` needs no machine: it finds damage, foreign or missing chunks and versions of later releases.
``check`` asks the channels, the bus and the hypervisor section of a machine. Only ``apply`` changes something, and
only a callback of a device can still fail in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmbus import __version__
from vmbus.errors import MalformedError
from vmbus.saving.channel import ChannelSaver
from vmbus.saving.chunks import MAX_IGNORED, Chunk, Position, count_pages, read_chunks
from vmbus.saving.pages import PagesTarget, check_order
from vmbus.saving.state import Assembly, ChannelState, SavableChannel
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.wire.chunk import CHUNK_HEADER, HEADER_SIZE, ChunkKind
from vmbus.wire.saved import SAVED_END, ChannelIdentity, SavedEnd, SavedMemory, SavedPages, SavedSection

MAX_CHANNELS = 2048
"""Channels of one state: channel ids are event flag numbers, of which there are 2048."""

_SHOWN = 64
"""Characters of a writer's name that a message shows."""

_ONCE = frozenset(ChunkKind) - {ChunkKind.CHANNEL_RECORDS, ChunkKind.PAGES}
"""Kinds of chunks of which a machine's state has at most one."""


@dataclass(frozen=True, slots=True)
class SavedChannelState:
    """One channel of a machine's state: the buffers to restore it from, and the state that they contain."""

    records: tuple[bytes, ...]
    state: ChannelState

    @property
    def identity(self) -> ChannelIdentity:
        return self.state.channel.identity


@dataclass(frozen=True, slots=True)
class MachineState:
    """A machine's state whose parts do not contradict each other."""

    writer: str
    hypervisor: SavedSection | None
    bus: SavedSection | None
    channels: tuple[SavedChannelState, ...]
    memory: SavedMemory | None = None
    """Description of guest memory if it was not copied: the target must map this memory."""
    pages: tuple[SavedPages, ...] = ()
    """Pages of guest memory that are newer than those that QEMU transferred."""
    ignored: tuple[str, ...] = ()
    """Optional parts of a later release that were left out, at most 16 descriptions."""


class SectionTarget(Protocol):
    """The hypervisor section or the bus section of a machine, which its part of a state is restored into."""

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        """Return why ``section`` cannot be applied (its form, its version, its content), or ``None``; change nothing.

        ``channels``: those of the same state, for cross-checks of GPADLs and open parameters.
        """

    def apply_restore(self, section: SavedSection) -> None:
        """Enter the state of ``section``. Must not fail for a section that :meth:`check_restore` accepted."""


def read_machine(data: bytes) -> MachineState:
    """Parse a machine's state. Raises :class:`StateRefused`, with the source's reason if it refused to save."""
    try:
        return _read_machine(data)
    except StateRefused as error:
        if error.reason in (Reason.TOO_NEW, Reason.UNKNOWN_KIND):
            raise StateRefused(error.reason, error.detail + _upgrade(data), error.status) from error
        raise


def _upgrade(data: bytes) -> str:
    """Return what to do about a state of a later release, as the end of a sentence."""
    try:
        (first,), _ = read_chunks(
            data[: HEADER_SIZE + CHUNK_HEADER.parse(data[:HEADER_SIZE]).length], Position()
        )
        writer = ascii(first.record.writer[:_SHOWN])
    except (StateRefused, MalformedError, ValueError, AttributeError):
        writer = "a later release"
    return f"; it was written by {writer}, this is {__version__}: upgrade this emulator to that release"


def _read_machine(data: bytes) -> MachineState:
    chunks, position = read_chunks(data, Position(), once=_ONCE)
    if not position.complete:
        raise StateRefused(Reason.TRUNCATED, f"the last chunk is missing after {len(data)} bytes")
    kinds = [chunk.kind for chunk in chunks]
    if len(chunks) < 2 or kinds[0] != ChunkKind.MACHINE or kinds[-1] != ChunkKind.END:
        raise StateRefused(Reason.INCONSISTENT, "the chunks are not the state of a machine")
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
    ignored = list(position.ignored)
    for chunk in chunks[1:-1]:
        if chunk.kind in (ChunkKind.HYPERVISOR, ChunkKind.BUS) and not (channels or pages):
            late = memory is not None or (chunk.kind == ChunkKind.HYPERVISOR and sections)
            if late:
                raise StateRefused(
                    Reason.INCONSISTENT,
                    f"chunk {chunk.index}: a {chunk.kind.name} record after records that it must precede",
                )
            sections[chunk.kind] = chunk.record
        elif chunk.kind == ChunkKind.MEMORY and not (channels or pages):
            memory = chunk.record
        elif chunk.kind == ChunkKind.PAGES and memory is None:
            pages.append(chunk.record)
        elif chunk.kind == ChunkKind.CHANNEL_RECORDS and not pages:
            channel, unknown = _read_channel(chunk.record.identity, chunk.record.records)
            ignored += [
                f"channel {channel.identity}: {each}" for each in unknown[: MAX_IGNORED - len(ignored)]
            ]
            if channel.identity in channels or len(channels) == MAX_CHANNELS:
                raise StateRefused(
                    Reason.INCONSISTENT,
                    f"channel {channel.identity} is listed twice, or beyond {MAX_CHANNELS} channels",
                )
            channels[channel.identity] = channel
            for packet in channel.state.packets():
                named = count_pages(packet, named)
        else:
            raise StateRefused(
                Reason.INCONSISTENT, f"chunk {chunk.index}: a {chunk.kind.name} record out of place"
            )
    check_order(pages)
    return MachineState(
        chunks[0].record.writer,
        sections.get(ChunkKind.HYPERVISOR),
        sections.get(ChunkKind.BUS),
        tuple(channels.values()),
        memory,
        tuple(pages),
        tuple(ignored),
    )


@dataclass(frozen=True, slots=True)
class Restore:
    """The restore of a state into a machine whose channels are paused and not open."""

    saver: ChannelSaver
    channels: Sequence[SavableChannel]
    hypervisor: SectionTarget | None = None
    bus: SectionTarget | None = None
    memory: PagesTarget | None = None
    allow_missing: bool = False
    """Whether channels of the state that this machine does not offer are left out: the bus revokes them."""
    lost: dict[ChannelIdentity, str] | None = None
    """With it, a channel that refuses its state is left out, and noted here with the reason; without it, the whole
    state is refused."""

    def missing(self, state: MachineState) -> list[ChannelIdentity]:
        """Return the channels of ``state`` that this machine does not offer."""
        there = self._by_identity()
        return [saved.identity for saved in state.channels if saved.identity not in there]

    def check(self, state: MachineState) -> None:
        """Check that all parts of this machine accept ``state``; change nothing. Raises :class:`StateRefused`.

        Channels of this machine that are not in the state are not affected: they were added after the save.
        """
        there = self._by_identity()
        for saved in state.channels:
            channel = there.get(saved.identity)
            if channel is None:
                if self.allow_missing:
                    continue
                raise not_there(saved.identity)
            try:
                self.saver.check_restore(channel, saved.state)
            except StateRefused as error:
                self._refused(saved, error)
        states = [saved.state for saved in state.channels]
        for name, section, target in self._sections(state):
            if target is None:
                raise StateRefused(Reason.NOT_THERE, f"this machine does not restore the state of the {name}")
            why = target.check_restore(section, states)
            if why is not None:
                raise StateRefused(Reason.NOT_ACCEPTED, f"{name}: {why}")
        if state.pages:
            if self.memory is None:
                raise StateRefused(Reason.NOT_THERE, "this machine does not restore pages of guest memory")
            why = self.memory.check_pages(state.pages)
            if why is not None:
                raise StateRefused(Reason.NOT_ACCEPTED, f"guest memory: {why}")

    def apply(self, state: MachineState) -> None:
        """Check, then restore pages of guest memory, hypervisor section, bus section and channels, in this order.

        Channels stay paused until ``saver.start``; those that are ``lost`` now have to be disabled before. Raises
        :class:`StateRefused`; its ``changed`` is true if anything was applied before.
        """
        self.check(state)
        if self.memory is not None:
            self.memory.apply_pages(state.pages)
        for _, section, target in self._sections(state):
            if target is not None:
                target.apply_restore(section)
        there = self._by_identity()
        for saved in state.channels:
            if saved.identity in there and saved.identity not in (self.lost or ()):
                self._restore_channel(there[saved.identity], saved)

    def _restore_channel(self, channel: SavableChannel, saved: SavedChannelState) -> None:
        try:
            self.saver.restore_checked(channel, saved.state)
        except StateRefused as error:
            self._refused(saved, error, changed=True)

    def _refused(self, saved: SavedChannelState, error: StateRefused, *, changed: bool = False) -> None:
        if self.lost is not None:
            self.lost[saved.identity] = error.detail
            return
        raise StateRefused(
            error.reason, f"channel {saved.identity}: {error.detail}", error.status, changed=changed
        ) from error

    def _by_identity(self) -> dict[ChannelIdentity, SavableChannel]:
        return {channel.identity: channel for channel in self.channels}

    def _sections(self, state: MachineState) -> Iterable[tuple[str, SavedSection, SectionTarget | None]]:
        if state.hypervisor is not None:
            yield "hypervisor section", state.hypervisor, self.hypervisor
        if state.bus is not None:
            yield "bus section", state.bus, self.bus


def not_there(identity: ChannelIdentity) -> StateRefused:
    """Return the refusal of a state with a channel that this machine does not offer."""
    return StateRefused(
        Reason.NOT_THERE,
        f"the state has channel {identity}, which this machine does not offer: give it the same devices, or allow "
        "it to revoke such channels (--allow-missing-devices)",
    )


def _read_channel(
    identity: ChannelIdentity, records: tuple[bytes, ...]
) -> tuple[SavedChannelState, tuple[str, ...]]:
    """Return the channel's state, and what of it was ignored."""
    assembly = Assembly()
    try:
        for record in records:
            assembly = assembly.take(record)
        state = assembly.state()
    except StateRefused as error:
        raise StateRefused(error.reason, f"channel {identity}: {error.detail}", error.status) from error
    if state.channel.identity != identity:
        raise StateRefused(
            Reason.FOREIGN_CHANNEL,
            f"the record of channel {identity} has the state of {state.channel.identity}",
        )
    return SavedChannelState(records, state), assembly.position.ignored


def _check_end(data: bytes, end: Chunk, count: int) -> None:
    size = len(data) - HEADER_SIZE - SAVED_END.size
    if not end.last or end.record != SavedEnd(count - 1, size):
        raise StateRefused(
            Reason.INCONSISTENT,
            f"{count - 1} chunks in {size} bytes were read, and {end.record!r} were written",
        )
