"""The server of a queue: what a storage daemon does with it, or what it should not do."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
from dataclasses import dataclass

from vmbus.ports import QueueLayout
from vmbus.wire.virtqueue import BLOCK_OK, DescriptorFlag, RingFlag

TIMEOUT = 20.0
_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_HEADER = struct.Struct("<IIQ")


@dataclass
class BlockRequest:
    """A request in the queue; ``pieces``: address and length of its data."""

    slot: int
    write: bool
    offset: int
    pieces: list[tuple[int, int]]
    status: int
    """Address of the status."""

    @property
    def room(self) -> int:
        """Bytes that the server may write."""
        return 1 if self.write else 1 + sum(length for _, length in self.pieces)


class QueueServer:
    """It maps the files of ``layout`` by itself, as another process would."""

    def __init__(self, layout: QueueLayout) -> None:
        self.layout = layout
        self._maps = [(each, mmap.mmap(each.fd, each.size)) for each in layout.files]
        self.seen = 0
        self.index = 0
        """Of the used ring."""

    def close(self) -> None:
        for _, each in self._maps:
            each.close()

    def place(self, address: int, length: int) -> tuple[mmap.mmap, int]:
        for file, memory in self._maps:
            if file.address <= address and address + length <= file.address + file.size:
                return memory, address - file.address
        raise AssertionError(f"{length} bytes at {address:#x} are not shared")

    def read(self, address: int, length: int) -> bytes:
        memory, at = self.place(address, length)
        return memory[at : at + length]

    def write(self, address: int, data: bytes) -> None:
        memory, at = self.place(address, len(data))
        memory[at : at + len(data)] = data

    def _u16(self, address: int) -> int:
        return int.from_bytes(self.read(address, 2), "little")

    def wait(self) -> None:
        """Until the server is told of requests."""
        assert select.select([self.layout.kick_fd], [], [], TIMEOUT)[0], "no kick"
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.layout.kick_fd)

    def take(self, count: int = 1) -> list[BlockRequest]:
        """Wait for ``count`` requests."""
        found = self.come(count)
        while len(found) < count:
            self.wait()
            found += self.come(count - len(found))
        return found

    def come(self, limit: int) -> list[BlockRequest]:
        """Return requests that are there already."""
        found: list[BlockRequest] = []
        while len(found) < limit and self._u16(self.layout.available + 2) != self.seen:
            at = self.layout.available + 4 + 2 * (self.seen % self.layout.entries)
            self.seen = (self.seen + 1) & 0xFFFF
            found.append(self._request(self._u16(at)))
        return found

    def _request(self, slot: int) -> BlockRequest:
        address, length, flags, _ = _DESCRIPTOR.unpack(
            self.read(self.layout.descriptors + slot * _DESCRIPTOR.size, _DESCRIPTOR.size)
        )
        assert flags == DescriptorFlag.INDIRECT
        table = list(_DESCRIPTOR.iter_unpack(self.read(address, length)))
        for number, (_, _, flags, following) in enumerate(table[:-1]):
            assert flags & DescriptorFlag.NEXT
            assert following == number + 1
        head, *data, last = table
        kind, _, sector = _HEADER.unpack(self.read(head[0], head[1]))
        assert (last[1], last[2]) == (1, DescriptorFlag.WRITE)
        assert {bool(each[2] & DescriptorFlag.WRITE) for each in data} == {not kind}
        return BlockRequest(slot, bool(kind), sector << 9, [each[:2] for each in data], last[0])

    def move(self, request: BlockRequest, disk: int) -> None:
        """Do the transfer, on file ``disk``."""
        offset = request.offset
        for address, length in request.pieces:
            if request.write:
                os.pwrite(disk, self.read(address, length), offset)
            else:
                self.write(address, os.pread(disk, length, offset))
            offset += length

    def used(self, number: int, length: int) -> None:
        """Put an entry into the used ring."""
        self.write(self.layout.used + 4 + 8 * (self.index % self.layout.entries), _USED.pack(number, length))
        self.publish(self.index + 1)

    def publish(self, index: int) -> None:
        """Store the index of the used ring, and wake the engine if it wants that."""
        self.index = index & 0xFFFF
        self.write(self.layout.used + 2, self.index.to_bytes(2, "little"))
        if not self._u16(self.layout.available) & RingFlag.QUIET:
            with contextlib.suppress(BlockingIOError):  # it is as full as it can be
                os.eventfd_write(self.layout.call_fd, 1)

    def answer(self, request: BlockRequest, status: int = BLOCK_OK, length: int | None = None) -> None:
        self.write(request.status, bytes((status,)))
        self.used(request.slot, request.room if length is None else length)
