"""An output that is open and never read stops nobody who serves a guest, and loses nothing that is read later."""

from __future__ import annotations

import asyncio
import os
import re
import select
import subprocess
import sys

from vmbus.cli.writer import Writer

_SERVING = """
import asyncio, contextlib, os, sys
from types import SimpleNamespace
from vmbus.cli import output, run
from vmbus.machine.host import ExitReason
from vmbus.provision.command_output import START

LINES = 60000  # 600 KiB, far more than a pipe holds

class Guest:
    command = object()
    def __init__(self):
        self.host = SimpleNamespace(stop=lambda: None)
        self.served = SimpleNamespace(serve=self.serve)
        self.finished = asyncio.Event()
    async def serve(self):
        for turn in range(100):  # what a host does meanwhile
            await asyncio.sleep(0.005)
            os.write(int(sys.argv[1]), b"t")
        await self.finished.wait()
        return ExitReason.POWERED_OFF
    async def command_output(self):
        yield START
        for number in range(0, LINES, 100):
            yield b"".join(b"%09d\\n" % each for each in range(number, number + 100))
            await asyncio.sleep(0)
        yield b"\\x10\\x03vmbus-exit 7\\n"
        self.finished.set()

async def main():
    return await run._command(Guest(), output.Echo(), under_way=False)

output.MAX_WAITING = 100000
with output.serving() if hasattr(output, "serving") else contextlib.nullcontext():
    status = asyncio.run(main())
sys.exit(status)
"""


_TELLING = """
import os, sys
from vmbus.cli import output
with output.serving():
    for number in range(8000):
        output.tell(f"{number:0200}")
    os.write(int(sys.argv[1]), b"t")
"""


def start(script: str, descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(descriptor)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(descriptor,),
    )


def turns(reader: int, count: int) -> int:
    """Return how many of ``count`` turns of a host came; the wait for each ends after a while."""
    came = 0
    while came < count and select.select([reader], [], [], 20)[0]:
        came += len(os.read(reader, count))
    return came


def test_a_host_goes_on_while_nobody_reads_and_loses_nothing() -> None:
    reader, writer = os.pipe()
    with start(_SERVING, writer) as process:
        try:
            assert turns(reader, 100) == 100
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)
    assert process.returncode == 7, errors.decode()
    assert output == b"".join(b"%09d\n" % number for number in range(60000))


def test_messages_that_nobody_reads_stop_nobody_and_are_counted() -> None:
    reader, writer = os.pipe()
    with start(_TELLING, writer) as process:
        try:
            assert turns(reader, 1) == 1  # 1 MiB and more were told, and a pipe holds 64 KiB
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)
    assert process.returncode == 0
    next_number, notices = 0, 0
    for line in errors.decode().splitlines():
        # The thread that writes may start late, fill the pipe, and make room for some more in between.
        if left_out := re.fullmatch(r"\[vmbus: (\d+) messages are left out here: nobody read them\]", line):
            next_number += int(left_out[1])
            notices += 1
        else:
            assert int(line) == next_number
            next_number += 1
    assert next_number == 8000
    assert notices


def test_what_was_written_comes_in_order_and_completely() -> None:
    reader, descriptor = os.pipe()
    writer = Writer(descriptor, 1 << 20)
    for number in range(100):
        writer.put(b"%03d" % number)
    assert writer.flush(10)
    assert os.read(reader, 1000) == b"".join(b"%03d" % number for number in range(100))
    os.close(reader)
    os.close(descriptor)


def test_a_descriptor_that_does_not_block_is_waited_for() -> None:
    """Who starts a program can share such a pipe with it."""
    reader, descriptor = os.pipe()
    os.set_blocking(descriptor, False)
    writer = Writer(descriptor, 1 << 20)
    writer.put(bytes(200000))
    left = 200000
    while left:
        left -= len(os.read(reader, left))
    assert writer.flush(10)
    assert writer.error is None
    os.close(reader)
    os.close(descriptor)


def test_a_flush_of_what_nobody_reads_ends() -> None:
    reader, descriptor = os.pipe()
    writer = Writer(descriptor, 1 << 20)
    writer.put(bytes(200000))
    assert not writer.flush(0.05)
    os.close(reader)  # the thread's write fails, and it ends
    assert writer.flush(10)
    assert isinstance(writer.error, BrokenPipeError)
    os.close(descriptor)


async def test_room_is_made_by_a_reader_by_an_error_and_by_the_end() -> None:
    for give in ("reader", "error", "end"):
        reader, descriptor = os.pipe()
        writer = Writer(descriptor, 100000)
        writer.put(bytes(200000))
        room = asyncio.ensure_future(writer.room())
        await asyncio.sleep(0)
        assert not room.done()
        if give == "reader":
            await asyncio.to_thread(_read, reader, 200000)
        elif give == "error":
            os.close(reader)
        else:
            writer.lift_limit()
        async with asyncio.timeout(20):
            await room
        if give != "error":
            os.close(reader)
        writer.flush(10)
        os.close(descriptor)


def _read(reader: int, left: int) -> None:
    while left:
        left -= len(os.read(reader, left))
