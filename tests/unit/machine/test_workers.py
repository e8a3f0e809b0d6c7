"""Threads for blocking work: it is done side by side, and reported in the event loop's thread."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable

import pytest
from vmbus.machine.io.workers import WorkerThreads


async def test_work_is_done_side_by_side_and_reported_in_the_loop() -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 4)
    meeting = threading.Barrier(4, timeout=20)
    loop_thread = threading.get_ident()
    reports: list[tuple[Exception | None, bool]] = []

    def done(error: Exception | None) -> None:
        reports.append((error, threading.get_ident() == loop_thread))

    for _ in range(4):
        workers.run(lambda: (meeting.wait(), None)[1], done)
    assert await workers.settle(20)
    assert reports == [(None, True)] * 4
    workers.close()


async def test_more_work_than_threads_waits_and_errors_are_handed_on() -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    errors: list[str] = []

    def fail() -> None:
        raise OSError("no")

    def succeed() -> None:
        pass

    for number in range(20):
        workers.run(fail if number % 2 else succeed, lambda error: errors.append(repr(error)))
    assert workers.unfinished == 20
    assert await workers.settle(20)
    assert sorted(errors) == ["None"] * 10 + ["OSError('no')"] * 10
    workers.close()


async def test_settling_gives_up_after_its_limit() -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 1)
    gate = threading.Event()
    workers.run(lambda: (gate.wait(20), None)[1], lambda error: None)
    assert not await workers.settle(0.01)
    gate.set()
    assert await workers.settle(20)
    workers.close()


async def test_work_that_is_done_elsewhere_is_waited_for_and_reported_in_the_loop() -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    reports: list[tuple[str, bool]] = []
    loop_thread = threading.get_ident()

    def done(error: Exception | None) -> None:
        reports.append((repr(error), threading.get_ident() == loop_thread))

    ended = workers.expect(done)
    assert workers.unfinished == 1
    assert not await workers.settle(0.001)
    threading.Thread(target=ended, args=(OSError("no"),)).start()
    assert await workers.settle(20)
    assert reports == [("OSError('no')", True)]
    workers.close()


async def test_each_task_that_waits_has_its_own_timeout() -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    gate = threading.Event()
    workers.run(lambda: (gate.wait(20), None)[1], lambda error: None)
    first = asyncio.ensure_future(workers.settle(20))
    assert not await workers.settle(0.01)
    second = asyncio.ensure_future(workers.settle(20))
    await asyncio.sleep(0)
    gate.set()
    async with asyncio.timeout(15):
        assert await first
        assert await second
    workers.close()


async def test_work_that_begins_when_other_work_has_ended_is_waited_for_too() -> None:
    loop = asyncio.get_running_loop()
    workers = WorkerThreads(loop, 2)
    ended: list[int] = []

    def begin(number: int) -> None:
        workers.run(lambda: None, lambda error: done(number))

    def done(number: int) -> None:
        ended.append(number)
        if number < 3:
            loop.call_soon(begin, number + 1)

    begin(1)
    assert await workers.settle(20)
    assert ended[0] == 1
    while len(ended) < 3:
        assert await workers.settle(20)
        await asyncio.sleep(0)
    workers.close()


async def test_a_task_is_not_told_that_work_is_late_because_another_began_some() -> None:
    """As a guest's device does, when a cancelled migration has resumed it before the next one."""
    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    began: list[Callable[[Exception | None], None]] = []
    loop = asyncio.get_running_loop()

    def ended(error: Exception | None) -> None:
        # Begun when all work is done, before the task that is woken by that runs.
        loop.call_soon(lambda: began.append(workers.expect(lambda _: None)))

    first = workers.expect(ended)
    waiting = asyncio.ensure_future(workers.settle(20))
    await asyncio.sleep(0)
    first(None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    began[0](None)
    assert await waiting
    workers.close()


def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


async def test_work_fails_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    called: list[str] = []
    errors: list[Exception | None] = []
    with monkeypatch.context() as limited:
        no_more_threads(limited)
        workers.run(lambda: called.append("work"), errors.append)
        assert await workers.settle(20)
    [error] = errors
    assert isinstance(error, OSError)
    assert error.errno == errno.EAGAIN
    assert (called, workers.unfinished) == ([], 0)
    workers.run(lambda: called.append("later"), errors.append)
    assert await workers.settle(20)
    assert called == ["later"]  # and what failed was not done after all
    workers.close()


async def test_threads_that_exist_do_the_work_of_those_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = WorkerThreads(asyncio.get_running_loop(), 2)
    gate = threading.Event()
    errors: list[Exception | None] = []
    workers.run(lambda: (gate.wait(20), None)[1], errors.append)
    with monkeypatch.context() as limited:
        no_more_threads(limited)
        workers.run(lambda: None, errors.append)
        workers.run(lambda: None, errors.append)
        gate.set()
        assert await workers.settle(20)
    assert errors == [None, None, None]
    assert workers.unfinished == 0
    workers.run(lambda: None, errors.append)
    assert await workers.settle(20)
    workers.close()
