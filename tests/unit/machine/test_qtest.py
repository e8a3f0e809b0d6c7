"""The qtest socket: who waits for QEMU's main loop, and who hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from vmbus.errors import QemuGone
from vmbus.machine.qemu.qtest import MainLoopWaits, Qtest

TIMEOUT = 20


class BusyQemu:
    """QEMU's end of a qtest socket. Its main loop answers while it is free."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.free = threading.Event()
        self.lines: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        left = b""
        while self.free.wait(TIMEOUT):
            try:
                data = self._end.recv(65536)
            except OSError:
                return
            if not data:
                return
            *lines, left = (left + data).split(b"\n")
            self.lines += lines
            with contextlib.suppress(OSError):
                self._end.sendall(b"OK\n" * len(lines))

    def close(self) -> None:
        self.free.set()
        self._end.close()
        self._thread.join(TIMEOUT)


@contextlib.contextmanager
def busy_qemu(timeout: float = TIMEOUT) -> Iterator[tuple[Qtest, BusyQemu]]:
    here, there = socket.socketpair()
    qtest, qemu = Qtest(here, timeout=timeout), BusyQemu(there)
    try:
        yield qtest, qemu
    finally:
        qtest.close()
        qemu.close()


async def test_the_event_loop_runs_while_a_task_waits_for_qemu() -> None:
    with busy_qemu() as (qtest, qemu):
        waited: list[bool] = []
        qtest.interrupt(0, 0x30)
        with qtest.waits.watched(lambda: waited.append(True)):
            tasks = [
                asyncio.ensure_future(work) for work in (qtest.settled(), qtest.marked([(4096, 1)] * 5000))
            ]
            for _ in range(10):
                await asyncio.sleep(0)
            assert not any(task.done() for task in tasks)
            qemu.free.set()
            async with asyncio.timeout(TIMEOUT):
                await asyncio.gather(*tasks)
            await qtest.settled()
        assert len(qemu.lines) == 5001
        assert not waited


async def test_a_task_and_the_event_loop_may_wait_for_the_same_answers() -> None:
    with busy_qemu() as (qtest, qemu):
        qtest.interrupt(0, 0x30)
        task = asyncio.ensure_future(qtest.settled())
        await asyncio.sleep(0)
        qemu.free.set()
        qtest.write_memory(4096, b"code")  # reads the answer that the task waits for
        async with asyncio.timeout(TIMEOUT):
            await task


async def test_another_thread_hears_that_the_event_loop_waits() -> None:
    with busy_qemu() as (qtest, qemu), qtest.waits.watched(qemu.free.set):
        qtest.write_memory(4096, b"code")
        assert qemu.lines == [b"b64write 0x1000 0x4 Y29kZQ=="]


async def test_another_thread_hears_of_it_if_not_even_the_socket_takes_more() -> None:
    with busy_qemu() as (qtest, qemu), qtest.waits.watched(qemu.free.set):
        count = 0
        while not qemu.free.is_set():
            qtest.interrupt(0, 0x30)
            count += 1
        async with asyncio.timeout(TIMEOUT):
            await qtest.settled()
        assert len(qemu.lines) == count


def test_a_thread_that_asks_late_hears_of_a_wait_under_way() -> None:
    waits, heard = MainLoopWaits(), []
    with waits.waiting(), waits.watched(lambda: heard.append(1)):
        pass
    with waits.watched(lambda: heard.append(2)):
        pass
    assert heard == [1]


async def test_while_a_guest_is_loaded_nothing_is_asked_of_qemu() -> None:
    with busy_qemu() as (qtest, qemu):
        with qtest.loading():
            qtest.write_memory(4096, b"code")
        qemu.free.set()
        qtest.interrupt(0, 0x30)
        await qtest.settled()
        assert [line.split()[0] for line in qemu.lines] == [b"writel"]


async def test_a_qemu_that_never_answers_or_ends_is_gone() -> None:
    with busy_qemu(timeout=0.02) as (qtest, _):
        with pytest.raises(QemuGone, match="has not answered"):
            qtest.write_memory(4096, b"code")
        with pytest.raises(QemuGone, match="has not answered"):
            await qtest.settled()
    with busy_qemu() as (qtest, qemu):
        qtest.interrupt(0, 0x30)
        task = asyncio.ensure_future(qtest.settled())
        await asyncio.sleep(0)
        qemu.close()
        async with asyncio.timeout(TIMEOUT):
            with pytest.raises(QemuGone, match="closed the qtest socket"):
                await task


class Other:
    """Another writer to the same socket."""

    def __init__(self) -> None:
        self.lines = 0
        self.locked: list[bool] = []

    def lock_lines(self) -> None:
        self.locked.append(True)

    def unlock_lines(self) -> None:
        self.locked.append(False)


async def test_the_answers_to_another_writer_are_counted_and_not_waited_for_without_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        qtest = Qtest(ours, timeout=20)
        qtest.other = other = Other()
        qtest.interrupt(0, 0x40)
        assert other.locked == [True, False]
        other.lines = 2
        settled = asyncio.ensure_future(qtest.settled())
        await asyncio.sleep(0)
        other.lines = 50  # it goes on
        theirs.sendall(b"OK\nOK\n")
        await asyncio.sleep(0.02)
        assert not settled.done()
        theirs.sendall(b"OK\n")
        await asyncio.wait_for(settled, 20)
        theirs.sendall(b"OK\n" * 48)
        qtest.read_answers()
        await asyncio.wait_for(qtest.settled(), 20)
        qtest.close()


async def test_waits_end_each_with_its_own_answers() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        qtest = Qtest(ours, timeout=20)
        qtest.interrupt(0, 0x40)
        first = asyncio.ensure_future(qtest.settled())
        await asyncio.sleep(0)
        qtest.interrupt(0, 0x41)
        second = asyncio.ensure_future(qtest.settled())
        await asyncio.sleep(0)
        theirs.sendall(b"OK\n")
        await asyncio.wait_for(first, 20)
        assert not second.done()
        theirs.sendall(b"OK\n")
        await asyncio.wait_for(second, 20)
        qtest.close()
