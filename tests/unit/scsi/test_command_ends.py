"""An error of the host's at the end of a command's work costs the channel of the command, and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import pytest
from vmbus.bus.io.state import IoState
from vmbus.testing.fakes import FakeMemory, FakeViews, FakeWorkers
from vmbus_devices.scsi.disk import Disk

from tests.unit.scsi.scsi_guest import RESET_BUS, ScsiGuest, controller, memory_disk

READ = struct.pack(">BBIBHB", 0x28, 0, 5, 0, 1, 0)
VERIFY = struct.pack(">BBIBHB", 0x2F, 0x02, 0, 0, 1, 0)


class BadViews(FakeViews):
    """Views whose end fails, as a write through a QEMU that is gone does."""

    def finish(self, length: int) -> None:
        raise OSError("no QEMU")


class BadMemory(FakeMemory):
    bad = False

    def writable(self, runs: Sequence[tuple[int, int]]) -> FakeViews:
        return (BadViews if self.bad else FakeViews)(self, runs)


def slow_disk(serial: str = "disk") -> Disk:
    disk = memory_disk(serial=serial)
    disk.backend.immediate = False
    return disk


def test_a_read_whose_end_fails_ends_and_costs_its_channel(caplog: pytest.LogCaptureFixture) -> None:
    memory = BadMemory(8 << 20)
    device = controller(slow_disk())
    with ScsiGuest(device, memory=memory) as guest:
        guest.negotiate()
        memory.bad = True
        guest.start(READ, read=512)
        guest.run()
        assert "no QEMU" in caplog.text
        assert guest.io.state is IoState.FAILED
        assert device.status()["in_flight"] == 0
        guest.close()
        assert not device._outstanding.closing
        memory.bad = False
        guest.open()
        guest.negotiate()
        assert guest.read(5, 1).good


@pytest.mark.parametrize("cdb", [READ, VERIFY])
def test_an_answer_that_fails_does_not_keep_a_closed_channel_or_a_removed_unit_waiting(
    cdb: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = controller(slow_disk())
    with ScsiGuest(device) as guest:
        guest.negotiate()
        guest.workers.paused = True
        if cdb is READ:
            guest.start(cdb, read=512)
        else:
            guest.start(cdb, write=bytes(512))
        guest.run()

        def broken(*_: Any) -> None:
            raise MemoryError("no memory for it")

        monkeypatch.setattr(guest.io, "complete", broken)
        device.detach(0, 0)
        assert device._table.removed
        guest.workers.release()
        guest.run()
        assert guest.io.state is IoState.FAILED
        assert not device._table.removed
        assert device.status()["in_flight"] == 0


def test_a_reset_whose_answer_fails_does_not_keep_others_from_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = controller(slow_disk())
    with ScsiGuest(device) as guest:
        guest.negotiate()
        guest.workers.paused = True
        guest.start(READ, read=512)
        guest.send(
            struct.pack("<III", RESET_BUS, 1, 0) + bytes(52), transaction_id=71, completion_requested=True
        )
        guest.send(
            struct.pack("<III", RESET_BUS, 1, 0) + bytes(52), transaction_id=72, completion_requested=True
        )
        guest.run()
        assert len(device.resets.waiting) == 2
        complete, answered = guest.io.complete, []

        def broken(transaction_id: int, payload: bytes = b"") -> None:
            if transaction_id == 71:
                raise MemoryError("no memory for it")
            answered.append(transaction_id)
            complete(transaction_id, payload)

        monkeypatch.setattr(guest.io, "complete", broken)
        guest.workers.release()
        guest.run()
        assert 72 in answered
        assert guest.io.state is IoState.FAILED


class OneThread(Executor):
    """An executor that cannot start a thread, and does what it was given later all the same, as CPython's does."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], Any]] = []

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **_: Any) -> Any:
        self.queued.append(lambda: work(*arguments))
        raise RuntimeError("can't start new thread")


class Expecting(FakeWorkers):
    """Workers that are told of work in threads of a device's own."""

    expected = 0

    def expect(self, done: Callable[[Exception | None], None], /) -> Callable[[Exception | None], None]:
        self.expected += 1

        def ended(error: Exception | None) -> None:
            self.expected -= 1
            self._timers.call_soon(lambda: done(error))

        return ended


def test_a_command_fails_where_its_back_end_has_no_thread_for_it() -> None:
    disk = slow_disk()
    executor = disk.backend.threads = OneThread()
    device = controller(disk)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        workers = Expecting(guest.timers)
        assert disk.environment is not None
        disk.environment = replace(disk.environment, workers=workers)
        guest.start(READ, read=512)
        guest.run()
        [answer] = guest.answers()
        assert answer.condition == (3, 0x11, 0)
        assert workers.expected == 0
        for each in executor.queued:  # it is not done behind the guest's back
            each()
        assert guest.buffer(512) == b"\xee" * 512
        assert workers.expected == 0
        assert guest.io.state is IoState.RUNNING
