"""The guest's echo program against the device, through shared memory and a socket: no guest, real concurrency.

The program's own ring code (C) and the emulator's (Python) run in two processes on one mapping, so that each
tests the other's order of stores and loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import DeviceEnvironment
from vmbus.testing.fakes import FakeMemory
from vmbus.testing.loopback import FakeChannel
from vmbus.wire.packet import Packet
from vmbus_devices.echo import Echo

PROGRAMS = Path(__file__).parents[2] / "guest" / "programs"
PAGE = 4096
BUFFER_PAGES = 4
TIMEOUT = 60.0
"""Seconds for one run of the program; it needs one or two."""


@pytest.fixture(scope="session")
def echo_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path_factory.mktemp("programs") / "echo_client"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion"]
    subprocess.run([compiler, *flags, "-o", program, PROGRAMS / "echo_client.c"], check=True)
    return program


class SocketChannel(FakeChannel):
    """Signals through the host's socket."""

    host: Host

    def signal_guest(self) -> None:
        self.host.interrupt()


class Host:
    """A device with one channel in a file, and a socket for signals."""

    def __init__(self, folder: Path, device: Echo, ring_pages: int = 17) -> None:
        self.path = folder / "memory"
        self.ring_bytes = 2 * ring_pages * PAGE
        size = self.ring_bytes + BUFFER_PAGES * PAGE
        self.path.write_bytes(bytes(size))
        with self.path.open("r+b") as file:
            self.mapping = mmap.mmap(file.fileno(), size)
        self.memory = FakeMemory(0)
        self.memory.ram = self.mapping  # type: ignore[assignment]
        self.device = device
        pfns = list(range(2 * ring_pages))
        self.channel = SocketChannel(
            device.offer(), self.memory.pages(pfns[:ring_pages]), self.memory.pages(pfns[ring_pages:])
        )
        self.channel.host = self
        self.host_end, self.guest_end = socket.socketpair()
        self.host_end.setblocking(False)

    def interrupt(self) -> None:
        with contextlib.suppress(BlockingIOError):  # so many are waiting that it makes no difference
            self.host_end.send(b"\1\0\0\0")

    async def run(self, program: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        """Open the channel, run the program, close; its exit status and what it printed."""
        loop = asyncio.get_running_loop()
        if self.device._environment is None:
            self.device.start(DeviceEnvironment(self.memory, loop, None))
        for ring in (self.channel.incoming, self.channel.outgoing):
            ring.write(0, bytes(PAGE))
            ring.store_u32(64, 1)
        self.io = ChannelIo(self.device, loop)
        self.io.opened(self.channel)

        def doorbell() -> None:
            self.host_end.recv(4096)
            self.io.signalled(self.channel)

        loop.add_reader(self.host_end, doorbell)
        descriptor = self.guest_end.fileno()
        process = await asyncio.create_subprocess_exec(
            program,
            "--loopback",
            f"{self.path},{self.ring_bytes},{descriptor}",
            "--timeout",
            "20",
            *arguments,
            pass_fds=[descriptor],
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            loop.remove_reader(self.host_end)
        self.io.closed(self.channel)
        assert process.returncode is not None
        return process.returncode, [json.loads(line) for line in output.splitlines()]

    def close(self) -> None:
        self.host_end.close()
        self.guest_end.close()


async def run(host: Host, program: Path, *arguments: str) -> dict[str, Any]:
    status, [result] = await host.run(program, *arguments)
    assert (status, result["ok"]) == (0, True), result
    assert host.io.refusals.counts == {}
    return result


@pytest.fixture
def host(tmp_path: Path) -> Any:
    host = Host(tmp_path, Echo())
    yield host
    host.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count", "2000"],
        ["--count", "1000", "--answers", "in-band", "--burst", "1"],
        ["--count", "1000", "--answers", "completion", "--size", "4000", "--burst", "1000"],
        ["--count", "300", "--size", "16384", "--burst", "300"],
        ["--count", "5000", "--size", "8", "--burst", "5000"],
    ],
)
async def test_echo(host: Host, echo_client: Path, arguments: list[str]) -> None:
    result = await run(host, echo_client, *arguments)
    assert result["echo"]["packets"] == int(arguments[1])
    assert result["host"]["echoed_bytes"] == result["echo"]["bytes"]


