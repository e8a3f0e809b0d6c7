"""A device that sends by itself, and writes into guest memory, while its emulator is killed."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from vmbus.ports import PAGE_SIZE
from vmbus.testing.loopback import COMPLETION, GPA_DIRECT, IN_BAND, gpa_direct_extension, guest_packet
from vmbus.wire.echo import (
    ECHO_GENERATE,
    ECHO_HEADER,
    ECHO_STATISTICS,
    GENERATED_DATA,
    GENERATED_PERIOD,
    EchoGenerate,
    EchoOperation,
    build_header,
    parse_header,
)

from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.matrix import Matrix

COUNT, SIZE = 30, 700
"""Packets that are generated, and their bytes; 11 fit into the ring."""


def request(operation: EchoOperation, data: bytes) -> bytes:
    return build_header(operation, 0, len(data), 0, zlib.crc32(data)) + data


def session(guest: KilledGuest) -> list[object]:
    guest.boot()
    [offer] = guest.connect()
    relid = offer.relid
    guest.open_rings(relid)
    rings, packets = guest.channels[relid], guest.packets[relid]
    rings.reads = False
    wanted = ECHO_GENERATE.build(EchoGenerate(COUNT, SIZE, 4))
    assert guest.send(relid, guest.request(request(EchoOperation.GENERATE, wanted), 1))
    guest.settle()
    filled = guest.pages(3)[::-1]
    ranges = gpa_direct_extension([(2 * PAGE_SIZE + 100, 50, filled)])
    fill = guest_packet(
        request(EchoOperation.FILL, b"filled"),
        kind=GPA_DIRECT,
        transaction_id=2,
        completion_requested=True,
        extension=ranges,
    )
    assert guest.send(relid, fill)
    guest.settle()
    for _ in range(COUNT):  # a little room at a time
        found, signal = rings.reader.read(3)
        packets += found
        if signal:
            guest.machine.ring(relid)
        guest.settle()
    rings.reads = True
    guest.read_ring(relid)
    generated = [parse_header(each.payload).sequence for each in packets if each.kind == IN_BAND]
    assert generated == list(range(COUNT))
    for each in packets:
        header = parse_header(each.payload)
        if each.kind == IN_BAND:
            start = header.sequence % GENERATED_PERIOD
            assert each.payload[ECHO_HEADER.size :][:SIZE] == GENERATED_DATA[start : start + SIZE]
    assert [each.transaction_id for each in packets if each.kind == COMPLETION] == [1, 2]
    written = guest.memory.pages(filled).read(50, 2 * PAGE_SIZE + 100)
    assert written == (b"filled" * PAGE_SIZE)[: len(written)]
    packets.clear()
    assert guest.send(relid, guest.request(request(EchoOperation.STATISTICS, b""), 3))
    guest.settle()
    [answer] = packets
    return [ECHO_STATISTICS.parse(answer.payload[ECHO_HEADER.size :]), guest.names()]


MATRIX = Matrix(session, 221, ["echo"])


def test_the_session_has_packets_that_were_generated(tmp_path: Path) -> None:
    seen = MATRIX.undisturbed(tmp_path)
    assert isinstance(seen, list)
    assert (seen[0].requests, seen[0].generated, seen[0].filled_bytes) == (3, COUNT, 2 * PAGE_SIZE + 100)


@pytest.mark.parametrize("end", MATRIX.each_step(9))
def test_each_packet_comes_once_and_in_order(tmp_path: Path, end: int) -> None:
    MATRIX.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), MATRIX.each_pair(31))
def test_each_comes_once_over_two_deaths(tmp_path: Path, end: int, next_end: int) -> None:
    MATRIX.killed_at(tmp_path, end, next_end)
