"""A guest of the engine: rings in real memory, a vCPU's words, a QEMU that takes interrupts, a device for tests."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from vmbus.machine.engine.build import LIBRARY
from vmbus.machine.engine.layout import EngineSetup, Mirror, Region
from vmbus.machine.engine.library import EngineLibrary
from vmbus.machine.engine.thread import Engine, Functions, Target
from vmbus.machine.io.addresses import address_of
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.native import compiler
from vmbus.native_layout import DEVICE_HEADER
from vmbus.testing.loopback import GuestPacket, RingReader, RingWriter, guest_packet
from vmbus.wire.gateway import IdleState

HERE = Path(__file__).parent
LIMIT = 20.0
PAGE = 4096
RAM = 4 << 20
IN_PAGES, OUT_PAGES = (3, 9, 4, 5), (20, 21, 7, 23)
"""Page numbers of the rings: not in one run."""
HOLE = 2 << 20
"""The guest's RAM is 0 to 2 MiB and 16 to 18 MiB, as if there was a hole."""
HIGH = 16 << 20
FLAGS_PAGE, FLAG = 30, 5
BUFFERS = 64
"""The first page that transfers store into."""
VECTOR = 0xF3
LINE = b"writel 0xfee00000 0xf3\n"


def compile_device(folder: Path) -> Path:
    library = folder / "device.so"
    (folder / "engine_device.h").write_text(DEVICE_HEADER)
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", "-shared", f"-I{folder}")
    subprocess.run([compiler(), *flags, "-o", library, HERE / "device.c"], check=True)
    return library


