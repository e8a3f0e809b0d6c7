"""A guest's storage driver, from plain ``struct`` formats: it negotiates, sends CDBs, reads answers and sense."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from vmbus.bus.budget import MemoryBudget
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import DeviceEnvironment
from vmbus.bus.offers import Offer
from vmbus.ports import PAGE_SIZE, NativeServices
from vmbus.testing.fakes import FakeMemory
from vmbus.testing.loopback import COMPLETION, FakeChannel, GuestPacket, LoopbackGuest, RingReader, RingWriter
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.backend import MemoryBackend
from vmbus_devices.scsi.blocks import BlockUnit
from vmbus_devices.scsi.disk import Disk

BEGIN, END, VERSION, PROPERTIES, ENUMERATE, CREATE = 7, 8, 9, 10, 11, 13
EXECUTE, RESET_LUN, RESET_ADAPTER, RESET_BUS = 3, 4, 5, 6
SUCCESS = 0
INVALID_PARAMETER = 0xC000000D
REVISION_MISMATCH = 0xC0000059
INVALID_DEVICE_STATE = 0xC0000184

BUFFER_PFN = 512
"""Where the guest's data buffer begins."""
OUT, IN, NONE = 0, 1, 2


@dataclass(frozen=True)
class Answer:
    """A completion of EXECUTE_SRB."""

    transaction_id: int
    status: int
    srb_status: int
    scsi_status: int
    address: tuple[int, int, int]
    transferred: int
    sense: bytes
    length: int
    data: bytes

    @property
    def good(self) -> bool:
        return (self.status, self.srb_status, self.scsi_status) == (0, 1, 0)

    @property
    def condition(self) -> tuple[int, int, int] | None:
        """Sense key, code, qualifier of a check condition."""
        if (self.srb_status, self.scsi_status) != (0x84, 2):
            return None
        return self.sense[2] & 0xF, self.sense[12], self.sense[13]


class Offers:
    """The bus, as far as sub-channels need it."""

    def __init__(self) -> None:
        self.offered: list[tuple[Offer, ChannelIo]] = []
        self.revoked: list[Any] = []

    def offer(self, offer: Offer, endpoint: Any) -> Any:
        self.offered.append((offer, endpoint))
        return FakeChannel(offer, None, None)  # type: ignore[arg-type]

    def revoke(self, channel: Any) -> None:
        self.revoked.append(channel)


def controller(*units: BlockUnit, **options: Any) -> Scsi:
    """A controller with ``units`` at LUN 0, 1, ..."""
    device = Scsi(**options)
    for unit in units:
        device.attach(unit)
    return device


def memory_disk(blocks: int = 4096, serial: str = "disk", **options: Any) -> Disk:
    """A disk of 512-byte blocks, filled with a pattern."""
    backend = MemoryBackend(blocks * 512)
    backend.data[:] = b"".join(struct.pack("<Q", index) * 64 for index in range(blocks))
    return Disk(backend, serial, **options)


def build_srb(
    cdb: bytes,
    *,
    length: int = 0,
    direction: int = NONE,
    address: tuple[int, int, int] = (0, 0, 0),
    size: int = 64,
    cdb_length: int | None = None,
) -> bytes:
    """Return a packet with a command, EXECUTE_SRB."""
    path, target, lun = address
    srb = struct.pack(
        "<HBBBBBBBBBBI16s4xHBBIII",
        0x34,
        0,
        0,
        0,
        path,
        target,
        lun,
        len(cdb) if cdb_length is None else cdb_length,
        20,
        direction,
        0,
        length,
        cdb.ljust(16, b"\0"),
        0,
        0xFF,
        0x20,
        0,
        60,
        0,
    )
    return (struct.pack("<III", EXECUTE, 1, 0) + srb)[:size]


