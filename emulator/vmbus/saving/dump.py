"""Chunks as text for people: ``vmbus channel save --dump``.

Source: docs/saved-state.md#the-chunk. Nothing of a state is printed raw: texts are quoted, bytes are hexadecimal.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from vmbus.saving.chunks import Position, read_chunks
from vmbus.wire.chunk import CHUNK_HEADER, HEADER_SIZE, ChunkFlags, ChunkKind
from vmbus.wire.saved import SAVED_PACKET, ChannelIdentity, SavedOutgoing, parse_record

MAX_BYTES = 64
"""Bytes of one field that are shown."""

_INDENT = "    "


def dump(data: bytes) -> Iterator[str]:
    """Yield the lines that describe the chunks in ``data``. Raises :class:`~vmbus.saving.StateRefused`."""
    position = Position()
    at = 0
    while at < len(data):
        header = data[at : at + HEADER_SIZE]
        end = len(data)
        if len(header) == HEADER_SIZE and header.startswith(b"VMBc"):
            end = min(end, at + HEADER_SIZE + CHUNK_HEADER.parse(header).length)
        chunks, position = read_chunks(data[at:end], position)
        found = CHUNK_HEADER.parse(header)
        kind = ChunkKind(found.kind).name if chunks else f"unknown kind {found.kind:#x}"
        flags = ChunkFlags(found.flags)
        yield (
            f"chunk {found.index} at {at}: {kind} version {found.version}, {found.length} bytes, "
            f"save {found.save_id:016x}, flags {flags.name or 0}, CRC-32 {found.crc:08x}"
        )
        for chunk in chunks:
            yield from _fields(chunk.record, _INDENT)
            if chunk.ignored:
                numbers = ", ".join(map(str, chunk.ignored[:MAX_BYTES]))
                yield f"{_INDENT}optional fields of a later release: {numbers}"
        at = end
    if not position.complete:
        yield f"the last chunk is missing after {len(data)} bytes"


def _fields(record: Any, indent: str) -> Iterator[str]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(record, SavedOutgoing) and field.name == "library":
            value = parse_record(SAVED_PACKET, value)
        yield from _value(field.name, value, indent)


def _value(name: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, ChannelIdentity):
        yield f"{indent}{name}: {value}"
    elif dataclasses.is_dataclass(value):
        yield f"{indent}{name}:"
        yield from _fields(value, indent + _INDENT)
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        yield f"{indent}{name}:"
        for key, each in value._asdict().items():
            yield from _value(key, each, indent + _INDENT)
    elif isinstance(value, tuple) and value and not all(isinstance(each, int) for each in value):
        for index, each in enumerate(value):
            yield from _value(f"{name}[{index}]", each, indent)
    else:
        yield f"{indent}{name}: {_plain(value)}"


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bytes):
        more = f" ... ({len(value)} bytes)" if len(value) > MAX_BYTES else ""
        return (value[:MAX_BYTES].hex(" ", -4) or "(empty)") + more
    if isinstance(value, enum.Flag):
        return f"{value.name or 0}"
    if isinstance(value, str):
        return ascii(value)
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, tuple):
        shown = ", ".join(f"{each:#x}" for each in value[:MAX_BYTES])
        more = f", ... ({len(value)})" if len(value) > MAX_BYTES else ""
        return f"[{shown}{more}]"
    return f"{value} ({value:#x})" if isinstance(value, int) and value > 9 else str(value)
