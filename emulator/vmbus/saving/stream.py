"""A whole machine's state as one byte string, for QEMU's migration stream, a side channel or a file.

Source: docs/saved-state.md. The chunks, in this order, all with one save id:

    MACHINE           name and version of the emulator that saved
    HYPERVISOR, BUS   at most one each, opaque to this package, with a form and a version of their own
    MEMORY            if guest memory is not copied: which file it is
    CHANNEL_RECORDS   for each channel, the buffers that SaveContinue filled
    PAGES             pages of guest memory that QEMU does not transfer, as many chunks as fit
    END               the last chunk: the number of chunks and bytes before it

A source that cannot save sends MACHINE, REFUSAL, END instead: dbus-vmstate cannot fail a migration at the source, so
the target fails it, with the source's reason.

:mod:`vmbus.saving.loading` reads it.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vmbus import __version__
from vmbus.saving.channel import ChannelSaver
from vmbus.saving.chunks import encode
from vmbus.saving.state import SavableChannel
from vmbus.saving.status import NtStatus, Reason, StateRefused
from vmbus.wire.chunk import HEADER_SIZE, ChunkKind
from vmbus.wire.saved import (
    SAVED_END,
    ChannelIdentity,
    SavedChannelRecords,
    SavedEnd,
    SavedMachine,
    SavedMemory,
    SavedPages,
    SavedRefusal,
    SavedSection,
)

STREAM_LIMIT = 1 << 20
"""Bytes that ``dbus-vmstate`` carries for one helper: 1 MiB."""

_END_SIZE = HEADER_SIZE + SAVED_END.size
"""Bytes of the last chunk."""

_MAX_REASON = 4096
"""Characters of a reason in place of a state."""

BUFFER_SIZE = 64 * 1024
"""Initial size, in bytes, of the buffer that channels are saved into; it grows when a chunk needs more."""


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Figures of the save of one channel. ``size``: bytes of its chunks; ``statuses``: one per SaveContinue."""

    identity: ChannelIdentity
    chunks: int
    size: int
    statuses: tuple[NtStatus, ...]


@dataclass(frozen=True, slots=True)
class SavedState:
    """A machine's state as bytes, and its contents."""

    data: bytes
    channels: tuple[ChannelStatistics, ...]
    pages: tuple[int, ...] = ()
    """Page frame numbers of the pages of guest memory that it has."""


def begin_channels(saver: ChannelSaver, channels: Iterable[SavableChannel]) -> list[SavableChannel]:
    """Begin the save of all ``channels``, which must be paused or not open; return them for :func:`save_machine`.

    Every device is asked here. Raises :class:`StateRefused` if one cannot be saved; then every channel is as before.
    """
    begun: list[SavableChannel] = []
    try:
        for channel in channels:
            status = saver.save_begin(channel)
            if status != NtStatus.STATUS_SUCCESS:
                raise _failed(saver, channel, status, "SaveBegin")
            begun.append(channel)
    except BaseException:
        cancel_channels(saver, begun)
        raise
    return begun


def cancel_channels(saver: ChannelSaver, begun: Iterable[SavableChannel]) -> None:
    """Undo :func:`begin_channels`."""
    for channel in begun:
        saver.save_cancel(channel)


