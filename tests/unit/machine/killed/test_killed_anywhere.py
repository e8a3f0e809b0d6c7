"""A guest whose emulator is killed before any of its steps: it notices nothing."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import pytest
from vmbus.testing.loopback import COMPLETION
from vmbus.wire.echo import EchoOperation, build_header, parse_header

from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.machine import Machine


def echo(data: bytes, sequence: int) -> bytes:
    return build_header(EchoOperation.ECHO, 0, len(data), sequence, zlib.crc32(data)) + data


class Session:
    """What the guest does, and what it must have seen at the end."""

    def __init__(self, guest: KilledGuest) -> None:
        self.guest = guest
        self.seen: list[object] = []

    def run(self) -> list[object]:
        guest = self.guest
        guest.boot()
        [offer] = guest.connect()
        relid = offer.relid
        guest.open_rings(relid)
        self.echoes(relid)
        self.more_than_fits(relid)
        guest.close(relid)
        guest.open_rings(relid)
        self.echoes(relid)
        guest.close(relid)
        guest.unload()
        guest.connect()
        guest.open_rings(relid)
        self.echoes(relid, 3)
        return [guest.names(), guest.messages]

    def more_than_fits(self, relid: int) -> None:
        """Answers wait for room in the guest's ring, which it reads late."""
        guest, rings = self.guest, self.guest.channels[relid]
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

    def echoes(self, relid: int, count: int = 6) -> None:
        guest = self.guest
        data = [bytes([65 + each]) * (8 << each) for each in range(count)]
        for number in range(count):  # several in flight
            assert guest.send(relid, guest.request(echo(data[number], number), 100 + number))
            if number % 3 == 2:
                guest.settle()
        guest.settle()
        answers = guest.packets[relid]
        assert [each.transaction_id for each in answers] == [100 + number for number in range(count)]
        for number, each in enumerate(answers):
            assert each.kind == COMPLETION
            header = parse_header(each.payload)
            assert (header.operation, header.status, header.sequence) == (EchoOperation.ECHO, 0, number)
            assert each.payload[24 : 24 + header.length] == data[number]


def session(folder: Path, *ends: int) -> tuple[Machine, list[object]]:
    machine = Machine(folder, ["echo"], ends)
    try:
        return machine, Session(KilledGuest(machine)).run()
    finally:
        machine.close()


STEPS = 258
"""Steps of an emulator in the session."""
TAKING_OVER = 12
"""Steps of one that takes the guest over, and some more."""


def ordinary(end: int, stride: int) -> tuple[pytest.MarkDecorator, ...]:
    """Mark all but every ``stride``-th case as one that only the full run has."""
    return () if end % stride == 0 else (pytest.mark.full,)


def test_a_session_has_as_many_steps_as_are_tried(tmp_path: Path) -> None:
    machine, seen = session(tmp_path)
    assert machine.deaths == []
    assert machine.fates[0].steps == STEPS
    opened = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
    offered = ["VERSION_RESPONSE", "OFFERCHANNEL", "ALLOFFERS_DELIVERED"]
    assert seen[0] == [*offered, *opened, *opened, "UNLOAD_RESPONSE", *offered, *opened]


def killed_at(folder: Path, *ends: int) -> None:
    _, told = session(folder)
    machine, seen = session(folder, *ends)
    assert len(machine.deaths) == len(ends)
    assert seen == told


@pytest.mark.parametrize("end", [pytest.param(end, marks=ordinary(end, 3)) for end in range(1, STEPS + 1)])
def test_a_guest_does_not_notice_the_death_of_an_emulator(
    tmp_path: Path, end: int, caplog: pytest.LogCaptureFixture
) -> None:
    killed_at(tmp_path, end)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("end", "next_end"),
    [
        pytest.param(end, next_end, marks=ordinary(number, 17))
        for number, (end, next_end) in enumerate(
            (end, next_end) for end in range(1, STEPS - TAKING_OVER) for next_end in range(1, TAKING_OVER)
        )
        if end % 3 == 0
    ],
)
def test_nor_that_of_the_one_that_takes_it_over(tmp_path: Path, end: int, next_end: int) -> None:
    killed_at(tmp_path, end, next_end)
