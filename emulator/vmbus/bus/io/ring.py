"""The two rings of an open channel, from the host's side: :class:`IncomingRing`, :class:`OutgoingRing`.

Source: docs/protocol/rings.md. The guest runs while the host reads. Therefore

* each index is loaded once and checked; the host's own index (read index of the incoming ring, write index of the
  outgoing one) is loaded when the object is made, and only stored from then on: what the guest writes there later
  has no effect on the host;
* bytes are copied in bulk, and packets are parsed from the private copy only;
* ``memory.fence()`` stands between a store and a load that the other side makes in the opposite order.

    | who    | stores                 | fence | then loads                                        |
    | reader | read index             | yes   | pending send size, write index: signal for room?  |
    | reader | interrupt mask = 0     | yes   | write index: has a packet arrived meanwhile?      |
    | writer | write index            | yes   | interrupt mask, read index: signal for data?      |
    | writer | pending send size      | yes   | read index: is there room by now?                 |

Every violation by the guest raises :class:`~vmbus.errors.RingError`; see also the reasons in
:mod:`vmbus.wire.packet`.

    | reason                       | found                                                             |
    | invalid-ring-pointer         | an index outside the data area, or no multiple of 8               |
    | invalid-data-available       | some bytes are in the ring, but fewer than a descriptor           |
    | invalid-message-length       | a packet of the host that can never fit the guest's ring          |
    | invalid-ring-memory          | no data page, or not whole pages                                  |
    | ring-too-large               | indices would not fit 32 bits                                     |
    | interrupts-externally-masked | the guest has set the interrupt mask that belongs to the host     |
"""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.errors import InternalError, RingError
from vmbus.ports import GuestMemory, GuestPages
from vmbus.wire.packet import (
    DESCRIPTOR_SIZE,
    TRAILER_SIZE,
    Packet,
    build_trailer,
    packet_size,
    parse_packet,
)
from vmbus.wire.ring import (
    FEATURE_BITS,
    FEATURE_PENDING_SEND_SIZE,
    INTERRUPT_MASK,
    PENDING_SEND_SIZE,
    READ_INDEX,
    RESERVED_BYTES,
    RING_CONTROL,
    RING_PAGE,
    WRITE_INDEX,
    RingControl,
)

BULK = 32768
"""Bytes copied from an incoming ring at once; a longer packet is copied separately."""


class _Ring:
    """The pages of one ring and the arithmetic of its indices."""

    __slots__ = ("_load", "_memory", "_pages", "_store", "size")

    def __init__(self, pages: GuestPages, memory: GuestMemory) -> None:
        size = pages.size - RING_PAGE
        if pages.size % RING_PAGE or size <= 0:
            raise RingError("invalid-ring-memory", f"{pages.size} bytes, not a control page and data pages")
        if size > 0xFFFFFFFF:
            raise RingError("ring-too-large", f"{size} bytes")
        self._pages = pages
        self._memory = memory
        self._load = pages.load_u32
        self._store = pages.store_u32
        self.size = size
        """Bytes in the data area; the ring holds at most ``size - 8``."""

    def _index(self, offset: int) -> int:
        """Load an index from the control page, and check it."""
        index = self._load(offset)
        if index >= self.size or index & 7:
            name = "write" if offset == WRITE_INDEX else "read"
            raise RingError(
                "invalid-ring-pointer", f"{name} index {index:#x} in {self.size:#x} bytes of data"
            )
        return index

    @property
    def pages(self) -> GuestPages:
        """The control page and the pages of the data."""
        return self._pages

    def control(self) -> RingControl:
        """Return the control page as it is now, unchecked, for reports."""
        return RING_CONTROL.parse(self._pages.read(0, RING_CONTROL.size))


