"""Transfers through io_uring: the same bytes as by plain calls, any number at a time, errors as numbers."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from vmbus.machine.io.uring import ENTRIES, Uring
from vmbus.machine.io.workers import WorkerThreads


async def with_ring(story: Callable[[Uring], Awaitable[None]]) -> None:
    ring = Uring.open(asyncio.get_running_loop())
    if ring is None:
        pytest.skip("no io_uring here")
    try:
        await story(ring)
    finally:
        ring.close()


async def moved(
    ring: Uring, fd: int, offset: int, views: list[memoryview], *, write: bool, flags: int = 0
) -> int:
    result: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    ring.transfer(fd, offset, views, write, flags, result.set_result)
    return await asyncio.wait_for(result, 20)


async def test_one_view_and_many_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(65536))
    fd = os.open(path, os.O_RDWR)
    data = os.urandom(8192)

    async def story(ring: Uring) -> None:
        assert await moved(ring, fd, 512, [memoryview(data)], write=True) == 8192
        parts = [memoryview(bytearray(size)) for size in (1, 4095, 4096)]
        assert await moved(ring, fd, 512, parts, write=False) == 8192
        assert b"".join(parts) == data
        pieces = [memoryview(data)[:100], memoryview(data)[100:]]
        assert await moved(ring, fd, 40000, pieces, write=True, flags=os.RWF_DSYNC) == 8192
        assert path.read_bytes()[40000 : 40000 + 8192] == data
        assert await moved(ring, fd, 65536 - 100, [memoryview(bytearray(512))], write=False) == 100
        assert await moved(ring, fd, 1 << 20, [memoryview(bytearray(512))], write=False) == 0

    await with_ring(story)
    os.close(fd)


async def test_errors_come_as_negative_numbers(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)

    async def story(ring: Uring) -> None:
        assert await moved(ring, fd, 0, [memoryview(bytes(512))], write=True) == -errno.EBADF

    await with_ring(story)
    os.close(fd)


async def test_more_than_the_ring_holds_wait_their_turn(tmp_path: Path) -> None:
    path = tmp_path / "file"
    count = 5 * ENTRIES
    path.write_bytes(b"".join(index.to_bytes(8, "little") for index in range(count)))
    fd = os.open(path, os.O_RDONLY)

    async def story(ring: Uring) -> None:
        views = [memoryview(bytearray(8)) for _ in range(count)]
        going = [
            asyncio.ensure_future(moved(ring, fd, index * 8, [view], write=False))
            for index, view in enumerate(views)
        ]
        assert await asyncio.gather(*going) == [8] * count
        assert ring.under_way == 0
        assert [int.from_bytes(view, "little") for view in views] == list(range(count))

    await with_ring(story)
    os.close(fd)


async def test_workers_wait_for_transfers_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    workers = WorkerThreads(asyncio.get_running_loop())
    view = memoryview(mmap.mmap(-1, 4096))
    results: list[int] = []
    if not workers.transfer(fd, 0, [view], False, 0, results.append):
        pytest.skip("no io_uring here")
    assert workers.unfinished == 1
    assert await workers.settle(20)
    assert results == [4096]
    assert bytes(view) == b"x" * 4096
    workers.close()
    os.close(fd)


async def test_where_there_is_no_ring_the_caller_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Uring, "open", classmethod(lambda cls, loop: None))
    workers = WorkerThreads(asyncio.get_running_loop())
    assert not workers.transfer(0, 0, [], False, 0, print)
    assert workers.unfinished == 0
    workers.close()
