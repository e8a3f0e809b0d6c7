"""Random requests for a storage controller: operations, lengths, addresses, CDBs, ranges, pages outside RAM.

A request is mostly valid, with one or two damaged fields. After it, the effects are compared with those that the
request allows:

* it is answered once, or the channel fails for a reason that is the guest's fault, never the device's;
* data is stored only to its pages, and not more than was requested; none if its data goes to the disk;
* a failed channel can be opened again, and a valid read returns what a valid write stored.

    python -m tests.fuzz.storvsc_requests --count 1000000 --seed 7
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from vmbus.bus.io.device import DeviceEnvironment
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeMemory, FakeViews
from vmbus.testing.loopback import (
    COMPLETION,
    GPA_DIRECT,
    IN_BAND,
    LoopbackGuest,
    gpa_direct_extension,
    guest_packet,
)
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.backend import Backend, MemoryBackend, NullBackend
from vmbus_devices.scsi.blocks import BlockUnit
from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.faults import FaultPlan, parse_faults

RAM = 8 << 20
DATA_PAGES = range(512, 1536)
"""Pages of buffers; the rings lie below them, the pages above them must never be written."""
OUTSIDE = (RAM // PAGE_SIZE, 1 << 20, 1 << 40, (1 << 52) - 1, (1 << 64) - 1)

OPCODES = (
    *(
        0x00,
        0x03,
        0x08,
        0x0A,
        0x12,
        0x15,
        0x1A,
        0x1B,
        0x1E,
        0x25,
        0x28,
        0x2A,
        0x2E,
        0x2F,
        0x35,
        0x41,
        0x42,
        0x43,
    ),
    *(0x46, 0x4A, 0x5A, 0x5E, 0x5F, 0x88, 0x8A, 0x8E, 0x8F, 0x91, 0x93, 0x9E, 0xA0, 0xA8, 0xAA, 0xAE, 0xAF),
)
WRITES = (0x0A, 0x2A, 0x2E, 0x41, 0x42, 0x5F, 0x8A, 0x8E, 0x93, 0xAA, 0xAE)
PLACES = ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 5))
OUT, IN, NONE = range(3)
CHECK_EVERY = 2000


class WatchedMemory(FakeMemory):
    """Memory that records where data was stored, except in the rings."""

    def __init__(self) -> None:
        super().__init__(RAM)
        self.touched: list[tuple[int, int]] = []

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        super().write(gpa, data)
        if gpa >= DATA_PAGES.start * PAGE_SIZE:
            self.touched.append((gpa, len(data)))

    def writable(self, runs: Sequence[tuple[int, int]]) -> FakeViews:
        views = super().writable(runs)
        self.touched += runs
        return views


def units() -> list[tuple[int, int, BlockUnit]]:
    """Return disks of every kind and a CD-ROM drive: (target, LUN, unit)."""
    aligned = MemoryBackend(2 << 20)
    aligned.alignment = 512
    slow = MemoryBackend(2 << 20)
    slow.immediate = False
    faults = FaultPlan(parse_faults("delay:0.5@100-199;error@300-310;short:0.5@400-410"))
    read_only: Backend = MemoryBackend(2 << 20)
    read_only.read_only = True
    return [
        (0, 0, Disk(aligned, "aligned")),
        (0, 1, Disk(slow, "faults", faults=faults)),
        (0, 2, Disk(NullBackend(1 << 50), "huge", block_size=4096)),
        (1, 0, CdRom(MemoryBackend(1 << 20), "disc")),
        (1, 5, Disk(read_only, "read-only")),
    ]


class Fuzzer:
    """A storage controller that receives random requests."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.device = Scsi()
        for target, lun, unit in units():
            self.device.attach(unit, target, lun)
        self.make_guest()
        self.next_id = 0
        self.open: dict[int, tuple[list[tuple[int, int]], int]] = {}
        """Transaction id → page runs that the request allows stores to, and the number of bytes."""
        self.results: Counter[str] = Counter()
        self.behind = self.digest()

    def make_guest(self) -> None:
        """Make the guest and its memory."""
        self.watched = WatchedMemory()
        self.memory: FakeMemory = self.watched
        self.guest = LoopbackGuest(self.device, ring_pages=64, memory=self.memory, start=False)
        self.device.clock = lambda: self.guest.timers.seconds
        self.device.start(
            DeviceEnvironment(
                self.memory, self.guest.timers, self.guest.timers.now, workers=self.guest.workers
            )
        )

    def digest(self) -> bytes:
        """Return the digest of the memory that must never be written."""
        return hashlib.sha256(memoryview(self.watched.ram)[DATA_PAGES.stop * PAGE_SIZE :]).digest()

    def look(self) -> None:
        """Check that data was stored only where a request allows it."""
        touched = self.watched.touched
        allowed = merged(run for runs, _ in self.open.values() for run in runs) if touched else []
        for gpa, length in touched:
            if length and not any(at <= gpa and gpa + length <= end for at, end in allowed):
                raise AssertionError(f"{length} bytes were stored at {gpa:#x}, where no request allowed it")
        touched.clear()

    def forget_stores(self) -> None:
        """Clear the record of stores."""
        self.watched.touched.clear()

    # --- the guest ---

    def begin(self) -> None:
        """Open the channel and negotiate, as a driver does."""
        self.guest.open()
        for operation, union in ((7, b""), (9, struct.pack("<HH", 0x602, 0)), (10, b""), (8, b"")):
            answer = self.exchange(struct.pack("<III", operation, 1, 0) + union)
            if answer[:4] != b"\1\0\0\0" or answer[8:12] != bytes(4):
                raise AssertionError(f"operation {operation} is answered {answer.hex()}")

    def exchange(self, payload: bytes, ranges: Sequence[tuple[int, int, Sequence[int]]] = ()) -> bytes:
        """Send a valid packet; return the payload of its answer."""
        self.next_id += 1
        self.guest.send(
            payload.ljust(64, b"\0"),
            transaction_id=self.next_id,
            completion_requested=True,
            ranges=ranges,
        )
        self.wait()
        found = [each for each in self.guest.receive() if each.transaction_id == self.next_id]
        if len(found) != 1:
            raise AssertionError(f"{len(found)} answers to {payload.hex()}: {self.guest.io.status()}")
        return found[0].payload

    # --- requests ---

    def number(self, bits: int) -> int:
        """Return a number that is likely to be a boundary value."""
        rng = self.rng
        most = (1 << bits) - 1
        return (
            rng.choice((0, 1, 2, 8, 255, 256, 512, 4095, 4096, most, most - 1, rng.getrandbits(bits))) & most
        )

    def lba(self, bits: int) -> int:
        return self.rng.choice(
            (0, 100, 199, 300, 405, 511, 4095, 4096, self.rng.randrange(5000), self.number(bits))
        )

    def cdb(self) -> tuple[bytes, int]:
        """Return a command, and its number of blocks."""
        rng = self.rng
        opcode = rng.choice(OPCODES) if rng.random() < 0.95 else rng.randrange(256)
        if rng.random() < 0.1:
            return bytes((opcode,)) + rng.randbytes(15), 1
        flags = rng.choice((0, 0, 0, 0, 1, 2, 6, 8, 0x10, 0x12, 0x20, 0xFF))
        blocks = rng.choice((0, 1, 1, 2, 8, 100, 512, 513, 0xFFFF, self.number(32)))
        match opcode >> 5:
            case 0:
                cdb = struct.pack(">BBHBB", opcode, flags & 0x1F, self.lba(16) & 0xFFFF, blocks & 0xFF, 0)
            case 4:
                cdb = struct.pack(">BBQIBB", opcode, flags, self.lba(64), blocks, 0, 0)
            case 5:
                cdb = struct.pack(">BBIIBB", opcode, flags, self.lba(32), blocks, 0, 0)
            case _:
                cdb = struct.pack(">BBIBHB", opcode, flags, self.lba(32), 0, blocks & 0xFFFF, 0)
        return cdb.ljust(16, b"\0"), blocks

    def plain_cdb(self) -> tuple[bytes, int]:
        """Return a read or write as a driver sends it, possibly beyond the end of the disk."""
        rng = self.rng
        blocks = rng.choice((1, 8, rng.randrange(1, 65)))
        write = 2 * rng.randrange(2)
        flags = rng.choice((0, 0, 0, 8, 0x10))
        lba = rng.randrange(4100)
        if rng.random() < 0.5:
            cdb = struct.pack(">BBIBHB", 0x28 + write, flags, lba, 0, blocks, 0)
        else:
            cdb = struct.pack(">BBQIBB", 0x88 + write, flags, lba, blocks, 0, 0)
        return cdb.ljust(16, b"\0"), blocks

    def buffer(self, blocks: int, *, plain: bool = False) -> tuple[bytes, list[tuple[int, int]], int]:
        """Return the extension of a packet, its runs of guest memory, and their bytes in total."""
        rng = self.rng
        ranges = []
        shifted = False
        for _ in range(1 if plain else rng.choice((1, 1, 1, 1, 1, 2, 3))):
            count = rng.choice((0, 1, 8, 24, 36, 513, 4096, 65536, 262144, rng.randrange(300000)))
            if blocks <= 512 and rng.random() < 0.7:
                count = min(blocks * rng.choice((512, 512, 2048, 4096)), 300000)
            offset = rng.choice((0, 0, 0, 512, 100, 4095, self.number(32) if rng.random() < 0.1 else 0))
            if plain:
                count, offset = blocks * 512, rng.choice((0, 0, 512, 3584, 4))
            pages = -(-((offset & 0xFFF) + count) // PAGE_SIZE)
            first = rng.choice(DATA_PAGES)
            pfns = [DATA_PAGES[(first + step) % len(DATA_PAGES)] for step in range(pages)]
            if rng.random() < 0.1 and pfns:
                pfns[rng.randrange(len(pfns))] = rng.choice(OUTSIDE)
            if rng.random() < 0.05:
                pfns = pfns[: rng.randrange(len(pfns) + 1)]
                shifted = True  # the bytes behind are parsed as page numbers
            ranges.append((count, offset, pfns))
        runs = []
        for count, offset, pfns in ranges:
            left = count
            for index, pfn in enumerate(pfns):
                start = offset if not index else 0
                step = min(PAGE_SIZE - start, left) if start < PAGE_SIZE else 0
                if step > 0:
                    runs.append((pfn * PAGE_SIZE + start, step))
                    left -= step
        extension = gpa_direct_extension(ranges)
        if shifted:
            return extension, self.everything(), RAM
        if rng.random() < 0.03:
            damaged = bytearray(extension)
            damaged[rng.randrange(min(len(damaged), 16))] ^= 1 << rng.randrange(8)
            return bytes(damaged), self.everything(), RAM
        return extension, runs, sum(count for count, _, _ in ranges)

    def everything(self) -> list[tuple[int, int]]:
        return [(DATA_PAGES.start * PAGE_SIZE, len(DATA_PAGES) * PAGE_SIZE)]

    def request(self) -> None:
        """Send one packet and check its effects."""
        rng = self.rng
        path, target, lun = rng.choice(PLACES)
        if rng.random() < 0.05:
            path, target, lun = rng.choice((0, 1, 255)), rng.choice((0, 1, 2, 255)), rng.randrange(256)
        plain = rng.random() < 0.3
        cdb, blocks = self.plain_cdb() if plain else self.cdb()
        extension, total = b"", 0
        runs: list[tuple[int, int]] = []
        if plain or rng.random() < 0.8:
            extension, runs, total = self.buffer(blocks, plain=plain)
        direction = rng.choice((OUT, IN, IN, NONE)) if rng.random() < 0.98 else rng.randrange(256)
        if plain or (cdb[0] in WRITES and rng.random() < 0.8):
            direction = OUT if cdb[0] in WRITES else IN
        wanted = total if rng.random() < 0.9 else self.number(32)
        cdb_length = rng.choice((16, 16, 6, 10, 12, 0, 17, 255)) if rng.random() < 0.2 else 16
        payload = struct.pack(
            "<IIIHBBBBBBBBBBI16s4xHBBIII",
            *(3, 1, 0, 0x34, 0, 0, 0, path, target, lun, cdb_length, 20, direction, 0),
            *(wanted, cdb, 0, 0xFF, 0x20, 0, 60, 0),
        )
        draw = rng.random()
        if draw < 0.005:
            payload = struct.pack("<I", rng.choice((0, 1, 2, 4, 5, 6, 11, 12, 13, 14, 99))) + payload[4:]
        elif draw < 0.01:
            payload = payload[: rng.choice((0, 8, 12, 20, 47, 48, 52, 56, 63))]
        self.next_id += 1
        self.open[self.next_id] = (runs if direction != OUT else [], min(wanted, total))
        asked = rng.random() < 0.998
        packet = guest_packet(
            payload,
            kind=GPA_DIRECT if extension else IN_BAND,
            transaction_id=self.next_id,
            completion_requested=asked,
            extension=extension,
        )
        self.forget_stores()
        if self.guest.put(packet):
            self.settle()
            if not asked:
                self.open.pop(self.next_id, None)
        else:
            del self.open[self.next_id]  # there was no room in the ring
            self.guest.advance(1)
            self.settle()

    # --- checks ---

    def wait(self) -> None:
        """Wait for work outside the event loop."""

    def settle(self) -> None:
        """Take answers, and check what was stored."""
        self.wait()
        self.look()
        for answer in self.guest.receive():
            if answer.kind != COMPLETION:
                raise AssertionError(f"a packet of kind {answer.kind}")
            if answer.transaction_id not in self.open:
                raise AssertionError(
                    f"transaction {answer.transaction_id} is answered twice, or never was asked"
                )
            _, most = self.open.pop(answer.transaction_id)
            self.judge(answer.payload, most)
        if self.guest.io.failure:
            self.failed(self.guest.io.failure)

    def judge(self, payload: bytes, most: int) -> None:
        if len(payload) < 12:  # as short as the request
            self.results["short"] += 1
            return
        operation, _, status = struct.unpack_from("<III", payload)
        if operation != 1 or len(payload) > 64:
            raise AssertionError(f"an answer {payload.hex()}")
        if len(payload) < 48:
            self.results["short"] += 1
            return
        srb_status, scsi_status = payload[14], payload[15]
        (transferred,) = struct.unpack_from("<I", payload, 24)
        if transferred > most:
            raise AssertionError(f"{transferred} bytes of at most {most} are said to be transferred")
        if srb_status == 0x84 and scsi_status == 2:
            if payload[21] != 18 or payload[28] & 0x7F != 0x70:
                raise AssertionError(f"sense data {payload[28:48].hex()}")
            self.results[f"{payload[30] & 15:X}/{payload[40]:02X}/{payload[41]:02X}"] += 1
        else:
            self.results[
                f"SRB {srb_status:02X}/{scsi_status:02X}" if srb_status else f"status {status:X}"
            ] += 1

    def failed(self, reason: str) -> None:
        """Close the failed channel and open it again."""
        if reason == "device-error":
            raise AssertionError("the device made a mistake")
        self.results[f"channel: {reason}"] += 1
        self.restart()

    def restart(self) -> None:
        self.guest.close()
        self.wait()
        self.guest.advance(10)
        self.open.clear()
        self.begin()

    def check(self) -> None:
        """Check that everything is answered at the end, and that data is kept."""
        self.guest.advance(10)
        self.forget_stores()
        self.settle()
        if self.open:
            raise AssertionError(f"{len(self.open)} requests are not answered: {self.device.status()}")
        if self.digest() != self.behind:
            raise AssertionError("memory that no request may write was changed")
        data = self.rng.randbytes(8 * 512)
        pages = list(DATA_PAGES[:4])
        for opcode, direction, pfn in ((0x2A, OUT, pages[0]), (0x28, IN, pages[2])):
            if direction == OUT:
                self.memory.write(pfn * PAGE_SIZE, data)
            cdb = struct.pack(">BBIBHB", opcode, 0, 1000, 0, 8, 0).ljust(16, b"\0")
            srb = struct.pack(
                "<HBBBBBBBBBBI16s4x", *(0x34, 0, 0, 0, 0, 0, 0, 10, 20, direction, 0, len(data), cdb)
            )
            for _ in range(2 + 8):  # unit attentions come first
                answer = self.exchange(struct.pack("<III", 3, 1, 0) + srb, [(len(data), 0, [pfn])])
                if answer[14] != 0x84 or answer[30] & 15 != 6:
                    break
            if answer[14] != 1:
                raise AssertionError(f"a sound request is answered {answer.hex()}")
        if self.memory.read(pages[2] * PAGE_SIZE, len(data)) != data:
            raise AssertionError("what was read is not what was written")
        self.forget_stores()

    def finish(self) -> None:
        """Finish after the last request."""

    def run(self, count: int) -> None:
        """Send ``count`` requests."""
        rng = self.rng
        for number in range(1, count + 1):
            self.request()
            draw = rng.random()
            if draw < 0.05:
                self.guest.advance(rng.choice((0.1, 0.5, 5)))
                self.settle()
            elif draw < 0.0505:
                self.restart()
            if number % CHECK_EVERY == 0:
                self.check()
        self.check()


def merged(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ``(start, end)`` of runs of ``(start, length)``, with adjacent runs joined."""
    found: list[tuple[int, int]] = []
    for start, length in sorted(runs):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], start + length))
        else:
            found.append((start, start + length))
    return found


def main(make: Callable[[int], Fuzzer] = Fuzzer) -> int:
    """Run from the command line, with the fuzzer that ``make`` returns for a seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000, help="requests to send")
    parser.add_argument("--seed", type=int, default=0, help="the same seed sends the same requests")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    begin = time.perf_counter()
    fuzzer = make(options.seed)
    fuzzer.begin()
    fuzzer.run(options.count)
    fuzzer.finish()
    took = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.count} requests in {took:.1f} s: {options.count / took:.0f} a second, {peak:.0f} MiB")
    print("answers: " + ", ".join(f"{name} {count}" for name, count in fuzzer.results.most_common()))
    refusals = sorted(fuzzer.guest.io.refusals.counts.items())
    print("refusals: " + ", ".join(f"{name} {count}" for name, count in refusals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
