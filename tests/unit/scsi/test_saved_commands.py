"""Commands of a saved controller as bytes: the layout, what is refused, and what page lists cost."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import DeviceError, InternalError
from vmbus.saving import Restore, read_machine, save_machine
from vmbus.wire.packet import MAX_PFNS, MAX_RANGES, GpaRange, Packet, PacketType
from vmbus_devices.scsi.handshake import Stage
from vmbus_devices.scsi.saved import (
    SavedController,
    build_packet_state,
    build_state,
    parse_packet_state,
    parse_state,
)
from vmbus_devices.scsi.saved_commands import MAX_COMMANDS, MAX_PAYLOAD

from tests.unit.scsi.waiting_reads import MOST_PAGES, send_reads, storage_channel

READ = Packet(
    PacketType.GPA_DIRECT,
    1,
    0x1122334455667788,
    b"payload.",
    (GpaRange(5000, 10, (7, 9)), GpaRange(1, 0, (3,))),
)
READ_BYTES = (
    struct.pack("<HHHHQH", 1, 0, 9, 1, READ.transaction_id, 8)
    + b"payload."
    + struct.pack("<H", 2)
    + struct.pack("<III2Q", 5000, 10, 2, 7, 9)
    + struct.pack("<IIIQ", 1, 0, 1, 3)
)
"""The form in which all releases have saved it."""

ranges = st.builds(
    lambda pages, offset: GpaRange(len(pages) * 4096 - offset, offset, tuple(pages)),
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20),
    st.integers(0, 4095),
)
packets = st.builds(
    lambda *fields: Packet(*fields),
    st.sampled_from(list(PacketType)),
    st.integers(0, 1),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=MAX_PAYLOAD),
    st.lists(ranges, max_size=4).map(tuple),
)


def calls_of(work: Callable[[], object]) -> int:
    """Return how many functions ``work`` calls, those in C included."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def read_of(pages: int) -> Packet:
    return READ._replace(ranges=(GpaRange(pages * 4096, 0, tuple(range(0, 2 * pages, 2))),))


def test_a_command_has_the_bytes_of_all_releases() -> None:
    assert build_packet_state("scsi", READ) == READ_BYTES
    assert parse_packet_state("scsi", READ_BYTES) == READ


@settings(deadline=None)
@given(packets)
def test_a_command_comes_back_as_it_was(packet: Packet) -> None:
    assert parse_packet_state("scsi", build_packet_state("scsi", packet)) == packet


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0xFFFF), packets), max_size=4), st.booleans())
def test_commands_in_a_controllers_own_record_are_still_read(
    commands: list[tuple[int, Packet]], due: bool
) -> None:
    saved = SavedController(Stage.READY, None, 3, 1 << 18, (), tuple(commands), enumeration_due=due)
    assert parse_state("scsi", build_state("scsi", saved)) == saved


