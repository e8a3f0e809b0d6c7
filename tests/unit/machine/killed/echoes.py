"""What a guest asks of an echo device, and what it gets."""

from __future__ import annotations

import zlib

from vmbus.testing.loopback import COMPLETION
from vmbus.wire.echo import (
    ECHO_CHECKSUM,
    ECHO_HEADER,
    ECHO_RANGE,
    ECHO_RANGE_COUNT,
    EchoOperation,
    EchoRange,
    EchoRangeCount,
    build_header,
    parse_header,
)

from tests.unit.machine.killed.guest import KilledGuest


def echo(data: bytes, sequence: int) -> bytes:
    return build_header(EchoOperation.ECHO, 0, len(data), sequence, zlib.crc32(data)) + data


def echoes(guest: KilledGuest, relid: int, count: int = 6) -> None:
    """Have data returned, with several requests in flight."""
    guest.packets[relid].clear()
    for number in range(count):
        ask(guest, relid, number)
        if number % 3 == 2:
            guest.settle()
    guest.settle()
    answers_to(guest, relid, count)


def ask(guest: KilledGuest, relid: int, number: int) -> None:
    """Send a request."""
    assert guest.send(relid, guest.request(echo(_data(number), number), 100 + number))


def answers_to(guest: KilledGuest, relid: int, count: int) -> None:
    """Check, and forget, what came back: the answers to requests 0 to ``count`` - 1, in this order."""
    answers = guest.packets[relid]
    assert [each.transaction_id for each in answers] == [100 + number for number in range(count)]
    for number, each in enumerate(answers):
        assert each.kind == COMPLETION
        header = parse_header(each.payload)
        assert (header.operation, header.status, header.sequence) == (EchoOperation.ECHO, 0, number)
        assert each.payload[24 : 24 + header.length] == _data(number)
    answers.clear()


def checksum(guest: KilledGuest, relid: int, gpadl_id: int, offset: int, length: int) -> int:
    """Have the device read memory that is shared with a GPADL; return the CRC-32."""
    guest.packets[relid].clear()
    wanted = ECHO_RANGE_COUNT.build(EchoRangeCount(1)) + ECHO_RANGE.build(EchoRange(offset, length, gpadl_id))
    header = build_header(EchoOperation.CHECKSUM, 0, len(wanted), 0, zlib.crc32(wanted))
    assert guest.send(relid, guest.request(header + wanted, 300))
    guest.settle()
    [answer] = guest.packets[relid]
    guest.packets[relid].clear()
    assert parse_header(answer.payload).status == 0
    found = ECHO_CHECKSUM.parse(answer.payload[ECHO_HEADER.size :])
    assert found.length == length
    return found.checksum


def _data(number: int) -> bytes:
    return bytes([65 + number]) * (8 << number)


def more_than_fits(guest: KilledGuest, relid: int) -> None:
    """Have answers wait for room in the guest's ring, which it reads late."""
    rings = guest.channels[relid]
    guest.packets[relid].clear()
    rings.reads = False
    data = bytes(range(256)) * 9
    for number in range(6):
        assert guest.send(relid, guest.request(echo(data, number), 200 + number))
        guest.settle()
    rings.reads = True
    for _ in range(3):
        guest.read_ring(relid)
        guest.settle()
    answers = guest.packets[relid]
    assert [each.transaction_id for each in answers] == [200 + number for number in range(6)]
    assert all(each.payload[24 : 24 + len(data)] == data for each in answers)
