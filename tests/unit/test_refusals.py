"""Refusals are counted always, logged at most once a second and reason in the whole process."""

from __future__ import annotations

import logging

import pytest
from vmbus.refusals import MAX_REASONS, LineLimit, Refusals

LOGGER = logging.getLogger("test")


def test_lines_are_rate_limited_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals("bus", LOGGER, limit=LineLimit(lambda: now))
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            refusals.refuse("open-state", "detail")
        refusals.refuse("other")
        now = 0.9
        refusals.refuse("open-state")
        now = 1.1
        refusals.refuse("open-state", "again")
    assert [record.getMessage() for record in caplog.records] == [
        "bus: refused open-state: detail",
        "bus: refused other",
        "bus: refused open-state: again (5 more)",
    ]
    assert refusals.counts == {"open-state": 7, "other": 1}
    assert refusals.total == 8


def test_a_guest_that_makes_new_parts_gets_no_more_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = [Refusals(f"channel {number}", LOGGER) for number in range(500)]
        for refusals in found:
            refusals.refuse("ic-bad-version", "by a guest that opens and closes")
    assert len(caplog.records) <= 2  # a second may begin meanwhile
    assert all(refusals.total == 1 for refusals in found)


def test_reasons_that_are_remembered_are_bounded() -> None:
    limit = LineLimit(lambda: 0.0)
    for number in range(MAX_REASONS + 10):
        assert limit.admit("test", str(number)) == 0
        assert limit.admit("test", str(number)) is None
    assert limit.admit("test", "0") == 0  # forgotten meanwhile
