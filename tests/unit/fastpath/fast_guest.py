"""A storage driver whose host has the engine and the compiled fast path: real memory and thread, no event loop."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Self

import pytest
from vmbus.bus.io.state import IoState
from vmbus.machine.engine.data_path import EngineChannel, EngineDataPath
from vmbus.machine.engine.library import EngineLibrary
from vmbus.machine.io.addresses import address_of
from vmbus.machine.io.engines import NativeEngines
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.ports import PAGE_SIZE, SignalTarget
from vmbus.testing.loopback import GuestPacket
from vmbus.wire.gateway import DOORBELL_RUNG
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.fast.path import FastPath, FastPathChannel

from tests.unit.scsi.scsi_guest import ScsiGuest

RAM = 8 << 20
HOLE = 6 << 20
"""The guest's RAM is 0 to 6 MiB and 16 to 18 MiB, as if there was a hole."""
HIGH = 16 << 20
FLAGS_PAGE = 8
"""Page with the event flags: the engine sets one when it signals."""

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


class Machine:
    """What an engine has of the gateway, the vCPU and QEMU: words, descriptors, a socket that answers nothing."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, PAGE_SIZE)
        self.words = (ctypes.c_uint64 * 8).from_buffer(self._map)
        """idle, pending (4), missed, doorbell, waiting"""
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ours, self.theirs = socket.socketpair()
        library = EngineLibrary.open()
        assert library is not None
        self._set_bits = library.set_bits
        at = ctypes.addressof(self.words)
        self.gateway: Any = SimpleNamespace(
            engine_event=lambda: os.dup(self.wake_fd),
            engine_waiting_address=lambda: at + 56,
            doorbell_address=lambda relid: at + 48,
            pending=SimpleNamespace(addresses=lambda: [(at, at + 8, at + 40)]),
        )
        self.qtest: Any = SimpleNamespace(
            fileno=self.theirs.fileno,
            line=lambda apic_id, vector: b"writel 0xfee00000 0xf3\n",
            read_answers=lambda: None,
            unanswered=-1_000_000,  # this QEMU needs no room for answers
            end_other=lambda: None,
        )
        self.interrupts: Any = SimpleNamespace(apic_ids=[0], request=lambda vp, vector: None)

    def ring(self) -> None:
        """Ring the engine's doorbell, as the gateway does."""
        self._set_bits(ctypes.addressof(self.words) + 48, DOORBELL_RUNG)
        if self.words[7] & 0xFFFFFFFF:
            os.eventfd_write(self.wake_fd, 1)

    def read_interrupts(self) -> None:
        """Take what the engine has written to QEMU."""
        while select.select([self.ours], [], [], 0)[0]:
            self.ours.recv(1 << 16)

    def close(self) -> None:
        os.close(self.wake_fd)
        self.ours.close()
        self.theirs.close()


class FastGuest(ScsiGuest):
    """A :class:`ScsiGuest` that is negotiated with; what it receives is complete: see :meth:`settle`.

    ``compiled=False``: the same guest with the same kind of memory, whose host has Python only.
    """

    def __init__(self, device: Scsi, *, compiled: bool = True, **options: Any) -> None:
        self.loop = Loop()
        self.notes = Notes((HIGH + RAM - HOLE) >> 12)
        self.through = Through()
        regions = (RamRegion(0, HOLE, 0), RamRegion(HIGH, RAM - HOLE, HOLE))
        self.ram = MappedMemory(
            memoryview(mmap.mmap(-1, RAM)), regions, code_pages=self.notes, through=self.through
        )
        self.machine = Machine()
        self.taken_before = 0
        """The same as :attr:`taken`, of openings that were closed."""
        self._data_path: EngineDataPath | None = None
        self.engines = NativeEngines(self.ram, self._start if compiled else lambda: None)
        self.path: FastPath | None = self.engines.engine(FastPath.open)
        if compiled and self.path is None:
            self.machine.close()
            pytest.skip("no compiler, or no io_uring for us")
        super().__init__(device, memory=self.ram, native=self.engines if compiled else None, **options)
        flags = self.ram.address + FLAGS_PAGE * PAGE_SIZE
        self.channel.target = SignalTarget(0, flags, 1 << 5, 0xF3)
        self.open()
        self.negotiate()

    def _start(self) -> EngineDataPath | None:
        machine = self.machine
        self._data_path = EngineDataPath.start(
            self.loop,
            self.ram,
            machine.gateway,
            machine.qtest,
            machine.interrupts,
            lambda: None,
            busy_waits=False,
        )
        if self._data_path is not None:
            self._data_path.engine.allow_lines(machine.qtest.unanswered)
        return self._data_path

    @property
    def fast(self) -> FastPathChannel | None:
        """The channel's fast path."""
        fast = self.io.fast
        assert fast is None or isinstance(fast, FastPathChannel)
        return fast

    @property
    def taken(self) -> int:
        """Requests that compiled code has taken since the channel was opened."""
        if self.fast is None or self._data_path is None:
            return 0
        channel = self.fast.data
        assert isinstance(channel, EngineChannel)
        return self._data_path.engine.counts(channel._number)[1]["packets_in"]

    @property
    def in_flight(self) -> int:
        """Requests that compiled code has taken and not ended."""
        return self.path.in_flight if self.path is not None else 0

    def doorbell(self) -> None:
        if not self.io._handover.given:
            super().doorbell()
            return
        self.doorbells += 1
        self.machine.ring()
        self.run()

    def _under_way(self) -> bool:
        """Return whether the host has something to do for this guest, as far as that can be seen from outside."""
        if self.in_flight:
            return True
        return self.io.state is IoState.RUNNING and self.writer.raw_free() < self.writer.length

    def settle(self) -> None:
        """Until nothing is under way, and Python has the channel's figures."""
        end = time.monotonic() + TIMEOUT
        while True:
            self.loop.run(0)
            self.run()
            if not self._under_way():
                self.io.recall()  # what the engine says is exact now
                if not self._under_way():
                    self.run()
                    return
            assert time.monotonic() < end, "a transfer did not end"
            self.loop.run(0.001)
            self.machine.read_interrupts()

    def close(self) -> None:
        self.taken_before += self.taken
        super().close()

    def receive(self, limit: int | None = None) -> list[GuestPacket]:
        self.settle()
        return super().receive(limit)

    def __enter__(self) -> Self:
        return self  # it is open already

    def __exit__(self, *_: object) -> None:
        self.settle()
        super().__exit__()
        self.settle()
        self.device.stop()
        self.engines.close()
        self.machine.close()