class EngineGuest:
    """The guest, and the owner of its channel in the emulator."""

    def __init__(
        self, device: Path, *, engine: str | None = None, busy_waits: bool = True, start: bool = True
    ) -> None:
        self.ram_fd = os.memfd_create("ram")
        os.ftruncate(self.ram_fd, RAM)
        self.map = mmap.mmap(self.ram_fd, RAM)
        self.memory = MappedMemory(
            memoryview(self.map), [RamRegion(0, HOLE, 0), RamRegion(HIGH, RAM - HOLE, HOLE)]
        )
        signals = EngineLibrary.open()
        assert signals is not None
        self._set_bits = signals.set_bits
        self.notes = bytearray((HIGH + RAM - HOLE) // PAGE)
        self.mirror_map = mmap.mmap(-1, ctypes.sizeof(Mirror))
        self.mirror = Mirror.from_buffer(self.mirror_map)
        self.words_map = mmap.mmap(-1, PAGE)
        self.words = (ctypes.c_uint64 * 8).from_buffer(self.words_map)
        """idle, pending (4), missed, doorbell, waiting"""
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.qtest, theirs = socket.socketpair()
        self._theirs = theirs
        at = ctypes.addressof(self.words)
        setup = EngineSetup(
            ram=self.memory.address,
            ram_size=RAM,
            dirty=address_of(self.memory.dirty),
            notes=address_of(self.notes),
            note_pages=len(self.notes),
            region_count=2,
            mirror=address_of(self.mirror_map),
            waiting=at + 56,
            wake_fd=self.wake_fd,
            qtest_fd=theirs.fileno(),
        )
        setup.region[0] = Region(0, HOLE, 0)
        setup.region[1] = Region(HOLE, RAM - HOLE, HIGH)
        self._setup, self._library, self._busy_waits = setup, engine or str(LIBRARY.build()), busy_waits
        self.through: list[tuple[int, int]] = []
        self._started: Engine | None = None
        if start:
            self.start_engine()
        self._device = ctypes.CDLL(str(device))
        self.file = os.memfd_create("disk")
        self._context = ctypes.create_string_buffer(1 << 20)
        struct.pack_into("=i4xQ", self._context, 0, self.file, self.memory.address)
        take, complete = (
            ctypes.cast(self._device[name], ctypes.c_void_p).value or 0
            for name in ("test_take", "test_complete")
        )
        self.functions = Functions(take, complete, ctypes.addressof(self._context))
        self._target = Target(FLAGS_PAGE * PAGE, 1 << FLAG, VECTOR, LINE, (at, at + 8, at + 40))
        self.writer = RingWriter(self.memory.pages(IN_PAGES))
        self.reader = RingReader(self.memory.pages(OUT_PAGES))
        self.reader.pages.store_u32(64, 1)
        self.indices = [0, 0]
        self.left = self.ended = 0
        self.answers: list[bytes] = []
        self.returned: list[bytes] = []
        self.failures: list[Exception] = []
        self.signal_owed = False
        self.outstanding = 0
        self.interrupts = 0
        self.next_id = 1
        self.seen: list[int] = []
        """Transaction ids of the answers that the guest has read."""

    def start_engine(self) -> None:
        self._started = Engine.start(self._library, self._setup, busy_waits=self._busy_waits)
        self._started.noted = self._started.stored = self.through.extend
        self._started.allow_lines(unanswered=-1_000_000)  # this QEMU needs no room for answers

    @property
    def engine(self) -> Engine:
        assert self._started is not None
        return self._started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started is not None:
            self._started.close()
        for each in (self.wake_fd, self.file, self.ram_fd):
            os.close(each)
        self.qtest.close()
        self._theirs.close()

    # --- the owner ---

    def engine_left(self) -> None:
        self.left += 1

    def engine_answered(self, answer: bytes) -> None:
        self.answers.append(answer)

    def engine_returned(self, packet: bytes) -> None:
        self.returned.append(packet)

    def engine_ended(self) -> None:
        self.ended += 1

    def engine_failed(self, error: Exception) -> None:
        self.failures.append(error)

    def give(self) -> None:
        at = ctypes.addressof(self.words) + 48
        assert self.engine.give(
            0,
            self,
            self.functions,
            self._target,
            incoming=([page * PAGE for page in IN_PAGES], self.indices[0]),
            outgoing=([page * PAGE for page in OUT_PAGES], self.indices[1]),
            doorbell=at,
        )

    def use_queue(self, number: int) -> None:
        """Have the device use a queue from now on, 0: none. The channel is not given."""
        struct.pack_into("=I", self._context, 4, number)

    def recall(self) -> None:
        recalled = self.engine.recall(0)
        self.indices[:] = recalled.read_index, recalled.write_index
        self.signal_owed = bool(recalled.interrupt_owed)
        self.outstanding = recalled.outstanding
        self.engine.dispatch()

    def dispatch(self, until: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not until():
            assert time.monotonic() < end, "it does not come"
            select.select([self.engine.fileno()], [], [], 0.05)
            self.engine.dispatch()

    # --- the guest ---

    @property
    def idle(self) -> IdleState:
        return IdleState(self.words[0])

    @idle.setter
    def idle(self, state: IdleState) -> None:
        self.words[0] = state

    def order(self, what: int, length: int = 0, offset: int = 0, place: int = 0) -> bytes:
        """A packet; its transaction ids count from 1."""
        payload = struct.pack("<IIQQ", what, length, offset, place)
        packet = guest_packet(payload, transaction_id=self.next_id, completion_requested=True)
        self.next_id += 1
        return packet

    def read_order(self, number: int, length: int = PAGE) -> bytes:
        return self.order(2, length, number * PAGE, (BUFFERS + number) * PAGE)

    def send(self, *packets: bytes) -> None:
        assert self.writer.write(*packets) is not None, "the ring is full"
        self.ring()

    def fill(self) -> None:
        """Send more than the guest has room for in answers, which it does not read."""
        for _ in range(3):
            self.send(*[self.order(1) for _ in range(200)])
            end = time.monotonic() + 0.2
            while self.writer.raw_free() < self.writer.length and time.monotonic() < end:
                time.sleep(0.001)
            if self.writer.raw_free() < self.writer.length:
                return
        raise AssertionError("everything fits")

    def ring(self) -> None:
        """The gateway's doorbell."""
        at = ctypes.addressof(self.words)
        self._set_bits(at + 48, 1)
        if self.words[7] & 0xFFFFFFFF:
            os.eventfd_write(self.wake_fd, 1)

    def interrupted(self) -> bool:
        """Take an interrupt of the vCPU, if there is one: by QEMU, or, if it polls, by itself."""
        if select.select([self.qtest], [], [], 0)[0]:
            self.interrupts += self.qtest.recv(4096).count(b"\n")
            return True
        if self.idle is not IdleState.RUNNING and self.words[1 + VECTOR // 64]:
            self.words[1 + VECTOR // 64] = 0  # nobody else takes it in these tests: see the model
            return True
        return False

    def take_interrupt(self) -> None:
        """Wait until the vCPU is interrupted."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if self.interrupted():
                return
        raise AssertionError(f"no interrupt: {self.engine.counts()}")

    def handle(self) -> list[GuestPacket]:
        """What the interrupt handler and its tasklet do."""
        self.memory.pages([FLAGS_PAGE]).store_u32(0, 0)
        self.memory.fence()
        packets, _ = self.reader.read()
        self.memory.fence()
        if self.reader.pages.load_u32(12):
            self.ring()  # a guest works out whether it has to, from the write index of after the read
        return packets

    def receive(self, count: int) -> list[GuestPacket]:
        """Wait for ``count`` answers, as a guest does: interrupts, and nothing else, make it look."""
        found: list[GuestPacket] = []
        while len(found) < count:
            self.take_interrupt()
            found += self.handle()
        return found
