"""A guest with a disk whose emulator is killed: each command is answered once, and the data is right."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from vmbus.wire.messages import CLOSECHANNEL, PAUSE, RESUME, ChannelOnly, HeaderOnly
from vmbus.wire.version import Feature, Version

from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.matrix import Matrix
from tests.unit.machine.killed.storage import BLOCK, Storage

BLOCKS = 256
RESERVE_IN, RESERVE_OUT = 0x5E, 0x5F
TEST_UNIT_READY = bytes(6)


def pattern(seed: int, blocks: int) -> bytes:
    return b"".join(struct.pack("<II", seed, index) * (BLOCK // 8) for index in range(blocks))


def image(*, written: bool = False) -> bytes:
    """Return what is in the image before, or after, the writes of :func:`transfers`."""
    blocks = [pattern(7, BLOCKS)[at : at + BLOCK] for at in range(0, BLOCKS * BLOCK, BLOCK)]
    if written:
        for each in range(3):
            data = pattern(each, 5)
            blocks[64 + 16 * each : 69 + 16 * each] = [
                data[at : at + BLOCK] for at in range(0, len(data), BLOCK)
            ]
        blocks[200:208] = [pattern(9, 1)] * 8
    return b"".join(blocks)


def lines(folder: Path) -> list[str]:
    path = folder / "disk.img"
    path.write_bytes(image())
    return [f"scsi,image={path},cache=writeback,queues=2"]


def transfers(guest: KilledGuest) -> list[object]:
    """Reads and writes, several in flight, and commands that are neither."""
    guest.boot()
    [offer] = guest.connect()
    disk = Storage(guest, offer.relid)
    disk.negotiate()
    seen: list[object] = [disk.do(TEST_UNIT_READY)[0], disk.do(TEST_UNIT_READY)[0]]
    reads = [disk.read(lba, 9) for lba in (3, 40)]
    writes = [disk.write(64 + 16 * each, pattern(each, 5)) for each in range(3)]
    answers = disk.end()
    assert set(answers) == {*reads, *writes}
    assert all(each.good for each in answers.values())
    whole = image()
    for number, lba in zip(reads, (3, 40), strict=True):
        assert disk.data(answers[number]) == whole[lba * BLOCK : (lba + 9) * BLOCK]
    seen.append(disk.do(struct.pack(">BBIBHB", 0x35, 0, 0, 0, 0, 0)))  # SYNCHRONIZE CACHE
    seen.append(disk.do(struct.pack(">BBIBHB", 0x41, 0, 200, 0, 8, 0), write=pattern(9, 1)))  # WRITE SAME
    seen.append(disk.do(bytes((0x12, 0, 0, 0, 36, 0)), read=36))  # INQUIRY
    seen.append(disk.do(struct.pack(">BBIBHB", 0x28, 0, BLOCKS, 0, 1, 0), read=BLOCK))  # behind the end
    for lba, blocks in ((60, 41), (196, 13)):
        seen.append(disk.do(struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0), read=blocks * BLOCK))
    guest.close(offer.relid)
    return seen


def reservations(guest: KilledGuest) -> list[object]:
    """Sub-channels, and what is known of a unit whichever channel it was told over."""
    guest.boot()
    [offer] = guest.connect()
    disk = Storage(guest, offer.relid)
    disk.negotiate(subchannels=1)
    [offered] = guest.take()
    other = offered.message.relid
    disk.open(other)
    seen: list[object] = [disk.do(TEST_UNIT_READY, relid=other)[0], disk.do(TEST_UNIT_READY)[0]]
    key = struct.pack(">QQ4xB3x", 0, 0x1234, 0)
    seen.append(disk.do(struct.pack(">BBBHIB", RESERVE_OUT, 0, 0, 0, 24, 0), write=key, relid=other)[0])
    seen.append(disk.do(struct.pack(">BB5xHB", RESERVE_IN, 0, 16, 0), read=16))
    pair = [disk.read(10, 4), disk.read(20, 4, other)]
    found = {**disk.end(other), **disk.end()}
    assert set(found) == set(pair)
    seen += [disk.data(found[each]) for each in pair]
    guest.close(offer.relid)
    return [seen, guest.names()]


def paused(guest: KilledGuest) -> list[object]:
    """Sub-channels that are offered to a guest which takes no messages at that time."""
    guest.boot()
    [offer] = guest.connect(Version.COPPER, features=Feature.PAUSE_RESUME)
    disk = Storage(guest, offer.relid)
    disk.negotiate()
    assert len(guest.ask(PAUSE.build(HeaderOnly()))) == 1
    disk.create_subchannels(1)
    assert disk.do(TEST_UNIT_READY)[0] is None
    [offered] = guest.ask(RESUME.build(HeaderOnly()))
    disk.open(offered.relid)
    number = disk.read(3, 2, offered.relid)
    assert disk.end(offered.relid)[number].good
    return [guest.names()]


def interrupted(guest: KilledGuest) -> list[object]:
    """Commands under way when the bus is reset, and when the guest closes the channel; a sub-channel leaves."""
    guest.boot()
    [offer] = guest.connect()
    disk = Storage(guest, offer.relid)
    disk.negotiate(subchannels=1)
    [offered] = guest.take()
    other = offered.message.relid
    disk.open(other)
    numbers = [disk.write(16 * each, pattern(each, 8)) for each in range(3)]
    numbers.append(disk.reset())
    beside = disk.read(100, 8, other)
    guest.settle()
    assert sorted(each.transaction_id for each in guest.packets[offer.relid]) == numbers
    guest.packets[offer.relid].clear()
    assert set(disk.end(other)) == {beside}
    for each in range(3):
        disk.write(16 * each, pattern(each + 3, 8))
        disk.read(16 * each, 8, other)
    guest.post(CLOSECHANNEL.build(ChannelOnly(offer.relid)))
    [rescinded] = guest.take()
    assert rescinded.message.relid == other
    del guest.channels[other]
    assert guest.release(other) == []
    disk = Storage(guest, offer.relid)
    disk.negotiate()
    number = disk.read(0, 40)
    assert disk.end()[number].good
    return [guest.names()]


INTERRUPTED = Matrix(interrupted, 281, lines)
PAUSED = Matrix(paused, 196, lines)
TRANSFERS = Matrix(transfers, 253, lines)
RESERVATIONS = Matrix(reservations, 242, lines)


def test_the_sessions_have_commands_that_end_well_and_badly(tmp_path: Path) -> None:
    seen = TRANSFERS.undisturbed(tmp_path)
    assert isinstance(seen, list)
    assert seen[:4] == [None, None, (None, b""), (None, b"")]
    assert seen[5] == ((5, 0x21, 0), b"")
    whole = image(written=True)
    assert seen[6:] == [(None, whole[60 * BLOCK : 101 * BLOCK]), (None, whole[196 * BLOCK : 209 * BLOCK])]
    assert (tmp_path / "disk.img").read_bytes() == whole


def test_the_sessions_have_a_sub_channel_and_a_reservation(tmp_path: Path) -> None:
    seen = RESERVATIONS.undisturbed(tmp_path)
    assert isinstance(seen, list)
    assert seen[0][3] == (None, struct.pack(">IIQ", 1, 8, 0x1234))
    opened = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
    assert seen[1][3:] == [*opened, "OFFERCHANNEL", *opened, "RESCIND_CHANNELOFFER"]


def test_the_sessions_have_a_guest_that_takes_no_messages(tmp_path: Path) -> None:
    seen = PAUSED.undisturbed(tmp_path)
    assert isinstance(seen, list)
    opened = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
    assert seen[0][3:] == [*opened, "PAUSE_RESPONSE", "OFFERCHANNEL", *opened]


def test_the_sessions_have_a_sub_channel_that_leaves(tmp_path: Path) -> None:
    seen = INTERRUPTED.undisturbed(tmp_path)
    assert isinstance(seen, list)
    opened = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
    assert seen[0][5:] == ["OFFERCHANNEL", *opened, "RESCIND_CHANNELOFFER", *opened]


@pytest.mark.parametrize("end", INTERRUPTED.each_step(4))
def test_commands_that_are_interrupted_end_once(tmp_path: Path, end: int) -> None:
    INTERRUPTED.killed_at(tmp_path, end)


@pytest.mark.parametrize("end", PAUSED.each_step(9))
def test_sub_channels_that_are_not_told_yet_are_kept(tmp_path: Path, end: int) -> None:
    PAUSED.killed_at(tmp_path, end)


@pytest.mark.parametrize("end", TRANSFERS.each_step(9))
def test_commands_are_answered_once_with_the_right_data(tmp_path: Path, end: int) -> None:
    TRANSFERS.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), TRANSFERS.each_pair(31))
def test_also_if_the_next_emulator_is_killed_too(tmp_path: Path, end: int, next_end: int) -> None:
    TRANSFERS.killed_at(tmp_path, end, next_end)


@pytest.mark.parametrize("end", RESERVATIONS.each_step(9))
def test_a_controller_with_sub_channels_goes_on(tmp_path: Path, end: int) -> None:
    RESERVATIONS.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), RESERVATIONS.each_pair(31))
def test_it_does_so_also_if_the_next_emulator_is_killed_too(tmp_path: Path, end: int, next_end: int) -> None:
    RESERVATIONS.killed_at(tmp_path, end, next_end)
