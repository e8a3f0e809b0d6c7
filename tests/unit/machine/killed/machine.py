"""A machine whose emulators are killed at any step: memory, gateway and journal outlive them, nothing else does.

The guest's processor, its local APIC and the gateway's plugin are played in Python, on the layouts of the real ones;
everything else is the emulator itself. Time passes only in :meth:`Machine.advance`.

A *step* is whatever the guest, or a later emulator, can see: a store to guest memory, an answer, a word of the
gateway, an interrupt, a transaction of the journal. :class:`Fate` kills the emulator before one of them.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock, patch

from vmbus.bus.io.device import Device
from vmbus.bus.messages import POSTED
from vmbus.cli.devices import registry
from vmbus.hypervisor.features import Features
from vmbus.machine import host as host_module
from vmbus.machine import takeover
from vmbus.machine.engine.library import EngineLibrary
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.posts import PostRing
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.journal.reading import JournalRefused
from vmbus.machine.journal.store import Journal
from vmbus.machine.memory import Buffer, MappedMemory, MappedPages, RamRegion
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.testing.fakes import FakeTimer, FakeTimers, FakeWorkers
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import EmulatorState, TrapKind, Verdict, offset_of
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.disk import Disk

RAM_SIZE = 4 << 20
JOURNAL_SIZE = 256 << 10
FREQUENCY = 1_000_000_000
_VCPU_AT, REQUEST_AT, DOORBELLS_AT, _POSTS_AT, _CODE_AT = 4096, 8192, 12288, 20480, 40960
_REGION_SIZE = 1 << 16
MAX_VCPUS = (REQUEST_AT - _VCPU_AT) // wire.VCPU_SIZE


class Killed(BaseException):
    """The emulator has ended here, as by SIGKILL."""


@dataclass
class Fate:
    """Kills one emulator before its step number ``end``, counted from 1; 0: it lives."""

    end: int = 0
    steps: int = 0
    dead: bool = False
    last: str = ""
    watch: Callable[[], None] = lambda: None
    """Called before each step: the guest's processor runs all the time."""

    def step(self, what: str) -> None:
        """Something is about to become visible."""
        self.watch()
        if not self.dead:
            self.steps += 1
            self.last = what
            self.dead = self.steps == self.end
        if self.dead:
            raise Killed(what)


class Loop(FakeTimers):
    """What an emulator needs of an event loop; errors of callbacks are raised by :meth:`advance`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.readers: dict[int, Callable[[], None]] = {}

    def time(self) -> float:
        return self.seconds

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., None], /, *args: Any, context: Any = None) -> FakeTimer:
        return self.call_later(0.0, lambda: callback(*args))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=cast("asyncio.AbstractEventLoop", self))

    def create_task(self, work: Any) -> asyncio.Future[Any]:
        """Return a task that waits for ever: of QEMU's life nothing is told here."""
        work.close()
        return self.create_future()

    def add_reader(self, descriptor: int, callback: Callable[[], None]) -> None:
        self.readers[descriptor] = callback

    def remove_reader(self, descriptor: int) -> None:
        self.readers.pop(descriptor, None)


class _Pages(MappedPages):
    """Pages that an emulator may be killed at."""

    __slots__ = ("_fate",)

    def __init__(self, memory: MappedMemory, offsets: Sequence[int], fate: Fate) -> None:
        super().__init__(memory, offsets)
        self._fate = fate

    def store_u32(self, offset: int, value: int) -> None:
        self._fate.step(f"store at {offset:#x}")
        super().store_u32(offset, value)

    def set_bits_u32(self, offset: int, bits: int) -> int:
        self._fate.step(f"bits at {offset:#x}")
        return super().set_bits_u32(offset, bits)


class MortalMemory(MappedMemory):
    """Guest memory that an emulator may be killed at, also in the middle of more than 8 bytes."""

    fate: Fate

    def pages(self, pfns: Sequence[int]) -> MappedPages:
        plain = super().pages(pfns)
        return _Pages(self, [4 * start for start in plain._starts], self.fate)

    def _store(self, offset: int, data: Buffer) -> None:
        self.fate.step(f"write of {len(data)} bytes at {offset:#x}")
        if len(data) > 8:
            half = len(data) // 2
            super()._store(offset, bytes(data)[:half])
            self.fate.step(f"rest of {len(data)} bytes at {offset:#x}")
        super()._store(offset, data)


class _Posts(PostRing):
    fate: Fate

    def release(self) -> None:
        self.fate.step("release of posts")
        super().release()

    def promise(self, messages: int) -> None:
        self.fate.step("promise")
        super().promise(messages)

    def withdraw(self) -> None:
        self.fate.step("withdrawal of the promise")
        super().withdraw()