class IncomingRing(_Ring):
    """Guest to host; the host reads. Making one stores nothing; see :meth:`initialize`.

    Raises :class:`~vmbus.errors.RingError` for pages that are no ring, or indices that are impossible.
    """

    __slots__ = ("_at", "_buffer", "_committed", "_known", "_masked", "_taken")

    def __init__(self, pages: GuestPages, memory: GuestMemory) -> None:
        super().__init__(pages, memory)
        self._committed = self._taken = self._index(READ_INDEX)
        self._index(WRITE_INDEX)
        self._masked = self._load(INTERRUPT_MASK) != 0
        # A private copy of what lies in the ring from _taken on begins at _buffer[_at]. _known bytes were
        # committed by the guest when its write index was last loaded; the copy may be shorter.
        self._buffer = b""
        self._at = 0
        self._known = 0

    @property
    def index(self) -> int:
        """The host's read index. Raises :class:`~vmbus.errors.InternalError` if something is not committed."""
        if self._committed != self._taken:
            raise InternalError("packets were taken, and their room is not free yet")
        return self._taken

    @property
    def taken(self) -> int:
        """The read index once everything that was taken is committed."""
        return self._taken

    @property
    def masked(self) -> bool:
        """Whether the guest's signals are masked."""
        return self._masked

    def continue_at(self, index: int) -> None:
        """Free the room of all before ``index``, which a process that has ended had taken.

        Raises :class:`~vmbus.errors.RingError` for an index that is impossible.
        """
        if index % 8 or not 0 <= index < self.size:
            raise RingError("invalid-ring-index", f"a journal has the read index {index:#x}")
        self._store(READ_INDEX, index)
        self.go_on(index)

    def go_on(self, index: int) -> None:
        """Go on at ``index``: compiled code has read so far, and has masked the guest's signals."""
        self._committed = self._taken = index
        self._buffer, self._at, self._known = b"", 0, 0
        self._masked = True

    def initialize(self) -> None:
        """Mask signals until the host goes idle: the channel opens.

        Source: docs/protocol/rings.md#ring-initialization.
        """
        self._store(INTERRUPT_MASK, 1)
        self._masked = True

    @property
    def available(self) -> int:
        """Bytes that the guest has written and the host has not taken. Raises ``RingError``."""
        return (self._index(WRITE_INDEX) - self._taken) % self.size

    def read_batch(self, limit: int) -> list[Packet]:
        """Take at most ``limit`` packets, perhaps fewer than there are; none only when the ring is empty.

        :meth:`commit` frees their room. Packets before a damaged one are returned; the next call raises
        :class:`~vmbus.errors.RingError`.
        """
        packets: list[Packet] = []
        if not self._known and not self._fetch(BULK):
            return packets
        buffer, at, known, taken = self._buffer, self._at, self._known, self._taken
        complete = len(buffer) - DESCRIPTOR_SIZE
        try:
            while known and len(packets) < limit:
                packet = parse_packet(buffer, at, known) if at <= complete else None
                if packet is None:
                    if not packets:
                        packets.append(packet := self._read_long())
                        buffer, at, known, taken = (
                            self._buffer,
                            packet.size,
                            self._known - packet.size,
                            self._taken,
                        )
                        taken += packet.size
                        if len(buffer) > BULK:  # do not keep the copy of a long packet
                            buffer, at = b"", 0
                    break
                packets.append(packet)
                step = packet.size
                at += step
                known -= step
                taken += step
        except RingError:
            if not packets:
                raise
        self._buffer, self._at, self._known, self._taken = buffer, at, known, taken % self.size
        return packets

    def _read_long(self) -> Packet:
        """Return the next packet, of which the private copy holds only a part; the copy is made anew.

        Nothing is used of the old copy but the length for the new one. A guest that changes the packet in between
        damages only its own ring.
        """
        if not self._fetch(BULK):
            raise RingError("invalid-data-available", "the write index went backwards")
        packet = parse_packet(self._buffer, 0, self._known)
        if packet is None:
            if not self._fetch(packet_size(self._buffer, 0)):
                raise RingError("invalid-data-available", "the write index went backwards")
            packet = parse_packet(self._buffer, 0, self._known)
        if packet is None:
            raise RingError("invalid-descriptor-lengths", "the packet changed while it was read")
        return packet

    def _fetch(self, wanted: int) -> int:
        """Copy what the guest has committed, at most ``wanted`` bytes; return how many bytes it has committed."""
        known = (self._index(WRITE_INDEX) - self._taken) % self.size
        if known and known < DESCRIPTOR_SIZE:
            raise RingError("invalid-data-available", f"{known} bytes")
        length = min(known, wanted)
        tail = self.size - self._taken
        read = self._pages.read
        if length <= tail:
            self._buffer = read(RING_PAGE + self._taken, length) if length else b""
        else:
            self._buffer = read(RING_PAGE + self._taken, tail) + read(RING_PAGE, length - tail)
        self._at = 0
        self._known = known
        return known

    def untake(self, packets: Sequence[Packet]) -> None:
        """Undo the taking of the last packets, which are not committed: the next batch begins with them."""
        size = sum([packet.size for packet in packets])
        if size > (self._taken - self._committed) % self.size:
            raise InternalError(f"{len(packets)} packets cannot be returned: not taken, or committed already")
        self._taken = (self._taken - size) % self.size
        if self._at >= size:
            self._at -= size
            self._known += size
        else:
            self._buffer, self._at, self._known = b"", 0, 0

    def commit(self) -> bool:
        """Free the room of what was taken; return whether the guest waits for that much room and wants a signal.

        Raises :class:`~vmbus.errors.RingError`.
        """
        old, taken = self._committed, self._taken
        if old == taken:
            return False
        self._committed = taken
        self._store(READ_INDEX, taken)
        self._memory.fence()
        # Some guests ask for "ring size - 1" bytes, which can never be free: the low bits are ignored.
        wanted = self._load(PENDING_SEND_SIZE) & ~7
        if not wanted or not self._load(FEATURE_BITS) & FEATURE_PENDING_SEND_SIZE:
            return False
        write = self._index(WRITE_INDEX)
        size = self.size
        return (old - write - RESERVED_BYTES) % size < wanted <= (taken - write - RESERVED_BYTES) % size

    def mask(self) -> None:
        """Mask signals while the host works. Raises ``RingError`` if the guest has set the mask itself."""
        if self._masked:
            return
        if self._load(INTERRUPT_MASK):
            raise RingError("interrupts-externally-masked", f"{self._load(INTERRUPT_MASK):#x}")
        self._store(INTERRUPT_MASK, 1)
        self._memory.fence()
        self._masked = True

    def unmask(self) -> bool:
        """Unmask signals before the host sleeps; return True if packets have arrived, which must be taken first."""
        self._store(INTERRUPT_MASK, 0)
        self._masked = False
        self._memory.fence()
        return self._index(WRITE_INDEX) != self._taken


