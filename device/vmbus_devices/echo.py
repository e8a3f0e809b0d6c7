"""The echo device: what every part of a channel does, in one small device. Read it to write your own.

The guest's side is a user program on ``uio_hv_generic`` (tests/guest/programs/echo_client.c); the protocol is
declared, and explained, in :mod:`vmbus.wire.echo`; docs/devices.md walks through this file.

    | the guest sends | the device                                                                         |
    | ECHO            | returns the data                                                                   |
    | FILL            | writes the data into guest memory, again and again until the ranges are full       |
    | CHECKSUM        | reads guest memory, returns its CRC-32                                             |
    | GENERATE        | answers, then sends packets by itself, as fast as the guest makes room             |
    | STATISTICS      | returns its counters                                                               |

Three rules of every device can be seen here. What comes from a guest is checked before it is used. A request
that is wrong is *refused* by raising a :class:`~vmbus.errors.GuestError`: the channel counts it under the
error's reason, and ``refused`` answers. And nothing blocks or runs long: what is big is done in pieces.
"""

from __future__ import annotations

import uuid
import zlib
from dataclasses import dataclass
from typing import Annotated, Any

import construct as c
from vmbus.api import (
    PAGE_SIZE,
    Channel,
    Device,
    GpadlState,
    GpaRange,
    GuestAddressError,
    GuestBuffer,
    GuestError,
    Help,
    Offer,
    OfferFlags,
    Packet,
    PacketType,
    Record,
    SavedState,
)
from vmbus.wire.echo import (
    ECHO_CHECKSUM,
    ECHO_GENERATE,
    ECHO_HEADER,
    ECHO_INSTANCE,
    ECHO_INTERFACE,
    ECHO_RANGE,
    ECHO_RANGE_COUNT,
    ECHO_STATISTICS,
    GENERATED_DATA,
    GENERATED_PERIOD,
    MAX_GENERATE_COUNT,
    MAX_GENERATE_SIZE,
    MAX_RANGES,
    MAX_TRANSFER,
    EchoChecksum,
    EchoGenerate,
    EchoHeader,
    EchoOperation,
    EchoRange,
    EchoStatistics,
    EchoStatus,
    build_header,
    parse_header,
)

COUNTERS = ("requests", "refused", "echoed_bytes", "filled_bytes", "summed_bytes", "generated")

MAX_BACKLOG = 64 << 10
"""Bytes of generated packets that wait at a time: what waits is saved, and a saved state has little room."""
PIECE = 64
"""Packets that GENERATE sends before the event loop serves its other callers."""


class EchoRefusal(GuestError):
    """A request that is answered with ``status`` and has no other effect."""

    def __init__(self, status: EchoStatus, detail: str) -> None:
        super().__init__(f"echo-{status.name.lower().replace('_', '-')}", detail)
        self.status = status


@dataclass(slots=True)
class Generation:
    """Packets that are still to be sent: ``next`` to ``count`` - 1."""

    next: int
    count: int
    size: int
    burst: int


@dataclass(frozen=True, slots=True)
class EchoSaved:
    """What survives a migration: the counters, and how far a generation has come (``count`` 0: there is none)."""

    requests: int
    refused: int
    echoed_bytes: int
    filled_bytes: int
    summed_bytes: int
    generated: int
    next: int
    count: int
    size: int
    burst: int


ECHO_SAVED = SavedState(
    Record(
        EchoSaved,
        "requests" / c.Int64ul,
        "refused" / c.Int64ul,
        "echoed_bytes" / c.Int64ul,
        "filled_bytes" / c.Int64ul,
        "summed_bytes" / c.Int64ul,
        "generated" / c.Int64ul,
        "next" / c.Int32ul,
        "count" / c.Int32ul,
        "size" / c.Int32ul,
        "burst" / c.Int32ul,
    )
)


