"""The guest's end of a channel, in memory: for tests of rings and of devices, without a guest.

``RingWriter`` and ``RingReader`` are the guest's side of docs/protocol/rings.md, written apart from
:mod:`vmbus.bus.io.ring` and :mod:`vmbus.wire.packet` on purpose: they count raw free bytes, as guests do, and
build packets from ``struct`` formats of their own. So each side tests the other.

``LoopbackGuest`` opens a device and exchanges packets with it::

    with LoopbackGuest(Echo()) as guest:
        guest.send(b"hello", transaction_id=7, completion_requested=True)
        [answer] = guest.receive()
        assert answer.kind == 11 and answer.transaction_id == 7

Time passes only in ``guest.advance(seconds)``; ``guest.interrupts`` counts the host's signals.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.channel.read_only import ReadOnlyPages
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.offers import Offer
from vmbus.errors import InternalError, ProtocolError
from vmbus.ports import PAGE_SIZE, GuestMemory, GuestPages, SignalTarget
from vmbus.testing.fakes import FakeMemory, FakeTimers, FakeWorkers

IN_BAND = 6
TRANSFER_PAGES = 7
GPA_DIRECT = 9
COMPLETION = 11


class GuestPacket(NamedTuple):
    """A packet as the guest sees it; ``extension`` is the part between descriptor and payload."""

    kind: int
    flags: int
    transaction_id: int
    payload: bytes
    extension: bytes = b""
    start: int = 0
    """The start offset in the packet's trailer."""


