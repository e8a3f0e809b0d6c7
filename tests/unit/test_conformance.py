"""Every numbered behaviour that this host promises has a test that names it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PROMISED = [*range(1, 69), 80, *range(83, 87)]
MARK = re.compile(r"pytest\.mark\.conformance\(([\d, ]+)\)")

#: Sockets beyond the connect flow; there is no socket device yet.
NOT_YET = {43, 44, 45}


def named_rows() -> set[int]:
    rows: set[int] = set()
    for path in TESTS.rglob("*.py"):
        for found in MARK.finditer(path.read_text()):
            rows.update(int(number) for number in found.group(1).split(","))
    return rows


def test_every_promised_row_is_named_by_a_test() -> None:
    missing = set(PROMISED) - NOT_YET - named_rows()
    assert not missing, f"no test is marked with conformance rows {sorted(missing)}"


def test_what_is_not_there_yet_is_not_marked() -> None:
    assert not NOT_YET & named_rows()