@settings(deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_are_a_command(data: st.DataObject) -> None:
    state = bytearray(READ_BYTES)
    for _ in range(data.draw(st.integers(0, 3))):
        state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(state[: data.draw(st.integers(0, len(state)))])
    try:
        found = parse_packet_state("scsi", cut)
    except DeviceError:
        return
    assert cut.startswith(build_packet_state("scsi", found))


@pytest.mark.parametrize("size", range(len(READ_BYTES)))
def test_a_command_that_is_cut_off_is_refused(size: int) -> None:
    with pytest.raises(DeviceError, match="damaged"):
        parse_packet_state("scsi", READ_BYTES[:size])


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (struct.pack("<H", 2), "version 2"),
        (struct.pack("<H", 0), "damaged: version 0"),
        (struct.pack("<HHH", 1, 0, 8), "damaged: a packet of type 8"),
        (READ_BYTES[:2] + struct.pack("<H", 1) + READ_BYTES[4:], "damaged: channel 1"),
        (struct.pack("<HHHHQH", 1, 0, 9, 1, 1, MAX_PAYLOAD + 1) + bytes(MAX_PAYLOAD + 1 + 2), "too large"),
        (struct.pack("<HHHHQHH", 1, 0, 9, 1, 1, 0, MAX_RANGES + 1), "too large"),
        (struct.pack("<HHHHQHHIII", 1, 0, 9, 1, 1, 0, 1, 4096, 4096, 2), "impossible range"),
        (struct.pack("<HHHHQHHIII", 1, 0, 9, 1, 1, 0, 1, 0, 0, 0), "impossible range"),
        (struct.pack("<HHHHQHHIII", 1, 0, 9, 1, 1, 0, 1, 4096, 0, 0xFFFFFFFF), "impossible range"),
        (struct.pack("<HHHHQHHIII", 1, 0, 9, 1, 1, 0, 1, (MAX_PFNS + 1) << 12, 0, MAX_PFNS + 1), "too large"),
    ],
)
def test_an_impossible_command_is_refused_with_the_reason(start: bytes, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        parse_packet_state("scsi", start + READ_BYTES[len(start) :])


def test_a_command_that_could_not_be_read_is_not_saved() -> None:
    page = GpaRange(4096, 0, (1,))
    for packet in (
        READ._replace(payload=bytes(MAX_PAYLOAD + 1)),
        READ._replace(ranges=(page,) * (MAX_RANGES + 1)),
        READ._replace(ranges=(GpaRange(4096, 0, (1, 2)),)),
        READ._replace(ranges=(GpaRange(4096, 0, (1 << 64,)),)),
        READ._replace(transaction_id=-1),
    ):
        with pytest.raises(InternalError, match="cannot be saved"):
            build_packet_state("scsi", packet)
    saved = SavedController(Stage.READY, None, None, 1 << 18, (), ((0, READ),) * (MAX_COMMANDS + 1))
    with pytest.raises(InternalError, match=f"at most {MAX_COMMANDS}"):
        build_state("scsi", saved)


def test_fields_of_a_later_release_are_ignored_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_packet_state("scsi", READ_BYTES + b"\x04\x01x") == READ
    assert "ignored: 2" in caplog.text
    with pytest.raises(DeviceError, match="later release"):
        parse_packet_state("scsi", READ_BYTES + b"\x05\x01x")


def test_a_page_list_is_written_and_read_in_one_piece() -> None:
    few, many = read_of(1), read_of(MOST_PAGES)
    assert calls_of(lambda: build_packet_state("scsi", few)) == calls_of(
        lambda: build_packet_state("scsi", many)
    )
    states = [build_packet_state("scsi", each) for each in (few, many)]
    first, second = (calls_of(lambda each=each: parse_packet_state("scsi", each)) for each in states)  # type: ignore[misc]
    assert first == second


def calls_of_a_move(reads: int, pages: int) -> tuple[int, int]:
    """Return :func:`calls_of` a save and a restore of a channel with ``reads`` of ``pages`` pages under way."""
    states: list[bytes] = []
    with storage_channel() as (guest, channel, saver):
        guest.negotiate()
        send_reads(guest, reads, pages)
        saver.pause(channel)
        saving = calls_of(lambda: states.append(save_machine(saver, [channel], save_id=1).data))
    with storage_channel() as (there, restored, other):
        other.pause(restored)
        there.io.detach()
        restoring = calls_of(lambda: Restore(other, [restored]).apply(read_machine(states[0])))
        assert there.io.save().owed == tuple((1000 + number, 1) for number in range(reads))
    return saving, restoring


def test_a_channel_is_saved_and_restored_with_the_same_work_whatever_the_length_of_its_reads() -> None:
    reads = 20
    calls_of_a_move(1, 1)  # compiles records, and fills caches
    few, many = calls_of_a_move(reads, 1), calls_of_a_move(reads, MOST_PAGES)
    for less, more in zip(few, many, strict=True):
        assert more - less < 10 * reads, "lengths of two bytes in place of one cost some calls a read"
