"""Encoding of chunks, and reading of whole chunks: checks magic, versions, length, checksum and order.

Source: docs/protocol/saving.md#silent-cases, docs/saved-state.md. Functions without side effects.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vmbus.errors import MalformedError, TooNewError
from vmbus.saving.status import Reason, StateRefused
from vmbus.wire.chunk import (
    CHUNK_HEADER,
    FORMAT_VERSION,
    HEADER_SIZE,
    MAGIC,
    ChunkFlags,
    ChunkHeader,
    ChunkKind,
    build_chunk,
    chunk_crc,
)
from vmbus.wire.saved import RECORDS, SavedPacket, SavedTaken, version_of

MAX_PACKET_PAGES = 1 << 20
"""Pages that all packets of a state may name together: a run of pages takes few bytes there, 8 bytes a page here."""

MAX_IGNORED = 16
"""Descriptions of parts that are ignored: enough to see what a release adds."""

_KINDS = {int(kind): kind for kind in ChunkKind}

# Plain numbers: an operation on a flag of an enumeration takes a microsecond, and states have thousands of chunks.
_LAST = int(ChunkFlags.LAST)
_IGNORABLE = int(ChunkFlags.IGNORABLE)
_LATER_FLAGS = ~(_LAST | _IGNORABLE)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A valid chunk of a kind that this release knows; ``record``: its dataclass of :mod:`vmbus.wire.saved`."""

    kind: ChunkKind
    record: Any
    save_id: int
    index: int
    last: bool
    ignored: tuple[int, ...] = ()
    """Numbers of its record's optional fields that this release does not know."""


@dataclass(frozen=True, slots=True)
class Position:
    """How far a save run has been read.

    ``save_id``: ``None`` before the first chunk. ``index``: of the next chunk. ``pages``: number of pages of guest
    memory that the packets so far name. ``ignored``: what was left out because this release does not know it, at
    most :data:`MAX_IGNORED` descriptions.
    """

    save_id: int | None = None
    index: int = 0
    complete: bool = False
    pages: int = 0
    ignored: tuple[str, ...] = ()


def encode(kind: ChunkKind, record: Any, *, save_id: int, index: int, last: bool) -> bytes:
    """Return the bytes of a chunk with ``record``, in the newest version of its class."""
    version = version_of(kind, record)
    return build_chunk(
        kind,
        RECORDS[kind][version].build(record),
        save_id=save_id,
        index=index,
        flags=_LAST if last else 0,
        version=version,
    )


def encode_all(records: Iterable[tuple[ChunkKind, Any]], *, save_id: int) -> bytes:
    """Return the chunks of one save run with all ``records``."""
    listed = list(records)
    return b"".join(
        encode(kind, record, save_id=save_id, index=index, last=index + 1 == len(listed))
        for index, (kind, record) in enumerate(listed)
    )