class OutgoingRing(_Ring):
    """Host to guest; the host writes. Making one stores nothing; see :meth:`initialize`.

    Raises :class:`~vmbus.errors.RingError` for pages that are no ring, or indices that are impossible.
    """

    __slots__ = ("_waiting", "_write")

    def __init__(self, pages: GuestPages, memory: GuestMemory) -> None:
        super().__init__(pages, memory)
        self._write = self._index(WRITE_INDEX)
        self._index(READ_INDEX)
        self._waiting = self._load(PENDING_SEND_SIZE) != 0

    @property
    def index(self) -> int:
        """The host's write index."""
        return self._write

    def written_since(self, index: int) -> int:
        """Return the bytes, trailers included, that were written behind ``index``.

        Raises :class:`~vmbus.errors.RingError` for an index that is impossible.
        """
        if index % 8 or not 0 <= index < self.size:
            raise RingError("invalid-ring-index", f"a journal has the write index {index:#x}")
        return (self._write - index) % self.size

    def go_on(self, index: int) -> None:
        """Go on at ``index``: compiled code has written so far."""
        self._write = index
        self._waiting = self._load(PENDING_SEND_SIZE) != 0

    def initialize(self) -> None:
        """Announce that the host uses pending send sizes, and set none: the channel opens.

        Source: docs/protocol/rings.md#ring-initialization.
        """
        self._store(FEATURE_BITS, FEATURE_PENDING_SEND_SIZE)
        self._store(PENDING_SEND_SIZE, 0)
        self._waiting = False

    @property
    def free(self) -> int:
        """Bytes that can be written now, trailers included. Raises ``RingError``."""
        return (self._index(READ_INDEX) - self._write - RESERVED_BYTES) % self.size

    @property
    def largest(self) -> int:
        """The longest packet that can ever be written, without its trailer, in bytes."""
        return self.size - 2 * RESERVED_BYTES - TRAILER_SIZE

    def write(self, packets: Sequence[bytes]) -> tuple[int, bool]:
        """Write as many of ``packets`` (see ``build_packet``) as fit, visible to the guest all at once.

        Returns how many were written, and whether the guest wants a signal: it does unless it has masked signals, or
        had something to read already. Raises :class:`~vmbus.errors.RingError`, for the guest's read index or
        for a first packet that is longer than :attr:`largest`.
        """
        size = self.size
        old = at = self._write
        free = (self._index(READ_INDEX) - old - RESERVED_BYTES) % size
        parts: list[bytes] = []
        for packet in packets:
            total = len(packet) + TRAILER_SIZE
            if total > free or total >= size - RESERVED_BYTES:
                break
            parts += (packet, build_trailer(0, at))
            free -= total
            at += total
            if at >= size:
                at -= size
        count = len(parts) >> 1
        if not count:
            if packets and len(packets[0]) > self.largest:
                raise RingError("invalid-message-length", f"{len(packets[0])} bytes, {self.largest} at most")
            return 0, False
        data = b"".join(parts)
        tail = size - old
        if len(data) <= tail:
            self._pages.write(RING_PAGE + old, data)
        else:
            self._pages.write(RING_PAGE + old, data[:tail])
            self._pages.write(RING_PAGE, data[tail:])
        self._write = at
        self._store(WRITE_INDEX, at)
        if self._waiting:
            self._store(PENDING_SEND_SIZE, 0)
            self._waiting = False
        self._memory.fence()
        return count, self._load(INTERRUPT_MASK) == 0 and self._index(READ_INDEX) == old

    def wait_for_room(self, length: int) -> bool:
        """Ask the guest for a signal when a packet of ``length`` bytes (without trailer) fits.

        Return True if it fits by now: write again. Otherwise the guest will signal; a write cancels the request.
        """
        total = (length + TRAILER_SIZE + 7) & ~7
        self._store(PENDING_SEND_SIZE, total)
        self._waiting = True
        self._memory.fence()
        return self.free >= total


def ring_status(incoming: IncomingRing, outgoing: OutgoingRing) -> dict[str, dict[str, int | None]]:
    """Return the size of both data areas and how many bytes are filled (``None``: invalid indices), for reports."""
    report: dict[str, dict[str, int | None]] = {}
    for name, ring in (("incoming", incoming), ("outgoing", outgoing)):
        try:
            fill = (
                ring.available if isinstance(ring, IncomingRing) else ring.size - RESERVED_BYTES - ring.free
            )
        except RingError:
            fill = None
        report[name] = {"size": ring.size, "fill": fill}
    return report
