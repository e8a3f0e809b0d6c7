"""Saved state: the records of chunks (:mod:`vmbus.wire.chunk`).

Source: docs/protocol/saving.md#saving-a-channel, docs/saved-state.md#the-chunk; the layouts are this project's own.

Integers are little-endian, lengths and counts are varints, page lists are runs (:mod:`vmbus.wire.pfn_runs`); records
have no fixed size unless stated. Every record has exactly one form: bytes that differ from those that their value is
built to are malformed. A record's layout never changes; a new layout gets a new version, and the old one stays
readable. What earlier releases can do without is added behind it, as an optional field (:mod:`vmbus.wire.optional`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import construct as c

from vmbus.wire.chunk import ChunkKind
from vmbus.wire.codec import Record
from vmbus.wire.packet import MAX_RANGES, GpaRange, TransferPages, TransferRange
from vmbus.wire.pfn_runs import MAX_PAGES, PfnList, PfnRuns, RawRuns, expand, fit_in_space, steps
from vmbus.wire.plain import Blob, Counted, Guid, Nested, Nullable, PlainAdapter, Text, VarTuple, VarUint

T = TypeVar("T")


class _Ranges(PlainAdapter):
    """The ranges of a GPA-direct packet, together at most ``MAX_PAGES`` pages."""

    def __init__(self) -> None:
        one = c.Struct("byte_count" / c.Int32ul, "byte_offset" / c.Int16ul, "runs" / RawRuns)
        super().__init__(Counted(VarUint, one, MAX_RANGES))

    def _decode(self, obj: Any, context: Any, path: str) -> tuple[GpaRange, ...]:
        found, room = [], MAX_PAGES
        for each in obj:
            byte_count, byte_offset = each["byte_count"], each["byte_offset"]
            pfns = expand(each["runs"], path, room)
            if byte_offset >= 4096 or len(pfns) != (byte_offset + byte_count + 4095) >> 12:
                raise c.ValidationError(
                    f"a range of {byte_count} bytes at {byte_offset} with {len(pfns)} pages", path
                )
            room -= len(pfns)
            found.append(GpaRange(byte_count, byte_offset, pfns))
        return tuple(found)

    def _encode(self, obj: Sequence[GpaRange], context: Any, path: str) -> list[dict[str, Any]]:
        for byte_count, byte_offset, pfns in obj:
            if not fit_in_space(pfns) or byte_offset >= 4096:
                raise c.ValidationError(
                    "a page frame number of more than 52 bits, or an offset outside the first page", path
                )
            if len(pfns) != (byte_offset + byte_count + 4095) >> 12:
                raise c.ValidationError(
                    f"a range of {byte_count} bytes at {byte_offset} with {len(pfns)} pages", path
                )
        if sum(len(pfns) for _, _, pfns in obj) > MAX_PAGES:
            raise c.ValidationError(f"more than {MAX_PAGES} pages in one packet", path)
        return [
            {"byte_count": byte_count, "byte_offset": byte_offset, "runs": steps(pfns)}
            for byte_count, byte_offset, pfns in obj
        ]


class _TransferPages(PlainAdapter):
    """The extension of a transfer-page packet."""

    def __init__(self) -> None:
        one = c.Struct("byte_count" / c.Int32ul, "byte_offset" / c.Int32ul)
        super().__init__(c.Struct("set_id" / c.Int16ul, "ranges" / Counted(VarUint, one, MAX_RANGES)))

    def _decode(self, obj: Any, context: Any, path: str) -> TransferPages:
        return TransferPages(
            obj["set_id"],
            tuple(TransferRange(each["byte_count"], each["byte_offset"]) for each in obj["ranges"]),
        )

    def _encode(self, obj: TransferPages, context: Any, path: str) -> dict[str, Any]:
        return {"set_id": obj.set_id, "ranges": [each._asdict() for each in obj.ranges]}


def parse_record(record: Record[T], data: bytes) -> T:
    """Parse all of ``data`` as ``record``. Raises :class:`~vmbus.errors.MalformedError`, also for a second form.

    Optional fields that are not known are left out; :meth:`~vmbus.wire.codec.Record.parse_all` returns them, too.
    """
    return record.parse_all(data)[0]


@dataclass(frozen=True, slots=True)
class ChannelIdentity:
    """Identity of a channel, equal in every process that serves the same guest; 34 bytes."""

    interface_id: UUID
    instance_id: UUID
    subchannel_index: int = 0

    def __str__(self) -> str:
        return f"{self.interface_id}:{self.instance_id}:{self.subchannel_index}"


CHANNEL_IDENTITY = Record(
    ChannelIdentity, "interface_id" / Guid, "instance_id" / Guid, "subchannel_index" / c.Int16ul
)


@dataclass(frozen=True, slots=True)
class SavedOpen:
    """The guest's OPENCHANNEL (docs/protocol/messages.md#open-channel).

    ``downstream_offset`` in pages; ``user_data``: up to 120 bytes. ``event_flag`` and ``connection_id``: ``None``
    unless the guest chose them.
    """

    open_id: int
    ring_gpadl: int
    target_vp: int
    downstream_offset: int
    user_data: bytes = b""
    flags: int = 0
    event_flag: int | None = None
    connection_id: int | None = None


SAVED_OPEN = Record(
    SavedOpen,
    "open_id" / c.Int32ul,
    "ring_gpadl" / c.Int32ul,
    "target_vp" / c.Int32ul,
    "downstream_offset" / c.Int32ul,
    "user_data" / Blob,
    "flags" / c.Int16ul,
    "event_flag" / Nullable(c.Int16ul),
    "connection_id" / Nullable(c.Int32ul),
)


@dataclass(frozen=True, slots=True)
class SavedGpadl:
    """A GPADL of the channel, 8 bytes, for a cross-check: the bus saves the page list."""

    gpadl_id: int
    page_count: int


MAX_GPADLS = 1024
"""GPADLs that a channel may have."""

SAVED_GPADL = Record(SavedGpadl, "gpadl_id" / c.Int32ul, "page_count" / c.Int32ul)


class ChannelAxes(enum.IntFlag):
    """The axes of a channel's state (docs/protocol/saving.md#channel-axes); open and paused are independent.

    INPUT_PAUSED: the device has stopped reading packets and will resume by itself (backpressure).
    """

    ENABLED = 1
    OPEN = 2
    PAUSED = 4
    INPUT_PAUSED = 8


@dataclass(frozen=True, slots=True)
class SavedChannel:
    """The header of a channel's state; ``open`` is present if and only if ``axes`` has OPEN.

    ``interrupt_latency`` in units of 100 ns; limits of 0 are not set. ``offer_flags``: of the offer. ``relid``: 0 if
    the channel was not offered to the guest. ``failure``: stable name of the reason why the channel stopped, empty if
    it did not; it stays until the guest opens the channel again.
    """

    identity: ChannelIdentity
    axes: ChannelAxes
    relid: int = 0
    connection_id: int = 0
    offer_flags: int = 0
    max_packet_size: int = 0
    max_external_data: int = 0
    max_external_chain: int = 0
    transaction_quota: int = 0
    interrupt_latency: int = 0
    mmio_megabytes: int = 0
    mmio_megabytes_optional: int = 0
    next_transaction_id: int = 0
    open: SavedOpen | None = None
    gpadls: tuple[SavedGpadl, ...] = ()
    failure: str = ""


class _Axes(PlainAdapter):
    """The axes as flags; any other bit is malformed."""

    def _decode(self, obj: int, context: Any, path: str) -> ChannelAxes:
        if obj & ~15:
            raise c.ValidationError(f"channel axes {obj:#x}", path)
        return ChannelAxes(obj)

    def _encode(self, obj: ChannelAxes, context: Any, path: str) -> int:
        return int(obj)


SAVED_CHANNEL = Record(
    SavedChannel,
    "identity" / Nested(CHANNEL_IDENTITY),
    "axes" / _Axes(c.Int8ul),
    "relid" / c.Int32ul,
    "connection_id" / c.Int32ul,
    "offer_flags" / c.Int32ul,
    "max_packet_size" / c.Int32ul,
    "max_external_data" / c.Int32ul,
    "max_external_chain" / c.Int32ul,
    "transaction_quota" / c.Int32ul,
    "interrupt_latency" / c.Int16ul,
    "mmio_megabytes" / c.Int16ul,
    "mmio_megabytes_optional" / c.Int16ul,
    "next_transaction_id" / c.Int64ul,
    "open" / Nullable(Nested(SAVED_OPEN)),
    "gpadls" / VarTuple(Nested(SAVED_GPADL), MAX_GPADLS),
    "failure" / Text,
)


@dataclass(frozen=True, slots=True)
class SavedPacket:
    """A packet of either direction; ``kind`` and ``flags``: of its descriptor.

    Source: docs/protocol/rings.md#packet-format.
    """

    kind: int
    flags: int
    transaction_id: int
    payload: bytes
    ranges: tuple[GpaRange, ...] = ()
    transfer_pages: TransferPages | None = None


SAVED_PACKET = Record(
    SavedPacket,
    "kind" / c.Int16ul,
    "flags" / c.Int16ul,
    "transaction_id" / c.Int64ul,
    "payload" / Blob,
    "ranges" / _Ranges(),
    "transfer_pages" / Nullable(_TransferPages()),
)


@dataclass(frozen=True, slots=True)
class SavedTaken:
    """A packet of the guest that is not completed, with the state that its device gave for it, which is not empty."""

    packet: SavedPacket
    device: bytes


SAVED_TAKEN = Record(SavedTaken, "packet" / Nested(SAVED_PACKET), "device" / Blob)


@dataclass(frozen=True, slots=True)
class SavedOutgoing:
    """A packet of the host that the guest has not completed, or that is not in the ring yet.

    ``library``: a ``SAVED_PACKET``. ``device``: the state that the device's SavePacket callback gave for it.
    """

    library: bytes
    device: bytes


SAVED_OUTGOING = Record(SavedOutgoing, "library" / Blob, "device" / Blob)


@dataclass(frozen=True, slots=True)
class SavedCompletion:
    """A completion for the guest that waits for space in the ring."""

    transaction_id: int
    payload: bytes


SAVED_COMPLETION = Record(SavedCompletion, "transaction_id" / c.Int64ul, "payload" / Blob)


@dataclass(frozen=True, slots=True)
class SavedDevice:
    """The device's own state of the channel, opaque to this package."""

    state: bytes