class _Workers(FakeWorkers):
    """Devices' work in threads, done at once; an emulator may be killed before it."""

    engines: object = None

    def __init__(self, loop: Loop, fate: Fate) -> None:
        super().__init__(loop)
        self._fate = fate

    def run(self, work: Callable[[], None], done: Callable[[Exception | None], None], /) -> None:
        self._fate.step("work of a device")
        super().run(work, done)

    def ended(self) -> None:
        """Nothing: nobody waits for the end of work."""

    def close(self) -> None:
        """Nothing: there are no threads."""


class MortalGateway(Gateway):
    """The client's end of the gateway; what goes over its socket is done at once."""

    def __init__(self, machine: Machine, fate: Fate) -> None:
        header = wire.CONTROL_HEADER.parse(machine.region[: wire.CONTROL_HEADER_SIZE])
        super().__init__(MagicMock(), machine.region, -1, machine.event, header)
        self._machine = machine
        self._fate = fate
        self.posts = _Posts(machine.region, self._quads, _POSTS_AT, machine.vcpus, header.owner)
        self.posts.fate = fate
        self.clock = SimpleNamespace(  # type: ignore[assignment]
            tsc_frequency=FREQUENCY, guest_tsc_now=lambda: machine.tsc, arm=lambda: None
        )

    def activate(self) -> None:
        self._fate.step("activation")
        self._machine.put("emulator", EmulatorState.ACTIVE)

    def journal_memory(self) -> mmap.mmap:
        return mmap.mmap(self._machine.journal, JOURNAL_SIZE)

    def _store_answer(self, vcpu: int, at: int, sequence: int, value: int, verdict: int) -> None:
        self._fate.step("answer")
        super()._store_answer(vcpu, at, sequence, value, verdict)

    def doorbells(self) -> list[int]:
        found = super().doorbells()
        if found:
            self._fate.step("doorbells taken")
        return found


