"""Plain reads and writes of disks in the engine's thread: as Python does them, and without it."""

from __future__ import annotations

import ctypes
import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.machine.engine.thread import Functions
from vmbus.machine.io.engines import NativeEngines
from vmbus.wire.scsi import ScsiStatus
from vmbus.wire.storvsp import (
    MAX_LUNS,
    MAX_TARGETS,
    SrbStatus,
    Status,
    answer_size,
    build_answer,
    parse_request,
)
from vmbus_devices.scsi.fast.path import FastPath, FastUnit

from tests.unit.engine.engine_guest import BUFFERS, PAGE, EngineGuest, compile_device

DISK = 1 << 20
BLOCK = 512


class Disk:
    """A disk on a file, LUN 0, and a guest whose channel the engine has."""

    def __init__(self, device: Path, *, busy_waits: bool = False) -> None:
        self.guest = EngineGuest(device, busy_waits=busy_waits)
        data_path: Any = SimpleNamespace(report_ranges=lambda on: None)  # the channel is given by hand
        path = NativeEngines(self.guest.memory, lambda: data_path).engine(FastPath.open)
        if path is None:
            pytest.skip("no compiler, or no io_uring for us")
        self.path = path
        self.file = self.guest.file
        os.ftruncate(self.file, DISK)
        self.unit = FastUnit(self.file, BLOCK, DISK // BLOCK, 1 << 18, 1, 0, readable=True, writable=True)
        number = path.add_unit(self.unit)
        assert number is not None
        self.number = number
        self.units = array("h", [-1] * (MAX_TARGETS * MAX_LUNS))
        self.units[0] = number
        self.guest.functions = Functions(*path.for_engine(self.units))

    def close(self) -> None:
        self.guest.__exit__()
        self.path.close()


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture
def disk(device: Path) -> Iterator[Disk]:
    disk = Disk(device)
    yield disk
    disk.close()


def request(
    number: int, *, write: bool, lba: int, blocks: int, place: int, inside: int = 0, lun: int = 0
) -> bytes:
    """A READ or WRITE(10) of ``blocks`` from or to the guest's pages from ``place`` on; ``number``: its id."""
    length = blocks * BLOCK
    pages = range(place, place + (inside + length + PAGE - 1) // PAGE)
    data = 16 + 8 + 8 + 8 * len(pages)
    head = struct.pack("<HHHHQ", 9, data // 8, (data + 64) // 8, 1, number)
    ranges = struct.pack("<IIII", 0, 1, length, inside) + struct.pack(f"<{len(pages)}Q", *pages)
    srb = struct.pack("<HBBBBBBBBBBI", 52, 0, 0, 0, 0, 0, lun, 10, 20, 0 if write else 1, 0, length)
    cdb = struct.pack(">BBIBHB", 0x2A if write else 0x28, 0, lba, 0, blocks, 0).ljust(20, b"\0")
    return head + ranges + (struct.pack("<III", 3, 1, 0) + srb + cdb).ljust(64, b"\0")


def test_what_is_written_is_read_again(disk: Disk) -> None:
    guest = disk.guest
    written = os.urandom(3 * PAGE)
    guest.memory.write(BUFFERS * PAGE + 1000, written)
    guest.give()
    guest.send(request(1, write=True, lba=40, blocks=24, place=BUFFERS, inside=1000))
    guest.receive(1)
    assert os.pread(disk.file, len(written), 40 * BLOCK) == written
    guest.send(request(2, write=False, lba=40, blocks=24, place=BUFFERS + 10))
    (answer,) = guest.receive(1)
    assert answer.transaction_id == 2
    assert guest.memory.read((BUFFERS + 10) * PAGE, len(written)) == written
    assert set(range(BUFFERS + 10, BUFFERS + 13)) <= set(guest.memory.take_dirty())
    assert (guest.left, guest.returned) == (0, [])


@pytest.mark.parametrize("write", [True, False])
def test_the_answer_is_that_of_python(disk: Disk, write: bool) -> None:
    guest = disk.guest
    packet = request(0x1122334455667788, write=write, lba=8, blocks=3, place=BUFFERS)
    guest.give()
    guest.send(packet)
    (answer,) = guest.receive(1)
    srb = parse_request(packet[-64:])
    expected = build_answer(
        srb, Status.SUCCESS, SrbStatus.SUCCESS, ScsiStatus.GOOD, 3 * BLOCK, b"", answer_size(64)
    )
    assert answer.payload == expected
    assert answer.transaction_id == 0x1122334455667788


def test_requests_side_by_side(disk: Disk) -> None:
    guest = disk.guest
    content = os.urandom(128 * PAGE)
    os.pwrite(disk.file, content, 0)
    guest.give()
    received = 0
    for start in range(0, 128, 32):
        guest.send(
            *[
                request(1 + number, write=False, lba=number * 8, blocks=8, place=BUFFERS + number)
                for number in range(start, start + 32)
            ]
        )
        received += len(guest.receive(32))
    assert received == 128
    assert guest.memory.read(BUFFERS * PAGE, len(content)) == content
    counts = disk.path.counts(disk.number)
    assert (counts.reads, counts.writes, counts.bytes_read) == (128, 0, len(content))
    assert sum(counts.latencies.values()) == 128
    assert 0 < counts.min_latency <= counts.max_latency
    again = disk.path.counts(disk.number)
    assert (again.reads, again.bytes_read, again.latencies) == (0, 0, {})
    assert disk.path.depth(disk.number) == 0


@pytest.mark.parametrize(
    "packet",
    [
        request(1, write=False, lba=DISK // BLOCK, blocks=1, place=BUFFERS),
        request(1, write=False, lba=0, blocks=1, place=BUFFERS, lun=1),
        request(1, write=False, lba=0, blocks=1, place=0x800),
    ],
    ids=["behind the end", "no such unit", "no RAM"],
)
def test_what_is_not_plain_is_left_to_python(disk: Disk, packet: bytes) -> None:
    guest = disk.guest
    guest.give()
    guest.send(packet)
    guest.dispatch(lambda: guest.left == 1)
    guest.recall()
    assert guest.indices[0] == 0
    assert disk.path.depth(disk.number) == 0


def test_a_read_that_ends_early_is_returned(disk: Disk) -> None:
    guest = disk.guest
    os.ftruncate(disk.file, 5 * BLOCK)
    packet = request(1, write=False, lba=4, blocks=8, place=BUFFERS)
    guest.give()
    guest.send(packet)
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [packet]
    guest.recall()
    assert disk.path.depth(disk.number) == 0
    assert disk.path.counts(disk.number).reads == 0


def test_a_unit_without_a_file(disk: Disk) -> None:
    guest = disk.guest
    disk.unit.fd = -1
    disk.path.change_unit(disk.number, disk.unit)
    guest.give()
    guest.send(*[request(1 + number, write=False, lba=0, blocks=8, place=BUFFERS) for number in range(32)])
    assert len(guest.receive(32)) == 32
    assert BUFFERS not in guest.memory.take_dirty()


def test_all_channels_of_a_controller_have_one_context(disk: Disk) -> None:
    first = disk.path.for_engine(disk.units)
    assert disk.path.for_engine(disk.units) == first
    assert bytes((ctypes.c_char * 16).from_address(first[2])) == struct.pack(
        "=QQ", disk.path._address, disk.units.buffer_info()[0]
    )
