"""The order in which workers take tests: guests first in each worker's share, and every test once."""

from __future__ import annotations

from typing import cast

import pytest

from tests.conftest import long_ones_first


class Item:
    """What the order looks at in a test."""

    def __init__(self, nodeid: str, guest: bool) -> None:
        self.nodeid = nodeid
        self._guest = guest

    def get_closest_marker(self, name: str) -> object:
        return name if name == "guest" and self._guest else None


def items(**modules: int) -> list[Item]:
    return [
        Item(f"{name}::{n}", name.startswith("g")) for name, count in modules.items() for n in range(count)
    ]


def ordered(found: list[Item], workers: int) -> list[str]:
    return [item.nodeid for item in long_ones_first(cast(list[pytest.Item], found), workers)]


@pytest.mark.parametrize("workers", [2, 3])
def test_each_share_begins_with_guests_and_ends_with_short_tests(workers: int) -> None:
    found = items(u1=50, g1=5, u2=40, g2=3, g3=4, q=20)
    order = ordered(found, workers)
    assert sorted(order) == sorted(item.nodeid for item in found)
    for number in range(workers):
        share = order[len(order) * number // workers : len(order) * (number + 1) // workers]
        guests = [nodeid.startswith("g") for nodeid in share]
        assert guests == sorted(guests, reverse=True)
        assert any(guests) and not all(guests)


def test_a_module_is_not_cut_into_shares() -> None:
    order = ordered(items(g1=4, g2=4, u=20), 2)
    assert order[:4] == [f"g1::{n}" for n in range(4)]
    assert order[14:18] == [f"g2::{n}" for n in range(4)]


def test_more_guests_than_short_tests() -> None:
    found = items(g1=9, u=1, g2=1)
    assert sorted(ordered(found, 2)) == sorted(item.nodeid for item in found)
