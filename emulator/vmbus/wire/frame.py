"""Messages between two emulators on the side channel, which carries the state outside of QEMU's stream.

Source: docs/saved-state.md#the-frame; the layouts are this project's own. All integers are little-endian.

The target greets each connection, the source sends one frame, the target answers with a verdict:

    target ── Greeting ──→ source      which machine the target is
    source ── frame ─────→ target      after its guest was paused
    target ── Verdict ───→ source      accepted, or why not; then the source lets QEMU's migration continue

A frame, which may also be stored in a file, is a header, its sections, and the BLAKE2b digest (32 bytes) of both:

    FrameHeader | (SectionHeader, its bytes) * sections | digest

QEMU's stream has a :class:`Reference` in place of a state that was sent this way.
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
MAX_LENGTH = 8 << 20
"""Bytes of all sections together; larger frames are refused. What is read of them occupies many times as much."""
STATE = b"state".ljust(16, b"\0")
"""Name of the only section: a machine's state."""
REFERENCE_MAGIC = b"VMBr"


class FrameFlags(IntFlag):
    """Bits of :attr:`FrameHeader.flags`."""

    RAN = 1
    """The guest was running before it was migrated, and is to run at the target."""


class GreetingFlags(IntFlag):
    """Bits of :attr:`Greeting.flags`."""

    FRESH = 1
    """The target's machine has no UUID: ``machine`` was chosen at random for this connection."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first message on a connection, 32 bytes; ``machine``: UUID that the frame has to have."""

    format: int
    machine: UUID
    flags: int = 0


GREETING = Record(
    Greeting,
    "_magic" / c.Const(b"VMBg"),
    "format" / c.Int32ul,
    "machine" / Guid,
    "flags" / c.Int32ul,
    "_reserved" / c.Padding(4),
)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """Header of a frame, 80 bytes.

    ``migration``: UUID chosen at random for each migration. ``length``: bytes of all sections with their headers.
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
    """Header of a section, 32 bytes; ``crc``: CRC-32 (zlib) of the section's ``length`` bytes."""

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
    """The target's answer, 8 bytes and ``reason``, which is UTF-8 and empty if the frame was accepted."""

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
    """Placeholder in QEMU's stream, 36 bytes; ``digest``: of the frame that has the state."""

    digest: bytes


REFERENCE = Record(Reference, "_magic" / c.Const(REFERENCE_MAGIC), "digest" / c.Bytes(DIGEST_SIZE))


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose digest and checksums were verified; ``ran``: the guest was running before it was migrated."""

    machine: UUID
    migration: UUID
    ran: bool
    writer: str
    state: bytes
    digest: bytes


def build_frame(*, machine: UUID, migration: UUID, ran: bool, writer: str, state: bytes) -> bytes:
    """Return the bytes of a frame."""
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
    """Return the size, in bytes, of the frame whose first ``FRAME_HEADER.size`` bytes are ``header``.

    Raises :class:`~vmbus.errors.MalformedError`, also for a frame that is too large or of another format.
    """
    found = FRAME_HEADER.parse(header)
    if found.format != FORMAT:
        raise MalformedError("too-new", f"a frame of format {found.format}, this emulator reads {FORMAT}")
    if found.length > MAX_LENGTH:
        raise MalformedError("too-large", f"a frame of {found.length} bytes, at most {MAX_LENGTH}")
    return FRAME_HEADER.size + found.length + DIGEST_SIZE


def parse_frame(data: bytes) -> Frame:
    """Parse ``data``, which must be exactly one frame. Raises :class:`~vmbus.errors.MalformedError`."""
    size = frame_size(data)
    if len(data) != size:
        what = "truncated" if len(data) < size else "trailing-bytes"
        raise MalformedError(what, f"{len(data)} bytes, the frame has {size}")
    body, digest = memoryview(data)[:-DIGEST_SIZE], data[-DIGEST_SIZE:]
    if _digest(body) != digest:
        raise MalformedError("damaged", "the digest of the frame is wrong")
    header = FRAME_HEADER.parse(data[: FRAME_HEADER.size])
    if header.flags & ~FrameFlags.RAN or header.sections != 1:
        raise MalformedError(
            "too-new", f"a frame with flags {header.flags:#x} and {header.sections} sections"
        )
    begin = FRAME_HEADER.size + SECTION_HEADER.size
    section = SECTION_HEADER.parse(data[FRAME_HEADER.size : begin])
    state = bytes(body[begin:])
    if section.name != STATE or section.version != 1:
        raise MalformedError("too-new", f"a section {section.name!r} of version {section.version}")
    if section.length != len(state) or section.crc != zlib.crc32(state):
        raise MalformedError("damaged", "the length or the checksum of the section is wrong")
    return Frame(
        header.machine,
        header.migration,
        bool(header.flags & FrameFlags.RAN),
        header.writer.rstrip(b"\0").decode(errors="replace"),
        state,
        digest,
    )


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
