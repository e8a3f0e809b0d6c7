"""A QEMU with the gateway and a bare guest, and the least of a QMP client."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmbus.errors import GatewayError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import Trap

LIMIT = 120.0


class Machine:
    """One QEMU process. A context manager: it ends with the block."""

    def __init__(
        self, qemu: list[str], plugin: Path, image: Path | None, directory: Path, *, options: tuple[str, ...] = (),
        wait: str = "on"
    ) -> None:  # fmt: skip
        self.socket = directory / "gateway.sock"
        self._console = directory / "console"
        command = [
            *qemu, "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "64", "-nodefaults",
            "-display", "none", *(("-kernel", str(image)) if image else ()), "-debugcon", f"file:{self._console}",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-qmp", f"unix:{directory}/qmp,server=on,wait=off",
            "-plugin", f"{plugin},socket={self.socket},wait={wait}", *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._qmp_path = directory / "qmp"
        self._qmp: Any = None
        self._gateways: list[Gateway] = []
        self.events: list[str] = []
        """Names of the events that QMP reported until the answer to the last command."""

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        for gateway in self._gateways:
            gateway.close()
        if self._qmp is not None:
            self._qmp.close()
        self.process.kill()
        self.process.wait(LIMIT)

    def _until(self, what: str, attempt: Callable[[], Any]) -> Any:
        end = time.monotonic() + LIMIT
        while True:
            try:
                return attempt()
            except (GatewayError, OSError) as error:
                assert self.process.poll() is None, f"QEMU ended while waiting for {what}"
                assert time.monotonic() < end, f"no {what} within {LIMIT} s: {error}"
                time.sleep(0.01)

    def attach(self, *, takeover: bool = False) -> Gateway:
        """Attach, as soon as QEMU listens."""
        gateway = self._until("gateway", lambda: Gateway.attach(self.socket, takeover=takeover))
        assert isinstance(gateway, Gateway)
        self._gateways.append(gateway)
        return gateway

    def qmp(self, command: str) -> float:
        """Run a QMP command; how long its answer took, in seconds."""
        self._connect()
        start = time.monotonic()
        self.ask(command)
        return time.monotonic() - start

    def ask(self, command: str, **arguments: object) -> Any:
        """Run a QMP command; its answer."""
        self._connect()
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
            self.events.append(answer["event"])

    def _connect(self) -> None:
        if self._qmp is None:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(LIMIT)
            self._until("QMP", lambda: connection.connect(str(self._qmp_path)))
            self._qmp = connection.makefile("rw")
            connection.close()
            self._qmp.readline()
            self.ask("qmp_capabilities")

    def console(self) -> list[int]:
        """What the guest has printed."""
        lines = self._console.read_text().split("\n")
        return [int(line, 16) for line in lines[:-1]]

    def prints(self, wanted: list[int]) -> None:
        """Wait until the guest has printed ``wanted``, and nothing else."""
        end = time.monotonic() + LIMIT
        while True:
            ended = self.process.poll() is not None  # before the look: the last of it may come with the end
            if (found := self.console()) == wanted:
                return
            assert found == wanted[: len(found)], found
            assert not ended, f"QEMU ended while waiting for {wanted}, after {found}"
            assert time.monotonic() < end, f"no {wanted} within {LIMIT} s, but {found}"
            time.sleep(0.01)

    def output(self) -> list[int]:
        """What the guest has printed when it is done."""
        self.process.wait(LIMIT)
        return self.console()


def serve(
    gateway: Gateway, answer: Callable[[Trap], None], *, until: Callable[[], bool] | None = None
) -> list[int]:
    """Hand traps to ``answer`` until QEMU ends or ``until`` holds; the doorbells that rang."""
    poll = select.poll()
    poll.register(gateway.fileno(), select.POLLIN)
    poll.register(gateway.connection_fileno(), select.POLLIN)
    rung: list[int] = []
    end = time.monotonic() + LIMIT
    while True:
        for trap in gateway.traps():
            answer(trap)
        rung += gateway.doorbells()
        if (until is not None and until()) or gateway.closed:
            return rung
        assert time.monotonic() < end, f"not served within {LIMIT} s"
        if not gateway.sleep_prepare():
            poll.poll(1000)
            gateway.awake()


def next_trap(gateway: Gateway) -> Trap:
    """Wait for one trap, and leave it unanswered."""
    found: list[Trap] = []
    serve(gateway, found.append, until=lambda: bool(found))
    assert found, "QEMU ended"
    return found[0]
