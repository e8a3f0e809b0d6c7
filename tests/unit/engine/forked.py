"""A machine whose emulators are processes, with the real engine: SIGKILL ends them between any two of its stores.

As :mod:`tests.unit.machine.killed.machine`, but the event loop, the thread of compiled code and the disk's file are
those of a process of its own, and time passes by itself.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import mmap
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from vmbus.cli.devices import registry
from vmbus.machine import host as host_module
from vmbus.machine import takeover
from vmbus.machine.engine import data_path
from vmbus.machine.engine.library import EngineLibrary
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.io.addresses import address_of
from vmbus.machine.journal.reading import JournalRefused
from vmbus.machine.journal.store import Journal
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.machine.qemu.discovery import QemuFacts
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import EmulatorState, TrapKind

from tests.unit.machine.killed.machine import (
    DOORBELLS_AT,
    FREQUENCY,
    RAM_SIZE,
    REQUEST_AT,
    Fate,
    Machine,
    MortalGateway,
    MortalMemory,
)

LIMIT = 60.0
JOURNAL = 16 << 20
LINE = b"irq %#x\n"
_DISTURBED = 0.004
"""Seconds between two moments at which compiled code has to give the rings back without a reason."""


@dataclass(frozen=True)
class Plan:
    """Before which step an emulator ends; 0: it does not. ``engine``: of compiled code; ``python``: of the rest."""

    engine: int = 0
    python: int = 0


class Fatal(Fate):
    """Ends the process."""

    def step(self, what: str) -> None:
        self.steps += 1
        if self.steps == self.end:
            os.kill(os.getpid(), signal.SIGKILL)


class _ForkedGateway(MortalGateway):
    _machine: ForkedMachine

    def journal_memory(self) -> mmap.mmap:
        return mmap.mmap(self._machine.journal, JOURNAL)

    def engine_event(self) -> int:
        return os.dup(self._machine.engine_event)


class _Qmp:
    """Of QEMU's life nothing is told here."""

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        await asyncio.get_running_loop().create_future()
        yield "", {}


class _Qtest:
    """The socket that interrupts go through."""

    unanswered = 0
    other: Any = None

    def __init__(self, machine: ForkedMachine, fate: Fate) -> None:
        self._socket = machine.qtest
        self._fate = fate

    def interrupt(self, apic_id: int, vector: int) -> None:
        self._fate.step(f"interrupt {vector:#x}")
        self._socket.send(LINE % vector)

    def line(self, apic_id: int, vector: int) -> bytes:
        return LINE % vector

    def fileno(self) -> int:
        return self._socket.fileno()

    def read_answers(self) -> None: ...
    def end_other(self) -> None: ...

    @contextmanager
    def loading(self) -> Iterator[None]:
        yield