class ScsiGuest(LoopbackGuest):
    """Opens the controller; ``negotiate`` makes it ready."""

    device: Scsi
    srb = staticmethod(build_srb)

    def __init__(
        self,
        device: Scsi,
        *,
        offers: bool = False,
        memory: Any = None,
        native: NativeServices | None = None,
        ring_pages: int = 8,
        budget: MemoryBudget | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            device, ring_pages=ring_pages, memory=memory or FakeMemory(8 << 20), start=False, **options
        )
        self.offers = Offers()
        self.stops: list[str] = []
        device.clock = lambda: self.timers.seconds
        device.start(
            DeviceEnvironment(
                self.memory,
                self.timers,
                self.timers.now,
                self.offers if offers else None,
                self.workers,
                native,
                self.stops.append,
                budget or MemoryBudget(),
            )
        )
        self.next_id = 1
        self.properties = b""

    # --- packets of the protocol ---

    def vstor(self, operation: int, union: bytes = b"", *, size: int = 64, **more: Any) -> GuestPacket | None:
        """Send a packet; its completion, if it came at once."""
        self.next_id += 1
        packet = (struct.pack("<III", operation, 1, 0) + union).ljust(size, b"\0")[:size]
        more.setdefault("completion_requested", True)
        assert self.send(packet, transaction_id=self.next_id, **more)
        return next((each for each in self.receive() if each.transaction_id == self.next_id), None)

    def status(self, operation: int, union: bytes = b"", **more: Any) -> int:
        """NTSTATUS of the answer to :meth:`vstor`."""
        answer = self.vstor(operation, union, **more)
        assert answer is not None
        assert answer.kind == COMPLETION
        operation, _, status = struct.unpack_from("<III", answer.payload)
        assert operation == 1
        return int(status)

    def negotiate(self, version: int = 0x0602) -> bytes:
        """To the state in which commands are taken; the properties."""
        assert self.status(BEGIN) == SUCCESS
        assert self.status(VERSION, struct.pack("<HH", version, 0)) == SUCCESS
        properties = self.vstor(PROPERTIES)
        assert properties is not None
        assert self.status(END) == SUCCESS
        return properties.payload[12:36]

    # --- commands ---

    def start(
        self,
        cdb: bytes,
        *,
        read: int = 0,
        write: bytes = b"",
        offset: int = 0,
        at: int = 0,
        io: tuple[RingWriter, Any] | None = None,
        **srb: Any,
    ) -> int:
        """Send a command with a buffer of ``read`` bytes, or with data; its transaction id.

        ``at``: page of the buffer; every second page is used, so that it is scattered.
        """
        self.next_id += 1
        length = len(write) or read
        ranges = []
        if length:
            count = (offset + length + PAGE_SIZE - 1) // PAGE_SIZE
            pfns = [BUFFER_PFN + at + 2 * index for index in range(count)]
            ranges = [(length, offset, pfns)]
            done = 0
            for index, pfn in enumerate(pfns):
                start = offset if not index else 0
                step = min(PAGE_SIZE - start, length - done)
                filler = write[done : done + step] if write else b"\xee" * step
                self.memory.write(pfn * PAGE_SIZE + start, filler)
                done += step
        direction = OUT if write else IN if read else NONE
        srb.setdefault("direction", direction)
        srb.setdefault("length", length)
        payload = build_srb(cdb, **srb)
        assert self.send(payload, transaction_id=self.next_id, completion_requested=True, ranges=ranges)
        return self.next_id

    def buffer(self, length: int, offset: int = 0, at: int = 0) -> bytes:
        """What is in the buffer of a command."""
        data = b""
        pfn = BUFFER_PFN + at
        while length:
            step = min(PAGE_SIZE - offset, length)
            data += self.memory.read(pfn * PAGE_SIZE + offset, step)
            length -= step
            offset = 0
            pfn += 2
        return data

    def answers(self) -> list[Answer]:
        """Completions of commands."""
        return [parse_answer(each) for each in self.receive() if each.kind == COMPLETION]

    def command(self, cdb: bytes, *, read: int = 0, offset: int = 0, at: int = 0, **more: Any) -> Answer:
        """Do a command that ends at once."""
        number = self.start(cdb, read=read, offset=offset, at=at, **more)
        [answer] = self.answers()
        assert answer.transaction_id == number
        data = self.buffer(answer.transferred, offset, at) if read else b""
        return Answer(**{**answer.__dict__, "data": data})

    def read(self, lba: int, blocks: int, **more: Any) -> Answer:
        """READ(10)."""
        return self.command(struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0), read=blocks * 512, **more)

    def write(self, lba: int, data: bytes, **more: Any) -> Answer:
        """WRITE(10)."""
        cdb = struct.pack(">BBIBHB", 0x2A, 0, lba, 0, len(data) // 512, 0)
        return self.command(cdb, write=data, **more)

    def open_subchannel(self, index: int) -> Subchannel:
        """Open the sub-channel that was offered with that index."""
        offer, io = next(each for each in self.offers.offered if each[0].subchannel_index == index)
        return Subchannel(self, offer, io, 64 + 32 * index)


class Subchannel:
    """A sub-channel of a :class:`ScsiGuest`."""

    def __init__(self, guest: ScsiGuest, offer: Offer, io: ChannelIo, first_pfn: int) -> None:
        self.guest = guest
        self.io = io
        pages = guest.memory.pages
        self.channel = FakeChannel(
            offer, pages(range(first_pfn, first_pfn + 5)), pages(range(first_pfn + 5, first_pfn + 10))
        )
        for each in (self.channel.incoming, self.channel.outgoing):
            each.write(0, bytes(PAGE_SIZE))
            each.store_u32(64, 1)
        self.writer = RingWriter(self.channel.incoming)
        self.reader = RingReader(self.channel.outgoing, 80)
        io.opened(self.channel)
        guest.run()

    def put(self, packet: bytes) -> None:
        assert self.writer.write(packet) is not None
        self.io.signalled(self.channel)
        self.guest.run()

    def answers(self) -> list[Answer]:
        return [parse_answer(each) for each in self.reader.read()[0]]


def parse_answer(packet: GuestPacket) -> Answer:
    operation, _, status = struct.unpack_from("<III", packet.payload)
    assert operation == 1
    fields = struct.unpack_from("<HBBBBBBBBBBI", packet.payload, 12)
    _, srb_status, scsi_status, _, path, target, lun, _, sense_length, _, _, transferred = fields
    return Answer(
        packet.transaction_id,
        status,
        srb_status,
        scsi_status,
        (path, target, lun),
        transferred,
        packet.payload[28 : 28 + sense_length],
        len(packet.payload),
        b"",
    )