class Echo(Device):
    """Returns, writes, reads and makes data as a guest program asks; for tests."""

    name = "echo"
    # The guest's program takes packets of any length (a driver in a guest's kernel would not).
    max_packet = MAX_TRANSFER

    def __init__(
        self,
        *,
        instance: Annotated[uuid.UUID, Help("instance GUID, for more than one echo device")] = ECHO_INSTANCE,
        monitor: Annotated[
            bool,
            Help("let the guest signal through its monitor page; uio_hv_generic of Linux 6.1 needs that"),
        ] = False,
    ) -> None:
        """A device for the registry: parameters with a ``Help`` are options of ``--device echo,...``."""
        self.instance = instance
        self.monitor = monitor
        self.counts = dict.fromkeys(COUNTERS, 0)
        self._generation: Generation | None = None

    # --- what a device must have: an offer, and an answer to packets ---

    def offer(self) -> Offer:
        """Return the offer of a channel. A guest's driver, or its user, finds the device by the GUIDs."""
        flags = OfferFlags.REQUEST_MONITORED_NOTIFICATION if self.monitor else OfferFlags(0)
        return Offer(interface_id=ECHO_INTERFACE, instance_id=self.instance, name=self.name, flags=flags)

    def packet(self, io: Channel, packet: Packet) -> None:
        """One request. Whatever raises a GuestError on the way ends in :meth:`refused`."""
        self.counts["requests"] += 1
        header, data = self._parse(packet)
        if header.operation == EchoOperation.ECHO:
            self.counts["echoed_bytes"] += len(data)
            self._answer(io, packet, header, data)
        elif header.operation == EchoOperation.FILL:
            self._fill(io, packet, header, data)
        elif header.operation == EchoOperation.CHECKSUM:
            self._checksum(io, packet, header, data)
        elif header.operation == EchoOperation.GENERATE:
            self._generate(io, packet, header, data)
        elif header.operation == EchoOperation.STATISTICS:
            self._answer(io, packet, header, ECHO_STATISTICS.build(EchoStatistics(**self.counts)))
        else:
            raise EchoRefusal(EchoStatus.UNKNOWN_OPERATION, f"{header.operation}")

    def refused(self, io: Channel, packet: Packet, error: GuestError) -> None:
        """Answer with the reason. The packet may contain anything; if its header cannot be parsed, zeros are used."""
        self.counts["refused"] += 1
        if isinstance(error, EchoRefusal):
            status = error.status
        elif isinstance(error, GuestAddressError):
            status = EchoStatus.NOT_RAM
        else:
            status = EchoStatus.MALFORMED
        header = EchoHeader(0, 0, 0, 0, 0)
        if len(packet.payload) >= ECHO_HEADER.size:
            header = parse_header(packet.payload)
        self._answer(io, packet, header, b"", status)

    # --- other events ---

    def closed(self, io: Channel) -> None:
        """Drop the generation under way: the next open starts from zero."""
        self._generation = None

    def writable(self, io: Channel) -> None:
        """Send more: all that was sent is in the ring (requested with ``notify_room``)."""
        self._send_generated(io)

    def status(self) -> dict[str, Any]:
        """Return what ``vmbus status`` shows."""
        return dict(self.counts)

    # --- saving: one explicit record, never the objects themselves ---

    def save(self) -> bytes:
        """Return counters and a generation under way. Requests and answers are in the rings, and saved there."""
        going = self._generation or Generation(0, 0, 0, 0)
        return ECHO_SAVED.save(
            EchoSaved(**self.counts, next=going.next, count=going.count, size=going.size, burst=going.burst)
        )

    def restore(self, state: bytes) -> None:
        """Restore what :meth:`save` returned. Check all of it before any change: the state may come from anywhere."""
        saved = ECHO_SAVED.load(state, self.name)
        self.counts = {counter: getattr(saved, counter) for counter in COUNTERS}
        self._generation = None
        if saved.next < saved.count and saved.size <= MAX_GENERATE_SIZE:
            self._generation = Generation(saved.next, saved.count, saved.size, saved.burst)

    def restored(self, io: Channel) -> None:
        """Continue a generation after a restore; called in place of ``opened``."""
        if self._generation is not None:
            io.notify_room()

    # --- requests ---

    def _parse(self, packet: Packet) -> tuple[EchoHeader, bytes]:
        """Return header and data. The payload is padded to 8 bytes; the header has the length of the data."""
        if packet.kind is PacketType.TRANSFER_PAGES:
            raise EchoRefusal(EchoStatus.MALFORMED, "a packet of type 7")
        header = ECHO_HEADER.parse(packet.payload)  # raises MalformedError, a GuestError, if too short
        data = packet.payload[ECHO_HEADER.size :]
        if header.length > len(data):
            raise EchoRefusal(
                EchoStatus.MALFORMED,
                f"the header announces {header.length} bytes of data, {len(data)} were sent",
            )
        data = data[: header.length]
        if zlib.crc32(data) != header.checksum:
            raise EchoRefusal(EchoStatus.BAD_CHECKSUM, f"{header.checksum:#x} over {len(data)} bytes")
        return header, data

    def _fill(self, io: Channel, packet: Packet, header: EchoHeader, data: bytes) -> None:
        ranges, source = _ranges(io, packet, data)
        if not source:
            raise EchoRefusal(EchoStatus.MALFORMED, "nothing to fill with")
        # GuestBuffer checks that all of it is RAM before the first byte is written. It writes through GuestMemory,
        # the only way in which QEMU's translated code and its dirty log stay correct.
        buffer = GuestBuffer(io.memory, ranges)
        buffer.write((source * (buffer.length // len(source) + 1))[: buffer.length])
        self.counts["filled_bytes"] += buffer.length
        self._answer(io, packet, header, b"")

    def _checksum(self, io: Channel, packet: Packet, header: EchoHeader, data: bytes) -> None:
        ranges, _ = _ranges(io, packet, data)
        buffer = GuestBuffer(io.memory, ranges)
        self.counts["summed_bytes"] += buffer.length
        found = EchoChecksum(zlib.crc32(buffer.read()), buffer.length)
        self._answer(io, packet, header, ECHO_CHECKSUM.build(found))

    def _generate(self, io: Channel, packet: Packet, header: EchoHeader, data: bytes) -> None:
        wanted: EchoGenerate = ECHO_GENERATE.parse(data)
        if self._generation is not None:
            raise EchoRefusal(
                EchoStatus.BUSY, f"{self._generation.next} of {self._generation.count} are sent"
            )
        if wanted.count > MAX_GENERATE_COUNT or wanted.size > MAX_GENERATE_SIZE:
            raise EchoRefusal(EchoStatus.TOO_LARGE, f"{wanted.count} packets of {wanted.size} bytes")
        self._answer(io, packet, header, b"")
        if wanted.count:
            self._generation = Generation(0, wanted.count, wanted.size, wanted.burst)
            io.notify_room()

    def _send_generated(self, io: Channel) -> None:
        going = self._generation
        if going is None:
            return
        for _ in range(min(going.burst or PIECE, PIECE)):
            start = going.next % GENERATED_PERIOD
            data = GENERATED_DATA[start : start + going.size]
            header = EchoHeader(
                EchoOperation.GENERATED, EchoStatus.OK, len(data), going.next, zlib.crc32(data)
            )
            io.send(ECHO_HEADER.build(header) + data)
            self.counts["generated"] += 1
            going.next += 1
            if going.next == going.count:
                self._generation = None
                return
            if io.backlog >= MAX_BACKLOG or io.congested:
                break
        # writable() is called once all of this is in the ring. While the ring is full, that is when the guest has
        # made room and signals: nothing polls.
        io.notify_room()

    # --- answers ---

    def _answer(
        self,
        io: Channel,
        packet: Packet,
        header: EchoHeader,
        data: bytes,
        status: EchoStatus = EchoStatus.OK,
    ) -> None:
        """Answer with ``io.answer``: a completion if one was requested, an in-band packet otherwise."""
        crc = zlib.crc32(data)
        io.answer(packet, build_header(header.operation, status, len(data), header.sequence, crc) + data)


def _ranges(io: Channel, packet: Packet, data: bytes) -> tuple[list[GpaRange], bytes]:
    """Return the guest memory that a request names, and the data that follows."""
    if packet.kind is PacketType.GPA_DIRECT:
        ranges, rest = list(packet.ranges), data
    else:
        count = ECHO_RANGE_COUNT.parse(data).count
        if not 1 <= count <= MAX_RANGES:
            raise EchoRefusal(EchoStatus.TOO_LARGE, f"{count} ranges, 1 to {MAX_RANGES} are possible")
        at = ECHO_RANGE_COUNT.size
        ranges = []
        for _ in range(count):
            ranges.append(_named_range(io, ECHO_RANGE.parse(data[at:])))
            at += ECHO_RANGE.size
        rest = data[at:]
    total = sum(each.byte_count for each in ranges)
    if total > MAX_TRANSFER:
        raise EchoRefusal(EchoStatus.TOO_LARGE, f"{total} bytes, {MAX_TRANSFER} are possible")
    return ranges, rest


def _named_range(io: Channel, wanted: EchoRange) -> GpaRange:
    """Return the pages of a range that the guest names by address, or by an offset in a GPADL of the channel."""
    if not 0 < wanted.length <= MAX_TRANSFER:
        raise EchoRefusal(EchoStatus.TOO_LARGE, f"a range of {wanted.length} bytes")
    first, offset = divmod(wanted.address, PAGE_SIZE)
    last = (wanted.address + wanted.length - 1) // PAGE_SIZE
    if not wanted.gpadl:
        return GpaRange(wanted.length, offset, tuple(range(first, last + 1)))
    gpadl = io.channel.gpadls.get(wanted.gpadl)
    if gpadl is None or gpadl.state is not GpadlState.ACCEPTED or len(gpadl.ranges) != 1:
        raise EchoRefusal(EchoStatus.MALFORMED, f"no GPADL {wanted.gpadl:#x} of one range")
    if wanted.address + wanted.length > gpadl.byte_count or gpadl.ranges[0].byte_offset:
        raise EchoRefusal(EchoStatus.MALFORMED, f"outside the {gpadl.byte_count} bytes of {wanted.gpadl:#x}")
    return GpaRange(wanted.length, offset, tuple(gpadl.ranges[0].pfns[first : last + 1]))