class ForkedMachine(Machine):
    """``library``: the engine, compiled with steps.

    Where an emulator ends, the next one of :attr:`plans` is started; the last one lives.
    """

    def __init__(self, folder: Path, lines: Sequence[str], library: Path) -> None:
        super().__init__(folder, lines)
        os.truncate(self.journal, JOURNAL)
        self.put("journal_size", JOURNAL)
        self.engine_event = os.eventfd(0, os.EFD_NONBLOCK)
        self.qtest, self._lines = socket.socketpair()
        self._lines.setblocking(False)
        self._partial = b""
        self._log = folder / "emulators.log"
        self._library = library
        self._process = 0
        self.plans: list[Plan] = []
        """Of emulators that are still to come."""
        signals = EngineLibrary.open()
        assert signals is not None
        self._set_bits = signals.set_bits
        self._word = bytearray(8)

    @property
    def tsc(self) -> int:
        return round((1000 + time.monotonic()) * FREQUENCY)

    # --- the lives of emulators ---

    def _begin(self, plan: Plan) -> None:
        """Start an emulator; there is none."""
        words = self.words
        words[self._post_word("promise")] = 0
        words[self._post_word("first")] = words[self._post_word("head")]
        self.put("owner", self.get("owner") + 1)
        self.put("emulator", EmulatorState.ATTACHED)
        self.put("engine_waiting", 0)
        os.close(self.engine_event)
        self.engine_event = os.eventfd(0, os.EFD_NONBLOCK)
        self._process = os.fork()
        if not self._process:
            try:
                with self._log.open("a") as log:
                    faulthandler.enable(log)
                    try:
                        asyncio.run(self._serve(plan))
                    except BaseException:  # noqa: BLE001 - the test shows it
                        traceback.print_exc(file=log)
            finally:
                os._exit(1)

    async def _serve(self, plan: Plan) -> None:
        fate = Fatal(plan.python)
        ctypes.c_ulong.in_dll(ctypes.CDLL(str(self._library)), "engine_die_at").value = plan.engine

        class Mortal(Journal):
            def commit(self, changes: Mapping[bytes, bytes | None]) -> None:
                fate.step("commit")
                super().commit(changes)
                fate.step("committed")

        def map_file(path: Path, regions: Sequence[RamRegion], **more: Any) -> MappedMemory:
            memory = MortalMemory(memoryview(self.ram), regions)
            memory.fate = fate
            return memory

        library = SimpleNamespace(build=lambda: self._library)
        with (
            patch.object(MappedMemory, "map_file", map_file),
            patch.object(host_module, "Journal", Mortal),
            patch.object(data_path, "LIBRARY", library),
        ):
            await self._attach_here(fate)

    async def _attach_here(self, fate: Fate) -> None:
        gateway = _ForkedGateway(self, fate)
        gateway.take()
        found = takeover.find_guest(gateway, takeover=False)
        if isinstance(found, JournalRefused):
            raise found
        facts = QemuFacts(
            pid=os.getppid(),
            version="11.1.3",
            machine="q35",
            name=None,
            running=True,
            ram_path=self.path,
            ram_size=RAM_SIZE,
            ram_regions=(RamRegion(0, RAM_SIZE, 0),),
            qtest_socket="",
            gateway_socket="",
            apic_ids=(0,),
            vcpus=1,
        )
        qtest = _Qtest(self, fate)
        host = Host(facts, cast("Any", _Qmp()), cast("Any", qtest), gateway, HostOptions(journal=True))
        for device in registry().create_all(self.lines):
            host.add_device(device)
        if found is not None:
            host._open_journal(found.contents)
            host._recover(found)
        for attached in host.devices:
            attached.device.claim()
        if found is not None:
            host._resume_recovered(found)
        else:
            host._activate()
        while not host._ended.done():
            await asyncio.sleep(_DISTURBED)
            for attached in host.devices:  # as `vmbus status` does, and a guest that changes its SynIC
                attached.io.recall()
        host._ended.result()

    def _died(self) -> bool:
        """Return whether there is no emulator."""
        if not self._process:
            return True
        if not os.waitpid(self._process, os.WNOHANG)[0]:
            return False
        self._process = 0
        self.put("emulator", EmulatorState.NONE)
        self.put("waiting", 0)
        self.words[self._post_word("promise")] = 0
        assert not self._log.exists() or not self._log.read_text(), self._log.read_text()
        return True

    def kill(self) -> None:
        """End the emulator, wherever it is."""
        if self._process:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = 0

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait; interrupts are collected meanwhile."""
        end = time.monotonic() + LIMIT
        while not condition():
            log = self._log.read_text() if self._log.exists() else ""
            assert time.monotonic() < end, f"it does not come: {what}\n{log}"
            self.run()

    def run(self) -> None:
        """Let some time pass, less if an interrupt comes; start an emulator where there is none."""
        if self._died():
            self._begin(self.plans.pop(0) if self.plans else Plan())
        if not select.select([self._lines], [], [], 0.001)[0]:
            return
        *lines, self._partial = (self._partial + self._lines.recv(1 << 16)).split(b"\n")
        for line in lines:
            vector = int(line.split()[1], 16)
            if (0, vector) not in self.interrupts:
                self.interrupts.append((0, vector))

    # --- the processor, and what the plugin does for it ---

    def fence(self) -> None:
        """Make what was stored visible before anything is loaded."""
        self._set_bits(address_of(self._word), 0)

    def _wake(self) -> None:
        if self.get("waiting"):
            os.eventfd_write(self.event, 1)

    def end_trap(self, kind: TrapKind, vcpu: int = 0) -> int:
        answer = self._of_vcpu(vcpu, "answers") // 8
        sequence = self.words[REQUEST_AT // 8 + vcpu * wire.SLOTS]
        self.until(lambda: self.words[answer] == sequence, f"an answer to {kind.name}")
        return super().end_trap(kind, vcpu)

    def ring(self, number: int) -> None:
        at = DOORBELLS_AT + number
        shift = 8 * (at % 4)
        before = self._set_bits(address_of(self.region) + at // 4 * 4, wire.DOORBELL_RUNG << shift)
        if before >> shift & wire.DOORBELL_ENGINE:
            if self.get("engine_waiting"):
                os.eventfd_write(self.engine_event, 1)
        else:
            self._wake()

    def close(self) -> None:
        self.kill()
        super().close()
        os.close(self.engine_event)
        self.qtest.close()
        self._lines.close()