class Machine:
    """The machine; ``ends``: the step before which each emulator is killed, one after the other.

    ``lines``: devices, as on the command line; a next emulator is started with those of then. ``between``: called
    after each death, before the next emulator.
    """

    def __init__(
        self,
        folder: Path,
        lines: Sequence[str],
        ends: Sequence[int] = (),
        *,
        vcpus: int = 1,
        features: Features | None = None,
    ) -> None:
        assert vcpus <= MAX_VCPUS
        self.vcpus = vcpus
        self.lines = list(lines)
        self.options = HostOptions(journal=True, features=features or Features())
        self.fates = [*(Fate(end) for end in ends), Fate()]
        self.ticks = 0
        """Ticks of the time stamp counter that have passed besides :meth:`advance`."""
        self.deaths: list[str] = []
        self.between: Callable[[], None] = lambda: None
        self.seconds = 0.0
        self.interrupts: list[tuple[int, int]] = []
        """Vectors that wait in the local APICs, each once: (vCPU, vector)."""
        self.path = folder / "ram"
        self.path.write_bytes(b"")
        os.truncate(self.path, RAM_SIZE)
        with self.path.open("r+b") as file:
            self.ram = mmap.mmap(file.fileno(), RAM_SIZE)
        self.journal = os.memfd_create("journal")
        os.truncate(self.journal, JOURNAL_SIZE)
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.region = mmap.mmap(-1, _REGION_SIZE)
        for name, value in {
            "magic": wire.MAGIC,
            "version": wire.VERSION,
            "vcpus_max": vcpus,
            "region_size": _REGION_SIZE,
            "vcpu_offset": _VCPU_AT,
            "request_offset": REQUEST_AT,
            "doorbell_offset": DOORBELLS_AT,
            "post_offset": _POSTS_AT,
            "code_offset": _CODE_AT,
            "code_pages": 16,
            "vcpus": vcpus,
            "journal_size": JOURNAL_SIZE,
        }.items():
            self.put(name, value)
        self.words = memoryview(self.region).cast("Q")
        self._sequence = 0
        self._devices: list[Device] = []
        """Those of the emulator of now."""
        self.host: Host | None = None
        self.loop = Loop(0.0)

    # --- words of the gateway ---

    def put(self, name: str, value: int) -> None:
        """Store a word of the control page."""
        at = offset_of(wire.CONTROL, name)
        [size] = [each.sizeof() for each in wire.CONTROL.subcons if each.name == name]
        self.region[at : at + size] = int(value).to_bytes(size, "little")

    def get(self, name: str) -> int:
        """Load a 32-bit word of the control page."""
        at = offset_of(wire.CONTROL, name)
        return int.from_bytes(self.region[at : at + 4], "little")

    def _post_word(self, name: str) -> int:
        return (_POSTS_AT + offset_of(wire.POST_RING, name)) // 8

    @property
    def tsc(self) -> int:
        """The processor's time stamp counter."""
        return round((1000 + self.loop.seconds) * FREQUENCY) + self.ticks

    # --- the lives of emulators ---

    @contextmanager
    def _patched(self, fate: Fate) -> Iterator[None]:
        """Have a host be made of parts that it may be killed at."""

        class Mortal(Journal):
            def commit(self, changes: Mapping[bytes, bytes | None]) -> None:
                fate.step("commit")
                super().commit(changes)

        def map_file(path: Path, regions: Sequence[RamRegion], **more: Any) -> MappedMemory:
            memory = MortalMemory(memoryview(self.ram), regions)
            memory.fate = fate
            return memory

        with (
            patch.object(EngineLibrary, "open", lambda: None),
            patch.object(MappedMemory, "map_file", map_file),
            patch.object(host_module, "Journal", Mortal),
            patch.object(host_module, "WorkerThreads", lambda loop: _Workers(loop, fate)),
            patch.object(Device, "poll_window", 0.0),  # of real time
            patch.object(Scsi, "poll_window", 0.0),
        ):
            yield

    def _attach(self, fate: Fate) -> None:
        words = self.words
        words[self._post_word("promise")] = 0
        words[self._post_word("first")] = words[self._post_word("head")]
        self.put("owner", self.get("owner") + 1)
        self.put("emulator", EmulatorState.ATTACHED)
        gateway = MortalGateway(self, fate)
        gateway.take()
        found = takeover.find_guest(gateway, takeover=False)
        assert not isinstance(found, JournalRefused), found
        qtest = MagicMock()
        qtest.interrupt = lambda apic_id, vector: self._interrupt(fate, apic_id, vector)
        self.loop = Loop(self.seconds)
        facts = QemuFacts(
            pid=os.getpid(),
            version="11.1.3",
            machine="q35",
            name=None,
            running=True,
            ram_path=self.path,
            ram_size=RAM_SIZE,
            ram_regions=(RamRegion(0, RAM_SIZE, 0),),
            qtest_socket="",
            gateway_socket="",
            apic_ids=tuple(range(self.vcpus)),
            vcpus=self.vcpus,
        )
        with self._running(), self._patched(fate):
            host = Host(facts, MagicMock(), qtest, gateway, self.options)
            self._devices = registry().create_all(self.lines)
            for device in self._devices:
                host.add_device(device)
            if found is not None:
                host._open_journal(found.contents)
                host._recover(found)
            for device in self._devices:
                device.claim()
            if found is not None:
                host._resume_recovered(found)
            else:
                host._activate()
        self.host = host

    @contextmanager
    def _running(self) -> Iterator[None]:
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", self.loop))
        try:
            yield
        finally:
            asyncio._set_running_loop(before)

    def _interrupt(self, fate: Fate, vcpu: int, vector: int) -> None:
        fate.step(f"interrupt {vector:#x}")
        if (vcpu, vector) not in self.interrupts:
            self.interrupts.append((vcpu, vector))

    def _close_devices(self) -> None:
        """Close the files of the emulator of now, as the kernel does at the end of a process."""
        for device in self._devices:
            if isinstance(device, Scsi):
                for unit in device.units.values():
                    cast("Disk", unit).backend.close()
        self._devices = []

    def _guarded(self, work: Callable[[], object]) -> None:
        """Do something of the emulator; if it is killed, there is none afterwards."""
        try:
            work()
        except Killed as end:
            self.deaths.append(str(end))
            self.fates.pop(0)
            self.host = None
            self._close_devices()
            self.seconds = self.loop.seconds
            self.loop = Loop(self.seconds)
            self.put("emulator", EmulatorState.NONE)
            self.words[self._post_word("promise")] = 0
            self.between()
        if self.host is not None and self.host._ended.done():
            self.host._ended.result()
            raise AssertionError("the host has ended")

    def kill(self) -> None:
        """Kill the emulator, while it does nothing."""

        def end() -> None:
            raise Killed("at rest")

        self.fates.insert(1, Fate())
        self._guarded(end)

    def run(self) -> None:
        """Let the emulator do what is to do now; another one attaches if it was killed."""
        self.advance(0.0)

    def advance(self, seconds: float) -> None:
        """Let time pass; none passes between the death of an emulator and the next one."""
        end = self.loop.seconds + seconds
        self._guarded(lambda: self.loop.advance(max(0.0, end - self.loop.seconds)))
        while self.host is None:
            self._guarded(partial(self._attach, self.fates[0]))
            self._guarded(lambda: self.loop.advance(max(0.0, end - self.loop.seconds)))

    def command(self, work: Callable[[Host], object]) -> None:
        """Have the emulator execute a command of its user; if it is killed meanwhile, nobody repeats the command."""
        self.run()
        host = self.host
        assert host is not None
        with self._running(), self._patched(self.fates[0]):
            self._guarded(lambda: work(host))
        self.run()

    def add(self, line: str) -> None:
        """Add a device to the running guest, and to those of later emulators."""
        self.lines.append(line)

        def work(host: Host) -> None:
            [device] = registry().create_all([line])
            self._devices.append(device)
            host.add_device(device)

        self.command(work)

    def remove(self, line: str) -> None:
        """Take a device away from the running guest, and from later emulators."""
        number = self.lines.index(line)
        del self.lines[number]
        self.command(lambda host: host.remove_device(host.devices[number]))

    def reset(self) -> None:
        """Reset the machine; QEMU reports that to the emulator, if one is there, after what waits already."""
        self.put("resets", self.get("resets") + 1)
        self.interrupts.clear()
        if self.host is not None:
            self.loop.call_soon(self.host.reset)

    @property
    def idle(self) -> bool:
        """Whether the emulator has nothing to do now."""
        return self.host is not None and not any(
            when <= self.loop.seconds and not timer.cancelled for when, _, timer in self.loop._queue
        )

    def _wake(self) -> None:
        if self.get("waiting"):
            for reader in tuple(self.loop.readers.values()):
                self.loop.call_soon(reader)

    # --- the processor, and what the plugin does for it ---

    def trap(self, kind: TrapKind, vcpu: int = 0, **registers: int) -> int:
        """Execute an instruction that the emulator answers; a fault is an ``AssertionError``."""
        self.begin_trap(kind, vcpu, **registers)
        return self.end_trap(kind, vcpu)

    def begin_trap(self, kind: TrapKind, vcpu: int = 0, **registers: int) -> None:
        """Execute an instruction, and wait for nothing; no vCPU has two at a time."""
        self._sequence += 1
        slot = self._of_vcpu(vcpu, "slots")
        names = ("tsc", "pc", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "rsp")
        values = {name: registers.get(name, 0) for name in names}
        entry = wire.SLOT.build({"kind": kind, "flags": wire.SLOT_LONG_MODE, **values, "reserved": None})
        self.region[slot : slot + len(entry)] = entry
        self.words[REQUEST_AT // 8 + vcpu * wire.SLOTS] = self._sequence
        self._wake()

    def _of_vcpu(self, vcpu: int, name: str) -> int:
        return int(_VCPU_AT + vcpu * wire.VCPU_SIZE + offset_of(wire.VCPU, name))

    def end_trap(self, kind: TrapKind, vcpu: int = 0) -> int:
        """Wait for the answer, and take it; the answer to a trap from before a reset is an ``AssertionError``."""
        answer = self._of_vcpu(vcpu, "answers") // 8
        sequence = self.words[REQUEST_AT // 8 + vcpu * wire.SLOTS]
        for _ in range(100):
            if self.words[answer] == sequence:
                break
            self.run()
        else:
            raise AssertionError(f"no answer to {kind.name}, deaths: {self.deaths}")
        value, verdict = self.words[answer + 1], self.words[answer + 2] & 0xFFFFFFFF
        assert verdict == Verdict.OK, Verdict(verdict)
        self.words[self._of_vcpu(vcpu, "retired") // 8] = sequence
        return int(value)

    def post(self, kind: TrapKind, connection: int = 0, payload: bytes = b"", vcpu: int = 0) -> bool:
        """Return whether a trap was posted, as the emulator has promised."""
        words = self.words
        promise, head = words[self._post_word("promise")], words[self._post_word("head")]
        owner, left = promise & 0xFFFFFFFF, (promise >> 32) - head & 0xFFFFFFFF
        if (
            not owner
            or owner != self.get("owner")
            or self.get("emulator") != EmulatorState.ACTIVE
            or head - words[self._post_word("tail")] >= wire.POSTS
        ):
            return False
        if kind is TrapKind.VMCALL and not (
            0 < left <= wire.POSTS and int.from_bytes(payload[:4], "little") in POSTED
        ):
            return False
        at = _POSTS_AT + offset_of(wire.POST_RING, "entries") + head % wire.POSTS * wire.POST_SIZE
        self.region[at : at + wire.POST_SIZE] = wire.POST.build(
            {
                "kind": kind,
                "vcpu": vcpu,
                "connection": connection,
                "size": len(payload),
                "payload": payload.ljust(wire.POST_PAYLOAD, b"\0"),
            }
        )
        words[self._post_word("head")] = head + 1
        self._wake()
        return True

    def ring(self, number: int) -> None:
        """Ring a doorbell."""
        self.region[DOORBELLS_AT + number] = wire.DOORBELL_RUNG
        self._wake()

    def close(self) -> None:
        """Free what the test has used."""
        self._close_devices()
        os.close(self.journal)
        os.close(self.event)
