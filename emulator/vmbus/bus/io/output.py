"""The queue of packets in front of a ring, the transactions that are open, and what both cost in memory.

    empty --put--> waiting for the end of the turn --write--> empty
                                                   --write, ring full--> blocked --write--> empty

While the queue is blocked the pending send size of the ring is set: the guest signals when there is room.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmbus.bus.io.ring import OutgoingRing
from vmbus.bus.io.state import IoCounters
from vmbus.errors import RingError
from vmbus.wire.packet import TRAILER_SIZE, Packet

PACKET_BYTES = 512
"""Memory that a packet with few bytes occupies while its completion is owed: the packet, and a device's request."""
PAGE_BYTES = 512
"""The same for each page that it names: the number, a run, views of guest memory."""
QUEUED_BYTES = 64
"""The same for a packet in the output queue, besides its bytes."""
OUTPUT_PACKETS = 4096
"""Packets that a device may have sent and the guest has not taken; completions do not count."""
OUTPUT_BYTES = 4 << 20
"""The same limit in bytes."""
_ATTEMPTS = 4
"""How often room may appear just when the host begins to wait, before other channels get their turn."""


def memory_of(packet: Packet) -> int:
    """Return about how many bytes of memory a packet occupies while its completion is owed."""
    size = PACKET_BYTES + len(packet.payload)
    for each in packet.ranges:
        size += PAGE_BYTES * len(each.pfns)
    if packet.transfer_pages is not None:
        size += PAGE_BYTES * len(packet.transfer_pages.ranges)
    return size


class Transactions:
    """The open transactions by id, each with what it costs in bytes of memory.

    A guest may use one id for several packets at a time.
    """

    __slots__ = ("_costs", "_more", "total")

    def __init__(self, items: Iterable[tuple[int, int]] = (), cost: int = 0) -> None:
        self._costs: dict[int, int] = {}
        self._more: dict[int, list[int]] = {}
        """For ids that are open more than once: the costs of all but the oldest."""
        self.total = 0
        """Open transactions of all ids."""
        for transaction_id, times in items:
            for _ in range(times):
                self.add(transaction_id, cost)

    def __contains__(self, transaction_id: int) -> bool:
        return transaction_id in self._costs

    def items(self) -> tuple[tuple[int, int], ...]:
        """Return each id and how often it is open."""
        return tuple((each, 1 + len(self._more.get(each, ()))) for each in self._costs)

    def add(self, transaction_id: int, cost: int = 0) -> None:
        """Open a transaction."""
        if transaction_id in self._costs:
            self._more.setdefault(transaction_id, []).append(cost)
        else:
            self._costs[transaction_id] = cost
        self.total += 1

    def remove(self, transaction_id: int) -> int | None:
        """Close a transaction and return what it costs; return ``None`` if none is open with that id."""
        cost = self._costs.pop(transaction_id, None)
        if cost is None:
            return None
        self.total -= 1
        if self._more and (more := self._more.get(transaction_id)):
            self._costs[transaction_id] = more.pop()
            if not more:
                del self._more[transaction_id]
        return cost


class Output:
    """The queue in front of an outgoing ring, in order.

    It takes completions without a limit: the guest's requests have one. See :attr:`full` for everything else.
    """

    __slots__ = ("blocked", "bytes", "packets")

    def __init__(self, packets: Iterable[bytes] = ()) -> None:
        self.packets = list(packets)
        self.bytes = sum([len(packet) for packet in self.packets])
        """Bytes queued, without trailers."""
        self.blocked = False
        """Whether the pending send size is set."""

    @property
    def memory(self) -> int:
        """Bytes of memory that the queue occupies."""
        return self.bytes + QUEUED_BYTES * len(self.packets)

    @property
    def full(self) -> bool:
        """Whether a device has sent as much as it may."""
        return len(self.packets) >= OUTPUT_PACKETS or self.bytes >= OUTPUT_BYTES

    @property
    def congested(self) -> bool:
        """Whether a device with unlimited data should wait."""
        return self.blocked or len(self.packets) >= OUTPUT_PACKETS // 2 or self.bytes >= OUTPUT_BYTES // 2

    def put(self, packet: bytes) -> None:
        """Queue a packet (see ``build_packet``)."""
        self.packets.append(packet)
        self.bytes += len(packet)

    def forget_written(self, size: int) -> None:
        """Drop the first packets: ``size`` bytes of them, trailers included, are in the ring already.

        Raises :class:`~vmbus.errors.RingError` if that is not a number of whole packets.
        """
        count = 0
        for packet in self.packets:
            if size <= 0:
                break
            size -= len(packet) + TRAILER_SIZE
            count += 1
        if size:
            raise RingError("invalid-ring-index", "the write index is in the middle of a packet")
        self.bytes -= sum([len(packet) for packet in self.packets[:count]])
        del self.packets[:count]

    def write(self, ring: OutgoingRing, counters: IoCounters) -> bool:
        """Move the queue to the ring, as far as it fits; return whether the guest wants a signal.

        If packets are left and the queue is not :attr:`blocked` afterwards, room keeps appearing: try again later.
        Raises :class:`~vmbus.errors.RingError`.
        """
        packets = self.packets
        signal = False
        for _ in range(_ATTEMPTS):
            count, wanted = ring.write(packets)
            if count:
                signal = signal or wanted
                size = sum([len(packet) for packet in packets[:count]])
                del packets[:count]
                self.bytes -= size
                counters.packets_out += count
                counters.bytes_out += size + TRAILER_SIZE * count
            if not packets:
                self.blocked = False
                return signal
            if not ring.wait_for_room(len(packets[0])):
                if not self.blocked:
                    counters.ring_full += 1
                self.blocked = True
                return signal
        self.blocked = False
        return signal
