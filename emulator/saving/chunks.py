"""Whole chunks in a buffer, checked: magic, versions, length, checksum, order within a save run.

Source: spec/save-restore-and-migration.md 1.7, docs/saved-state.md. Nothing here changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from emulator.errors import MalformedError
from emulator.saving.refusal import Reason, StateRefused
from emulator.wire.chunk import (
    CHUNK_HEADER,
    FORMAT_VERSION,
    HEADER_SIZE,
    MAGIC,
    ChunkFlags,
    ChunkKind,
    build_chunk,
    chunk_crc,
)
from emulator.wire.saved import RECORDS, newest, parse_record

_KINDS = {int(kind): kind for kind in ChunkKind}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sound chunk. ``kind`` is ``None`` for one that this release does not know and that may be skipped."""

    kind: ChunkKind | None
    record: Any
    save_id: int
    index: int
    last: bool


@dataclass(frozen=True, slots=True)
class Position:
    """How far a save run has been read: its id (``None`` before the first chunk) and the next chunk's index."""

    save_id: int | None = None
    index: int = 0
    complete: bool = False


def encode(kind: ChunkKind, record: Any, *, save_id: int, index: int, last: bool) -> bytes:
    """A chunk with the newest version of ``record``."""
    version = newest(kind)
    return build_chunk(
        kind,
        RECORDS[kind][version].build(record),
        save_id=save_id,
        index=index,
        flags=ChunkFlags.LAST if last else 0,
        version=version,
    )


def read_chunks(buffer: bytes | bytearray | memoryview, position: Position) -> tuple[list[Chunk], Position]:
    """All chunks of ``buffer``, which continue a save run at ``position``; and where it stands then.

    Chunks of unknown kinds that may be skipped count, but are not among those returned. Raises
    :class:`StateRefused`.
    """
    chunks = []
    for chunk in _each(bytes(buffer)):
        if position.complete:
            raise StateRefused(Reason.TRAILING_BYTES, f"chunk {chunk.index} follows the last chunk")
        if position.save_id is not None and chunk.save_id != position.save_id:
            raise StateRefused(
                Reason.FOREIGN_SAVE, f"save id {chunk.save_id:#x}, expected {position.save_id:#x}"
            )
        if chunk.index != position.index:
            reason = Reason.REPEATED if chunk.index < position.index else Reason.OUT_OF_ORDER
            raise StateRefused(reason, f"chunk {chunk.index} where {position.index} is expected")
        position = Position(chunk.save_id, chunk.index + 1, chunk.last)
        if chunk.kind is not None:
            chunks.append(chunk)
    return chunks, position


def _each(data: bytes) -> Iterator[Chunk]:
    at = 0
    while at < len(data):
        chunk, at = _read(data, at)
        yield chunk
        if chunk.last and at < len(data):
            raise StateRefused(Reason.TRAILING_BYTES, f"{len(data) - at} bytes follow the last chunk")


def _read(data: bytes, at: int) -> tuple[Chunk, int]:
    left = len(data) - at
    if not data.startswith(MAGIC[:left], at):
        raise StateRefused(Reason.DAMAGED, f"no chunk at byte {at}: {data[at : at + 4].hex()}")
    if left < HEADER_SIZE:
        raise StateRefused(Reason.TRUNCATED, f"{left} bytes of a chunk's header at byte {at}")
    header = CHUNK_HEADER.parse(data[at : at + HEADER_SIZE])
    if header.format_version != FORMAT_VERSION:
        # The place of the checksum is a matter of the format: nothing more can be said of such a chunk.
        reason = Reason.TOO_NEW if header.format_version > FORMAT_VERSION else Reason.TOO_OLD
        raise StateRefused(
            reason, f"chunk format {header.format_version}, this release reads {FORMAT_VERSION}"
        )
    end = at + HEADER_SIZE + header.length
    if end > len(data):
        raise StateRefused(Reason.TRUNCATED, f"chunk at byte {at} needs {end - len(data)} bytes more")
    if chunk_crc(memoryview(data)[at:end]) != header.crc:
        raise StateRefused(Reason.DAMAGED, f"checksum of the chunk at byte {at}")
    if header.flags & ~int(ChunkFlags.LAST | ChunkFlags.IGNORABLE):
        raise StateRefused(Reason.TOO_NEW, f"chunk {header.index} has flags {header.flags:#x}")
    last = bool(header.flags & ChunkFlags.LAST)
    kind = _KINDS.get(header.kind)
    record = None
    if kind is not None:
        record = _record(kind, header.version, data[at + HEADER_SIZE : end], header.index)
    elif not header.flags & ChunkFlags.IGNORABLE:
        raise StateRefused(Reason.UNKNOWN_KIND, f"chunk {header.index} is of kind {header.kind:#x}")
    return Chunk(kind, record, header.save_id, header.index, last), end


def _record(kind: ChunkKind, version: int, data: bytes, index: int) -> Any:
    known = RECORDS[kind]
    if version not in known:
        reason = Reason.TOO_NEW if version > max(known) else Reason.TOO_OLD
        raise StateRefused(
            reason,
            f"{kind.name} record of version {version}, this release reads {min(known)} to {max(known)}",
        )
    try:
        return parse_record(known[version], data)
    except MalformedError as error:
        raise StateRefused(Reason.DAMAGED, f"chunk {index}: {error.detail}") from error