async def test_ring_of_one_page_is_full_most_of_the_time(tmp_path: Path, echo_client: Path) -> None:
    host = Host(tmp_path, Echo(), ring_pages=2)
    result = await run(host, echo_client, "--count", "1000", "--burst", "100")
    assert result["echo"]["ring_full"] > 0
    host.close()


async def test_fill_and_checksum(host: Host, echo_client: Path) -> None:
    result = await run(host, echo_client, "--fill", "200")
    assert result["fill"]["bytes"] == result["host"]["filled_bytes"] == result["host"]["summed_bytes"]


async def test_fill_code(host: Host, echo_client: Path) -> None:
    result = await run(host, echo_client, "--fill-code", "96")
    assert result["fill_code"] == {"runs": 192, "stale": 0}


@pytest.mark.parametrize(
    "arguments", [["--size", "1000"], ["--size", "16384"], ["--size", "8", "--burst", "1"]]
)
async def test_generate(host: Host, echo_client: Path, arguments: list[str]) -> None:
    result = await run(host, echo_client, "--generate", "3000", *arguments)
    assert result["generate"]["packets"] == result["host"]["generated"] == 3000
    if "1000" in arguments:
        assert result["generate"]["host_waited"] > 0, "the host never had to wait for room"


async def test_signal_latency(host: Host, echo_client: Path) -> None:
    result = await run(host, echo_client, "--signal-latency", "300")
    times = result["signal_latency_us"]
    assert times["count"] == 300
    assert 0 < times["min"] <= times["median"] <= times["p99"] <= times["max"]
    assert times["signals"] >= 250, "the host was awake too often to tell"


async def test_everything_again_after_closing_and_opening(host: Host, echo_client: Path) -> None:
    for opening in range(1, 4):
        result = await run(
            host, echo_client, "--count", "100", "--fill", "5", "--generate", "50", "--size", "200"
        )
        assert result["host"]["generated"] == 50 * opening


class LyingEcho(Echo):
    """Changes one byte of the 50th answer, behind the checksum's back."""

    def _answer(self, io: ChannelIo, packet: Packet, *rest: Any, **more: Any) -> None:
        if self.counts["requests"] == 50:
            send = io.answer

            def lie(packet: Packet, payload: bytes | bytearray | memoryview = b"") -> None:
                send(packet, bytes(payload[:-1]) + b"?")

            io.answer = lie  # type: ignore[method-assign]
            super()._answer(io, packet, *rest, **more)
            io.answer = send  # type: ignore[method-assign]
        else:
            super()._answer(io, packet, *rest, **more)


class DeafEcho(Echo):
    """Says that it has written what it has not."""

    def _fill(self, io: ChannelIo, packet: Packet, header: Any, data: bytes) -> None:
        self._answer(io, packet, header, b"")


class SilentEcho(Echo):
    """Takes no packet."""

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        io.pause_input()


@pytest.mark.parametrize(
    ("device", "arguments", "error"),
    [
        (LyingEcho, ["--size", "100"], "wrong checksum"),
        (DeafEcho, ["--fill", "3"], "do not hold what they should"),
        (DeafEcho, ["--fill-code", "3"], "the code is not in the page"),
        (SilentEcho, ["--timeout", "1"], "nothing came from the host in 1 s"),
    ],
)
async def test_program_notices_a_wrong_host(
    tmp_path: Path, echo_client: Path, device: type[Echo], arguments: list[str], error: str
) -> None:
    host = Host(tmp_path, device())
    status, [result] = await host.run(echo_client, *arguments)
    assert (status, result["ok"]) == (1, False)
    assert error in result["error"]
    host.close()


@pytest.mark.parametrize(
    "arguments", [["--count", "0"], ["--count", "x"], ["--answers", "none"], ["--what"], ["more"]]
)
def test_wrong_arguments_are_refused(echo_client: Path, arguments: list[str]) -> None:
    done = subprocess.run([echo_client, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr
