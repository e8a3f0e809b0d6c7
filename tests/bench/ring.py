"""What a packet costs the host: rings and ``ChannelIo`` over mapped memory, without a guest.

    python -m tests.bench.ring [--packets 200000]

The guest's side is prepared outside of the measured time, which is the thread's time on a processor. Figures are
thousands of packets a second of one core, and microseconds a packet. ``ring`` is read_batch + commit, and a
completion each through OutgoingRing.write; ``channel`` is all of it: doorbell, turn, device, completion, signal.
"""

from __future__ import annotations

import argparse
import mmap
import struct
import sys
import time
import uuid
from collections.abc import Callable, Sequence

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.io.ring import IncomingRing, OutgoingRing
from vmbus.bus.offers import Offer
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.ports import PAGE_SIZE
from vmbus.testing.loopback import FakeChannel, gpa_direct_extension, guest_packet
from vmbus.wire.packet import Packet, PacketType, build_packet

SHAPES = {
    "in band, 64 bytes": guest_packet(bytes(64), transaction_id=1, completion_requested=True),
    "storage read, 4 KiB": guest_packet(
        bytes(64),
        kind=9,
        transaction_id=1,
        completion_requested=True,
        extension=gpa_direct_extension([(4096, 0, [300])]),
    ),
    "storage read, 512 KiB": guest_packet(
        bytes(64),
        kind=9,
        transaction_id=1,
        completion_requested=True,
        extension=gpa_direct_extension([(512 << 10, 0, range(300, 428))]),
    ),
    "network send, 4 ranges": guest_packet(
        bytes(40),
        kind=9,
        transaction_id=1,
        completion_requested=True,
        extension=gpa_direct_extension([(1000, 16, [n]) for n in range(4)]),
    ),
}
BATCHES = (1, 32)


class Complete(Device):
    """Completes everything with 64 bytes, as storage does."""

    name = "bench"
    answer = bytes(64)

    def offer(self) -> Offer:
        return Offer(uuid.UUID(int=1), uuid.UUID(int=2))

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        io.complete(packet.transaction_id, self.answer)


class Loop:
    """The least event loop: what is asked for soon runs in ``run``."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Loop:
        return self

    def cancel(self) -> None:
        pass

    def run(self) -> None:
        while self.soon:
            self.soon.pop()()


class Rig:
    """A mapped memory with two rings of 32 pages, and the guest's side of them."""

    def __init__(self) -> None:
        mapping = mmap.mmap(-1, 4 << 20)
        self.memory = MappedMemory(memoryview(mapping), [RamRegion(0, 4 << 20, 0)])
        self.incoming = self.memory.pages(range(16, 48))
        self.outgoing = self.memory.pages(range(48, 80))
        for pages in (self.incoming, self.outgoing):
            pages.store_u32(64, 1)
        self.size = self.incoming.size - PAGE_SIZE

    def put(self, packet: bytes, count: int) -> None:
        """What a guest does: ``count`` times ``packet`` into the ring."""
        at = self.incoming.load_u32(0)
        data = b"".join(
            [
                packet + struct.pack("<Q", ((at + n * (len(packet) + 8)) % self.size) << 32)
                for n in range(count)
            ]
        )
        tail = self.size - at
        self.incoming.write(PAGE_SIZE + at, data[:tail])
        if len(data) > tail:
            self.incoming.write(PAGE_SIZE, data[tail:])
        self.incoming.store_u32(0, (at + len(data)) % self.size)

    def take(self) -> None:
        """What a guest does: read all completions."""
        self.outgoing.store_u32(4, self.outgoing.load_u32(0))


def bench_ring(packet: bytes, batch: int, packets: int) -> float:
    """Seconds for ``packets`` packets: read, commit, complete."""
    rig = Rig()
    incoming = IncomingRing(rig.incoming, rig.memory)
    outgoing = OutgoingRing(rig.outgoing, rig.memory)
    incoming.initialize()
    outgoing.initialize()
    answer = bytes(64)
    spent = 0.0
    for _ in range(packets // batch):
        rig.put(packet, batch)
        begun = time.thread_time()
        incoming.mask()
        while taken := incoming.read_batch(32):
            incoming.commit()
            outgoing.write(
                [
                    build_packet(PacketType.COMPLETION, answer, transaction_id=each.transaction_id)
                    for each in taken
                ]
            )
        incoming.unmask()
        spent += time.thread_time() - begun
        rig.take()
    return spent


def bench_channel(packet: bytes, batch: int, packets: int) -> float:
    """Seconds for ``packets`` packets through a ``ChannelIo``, from doorbell to signal."""
    rig = Rig()
    device = Complete()
    loop = Loop()
    device.start(DeviceEnvironment(rig.memory, loop, lambda: 0))
    channel = FakeChannel(device.offer(), rig.incoming, rig.outgoing)
    io = ChannelIo(device, loop, poll_window=0)
    io.opened(channel)
    loop.run()
    spent = 0.0
    for _ in range(packets // batch):
        rig.put(packet, batch)
        begun = time.thread_time()
        io.signalled(channel)
        loop.run()
        spent += time.thread_time() - begun
        rig.take()
    if io.counters.packets_out != packets // batch * batch:
        raise SystemExit(f"{io.status()}")
    return spent


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packets", type=int, default=100_000)
    options = parser.parse_args(arguments)
    for name, bench in (("ring", bench_ring), ("channel", bench_channel)):
        for shape, packet in SHAPES.items():
            for batch in BATCHES:
                seconds = min(bench(packet, batch, options.packets // 3) for _ in range(3)) * 3
                rate = options.packets / seconds
                print(f"{name:8} {shape:24} batch {batch:3}: {rate / 1e3:7.1f} k/s {1e6 / rate:6.2f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
