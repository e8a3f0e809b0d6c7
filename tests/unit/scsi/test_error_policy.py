"""werror= and rerror=: a guest is stopped for an error, and resumed."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.backend import MemoryBackend
from vmbus_devices.scsi.blocks import ReadErrors, WriteErrors
from vmbus_devices.scsi.disk import Disk

from tests.unit.scsi.scsi_guest import RESET_BUS, ScsiGuest, controller

BLOCKS = 4096


class Failing(MemoryBackend):
    """Fails with ``number`` as long as that is set."""

    immediate = False
    number = 0

    def check(self) -> None:
        if self.number:
            raise OSError(self.number, "it fails")

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self.check()
        super().read(offset, views)

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        self.check()
        super().write(offset, views, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self.check()
        super().discard(offset, length)


def disk(werror: str = "report", rerror: str = "report") -> tuple[Disk, Failing]:
    backend = Failing(BLOCKS * 512)
    unit = Disk(backend, "d")
    unit.write_errors, unit.read_errors = WriteErrors(werror), ReadErrors(rerror)
    return unit, backend


@contextmanager
def guest_of(unit: Disk) -> Iterator[tuple[ScsiGuest, Scsi]]:
    device = controller(unit)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        yield guest, device


WRITE = struct.pack(">BBIBHB", 0x2A, 0, 5, 0, 1, 0)
READ = struct.pack(">BBIBHB", 0x28, 0, 5, 0, 1, 0)


@pytest.mark.parametrize(
    ("werror", "rerror", "number", "write", "stops"),
    [
        ("report", "report", errno.ENOSPC, True, False),
        ("report", "report", errno.EIO, False, False),
        ("enospc", "report", errno.ENOSPC, True, True),
        ("enospc", "report", errno.EDQUOT, True, True),
        ("enospc", "report", errno.EIO, True, False),
        ("stop", "report", errno.EIO, True, True),
        ("stop", "report", errno.EIO, False, False),
        ("report", "stop", errno.EIO, False, True),
        ("report", "stop", errno.EIO, True, False),
    ],
)
def test_what_stops_the_guest(werror: str, rerror: str, number: int, write: bool, stops: bool) -> None:
    unit, backend = disk(werror, rerror)
    with guest_of(unit) as (guest, device):
        backend.number = number
        if write:
            guest.start(WRITE, write=b"x" * 512)
        else:
            guest.start(READ, read=512)
        answers = guest.answers()
        assert bool(guest.stops) == stops
        assert (answers == []) == stops
        status = device.status()["units"]["0:0"]
        assert ("kept" in status) == stops
        if stops:
            assert status["kept"]["requests"] == 1
            assert "it fails" in status["kept"]["because"]
            assert "disk d" in guest.stops[0]
        else:
            assert answers[0].condition is not None


def test_a_command_that_the_host_fails_at_does_not_keep_the_others_from_being_done_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, backend = disk("stop", "stop")
    with guest_of(unit) as (guest, device):
        backend.number = errno.ENOSPC
        guest.start(WRITE, write=b"x" * 512)
        guest.start(WRITE, write=b"y" * 512, at=8)
        move, failures = unit._move, [MemoryError("no memory for it")]

        def exhausted(*arguments: Any) -> None:
            if failures:
                raise failures.pop()
            move(*arguments)

        monkeypatch.setattr(unit, "_move", exhausted)
        backend.number = 0
        device.guest_resumed()
        guest.run()
        assert "no memory for it" in caplog.text
        assert backend.data[5 * 512 : 6 * 512] == b"y" * 512
        assert device.status()["in_flight"] == 0
    assert not guest.channel.closing


def test_what_failed_is_done_again_when_the_guest_goes_on() -> None:
    unit, backend = disk("stop", "stop")
    with guest_of(unit) as (guest, device):
        backend.number = errno.ENOSPC
        first = guest.start(WRITE, write=b"x" * 512)
        second = guest.start(READ, read=512, at=8)
        assert guest.answers() == []
        assert device.status()["in_flight"] == 2
        device.guest_resumed()  # nothing was mended
        guest.run()
        assert guest.answers() == []
        assert len(guest.stops) == 4
        backend.number = 0
        device.guest_resumed()
        guest.run()
        answers = guest.answers()
        assert [answer.transaction_id for answer in answers] == [first, second]
        assert all(answer.good for answer in answers)
        assert backend.data[5 * 512 : 6 * 512] == b"x" * 512
        assert guest.buffer(512, at=8) == b"x" * 512
        assert "kept" not in device.status()["units"]["0:0"]
        assert device.status()["units"]["0:0"]["requests"] == 2


def test_a_discard_is_kept_too() -> None:
    unit, backend = disk("enospc")
    with guest_of(unit) as (guest, device):
        backend.data[4096:8192] = b"x" * 4096
        backend.number = errno.ENOSPC
        unmap = struct.pack(">HHIQII", 22, 16, 0, 8, 8, 0)
        guest.start(bytes((0x42, 0, 0, 0, 0, 0, 0, 0, len(unmap), 0)), write=unmap)
        assert guest.answers() == []
        backend.number = 0
        device.guest_resumed()
        guest.run()
        assert [answer.good for answer in guest.answers()] == [True]
        assert backend.data[4096:8192] == bytes(4096)


def test_what_was_kept_is_saved_and_done_where_the_guest_goes_on() -> None:
    unit, backend = disk("stop")
    other, there = disk("stop")
    with guest_of(unit) as (guest, device):
        backend.number = errno.ENOSPC
        guest.start(WRITE, write=b"x" * 512)
        state, [packet] = device.save(), device.save_packets(guest.io)
        target = controller(other)
        target.restore(state)
        target.restore_packet(guest.io, packet)
        assert list(target.save_packets(guest.io)) == [packet]
        assert WRITE in packet.state
        assert WRITE not in state
        # The migration failed: it is done here after all.
        backend.number = 0
        device.guest_resumed()
        guest.run()
        assert [answer.good for answer in guest.answers()] == [True]
        assert there.data[:] == bytes(BLOCKS * 512)


def test_a_reset_aborts_what_was_kept() -> None:
    unit, backend = disk("stop")
    with guest_of(unit) as (guest, device):
        backend.number = errno.EIO
        guest.start(WRITE, write=b"x" * 512)
        assert guest.status(RESET_BUS) == 0
        assert device.status()["in_flight"] == 0
        device.guest_resumed()
        guest.run()
        assert guest.answers() == []


def test_a_disk_that_is_taken_away_keeps_nothing() -> None:
    unit, backend = disk("stop")
    with guest_of(unit) as (guest, device):
        backend.number = errno.EIO
        guest.start(WRITE, write=b"x" * 512)
        device.detach(0, 0)
        guest.run()
        assert [answer.srb_status for answer in guest.answers()] == [2]
