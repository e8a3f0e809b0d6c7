"""What two emulators say to each other when QEMU's stream does not carry the state (docs/saved-state.md).

The target greets whoever connects, the source sends one frame, the target answers with a verdict:

    target ── Greeting ──→ source      which machine the target is
    source ── frame ─────→ target      once its guest stands still
    target ── Verdict ───→ source      accepted, or why not; only then may QEMU go on

A frame, which may also lie in a file, is a header, its sections, and the BLAKE2b digest (32 bytes) of all of that:

    FrameHeader | (SectionHeader, its bytes) * sections | digest

A :class:`Reference` is what QEMU's stream has in place of a state that went this way.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from enum import IntFlag
from uuid import UUID

import construct as c

from vmbus.errors import MalformedError
from vmbus.wire.codec import Record
from vmbus.wire.plain import Guid

FORMAT = 1
DIGEST_SIZE = 32
MAX_LENGTH = 64 << 20
"""Bytes of all sections: more than any guest's state."""
STATE = b"state".ljust(16, b"\0")
"""The name of the one section there is: a machine's state."""
REFERENCE_MAGIC = b"VMBr"


class FrameFlags(IntFlag):
    """Bits of :attr:`FrameHeader.flags`."""

    RAN = 1
    """The guest ran before it was migrated, and shall run at the target."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """``machine``: the UUID of the target's machine, all zeros if it has none."""

    format: int
    machine: UUID


GREETING = Record(
    Greeting, "_magic" / c.Const(b"VMBg"), "format" / c.Int32ul, "machine" / Guid, "_reserved" / c.Padding(8)
)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """``migration``: chosen at random for each. ``length``: bytes of all sections, with their headers.

    ``writer``: name and version of the emulator, UTF-8, padded with zeros.
    """

    format: int
    flags: int
    sections: int
    machine: UUID
    migration: UUID
    length: int
    writer: bytes


FRAME_HEADER = Record(
    FrameHeader,
    "_magic" / c.Const(b"VMBf"),
    "format" / c.Int8ul,
    "flags" / c.Int8ul,
    "sections" / c.Int16ul,
    "machine" / Guid,
    "migration" / Guid,
    "length" / c.Int64ul,
    "writer" / c.Bytes(32),
)


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """``crc``: CRC-32 (zlib) of the section's ``length`` bytes."""

    name: bytes
    version: int
    crc: int
    length: int


SECTION_HEADER = Record(
    SectionHeader,
    "name" / c.Bytes(16),
    "version" / c.Int32ul,
    "crc" / c.Int32ul,
    "length" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's answer; ``reason`` is UTF-8, empty if the frame was accepted."""

    accepted: int
    reason: bytes


VERDICT_HEADER_SIZE = 8
VERDICT = Record(
    Verdict,
    "_magic" / c.Const(b"VMBv"),
    "accepted" / c.Int16ul,
    "reason" / c.Prefixed(c.Int16ul, c.GreedyBytes),
)


@dataclass(frozen=True, slots=True)
class Reference:
    """``digest``: that of the frame that has the state."""

    digest: bytes


REFERENCE = Record(Reference, "_magic" / c.Const(REFERENCE_MAGIC), "digest" / c.Bytes(DIGEST_SIZE))


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that is sound in itself."""

    machine: UUID
    migration: UUID
    ran: bool
    writer: str
    state: bytes
    digest: bytes


def build_frame(*, machine: UUID, migration: UUID, ran: bool, writer: str, state: bytes) -> bytes:
    """The bytes of a frame."""
    section = SECTION_HEADER.build(SectionHeader(STATE, 1, zlib.crc32(state), len(state))) + state
    header = FrameHeader(
        FORMAT,
        FrameFlags.RAN if ran else 0,
        1,
        machine,
        migration,
        len(section),
        writer.encode()[:32].ljust(32, b"\0"),
    )
    body = FRAME_HEADER.build(header) + section
    return body + _digest(body)


def frame_size(header: bytes) -> int:
    """Bytes of the whole frame that ``header`` (``FRAME_HEADER.size`` bytes) begins.

    Raises :class:`~vmbus.errors.MalformedError`, also for one that is too large or of another format.
    """
    found = FRAME_HEADER.parse(header)
    if found.format != FORMAT:
        raise MalformedError("too-new", f"a frame of format {found.format}, this emulator reads {FORMAT}")
    if found.length > MAX_LENGTH:
        raise MalformedError("too-large", f"a frame of {found.length} bytes, at most {MAX_LENGTH}")
    return FRAME_HEADER.size + found.length + DIGEST_SIZE


def parse_frame(data: bytes) -> Frame:
    """All of ``data``. Raises :class:`~vmbus.errors.MalformedError` for anything else than one sound frame."""
    size = frame_size(data)
    if len(data) != size:
        what = "truncated" if len(data) < size else "trailing-bytes"
        raise MalformedError(what, f"{len(data)} bytes of a frame that has {size}")
    body, digest = data[:-DIGEST_SIZE], data[-DIGEST_SIZE:]
    if _digest(body) != digest:
        raise MalformedError("damaged", "the digest is not that of the frame")
    header = FRAME_HEADER.parse(body)
    if header.flags & ~FrameFlags.RAN or header.sections != 1:
        raise MalformedError("too-new", f"flags {header.flags:#x}, {header.sections} sections")
    section = SECTION_HEADER.parse(body[FRAME_HEADER.size :])
    state = body[FRAME_HEADER.size + SECTION_HEADER.size :]
    if section.name != STATE or section.version != 1:
        raise MalformedError("too-new", f"a section {section.name!r} of version {section.version}")
    if section.length != len(state) or section.crc != zlib.crc32(state):
        raise MalformedError("damaged", "a section that is not as long as it says, or has another checksum")
    return Frame(
        header.machine,
        header.migration,
        bool(header.flags & FrameFlags.RAN),
        header.writer.rstrip(b"\0").decode(errors="replace"),
        state,
        digest,
    )


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