def save_machine(
    saver: ChannelSaver,
    channels: Iterable[SavableChannel],
    *,
    begun: bool = False,
    hypervisor: SavedSection | None = None,
    bus: SavedSection | None = None,
    memory: SavedMemory | None = None,
    pages: Sequence[SavedPages] = (),
    buffer_size: int = BUFFER_SIZE,
    limit: int = STREAM_LIMIT,
    save_id: int | None = None,
) -> SavedState:
    """Save all ``channels``, which must be paused or not open, and the sections that are given.

    The buffer that channels are saved into has ``buffer_size`` bytes and grows to the size that a chunk needs. The
    save of every channel begins before the first one continues (``begun``: it has, by :func:`begin_channels`), and
    every channel keeps its view until ``saver.start``. As many of ``pages`` (in ascending order, see
    :mod:`vmbus.saving.pages`) are added as fit into ``limit`` bytes. Raises :class:`StateRefused` if a channel cannot
    be saved, or if the state without pages has more than ``limit`` bytes; then every channel is as before.
    """
    saved_from = list(channels) if begun else begin_channels(saver, channels)
    try:
        records, statistics = [], []
        for channel in saved_from:
            found, facts = _save_channel(saver, channel, buffer_size)
            records.append(found)
            statistics.append(facts)
        data, carried = _stream(
            [
                *([(ChunkKind.HYPERVISOR, hypervisor)] if hypervisor is not None else []),
                *([(ChunkKind.BUS, bus)] if bus is not None else []),
                *([(ChunkKind.MEMORY, memory)] if memory is not None else []),
                *((ChunkKind.CHANNEL_RECORDS, each) for each in records),
            ],
            save_id,
            pages,
            limit,
        )
        if len(data) > limit:
            raise StateRefused(
                Reason.TOO_LARGE,
                f"{len(data)} bytes of state, at most {limit} can be transferred",
                NtStatus.STATUS_BUFFER_OVERFLOW,
            )
    except BaseException:
        cancel_channels(saver, saved_from)
        raise
    for channel in saved_from:
        saver.save_end(channel)
    return SavedState(data, tuple(statistics), carried)


def refusal_stream(error: StateRefused, *, save_id: int | None = None) -> bytes:
    """Return what to send instead of a state: reading it raises :attr:`Reason.REFUSED_AT_SOURCE` with ``error``."""
    # A reason may name a file whose name is not valid Unicode, or quote another process.
    detail = error.detail[:_MAX_REASON].encode(errors="backslashreplace").decode()
    refusal = SavedRefusal(str(error.reason), detail)
    return _stream([(ChunkKind.REFUSAL, refusal)], save_id)[0]


def _save_channel(
    saver: ChannelSaver, channel: SavableChannel, buffer_size: int
) -> tuple[SavedChannelRecords, ChannelStatistics]:
    buffer = bytearray(max(buffer_size, 0))
    records: list[bytes] = []
    statuses: list[NtStatus] = []
    while True:
        status, filled, required = saver.save_continue(channel, buffer, len(buffer))
        statuses.append(status)
        if filled:
            records.append(bytes(buffer[:filled]))
        if status == NtStatus.STATUS_SUCCESS:
            break
        if status == NtStatus.STATUS_BUFFER_TOO_SMALL and required > len(buffer):
            buffer = bytearray(required)
        elif status != NtStatus.STATUS_BUFFER_OVERFLOW or not filled:
            raise _failed(saver, channel, status, "SaveContinue")
    facts = ChannelStatistics(
        channel.identity, saver.chunks_saved(channel), sum(map(len, records)), tuple(statuses)
    )
    return SavedChannelRecords(channel.identity, tuple(records)), facts


def _failed(saver: ChannelSaver, channel: SavableChannel, status: NtStatus, function: str) -> StateRefused:
    why = saver.refusal(channel)
    detail = f"channel {channel.identity}: {function} returned {status!s}"
    if why is None:
        return StateRefused(Reason.DEVICE_FAILED, detail, status)
    return StateRefused(why.reason, f"{detail}: {why.detail}", status)


def _stream(
    parts: Sequence[tuple[ChunkKind, Any]],
    save_id: int | None,
    pages: Sequence[SavedPages] = (),
    limit: int = 0,
) -> tuple[bytes, tuple[int, ...]]:
    """Return the bytes of ``parts`` and of the ``pages`` that fit into ``limit`` bytes, and those pages' numbers."""
    identifier = secrets.randbits(64) if save_id is None else save_id
    data = bytearray()
    first = (ChunkKind.MACHINE, SavedMachine(f"vmbus-emulator {__version__}"))
    for index, (kind, record) in enumerate([first, *parts]):
        data += encode(kind, record, save_id=identifier, index=index, last=False)
    count = len(parts) + 1
    carried: list[int] = []
    for each in pages:
        chunk = encode(ChunkKind.PAGES, each, save_id=identifier, index=count, last=False)
        if len(data) + len(chunk) + _END_SIZE > limit:
            break
        data += chunk
        count += 1
        carried += each.pfns
    end = SavedEnd(count, len(data))
    data += encode(ChunkKind.END, end, save_id=identifier, index=count, last=True)
    return bytes(data), tuple(carried)
