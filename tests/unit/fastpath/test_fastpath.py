"""The fast path does what Python does for the same packets, and leaves to Python what it cannot do."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vmbus.bus.io.state import IoState
from vmbus.ports import PAGE_SIZE
from vmbus.wire.scsi import Sense
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.faults import FaultPlan, parse_faults
from vmbus_devices.scsi.file import Cache, FileBackend

from tests.unit.fastpath.fast_guest import HIGH, HOLE, RAM, FastGuest
from tests.unit.scsi.scsi_guest import BUFFER_PFN, IN, NONE, OUT, Answer, ScsiGuest, controller

BLOCKS = 4096


def image(path: Path) -> Path:
    """A disk whose every block says which one it is."""
    path.write_bytes(b"".join(struct.pack("<Q", index) * 64 for index in range(BLOCKS)))
    return path


def disk(path: Path, *, faults: str = "", cache: Cache = Cache.WRITEBACK, **options: Any) -> Disk:
    return Disk(FileBackend(path, cache=cache), "disk", faults=FaultPlan(parse_faults(faults)), **options)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FastGuest]:
    with FastGuest(controller(disk(image(tmp_path / "disk.img")))) as found:
        found.command(bytes(6))  # the unit attention of a new disk, if it has one
        yield found


def do(guest: ScsiGuest, cdb: bytes, **more: Any) -> Answer:
    """A command, to its end."""
    number = guest.start(cdb, **more)
    [answer] = guest.answers()
    assert answer.transaction_id == number
    return answer


def rw(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    """READ or WRITE of the length that the opcode says."""
    group = opcode >> 5
    if group == 0:
        return bytes((opcode, lba >> 16 & 0x1F, lba >> 8 & 0xFF, lba & 0xFF, blocks & 0xFF, 0))
    if group == 4:
        return struct.pack(">BBQIBB", opcode, flags, lba, blocks, 0, 0)
    if group == 5:
        return struct.pack(">BBIIBB", opcode, flags, lba & 0xFFFFFFFF, blocks, 0, 0)
    return struct.pack(">BBIBHB", opcode, flags, lba & 0xFFFFFFFF, 0, blocks & 0xFFFF, 0)


# --- requests that take the fast path ---


@pytest.mark.parametrize("opcode", [0x08, 0x28, 0xA8, 0x88])
def test_a_read_of_each_length_is_done_by_the_fast_path(guest: FastGuest, opcode: int) -> None:
    answer = do(guest, rw(opcode, 7, 24), read=24 * 512, offset=512)
    assert answer.good
    assert answer.transferred == 24 * 512
    assert guest.taken == 1
    assert guest.buffer(24 * 512, 512) == b"".join(struct.pack("<Q", index) * 64 for index in range(7, 31))


@pytest.mark.parametrize("opcode", [0x0A, 0x2A, 0xAA, 0x8A])
@pytest.mark.parametrize("flags", [0, 0x08, 0x10])
def test_a_write_of_each_length_is_done_by_the_fast_path(
    guest: FastGuest, tmp_path: Path, opcode: int, flags: int
) -> None:
    data = os.urandom(17 * 512)
    assert do(guest, rw(opcode, 100, 17, flags), write=data).good
    assert guest.taken == 1
    assert (tmp_path / "disk.img").read_bytes()[100 * 512 : 117 * 512] == data


def test_many_at_a_time_are_each_answered_once(guest: FastGuest) -> None:
    numbers = {guest.start(rw(0x28, index, 8), read=4096, at=2 * index) for index in range(60)}
    guest.settle()
    answers = guest.answers()
    assert {answer.transaction_id for answer in answers} == numbers
    assert len(answers) == 60
    assert all(answer.good for answer in answers)
    assert guest.taken == 60
    for index in range(60):
        assert guest.buffer(8, 0, 2 * index) == struct.pack("<Q", index)


def test_direct_io_goes_through_it_where_memory_is_aligned_and_past_it_where_not(tmp_path: Path) -> None:
    with FastGuest(controller(disk(image(tmp_path / "disk.img"), cache=Cache.NONE))) as guest:
        guest.command(bytes(6))
        if not guest.device.units[0, 0].backend.direct:  # type: ignore[attr-defined]
            pytest.skip("the file system has no direct I/O")
        assert do(guest, rw(0x28, 16, 8), read=4096).good
        assert guest.taken == 1
        assert do(guest, rw(0x28, 16, 8), read=4096, offset=4).good
        assert guest.taken == 1
        assert guest.buffer(8, 4) == struct.pack("<Q", 16)


def test_a_buffer_on_both_sides_of_a_hole_is_filled(guest: FastGuest) -> None:
    last, first = (HOLE >> 12) - 1, HIGH >> 12
    payload = guest.srb(rw(0x28, 5, 16), length=8192, direction=IN)
    assert guest.send(
        payload, transaction_id=77, completion_requested=True, ranges=[(8192, 0, [last, first])]
    )
    guest.settle()
    [answer] = guest.answers()
    assert answer.good
    assert guest.taken == 1
    assert guest.memory.read(HOLE - 8, 8) == struct.pack("<Q", 12)
    assert guest.memory.read(HIGH, 8) == struct.pack("<Q", 13)


# --- memory ---


def test_pages_that_were_read_into_are_dirty_and_code_in_them_is_written_through_qemu(
    guest: FastGuest,
) -> None:
    pfns = [BUFFER_PFN, BUFFER_PFN + 2, BUFFER_PFN + 4]
    guest.ram.take_dirty()
    guest.notes.bytes[pfns[1]] = 1
    payload = guest.srb(rw(0x28, 0, 24), length=24 * 512, direction=IN)
    assert guest.send(payload, transaction_id=1, completion_requested=True, ranges=[(24 * 512, 0, pfns)])
    guest.settle()
    assert set(pfns) <= set(guest.ram.take_dirty())
    data = b"".join(struct.pack("<Q", index) * 64 for index in range(8, 16))
    assert guest.through.writes == [(pfns[1] * PAGE_SIZE, data)]
    assert not guest.notes.bytes[pfns[1]]


def test_an_error_of_the_host_costs_the_channel_of_the_request_and_loses_no_other_result(
    guest: FastGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(gpa: int, data: Any) -> None:
        raise OSError("no QEMU")

    monkeypatch.setattr(guest.through, "write_memory", gone)
    for number in (1, 2, 3):
        guest.notes.bytes[BUFFER_PFN + number] = 1
        payload = guest.srb(rw(0x28, 0, 8), length=4096, direction=IN)
        ranges = [(4096, 0, [BUFFER_PFN + number])]
        assert guest.send(payload, transaction_id=number, completion_requested=True, ranges=ranges)
    guest.settle()
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "device-error")
    assert (guest.in_flight, guest.device.status()["in_flight"]) == (0, 0)
    guest.close()
    guest.open()
    guest.negotiate()
    assert do(guest, rw(0x28, 0, 8), read=4096, at=6).good


def test_pages_that_were_written_from_stay_clean(guest: FastGuest) -> None:
    guest.start(rw(0x2A, 0, 8), write=bytes(4096))
    guest.settle()
    guest.answers()
    guest.ram.take_dirty()
    guest.notes.bytes[BUFFER_PFN] = 1
    payload = guest.srb(rw(0x2A, 0, 8), length=4096, direction=OUT)
    assert guest.send(payload, transaction_id=1, completion_requested=True, ranges=[(4096, 0, [BUFFER_PFN])])
    guest.settle()
    assert BUFFER_PFN not in guest.ram.take_dirty()
    assert guest.notes.bytes[BUFFER_PFN]
    assert guest.taken == 2


# --- what it leaves ---


def test_a_unit_attention_is_told_first(guest: FastGuest) -> None:
    guest.device.units[0, 0].attention(Sense.CAPACITY_CHANGED)
    assert do(guest, rw(0x28, 0, 8), read=4096).condition == (6, 0x2A, 9)
    assert guest.taken == 0
    assert do(guest, rw(0x28, 0, 8), read=4096).good
    assert guest.taken == 1


def test_a_disk_with_faults_does_not_take_it(tmp_path: Path) -> None:
    with FastGuest(controller(disk(image(tmp_path / "disk.img"), faults="read-error@4"))) as guest:
        guest.command(bytes(6))
        assert do(guest, rw(0x28, 0, 8), read=4096).condition == (3, 0x11, 0)
        assert do(guest, rw(0x28, 8, 8), read=4096).good
        assert guest.taken == 0


def test_a_file_that_ends_early_gives_the_sense_data_of_the_ordinary_way(
    guest: FastGuest, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "disk.img", 100 * 512)
    assert do(guest, rw(0x28, 96, 8), read=4096).condition == (3, 0x11, 0)
    assert guest.taken == 1
    assert do(guest, rw(0x28, 8, 8), read=4096).good


def test_a_disk_that_grew_is_read_behind_its_old_end(guest: FastGuest, tmp_path: Path) -> None:
    os.truncate(tmp_path / "disk.img", 2 * BLOCKS * 512)
    assert do(guest, rw(0x28, BLOCKS, 8), read=4096).condition == (5, 0x21, 0)
    assert guest.device.resize(0, 0)
    guest.receive()
    assert do(guest, bytes(6)).condition == (6, 0x2A, 9)
    assert do(guest, rw(0x28, BLOCKS, 8), read=4096).good
    assert guest.taken == 1


def test_a_disk_that_is_taken_away_takes_nothing_more(guest: FastGuest, tmp_path: Path) -> None:
    assert do(guest, rw(0x28, 0, 8), read=4096).good
    guest.device.detach(0, 0)
    guest.receive()
    assert do(guest, rw(0x28, 0, 8), read=4096).srb_status == 0x20
    other = image(tmp_path / "other.img")
    guest.device.attach(disk(other))
    guest.receive()
    assert do(guest, bytes(6)).condition == (6, 0x29, 1)
    assert do(guest, rw(0x28, 3, 8), read=4096).good
    assert guest.taken == 2


def test_requests_of_a_channel_that_closes_end_and_are_not_answered(guest: FastGuest) -> None:
    for _ in range(8):
        for index in range(20):
            guest.start(rw(0x28, index, 8), read=4096, at=2 * index)
        guest.io.closed(guest.channel)
        assert guest.channel.closing or not guest.in_flight  # they end at any moment, also before the close
        guest.settle()
        assert not guest.channel.closing
        guest.open()
        guest.negotiate()
        assert do(guest, rw(0x28, 0, 8), read=4096).good


def test_what_it_did_is_in_the_unit_s_figures(guest: FastGuest) -> None:
    for _ in range(3):
        do(guest, rw(0x28, 0, 8), read=4096)
    do(guest, rw(0x2A, 0, 8), write=bytes(4096))
    figures = guest.device.units[0, 0].statistics.status()
    assert guest.taken == 4
    assert (figures["reads"], figures["writes"], figures["bytes_read"]) == (3, 1, 3 * 4096)
    assert figures["latency"]["count"] >= 4
    assert figures["latency"]["median_us"] > 0
    assert figures["queue_depth"] == 0


# --- the same as in Python ---


@dataclass(frozen=True)
class Story:
    """One request, as a guest may send it."""

    opcode: int
    flags: int
    lba: int
    blocks: int
    length: int
    offset: int
    direction: int
    address: tuple[int, int, int]
    size: int
    cdb_length: int
    pfns: tuple[int, ...]


lbas = st.one_of(st.integers(0, BLOCKS), st.integers(BLOCKS - 3, BLOCKS + 3), st.integers(0, (1 << 64) - 1))
pages = st.one_of(
    st.integers(BUFFER_PFN, BUFFER_PFN + 300),
    st.integers((HOLE >> 12) - 2, (HOLE >> 12) + 2),
    st.integers((HIGH >> 12) - 1, (HIGH + RAM - HOLE >> 12) + 1),
    st.integers(0, (1 << 64) - 1),
)
stories = st.builds(
    Story,
    opcode=st.sampled_from([0x08, 0x0A, 0x28, 0x2A, 0xA8, 0xAA, 0x88, 0x8A, 0x2E, 0x2F, 0x00]),
    flags=st.sampled_from([0, 0, 0, 0x08, 0x10, 0x20, 0xE0, 0xFF]),
    lba=lbas,
    blocks=st.one_of(st.integers(0, 20), st.sampled_from([512, 513, 0xFFFF, 0xFFFFFFFF])),
    length=st.one_of(st.integers(1, 16 * 512), st.sampled_from([512, 4096, 8192, 262144])),
    offset=st.sampled_from([0, 0, 0, 512, 4, 4095, 4096, 0xFFFFFFFF]),
    direction=st.sampled_from([IN, IN, OUT, OUT, NONE, 7]),
    address=st.sampled_from([(0, 0, 0)] * 6 + [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 255, 255)]),
    size=st.sampled_from([64, 64, 64, 48, 56, 72, 200]),
    cdb_length=st.sampled_from([16, 16, 10, 6, 20]),
    pfns=st.lists(pages, min_size=1, max_size=66).map(tuple),
)


def send(guest: ScsiGuest, story: Story, number: int) -> list[Any]:
    """Send a request, and return all that the host answers."""
    cdb = rw(story.opcode, story.lba, min(story.blocks, 0xFFFFFFFF), story.flags).ljust(16, b"\0")
    payload = guest.srb(
        cdb,
        length=story.length,
        direction=story.direction,
        address=story.address,
        cdb_length=story.cdb_length,
        size=64,
    )
    payload = payload.ljust(story.size, b"\0")[: story.size]
    assert guest.send(
        payload,
        transaction_id=number,
        completion_requested=True,
        ranges=[(story.length, story.offset, story.pfns)],
    )
    return [(each.kind, each.transaction_id, each.payload) for each in guest.receive()]


def traffic(guest: FastGuest) -> tuple[int, int, int, int]:
    """Packets and bytes, in and out, as ``vmbus status`` shows them."""
    counters = guest.io.counters
    return counters.packets_in, counters.bytes_in, counters.packets_out, counters.bytes_out


class TwoHosts:
    """The same guest on two hosts, one of which uses the fast path."""

    def __init__(self, folder: Path) -> None:
        self.files = [image(folder / "fast.img"), image(folder / "ordinary.img")]
        self.fast = FastGuest(controller(disk(self.files[0])))
        self.ordinary = FastGuest(controller(disk(self.files[1])), compiled=False)
        for guest in (self.fast, self.ordinary):
            guest.command(bytes(6))
        self.number = 1000

    def check(self, story: Story) -> None:
        self.number += 1
        assert send(self.fast, story, self.number) == send(self.ordinary, story, self.number)
        assert self.files[0].read_bytes() == self.files[1].read_bytes()
        for gpa, length in ((BUFFER_PFN << 12, HOLE - (BUFFER_PFN << 12)), (HIGH, RAM - HOLE)):
            assert self.fast.memory.read(gpa, length) == self.ordinary.memory.read(gpa, length)
        assert self.fast.io.state is self.ordinary.io.state
        assert self.fast.io.refusals.counts == self.ordinary.io.refusals.counts
        assert traffic(self.fast) == traffic(self.ordinary)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    hosts = TwoHosts(tmp_path_factory.mktemp("twins"))
    with hosts.fast, hosts.ordinary:
        yield hosts
        assert hosts.ordinary.taken == 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=stories)
def test_whatever_is_sent_both_ways_answer_the_same_and_store_the_same(
    two_hosts: TwoHosts, story: Story
) -> None:
    two_hosts.check(story)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    write=st.booleans(),
    lba=st.integers(0, BLOCKS - 64),
    blocks=st.integers(1, 64),
    offset=st.integers(0, 7).map(lambda part: part * 512),
    first=st.integers(BUFFER_PFN, BUFFER_PFN + 200),
    step=st.sampled_from([1, 2, 3]),
)
def test_eligible_requests_answer_the_same_and_store_the_same(
    two_hosts: TwoHosts, write: bool, lba: int, blocks: int, offset: int, first: int, step: int
) -> None:
    length = blocks * 512
    count = (offset + length + 4095) >> 12
    before = two_hosts.fast.taken
    two_hosts.check(
        Story(
            0x2A if write else 0x28,
            0,
            lba,
            blocks,
            length,
            offset,
            OUT if write else IN,
            (0, 0, 0),
            64,
            10,
            tuple(first + step * index for index in range(count)),
        )
    )
    assert two_hosts.fast.taken == before + 1