SAVED_DEVICE = Record(SavedDevice, "state" / Blob)


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """The first chunk of a machine's state; ``writer``: name and version of the emulator, informative."""

    writer: str


SAVED_MACHINE = Record(SavedMachine, "writer" / Text)


@dataclass(frozen=True, slots=True)
class SavedSection:
    """The hypervisor section or the bus section: name and version of its form, and its bytes."""

    name: str
    version: int
    state: bytes


SAVED_SECTION = Record(SavedSection, "name" / Text, "version" / c.Int16ul, "state" / Blob)


@dataclass(frozen=True, slots=True)
class SavedChannelRecords:
    """The chunks of one channel, in the buffers that SaveContinue filled."""

    identity: ChannelIdentity
    records: tuple[bytes, ...]


SAVED_CHANNEL_RECORDS = Record(
    SavedChannelRecords, "identity" / Nested(CHANNEL_IDENTITY), "records" / VarTuple(Blob)
)


@dataclass(frozen=True, slots=True)
class SavedMemory:
    """Guest memory that is not copied: identity and sample of the file that the target must map.

    ``boot``: boot id of the host; ``device`` and ``inode``: of the file; ``size`` in bytes. ``digest``: BLAKE2b of
    ``pages`` (page numbers within the file), then of pages ``first``, ``first + step`` …
    """

    boot: UUID
    device: int
    inode: int
    size: int
    pages: tuple[int, ...]
    first: int
    step: int
    digest: bytes


