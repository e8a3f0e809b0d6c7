"""The queue of packets in front of a ring, and the transactions that are open.

    empty --put--> waiting for the end of the turn --write--> empty
                                                   --write, ring full--> blocked --write--> empty

While the queue is blocked the pending send size of the ring is set: the guest signals when there is room.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmbus.bus.io.ring import OutgoingRing
from vmbus.bus.io.state import IoCounters
from vmbus.wire.packet import TRAILER_SIZE

_ATTEMPTS = 4
"""How often room may appear just when the host begins to wait, before other channels get their turn."""


class Transactions:
    """The open transactions, counted by id: a guest may use one id for several packets at a time."""

    __slots__ = ("_times", "total")

    def __init__(self, items: Iterable[tuple[int, int]] = ()) -> None:
        self._times = dict(items)
        self.total = sum(self._times.values())
        """Open transactions of all ids."""

    def __contains__(self, transaction_id: int) -> bool:
        return transaction_id in self._times

    def items(self) -> tuple[tuple[int, int], ...]:
        """Return each id and how often it is open."""
        return tuple(self._times.items())

    def add(self, transaction_id: int) -> None:
        """Open a transaction."""
        self._times[transaction_id] = self._times.get(transaction_id, 0) + 1
        self.total += 1

    def remove(self, transaction_id: int) -> bool:
        """Close a transaction; return False if none is open with that id."""
        times = self._times.pop(transaction_id, 0)
        if not times:
            return False
        if times > 1:
            self._times[transaction_id] = times - 1
        self.total -= 1
        return True


class Output:
    """The queue in front of an outgoing ring, in order and without a limit of its own."""

    __slots__ = ("blocked", "bytes", "packets")

    def __init__(self, packets: Iterable[bytes] = ()) -> None:
        self.packets = list(packets)
        self.bytes = sum([len(packet) for packet in self.packets])
        """Bytes queued, without trailers."""
        self.blocked = False
        """Whether the pending send size is set."""

    def put(self, packet: bytes) -> None:
        """Queue a packet (see ``build_packet``)."""
        self.packets.append(packet)
        self.bytes += len(packet)

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