def read_chunks(
    buffer: bytes | bytearray | memoryview, position: Position, *, once: frozenset[ChunkKind] = frozenset()
) -> tuple[list[Chunk], Position]:
    """Parse all chunks of ``buffer``, which continue a save run at ``position``; return them and the new position.

    Chunks of unknown kinds that may be skipped are counted but not returned. A second chunk of a kind in ``once`` is
    refused before it is parsed, because few bytes may name very many pages. Raises :class:`StateRefused`.
    """
    data = bytes(buffer)
    chunks: list[Chunk] = []
    at = 0
    save_id, index, last, pages = position.save_id, position.index, position.complete, position.pages
    skipped = list(position.ignored)
    while at < len(data):
        if last:
            raise StateRefused(Reason.TRAILING_BYTES, f"{len(data) - at} bytes follow the last chunk")
        header, end = _header(data, at)
        if save_id is not None and header.save_id != save_id:
            raise StateRefused(
                Reason.FOREIGN_SAVE, f"chunk of save {header.save_id:#x}, expected {save_id:#x}"
            )
        if header.index != index:
            reason = Reason.REPEATED if header.index < index else Reason.OUT_OF_ORDER
            raise StateRefused(reason, f"chunk {header.index}, expected {index}")
        save_id, index, last = header.save_id, index + 1, bool(header.flags & _LAST)
        kind = _KINDS.get(header.kind)
        if kind is not None:
            if kind in once and any(each.kind == kind for each in chunks):
                raise StateRefused(Reason.INCONSISTENT, f"chunk {header.index}: a second {kind.name} record")
            record, ignored = _record(kind, header.version, data[at + HEADER_SIZE : end], header.index)
            skipped += [
                f"field {number} of chunk {header.index} ({kind.name})" for number in ignored[:MAX_IGNORED]
            ]
            packet = record.packet if isinstance(record, SavedTaken) else record
            if isinstance(packet, SavedPacket):
                pages = count_pages(packet, pages)
            chunks.append(Chunk(kind, record, header.save_id, header.index, last, ignored))
        elif not header.flags & _IGNORABLE:
            raise StateRefused(
                Reason.UNKNOWN_KIND,
                f"chunk {header.index} is of kind {header.kind:#x}, which this release does not know",
            )
        else:
            skipped.append(f"chunk {header.index} of kind {header.kind:#x}")
        del skipped[MAX_IGNORED:]
        at = end
    return chunks, Position(save_id, index, last, pages, tuple(skipped))


def count_pages(packet: SavedPacket, pages: int) -> int:
    """Return ``pages`` plus the pages that ``packet`` names. Raises :class:`StateRefused` above the maximum."""
    for each in packet.ranges:
        pages += len(each.pfns)
    if pages > MAX_PACKET_PAGES:
        raise StateRefused(
            Reason.INCONSISTENT, f"packets that name more than {MAX_PACKET_PAGES} pages of guest memory"
        )
    return pages


def _header(data: bytes, at: int) -> tuple[ChunkHeader, int]:
    """Check the chunk at ``at``; return its header and the offset of its end. Raises :class:`StateRefused`."""
    left = len(data) - at
    if not data.startswith(MAGIC[:left], at):
        raise StateRefused(Reason.DAMAGED, f"no chunk magic at byte {at}: {data[at : at + 4].hex()}")
    if left < HEADER_SIZE:
        raise StateRefused(Reason.TRUNCATED, f"only {left} bytes of a chunk header at byte {at}")
    header = CHUNK_HEADER.parse(data[at : at + HEADER_SIZE])
    if header.format_version != FORMAT_VERSION:
        # Another format may have its checksum elsewhere, so that nothing else of this chunk can be checked.
        reason = Reason.TOO_NEW if header.format_version > FORMAT_VERSION else Reason.TOO_OLD
        raise StateRefused(
            reason, f"chunk format {header.format_version}, this release reads {FORMAT_VERSION}"
        )
    end = at + HEADER_SIZE + header.length
    if end > len(data):
        raise StateRefused(
            Reason.TRUNCATED, f"the last {end - len(data)} bytes of the chunk at byte {at} are missing"
        )
    if chunk_crc(memoryview(data)[at:end]) != header.crc:
        raise StateRefused(Reason.DAMAGED, f"the checksum of the chunk at byte {at} is wrong")
    if header.flags & _LATER_FLAGS:
        raise StateRefused(
            Reason.TOO_NEW,
            f"chunk {header.index} has flags {header.flags:#x}, which this release does not know",
        )
    return header, end


def _record(kind: ChunkKind, version: int, data: bytes, index: int) -> tuple[Any, tuple[int, ...]]:
    known = RECORDS[kind]
    if version not in known:
        reason = Reason.TOO_NEW if version > max(known) else Reason.TOO_OLD
        raise StateRefused(
            reason,
            f"{kind.name} record of version {version}, this release reads {min(known)} to {max(known)}",
        )
    try:
        return known[version].parse_all(data)
    except TooNewError as error:
        raise StateRefused(Reason.TOO_NEW, f"chunk {index} ({kind.name}): {error.detail}") from error
    except MalformedError as error:
        raise StateRefused(Reason.DAMAGED, f"chunk {index}: {error.detail}") from error
