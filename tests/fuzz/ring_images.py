"""Random ring images: the host reads and writes rings with arbitrary content and raises nothing but RingError.

    python -m tests.fuzz.ring_images --count 1000000 --seed 1

Each image is a pair of control pages and data pages: indices, packets and bytes are valid, nearly valid or random,
and may change between two accesses of the host. Checked for each image:

* nothing is raised but ``RingError`` (an invalid list of ranges: a packet with ``error``);
* the host makes no access outside the ring, and a bounded number of accesses;
* no packet is longer than the bytes in the ring; ranges are within their limits;
* every index that the host stores is a valid index.

A failure prints the seed and the number of the image; ``--seed S --first N --count 1`` repeats this image.
"""

from __future__ import annotations

import argparse
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence

from vmbus.bus.io.ring import IncomingRing, OutgoingRing
from vmbus.errors import RingError
from vmbus.ports import PAGE_SIZE
from vmbus.wire.packet import MAX_PFNS, MAX_RANGES, Packet, PacketType, build_packet

ACCESSES = 400
"""Accesses of the host to one image, at most."""


class Memory:
    """A ``GuestMemory`` that has only the fence."""

    def fence(self) -> None:
        pass


class Pages:
    """Ring pages in a ``bytearray``. ``mutate`` is called after every ``period``-th access, if that is not 0."""

    def __init__(self, data_pages: int) -> None:
        self.size = (data_pages + 1) * PAGE_SIZE
        self.bytes = bytearray(self.size)
        self.accesses = 0
        self.period = 0
        self.random = random.Random(0)

    def _count(self) -> None:
        self.accesses += 1
        if self.period and self.accesses % self.period == 0:
            choice = self.random.random()
            if choice < 0.5:
                offset = self.random.choice((0, 4, 8, 12, 64))
                struct.pack_into("<I", self.bytes, offset, index_word(self.random, self.size - PAGE_SIZE))
            else:
                at = self.random.randrange(PAGE_SIZE, self.size - 16)
                self.bytes[at : at + 16] = self.random.randbytes(16)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"read of {length} at {offset}")
        data = bytes(self.bytes[offset : offset + length])
        self._count()
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if offset < PAGE_SIZE or offset + len(data) > self.size:
            raise IndexError(f"write of {len(data)} at {offset}")
        self.bytes[offset : offset + len(data)] = data
        self._count()

    def load_u32(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self.bytes, offset)[0]
        self._count()
        return value

    def store_u32(self, offset: int, value: int) -> None:
        if offset in (0, 4) and (value >= self.size - PAGE_SIZE or value & 7):
            raise AssertionError(f"the host stored index {value:#x}")
        struct.pack_into("<I", self.bytes, offset, value)
        self._count()


def index_word(rng: random.Random, size: int) -> int:
    """Return an index that is mostly valid."""
    choice = rng.random()
    if choice < 0.8:
        return rng.randrange(0, size, 8)
    if choice < 0.9:
        return rng.choice((0, size - 8, size, size + 8, size - 4, 0xFFFFFFFF, 0xFFFFFFF8, 0x80000000, 1, 4))
    return rng.getrandbits(32)


