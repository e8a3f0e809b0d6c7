"""Refusals are counted always, logged at most once a second and reason."""

from __future__ import annotations

import logging

import pytest
from vmbus.refusals import Refusals


def test_lines_are_rate_limited_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals("bus", logging.getLogger("test"), clock=lambda: now)
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