SAVED_MEMORY = Record(
    SavedMemory,
    "boot" / Guid,
    "device" / c.Int64ul,
    "inode" / c.Int64ul,
    "size" / c.Int64ul,
    "pages" / PfnRuns,
    "first" / VarUint,
    "step" / VarUint,
    "digest" / Blob,
)


SAVED_PAGE_SIZE = 4096
"""Bytes of a page of guest memory."""


PAGES_IN_RECORD = 64
"""Pages that one record may have."""


class _PageContent(PlainAdapter):
    """The content of a page without the zeros at its end."""

    def __init__(self) -> None:
        super().__init__(Blob)

    def _decode(self, obj: bytes, context: Any, path: str) -> bytes:
        if len(obj) > SAVED_PAGE_SIZE or obj.endswith(b"\0"):
            raise c.ValidationError(
                f"{len(obj)} bytes are not the content of a page without the zeros at its end", path
            )
        return obj

    def _encode(self, obj: bytes, context: Any, path: str) -> bytes:
        return self._decode(obj, context, path)


@dataclass(frozen=True, slots=True)
class SavedPages:
    """Pages of guest memory that were written without QEMU's dirty-page tracking.

    ``pfns``: guest page frame numbers in ascending order. ``contents``: of the same length, the content of each page
    without the zeros at its end.
    """

    pfns: tuple[int, ...]
    contents: tuple[bytes, ...]


