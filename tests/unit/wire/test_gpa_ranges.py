"""Ranges of guest pages and their runs."""

from __future__ import annotations

import sys
from array import array

import pytest
from vmbus.wire import gpadl
from vmbus.wire.gpadl import GpaRange
from vmbus.wire.pfn_runs import PageRuns


def test_the_runs_of_a_range_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save, a check of memory and the account of saved bytes each walk them."""
    each = GpaRange(5 * 4096, 0, array("Q", [7, 8, 9, 3, 4]))
    assert list(each.runs) == [(7, 3), (3, 2)]
    monkeypatch.setattr(gpadl, "runs", None)
    assert list(each.runs) == [(7, 3), (3, 2)]
    restored = GpaRange.of_runs(5 * 4096, 0, ((7, 3), (3, 2)))
    assert list(restored.runs) == [(7, 3), (3, 2)]
    assert (restored.pfns, restored) == (each.pfns, each)


def test_runs_of_scattered_pages_take_little_memory() -> None:
    """A guest may share a million pages of which no two are neighbours: the limit counts 12 bytes for each."""
    few, many = (PageRuns((2 * pfn, 1) for pfn in range(count)) for count in (0, 100_000))
    grown = sum(
        sys.getsizeof(getattr(many, name)) - sys.getsizeof(getattr(few, name)) for name in many.__slots__
    )
    assert grown <= 100_000 * 12 * 1.13  # an array grows by an eighth
