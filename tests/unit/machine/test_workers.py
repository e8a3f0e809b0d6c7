"""Threads for blocking work: it is done side by side, and reported in the event loop's thread."""

from __future__ import annotations

import asyncio
import threading

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
