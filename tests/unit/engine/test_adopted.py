"""Slots whose requests Python has taken over: they are released when the journal has them, and named until then."""

from __future__ import annotations

import pytest
from vmbus.machine.engine.adopted import AdoptedSlots


class Engine:
    """It frees what is released when the test says so."""

    def __init__(self, count: int = 0) -> None:
        self.released: list[int] = []
        self.freed = count
        self.slots = AdoptedSlots(self.released.append, lambda: self.freed & 0xFFFFFFFF)
        self.slots._count = count
        self.slots.keeps = True

    def free(self, count: int) -> None:
        self.freed += count


@pytest.mark.parametrize("count", [0, 0xFFFFFFFE])
def test_a_slot_is_named_until_the_engine_has_freed_it(count: int) -> None:
    engine = Engine(count)
    slots = engine.slots
    slots.take(3, 10, 100)
    slots.take(3, 11, 101)
    slots.take(4, 12, 7)
    assert (slots.numbers(3), slots.numbers(4), slots.held(3)) == ((100, 101), (7,), 2)
    assert engine.released == []
    slots.recorded(3)
    assert (engine.released, slots.held(3)) == ([10, 11], 0)
    slots.take(3, 13, 102)
    assert slots.numbers(3) == (100, 101, 102)
    engine.free(1)
    assert slots.numbers(3) == (101, 102)
    engine.free(1)
    assert slots.numbers(3) == (102,)
    slots.recorded(3)
    engine.free(1)
    assert (slots.numbers(3), slots.numbers(4)) == ((), (7,))


def test_other_releases_are_counted() -> None:
    engine = Engine()
    slots = engine.slots
    slots.count_release()
    slots.take(3, 10, 100)
    slots.recorded(3)
    engine.free(1)
    assert slots.numbers(3) == (100,)
    engine.free(1)
    assert slots.numbers(3) == ()


def test_without_a_journal_a_slot_is_released_at_once() -> None:
    engine = Engine()
    engine.slots.keeps = False
    engine.slots.take(3, 10, 100)
    assert (engine.released, engine.slots.numbers(3)) == ([10], ())


def test_an_opening_that_is_over_names_nothing() -> None:
    engine = Engine()
    engine.slots.take(3, 10, 100)
    engine.slots.recorded(3)
    engine.slots.take(3, 11, 101)
    engine.slots.forget(3)
    assert (engine.released, engine.slots.numbers(3)) == ([10, 11], ())
