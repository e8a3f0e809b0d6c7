"""A storage driver whose host has the compiled fast path: real memory, a real io_uring, no event loop of its own."""

from __future__ import annotations

import mmap
import select
from collections.abc import Callable
from typing import Any, Self

import pytest
from vmbus.machine.io.addresses import address_of
from vmbus.machine.io.engines import NativeEngines
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.fast.path import FastPath

from tests.unit.scsi.scsi_guest import ScsiGuest

RAM = 8 << 20
HOLE = 6 << 20
"""The guest's RAM is 0 to 6 MiB and 16 to 18 MiB, as if there was a hole."""
HIGH = 16 << 20

TIMEOUT = 20.0


class Timer:
    """A timer of :class:`Loop`, which is due in the next turn."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def __call__(self) -> None:
        if self._callback is not None:
            self._callback()

    def cancel(self) -> None:
        self._callback = None


class Loop:
    """The part of an event loop that the fast path uses."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.soon: list[Callable[[], None]] = []

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]

    def call_soon(self, callback: Callable[[], None], /) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        timer = Timer(callback)
        self.soon.append(timer)
        return timer

    def run(self, limit: float) -> bool:
        """Wait for a file descriptor and call its callback; return False if none was readable."""
        while self.soon:
            self.soon.pop(0)()
        ready = select.select(list(self.readers), [], [], limit)[0]
        for fd in ready:
            self.readers[fd]()
        return bool(ready)


class Notes:
    """Code pages, as the gateway notes them."""

    def __init__(self, pages: int) -> None:
        self.bytes = bytearray(pages)

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        found = [pfn for pfn in range(first_pfn, first_pfn + count) if self.bytes[pfn]]
        for pfn in found:
            self.bytes[pfn] = 0
        return found

    def native(self) -> tuple[int, int]:
        return address_of(self.bytes), len(self.bytes)


class Through:
    """Writes through QEMU."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []

    def write_memory(self, gpa: int, data: Any) -> None:
        self.writes.append((gpa, bytes(data)))


class FastGuest(ScsiGuest):
    """A :class:`ScsiGuest` that is negotiated with; :meth:`settle` waits for the kernel."""

    def __init__(self, device: Scsi, **options: Any) -> None:
        self.loop = Loop()
        self.notes = Notes((HIGH + RAM - HOLE) >> 12)
        self.through = Through()
        regions = (RamRegion(0, HOLE, 0), RamRegion(HIGH, RAM - HOLE, HOLE))
        self.ram = MappedMemory(
            memoryview(mmap.mmap(-1, RAM)), regions, code_pages=self.notes, through=self.through
        )
        engines = NativeEngines(self.loop, self.ram, lambda: None)
        path = engines.engine(FastPath.open)
        if path is None:
            pytest.skip("no compiler, or no io_uring for us")
        self.path = path
        super().__init__(device, memory=self.ram, native=engines, **options)
        self.open()
        self.negotiate()

    def settle(self) -> None:
        """Until nothing is under way."""
        while self.path.in_flight:
            assert self.loop.run(TIMEOUT), "a transfer did not end"
        self.run()

    def __enter__(self) -> Self:
        return self  # it is open already

    def __exit__(self, *_: object) -> None:
        self.settle()
        super().__exit__()
        self.settle()
        self.device.stop()
        self.path.close()
