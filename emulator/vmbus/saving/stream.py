"""A whole machine's state as one string of bytes, for whatever carries it (QEMU's stream, a file).

Source: docs/saved-state.md. The chunks, in this order, all with one save id:

    MACHINE           who wrote it
    HYPERVISOR, BUS   at most one each, opaque here, with a form and a version of their own
    MEMORY            if guest memory is not copied: which file it is
    CHANNEL_RECORDS   for each channel, what SaveContinue filled
    PAGES             pages of guest memory that nobody else carries, any number of chunks that still fit
    END               the last chunk: how many chunks and bytes came before

A source that cannot save sends MACHINE, REFUSAL, END instead: what carries the state may have no way to fail on
the source's side, so the target fails, with the source's reason.

Reading is :mod:`vmbus.saving.loading`.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vmbus import __version__
from vmbus.saving.channel import ChannelSaver
from vmbus.saving.chunks import encode
from vmbus.saving.refusal import Reason, StateRefused
from vmbus.saving.state import SavableChannel
from vmbus.saving.status import NtStatus
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
"""What ``dbus-vmstate`` carries for one helper: 1 MiB."""

_END_SIZE = HEADER_SIZE + SAVED_END.size
"""Bytes of the last chunk."""

BUFFER_SIZE = 64 * 1024
"""First size of the buffer that channels are saved into; it grows when a chunk needs more."""


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """How the save of one channel went. ``size``: bytes of its chunks; ``statuses``: one a SaveContinue."""

    identity: ChannelIdentity
    chunks: int
    size: int
    statuses: tuple[NtStatus, ...]


@dataclass(frozen=True, slots=True)
class SavedState:
    """A machine's state as bytes, and what it consists of."""

    data: bytes
    channels: tuple[ChannelStatistics, ...]
    pages: tuple[int, ...] = ()
    """Frame numbers of the pages that it carries."""


def save_machine(
    saver: ChannelSaver,
    channels: Iterable[SavableChannel],
    *,
    hypervisor: SavedSection | None = None,
    bus: SavedSection | None = None,
    memory: SavedMemory | None = None,
    pages: Sequence[SavedPages] = (),
    buffer_size: int = BUFFER_SIZE,
    limit: int = STREAM_LIMIT,
    save_id: int | None = None,
) -> SavedState:
    """Save all ``channels``, which are paused or not open, and the parts that are given.

    The buffer that they are saved into has ``buffer_size`` bytes and grows to what a chunk needs. All channels
    are frozen before the first one is saved, and stay so until ``saver.start``. Of ``pages`` (in ascending order, see
    :mod:`vmbus.saving.pages`) as many go along as fit into ``limit`` bytes. Raises :class:`StateRefused` when a
    channel cannot be saved, or when the rest alone has more than ``limit`` bytes; then every channel is as it was.
    """
    saved_from = list(channels)
    begun: list[SavableChannel] = []
    try:
        for channel in saved_from:
            status = saver.save_begin(channel)
            if status != NtStatus.STATUS_SUCCESS:
                raise _failed(saver, channel, status, "SaveBegin")
            begun.append(channel)
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
                f"{len(data)} bytes of state, at most {limit} can be carried",
                NtStatus.STATUS_BUFFER_OVERFLOW,
            )
    except BaseException:
        for channel in begun:
            saver.save_cancel(channel)
        raise
    for channel in saved_from:
        saver.save_end(channel)
    return SavedState(data, tuple(statistics), carried)


def refusal_stream(error: StateRefused, *, save_id: int | None = None) -> bytes:
    """What to send instead of a state: who reads it fails with :attr:`Reason.REFUSED_AT_SOURCE` and this reason."""
    refusal = SavedRefusal(str(error.reason), error.detail)
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
    """All ``parts``, of ``pages`` what fits into ``limit`` bytes, and the frame numbers of those."""
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