SAVED_PAGES = Record(
    SavedPages, "pfns" / PfnList(PAGES_IN_RECORD), "contents" / VarTuple(_PageContent(), PAGES_IN_RECORD)
)


@dataclass(frozen=True, slots=True)
class SavedRefusal:
    """Why the source could not save, in place of a state; ``reason``: a stable name."""

    reason: str
    detail: str


SAVED_REFUSAL = Record(SavedRefusal, "reason" / Text, "detail" / Text)


@dataclass(frozen=True, slots=True)
class SavedEnd:
    """The last chunk of a machine's state, 8 bytes: the number of chunks and bytes before it."""

    chunks: int
    size: int


SAVED_END = Record(SavedEnd, "chunks" / c.Int32ul, "size" / c.Int32ul)

RECORDS: dict[ChunkKind, dict[int, Record[Any]]] = {
    ChunkKind.CHANNEL: {1: SAVED_CHANNEL},
    ChunkKind.OUTSTANDING: {1: SAVED_OUTGOING},
    ChunkKind.UNSENT: {1: SAVED_OUTGOING},
    ChunkKind.COMPLETION: {1: SAVED_COMPLETION},
    ChunkKind.TAKEN: {1: SAVED_PACKET, 2: SAVED_TAKEN},
    ChunkKind.DEVICE: {1: SAVED_DEVICE},
    ChunkKind.MACHINE: {1: SAVED_MACHINE},
    ChunkKind.HYPERVISOR: {1: SAVED_SECTION},
    ChunkKind.BUS: {1: SAVED_SECTION},
    ChunkKind.CHANNEL_RECORDS: {1: SAVED_CHANNEL_RECORDS},
    ChunkKind.MEMORY: {1: SAVED_MEMORY},
    ChunkKind.PAGES: {1: SAVED_PAGES},
    ChunkKind.REFUSAL: {1: SAVED_REFUSAL},
    ChunkKind.END: {1: SAVED_END},
}
"""Every version of every record that can be read; the highest version of a record's class is written."""


_VERSIONS = {
    (kind, known.cls): version
    for kind, versions in RECORDS.items()
    for version, known in sorted(versions.items())
}


def version_of(kind: ChunkKind, record: object) -> int:
    """Return the version in which ``record`` is written. One that needs no new field is written as before."""
    return _VERSIONS[kind, type(record)]
