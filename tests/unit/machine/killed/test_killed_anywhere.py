"""A guest whose emulator is killed before any of its steps: it notices nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.unit.machine.killed.echoes import echoes, more_than_fits
from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.matrix import Matrix


def session(guest: KilledGuest) -> list[object]:
    guest.boot()
    [offer] = guest.connect()
    relid = offer.relid
    guest.open_rings(relid)
    echoes(guest, relid)
    more_than_fits(guest, relid)
    guest.close(relid)
    guest.open_rings(relid)
    echoes(guest, relid)
    guest.close(relid)
    guest.unload()
    guest.connect()
    guest.open_rings(relid)
    echoes(guest, relid, 3)
    return [guest.names(), guest.messages]


MATRIX = Matrix(session, 262, ["echo"])


def test_a_session_has_as_many_steps_as_are_tried(tmp_path: Path) -> None:
    seen = MATRIX.undisturbed(tmp_path)
    opened = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
    offered = ["VERSION_RESPONSE", "OFFERCHANNEL", "ALLOFFERS_DELIVERED"]
    assert isinstance(seen, list)
    assert seen[0] == [*offered, *opened, *opened, "UNLOAD_RESPONSE", *offered, *opened]


@pytest.mark.parametrize("end", MATRIX.each_step(4))
def test_a_guest_does_not_notice_the_death_of_an_emulator(
    tmp_path: Path, end: int, caplog: pytest.LogCaptureFixture
) -> None:
    MATRIX.killed_at(tmp_path, end)
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.mark.parametrize(("end", "next_end"), MATRIX.each_pair(37, of=3))
def test_nor_that_of_the_one_that_takes_it_over(tmp_path: Path, end: int, next_end: int) -> None:
    MATRIX.killed_at(tmp_path, end, next_end)
