"""The compiled gateway in a process of its own, with a stand-in for QEMU (``harness.c``)."""

from __future__ import annotations

import queue
import select
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vmbus.errors import GatewayError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import Trap

LIMIT = 30.0
CPUID, RDMSR, WRMSR, VMCALL, VMMCALL = "0fa2", "0f32", "0f30", "0f01c1", "0f01d9"
MSR = 0x40000020
PC = 0xFFFFFFFF81000100
RAM = range(0x100000, 0x104000)
"""The guest's memory: STUB_RAM_START in ``stub.h``."""


class Done(NamedTuple):
    """How an instruction ended, and the registers after it."""

    how: str
    pc: int
    rax: int
    rbx: int
    rcx: int
    rdx: int
    times: int


class Harness:
    """A context manager; ``vcpus`` threads that run what :meth:`start` gives them."""

    def __init__(
        self, program: Path, directory: Path, *, vcpus: int = 1, arguments: tuple[str, ...] = ()
    ) -> None:
        self.socket = directory / "gateway.sock"
        self.process = subprocess.Popen(
            [program, str(vcpus), f"socket={self.socket}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._gateways: list[Gateway] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            for _ in range(vcpus):
                self.expect("ready")
        except BaseException:
            self._end()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for gateway in self._gateways:
            gateway.close()
        if kind is None:
            self.quit()
            self.process.wait(LIMIT)
        self._end()
        if kind is None:
            assert self.process.returncode == 0, "the sanitizer has complained; see standard error"

    def _end(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def quit(self) -> None:
        try:
            self.send("quit")
        except BrokenPipeError:
            return  # it is gone: its status says why

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def expect(self, word: str, limit: float = LIMIT) -> list[str]:
        """The next line of output, which begins with ``word`` and comes within ``limit`` seconds."""
        line = self._lines.get(timeout=limit)
        words = line.split()
        assert words and words[0] == word, f"expected {word!r}, the harness said {line!r}"
        return words[1:]

    def silent(self) -> bool:
        """Whether nothing was printed that :meth:`expect` has not seen."""
        return self._lines.empty()

    def attach(self, *, takeover: bool = False) -> Gateway:
        """Attach; waits for a predecessor that has just closed to be noticed."""
        end = time.monotonic() + LIMIT
        while True:
            try:
                gateway = Gateway.attach(self.socket, takeover=takeover)
                break
            except GatewayError:
                if takeover or time.monotonic() > end:
                    raise
                time.sleep(0.001)
        self._gateways.append(gateway)
        return gateway

    def active(self) -> Gateway:
        gateway = self.attach()
        gateway.activate()
        return gateway

    def start(
        self, instruction: str, vcpu: int = 0, *, bits: int = 64, cpl: int = 0, pc: int = PC, **registers: int
    ) -> None:
        """Let a vCPU run one instruction; :meth:`done` fetches how it went."""
        names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "rsp")
        values = " ".join(f"{registers.pop(name, 0):x}" for name in names)
        assert not registers
        self.send(f"run {vcpu} {instruction} {int(bits == 64)} {cpl} {pc:x} {values}")

    def store(self, address: int, data: bytes, vcpu: int = 0) -> None:
        """Store into the guest's RAM, which is :data:`RAM`, by way of a vCPU that runs nothing."""
        self.send(f"store {vcpu} {address:x} {data.hex()}")
        self.expect("stored")

    def done(self) -> Done:
        _, how, pc, rax, rbx, rcx, rdx, times = self.expect("done")
        return Done(how, int(pc, 16), int(rax, 16), int(rbx, 16), int(rcx, 16), int(rdx, 16), int(times))

    def run(self, instruction: str, vcpu: int = 0, **options: int) -> Done:
        """Run an instruction that the emulator is not needed for."""
        self.start(instruction, vcpu, **options)
        return self.done()


def work(gateway: Gateway, *, until: Callable[[], bool], answer: Callable[[Trap], None]) -> None:
    """The emulator's loop, until something holds."""
    poll = select.poll()
    poll.register(gateway.fileno(), select.POLLIN)
    poll.register(gateway.connection_fileno(), select.POLLIN)
    end = time.monotonic() + LIMIT
    while True:
        for trap in gateway.traps():
            answer(trap)
        if until():
            return
        assert not gateway.closed
        assert time.monotonic() < end
        if not gateway.sleep_prepare():
            poll.poll(100)
            gateway.awake()


def traps(gateway: Gateway, count: int = 1) -> list[Trap]:
    """Wait for ``count`` traps and leave them unanswered."""
    found: list[Trap] = []
    work(gateway, until=lambda: len(found) >= count, answer=found.append)
    assert len(found) == count
    return found