def guest_packet(
    payload: bytes = b"",
    *,
    kind: int = IN_BAND,
    transaction_id: int = 0,
    completion_requested: bool = False,
    extension: bytes = b"",
    flags: int | None = None,
) -> bytes:
    """Return a packet as a guest builds it, padded, without trailer."""
    offset = 16 + len(extension)
    body = extension + payload + b"\0" * (-len(payload) % 8)
    number = int(completion_requested) if flags is None else flags
    return struct.pack("<HHHHQ", kind, offset // 8, (16 + len(body)) // 8, number, transaction_id) + body


def gpa_direct_extension(ranges: Sequence[tuple[int, int, Sequence[int]]]) -> bytes:
    """Return the extension of a GPA-direct packet with the ranges ``(byte count, byte offset, page numbers)``."""
    out = struct.pack("<II", 0, len(ranges))
    for count, offset, pfns in ranges:
        out += struct.pack(f"<II{len(pfns)}Q", count, offset, *pfns)
    return out


class RingWriter:
    """A guest's writer of a ring. ``pages``: control page and data pages."""

    def __init__(self, pages: GuestPages) -> None:
        self.pages = pages
        self.length = pages.size - PAGE_SIZE

    def raw_free(self) -> int:
        """Return the bytes that are not in use, including the eight that must stay free."""
        write, read = self.pages.load_u32(0), self.pages.load_u32(4)
        return self.length - (write - read if write >= read else self.length - read + write)

    def write(self, *packets: bytes) -> bool | None:
        """Write all ``packets``, or none: then return None, otherwise whether to signal the reader."""
        total = sum(len(packet) + 8 for packet in packets)
        if self.raw_free() <= total:
            return None
        old = self.pages.load_u32(0)
        at = old
        for packet in packets:
            self._put(at, packet + struct.pack("<Q", at << 32))
            at = (at + len(packet) + 8) % self.length
        self.pages.store_u32(0, at)
        return self.pages.load_u32(8) == 0 and self.pages.load_u32(4) == old

    def _put(self, at: int, data: bytes) -> None:
        at %= self.length
        fits = min(len(data), self.length - at)
        self.pages.write(PAGE_SIZE + at, data[:fits])
        if fits < len(data):
            self.pages.write(PAGE_SIZE, data[fits:])

    def wait_for_room(self, total: int) -> None:
        """Ask for a signal when ``total`` bytes (trailer included) are free; 0 cancels that."""
        self.pages.store_u32(12, total)


class RingReader:
    """A guest's reader of a ring. ``max_packet``: bytes, without trailer; more is an ``AssertionError``."""

    def __init__(self, pages: GuestPages, max_packet: int = 4096) -> None:
        self.pages = pages
        self.length = pages.size - PAGE_SIZE
        self.max_packet = max_packet

    def _read(self, at: int, length: int) -> bytes:
        at %= self.length
        fits = min(length, self.length - at)
        found = self.pages.read(PAGE_SIZE + at, fits)
        return found if fits == length else found + self.pages.read(PAGE_SIZE, length - fits)

    def available(self) -> int:
        """Return the number of bytes to read."""
        return (self.pages.load_u32(0) - self.pages.load_u32(4)) % self.length

    def peek(self) -> GuestPacket | None:
        """Return the next packet, and leave it in the ring."""
        if not self.available():
            return None
        at = self.pages.load_u32(4)
        kind, offset, length, flags, transaction_id = struct.unpack("<HHHHQ", self._read(at, 16))
        assert 2 <= offset <= length, (offset, length)
        assert length * 8 + 8 <= self.available(), (length * 8, self.available())
        assert length * 8 <= self.max_packet, f"the host sent {length * 8} bytes"
        data = self._read(at, length * 8)
        zero, start = struct.unpack("<II", self._read(at + length * 8, 8))
        assert (zero, start) == (0, at), (zero, start, at)
        return GuestPacket(kind, flags, transaction_id, data[offset * 8 :], data[16 : offset * 8], start)

    def read(self, limit: int | None = None) -> tuple[list[GuestPacket], bool]:
        """Take up to ``limit`` packets; return them, and whether to signal a writer that waits for the room."""
        packets: list[GuestPacket] = []
        before = self.length - self.available()
        while (limit is None or len(packets) < limit) and (packet := self.peek()) is not None:
            packets.append(packet)
            size = 16 + len(packet.extension) + len(packet.payload) + 8
            self.pages.store_u32(4, (self.pages.load_u32(4) + size) % self.length)
        wanted = self.pages.load_u32(12)
        after = self.length - self.available()
        return packets, bool(wanted and self.pages.load_u32(64) & 1 and before <= wanted < after)

    def mask(self, masked: bool) -> None:
        """Set or clear the interrupt mask."""
        self.pages.store_u32(8, int(masked))


class RacingPages:
    """``pages``, with a guest that acts right after every access of the host.

    ``after`` is called with ``"read"``, ``"write"``, ``"load"`` or ``"store"``, and the offset.
    """

    def __init__(self, pages: GuestPages, after: Callable[[str, int], None]) -> None:
        self._pages = pages
        self._after = after
        self.size = pages.size

    def read(self, offset: int, length: int) -> bytes:
        data = self._pages.read(offset, length)
        self._after("read", offset)
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._pages.write(offset, data)
        self._after("write", offset)

    def load_u32(self, offset: int) -> int:
        value = self._pages.load_u32(offset)
        self._after("load", offset)
        return value

    def store_u32(self, offset: int, value: int) -> None:
        self._pages.store_u32(offset, value)
        self._after("store", offset)

    def set_bits_u32(self, offset: int, bits: int) -> int:
        before = self._pages.set_bits_u32(offset, bits)
        self._after("store", offset)
        return before

    def address_u32(self, offset: int) -> int:
        return 0  # compiled code would not call the guest


@dataclass(slots=True)
class FakeChannel:
    """An :class:`~vmbus.bus.channel.endpoint.EndpointChannel` over the pages of two rings."""

    offer: Offer
    incoming: GuestPages
    outgoing: GuestPages
    interrupts: int = 0
    relid: int = 1
    gpadls: dict[int, Gpadl] = field(default_factory=dict)
    deferred: set[str] = field(default_factory=set)
    """The calls that the device has deferred: ``opened``, ``closed``, ``gpadl_torn_down``."""
    memory: GuestMemory | None = None
    """Where the pages of ``gpadls`` are, for devices that use them."""
    target: SignalTarget | None = None
    """Where compiled code interrupts the guest; ``None``: it gets no channel."""

    @property
    def closing(self) -> bool:
        """Whether the device has deferred the end of its close."""
        return "closed" in self.deferred

    def ring_pages(self) -> tuple[GuestPages, GuestPages]:
        return self.incoming, self.outgoing

    def gpadl_pages(self, gpadl_id: int, *, read_only: bool = False) -> GuestPages:
        if self.memory is None or gpadl_id not in self.gpadls:
            raise ProtocolError("gpadl-unknown", f"{gpadl_id:#x}")
        pages = self.memory.pages(self.gpadls[gpadl_id].aligned_pfns())
        return ReadOnlyPages(pages) if read_only else pages

    def signal_guest(self) -> None:
        self.interrupts += 1

    def signal_target(self) -> SignalTarget | None:
        return self.target

    def count_signals(self, doorbells: int, interrupts: int) -> None:
        self.interrupts += interrupts

    def defer_open(self) -> None:
        self.deferred.add("opened")

    def finish_open(self, error: Exception | None = None) -> None:
        self._finish("opened")
        if error is not None:
            raise error

    def defer_close(self) -> None:
        self.deferred.add("closed")

    def finish_close(self) -> None:
        self._finish("closed")

    def defer_teardown(self, gpadl: Gpadl) -> None:
        self.deferred.add("gpadl_torn_down")

    def finish_teardown(self, gpadl: Gpadl) -> None:
        self._finish("gpadl_torn_down")

    def _finish(self, call: str) -> None:
        if call not in self.deferred:
            raise InternalError(f"{call}() is finished, but was not deferred")
        self.deferred.remove(call)


class LoopbackGuest:
    """A guest that opens ``device`` and exchanges packets through rings of ``ring_pages`` data pages each.

    The guest starts the device, unless ``start`` is False. ``scattered``: the rings' pages are not in order.
    """

    def __init__(
        self,
        device: Device,
        *,
        ring_pages: int = 3,
        memory: FakeMemory | None = None,
        timers: FakeTimers | None = None,
        scattered: bool = True,
        start: bool = True,
        poll_window: float = 0.0,
    ) -> None:
        self.device = device
        self.memory = memory or FakeMemory(4 << 20)
        self.timers = timers or FakeTimers()
        self.workers = FakeWorkers(self.timers)
        if start:
            device.start(DeviceEnvironment(self.memory, self.timers, self.timers.now, workers=self.workers))
        count = ring_pages + 1
        pfns = list(range(16, 16 + 2 * count))
        if scattered:
            pfns = pfns[::2] + pfns[1::2][::-1]
        self.channel = FakeChannel(
            device.offer(), self.memory.pages(pfns[:count]), self.memory.pages(pfns[count:])
        )
        self.io = ChannelIo(device, self.timers, clock=lambda: self.timers.seconds, poll_window=poll_window)
        self.writer = RingWriter(self.channel.incoming)
        self.reader = RingReader(self.channel.outgoing, device.max_packet)
        self.doorbells = 0

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def interrupts(self) -> int:
        """The number of the host's signals."""
        return self.channel.interrupts

    def open(self) -> None:
        """Prepare the rings as a guest does, and open the channel. Raises the error with which the device refuses."""
        for pages in (self.channel.incoming, self.channel.outgoing):
            pages.write(0, bytes(PAGE_SIZE))
            pages.store_u32(64, 1)
        self.io.opened(self.channel)
        self.run()

    def close(self) -> None:
        """Close the channel."""
        self.io.closed(self.channel)
        self.run()

    def run(self) -> None:
        """Run the host's work that is due now."""
        self.timers.advance(0)

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.timers.advance(seconds)

    def doorbell(self) -> None:
        """Signal the host, and run its work."""
        self.doorbells += 1
        self.io.signalled(self.channel)
        self.run()

    def put(self, *packets: bytes) -> bool:
        """Write built packets, and ring the doorbell if the host wants it. Return False if they do not fit."""
        signal = self.writer.write(*packets)
        if signal is None:
            return False
        if signal:
            self.doorbell()
        else:
            self.run()
        return True

    def send(
        self,
        payload: bytes = b"",
        *,
        kind: int = IN_BAND,
        transaction_id: int = 0,
        completion_requested: bool = False,
        ranges: Sequence[tuple[int, int, Sequence[int]]] = (),
    ) -> bool:
        """Send one packet, GPA-direct if ``ranges`` are given. Return False if the ring is full."""
        extension = b""
        if ranges:
            kind, extension = GPA_DIRECT, gpa_direct_extension(ranges)
        return self.put(
            guest_packet(
                payload,
                kind=kind,
                transaction_id=transaction_id,
                completion_requested=completion_requested,
                extension=extension,
            )
        )

    def receive(self, limit: int | None = None) -> list[GuestPacket]:
        """Return what the host has sent; ring the doorbell if the host waits for room."""
        packets, signal = self.reader.read(limit)
        if signal:
            self.doorbell()
        return packets
