"""A storage daemon that leaves a request out of its queue, while it answers others: NBD does it in the end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vmbus_devices.scsi.image import ImageFile

from tests.unit.engine.engine_guest import BUFFERS, compile_device
from tests.unit.fastpath.image_daemon import ImageDaemon, ImageDaemons
from tests.unit.fastpath.image_disk import ImageDisk
from tests.unit.fastpath.test_engine_storage import BLOCK, DISK, request

STALL = 0.8
LEFT_OUT = 40
"""The block that is not answered."""


class Bench:
    """A disk with such a daemon."""

    def __init__(self, device: Path) -> None:
        self.file = os.memfd_create("content")
        os.pwrite(self.file, os.urandom(DISK), 0)
        self.daemon = ImageDaemon(self.file, {LEFT_OUT * BLOCK})
        self.disk = ImageDisk(device, ImageDaemons(self.daemon), ImageFile(Path("disk.qcow2"), "qcow2"))
        self.answered: set[int] = set()

    def look(self) -> None:
        """Take what the engine has for the guest, and for Python."""
        guest = self.disk.guest
        guest.engine.dispatch()
        if guest.interrupted():
            self.answered |= {each.transaction_id for each in guest.handle()}

    async def end(self) -> None:
        await self.disk.end()
        os.close(self.file)


@pytest.fixture
async def bench(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    monkeypatch.delenv("VMBUS_FASTPATH", raising=False)
    monkeypatch.setattr("vmbus_devices.nbd.client.STALL_TIMEOUT", STALL)
    monkeypatch.setattr("vmbus_devices.scsi.nbd._SLOW", 0.0)
    bench = Bench(compile_device(tmp_path_factory.mktemp("device")))
    yield bench
    await bench.end()


def read(number: int, lba: int) -> bytes:
    return request(number, write=False, lba=lba, blocks=8, place=BUFFERS + number % 64)


async def test_a_request_that_is_left_out_of_the_queue_is_sent_again_over_nbd(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    disk, guest = bench.disk, bench.disk.guest
    backend = disk.backend
    await disk.until(lambda: backend.queue)
    disk.use()
    guest.give()
    begun, number, waits = time.monotonic(), 1, 0.0
    guest.send(read(1, LEFT_OUT))
    while not guest.returned:
        assert time.monotonic() < begun + 10 * STALL, "the request waits without end"
        number += 1
        guest.send(read(number, 0))

        def gone(number: int = number) -> bool:
            bench.look()
            return number in bench.answered or bool(guest.returned) or guest.left > 0

        await disk.until(gone)
        waits = max(waits, backend.status().get("waits", 0.0))
    assert time.monotonic() > begun + STALL
    assert guest.returned[0] == read(1, LEFT_OUT)
    assert len(bench.answered) > 10
    assert 1 not in bench.answered
    assert waits > STALL / 2
    assert f"has not answered a request for {STALL:g} s, while it answered others" in caplog.text
    found = memoryview(bytearray(8 * BLOCK))
    await asyncio.to_thread(backend.read, LEFT_OUT * BLOCK, [found])
    assert found == os.pread(bench.file, len(found), LEFT_OUT * BLOCK)
    assert bench.daemon.with_queue == [False, True, False]
    assert (backend.status()["path"], backend.client.trouble) == ("nbd", "")


async def test_a_request_behind_others_in_the_queue_is_waited_for(bench: Bench) -> None:
    disk, guest = bench.disk, bench.disk.guest
    count = 12
    bench.daemon.delay = 2 * STALL / count
    await disk.until(lambda: disk.backend.queue)
    disk.use()
    guest.give()
    guest.send(*[read(number, 0) for number in range(count)])

    def all_answered() -> bool:
        bench.look()
        return len(bench.answered) == count

    await disk.until(all_answered)
    assert (disk.backend.client.sessions, guest.returned) == (1, [])