def some_packet(rng: random.Random) -> bytes:
    """Return a packet with its trailer, valid or nearly valid."""
    kind = rng.choice((6, 6, 6, 9, 9, 9, 7, 11, rng.randrange(16)))
    extension = b""
    if kind == 9:
        count = rng.choice((1, 1, 1, 2, 3, 0, 40, rng.getrandbits(32)))
        extension = struct.pack("<II", 0, count)
        for _ in range(min(count, 8)):
            length = rng.choice((rng.randrange(1, 9000), 0, 4096, rng.getrandbits(32)))
            offset = rng.choice((0, rng.randrange(4096), 4095, 4096, rng.getrandbits(32)))
            extension += struct.pack("<II", length, offset)
            extension += rng.randbytes(
                8 * min(20, max(0, (length + offset + 4095) // 4096 - (rng.random() < 0.1)))
            )
    elif kind == 7:
        count = rng.choice((1, 2, 3, 0, rng.getrandbits(32)))
        extension = struct.pack("<HHI", rng.getrandbits(16), 0, count) + rng.randbytes(8 * min(count, 5))
    payload = rng.randbytes(8 * rng.choice((0, 1, 2, 4, 8, 100)))
    offset8 = 2 + len(extension) // 8
    length8 = offset8 + len(payload) // 8
    flags = rng.choice((0, 1))
    if rng.random() < 0.05:
        flags = rng.getrandbits(16)
    if rng.random() < 0.05:
        offset8 = rng.choice((0, 1, 2, 3, length8, length8 + 1, rng.getrandbits(16)))
    if rng.random() < 0.05:
        length8 = rng.choice((0, 1, 2, length8 + 1, 0xFFFF, rng.getrandbits(16)))
    header = struct.pack("<HHHHQ", kind, offset8 & 0xFFFF, length8 & 0xFFFF, flags, rng.getrandbits(64))
    return header + extension + payload + bytes(8)


def fill(rng: random.Random, pages: Pages) -> None:
    """Fill ``pages`` with an image."""
    size = pages.size - PAGE_SIZE
    start = rng.randrange(0, size, 8)
    at = start
    if rng.random() < 0.1:
        pages.bytes[PAGE_SIZE:] = rng.randbytes(size)
        at = rng.randrange(0, size, 8)
    else:
        left = rng.randrange(0, size, 8)
        data = bytearray()
        for _ in range(rng.randrange(1, 12)):
            packet = some_packet(rng)
            if len(data) + len(packet) > left:
                break
            data += packet
        first = min(len(data), size - start)
        pages.bytes[PAGE_SIZE + start : PAGE_SIZE + start + first] = data[:first]
        pages.bytes[PAGE_SIZE : PAGE_SIZE + len(data) - first] = data[first:]
        at = (start + len(data)) % size
        if rng.random() < 0.05:
            at = rng.randrange(0, size, 8)
    words = [at, start, rng.choice((0, 1)), rng.choice((0, 0, 64, size - 1, 0xFFFFFFFF))]
    if rng.random() < 0.1:
        words[rng.randrange(4)] = index_word(rng, size)
    struct.pack_into("<4I", pages.bytes, 0, *words)
    struct.pack_into("<I", pages.bytes, 64, rng.choice((1, 1, 0, 0xFFFFFFFF)))


def check(packet: Packet, size: int) -> None:
    """Check what must be true of every packet that was taken."""
    if not 24 <= packet.size <= size or len(packet.payload) > packet.size - 24:
        raise AssertionError(f"{packet.size} bytes in a ring of {size}")
    if len(packet.ranges) > MAX_RANGES or sum([len(each.pfns) for each in packet.ranges]) > MAX_PFNS:
        raise AssertionError("ranges beyond their limits")
    for each in packet.ranges:
        if len(each.pfns) != (each.byte_offset + each.byte_count + 4095) // 4096 or each.byte_offset > 4095:
            raise AssertionError(f"{each}")
    if packet.kind is PacketType.GPA_DIRECT and bool(packet.ranges) == (packet.error is not None):
        raise AssertionError(f"{packet}")


def read_all(rng: random.Random, pages: Pages, seen: Counter[str]) -> None:
    """Do what the host does with a ring from the guest."""
    ring = IncomingRing(pages, Memory())  # type: ignore[arg-type]
    if rng.random() < 0.5:
        ring.initialize()
    ring.mask()
    for _ in range(20):
        batch = ring.read_batch(rng.choice((1, 3, 64)))
        for packet in batch:
            check(packet, ring.size)
            seen[packet.error.reason if packet.error else packet.kind.name] += 1
        if batch and rng.random() < 0.2:
            ring.untake(batch[rng.randrange(len(batch)) :])
        seen["signal" if ring.commit() else "no signal"] += 1
        if not batch and not ring.unmask():
            break
        ring.mask()


def write_some(rng: random.Random, pages: Pages, seen: Counter[str]) -> None:
    """Do what the host does with a ring to the guest."""
    ring = OutgoingRing(pages, Memory())  # type: ignore[arg-type]
    for _ in range(5):
        packets = [
            build_packet(PacketType.COMPLETION, bytes(rng.choice((0, 8, 64, 1000, 4072, 5000))))
            for _ in range(rng.randrange(1, 5))
        ]
        count, _ = ring.write(packets)
        seen["written"] += count
        if count < len(packets) and not ring.wait_for_room(len(packets[count])):
            seen["blocked"] += 1


def run(seed: int, first: int, count: int, seen: Counter[str] | None = None) -> Counter[str]:
    """Try ``count`` images. Raises any failure, with the number of the image as a note."""
    seen = Counter() if seen is None else seen
    rings = [Pages(1), Pages(2), Pages(12)]
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        pages = rings[0 if (choice := rng.random()) < 0.5 else 1 if choice < 0.9 else 2]
        pages.accesses = pages.period = 0
        fill(rng, pages)
        pages.random = rng
        pages.period = rng.choice((0, 0, 1, 2, 3, 7))
        try:
            (read_all if rng.random() < 0.8 else write_some)(rng, pages, seen)
        except RingError as error:
            seen[error.reason] += 1
        except Exception as error:
            error.add_note(f"image {number} of seed {seed}")
            raise
        if pages.accesses > ACCESSES:
            raise AssertionError(f"image {number} of seed {seed}: {pages.accesses} accesses")
    return seen


ALLOWED_GROWTH = 8 << 10
"""KiB by which the peak of memory may grow after the warm-up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; return exit status 1 if an image causes a failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    seen: Counter[str] = Counter()
    begun = time.monotonic()
    warm_up = options.count // 10
    run(options.seed, options.first, warm_up, seen)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(options.seed, options.first + warm_up, options.count - warm_up, seen)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.monotonic() - begun
    for name, times in sorted(seen.items()):
        print(f"{times:12} {name}")
    print(f"{options.count} images in {seconds:.1f} s, {options.count / seconds:.0f} a second")
    print(f"peak memory grew by {growth / 1024:.1f} MiB after the warm-up")
    return 1 if growth > ALLOWED_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
