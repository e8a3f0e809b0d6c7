"""The engine as devices use it: what a recall leaves to do, and when the number of a channel is free again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.machine.engine.data_path import EngineChannel
from vmbus.machine.engine.layout import ChannelCounts, Recalled
from vmbus.machine.engine.thread import Functions
from vmbus.ports import GivenChannel, GivenRing, SignalTarget

RING = GivenRing((4096, 8192), 0)
CHANNEL = GivenChannel(RING, RING, 7, SignalTarget(3, 4096, 1, 0xF3))


class Path:
    """An engine that returns what the test says, and the machine around it."""

    def __init__(self) -> None:
        self.recalled = Recalled()
        self.forgotten: list[int] = []
        self.freed: list[int] = []
        self.requested: list[tuple[int, int]] = []
        self.engine = SimpleNamespace(
            give=lambda *_, **__: True,
            recall=lambda number: self.recalled,
            forget=self.forgotten.append,
            outstanding=lambda number: 11,
        )
        self.interrupts = SimpleNamespace(request=lambda *each: self.requested.append(each))

    def target(self, channel: GivenChannel) -> None: ...
    def doorbell(self, relid: int) -> None: ...
    def offsets(self, pages: tuple[int, ...]) -> tuple[int, ...]:
        return pages

    def dispatch(self) -> None: ...
    def free(self, number: int) -> None:
        self.freed.append(number)


def channel(path: Any) -> EngineChannel:
    nobody: Any = SimpleNamespace(engine_answered=lambda answer: None, engine_ended=lambda: None)
    return EngineChannel(path, 5, nobody, Functions(1, 2, 3))


def test_an_interrupt_that_is_owed_at_a_recall_is_requested() -> None:
    path = Path()
    one = channel(path)
    assert one.give(CHANNEL)
    path.recalled = Recalled(interrupt_owed=1)
    one.recall()
    assert path.requested == [(3, 0xF3)]
    one.give(CHANNEL)
    path.recalled = Recalled()
    one.recall()
    assert path.requested == [(3, 0xF3)]


def test_a_recall_returns_what_was_done_since_the_last_one() -> None:
    path = Path()
    one = channel(path)
    for counted, expected in ((10, 10), (25, 15)):
        one.give(CHANNEL)
        path.recalled = Recalled(was_left=1, read_index=8, counts=ChannelCounts(packets_in=counted))
        found = one.recall()
        assert (found.packets_in, found.was_left, found.read_index) == (expected, True, 8)


def test_the_number_is_free_when_nothing_is_outstanding() -> None:
    path = Path()
    one = channel(path)
    one.give(CHANNEL)
    assert one.outstanding == 11
    path.recalled = Recalled(outstanding=2)
    one.recall()
    assert one.outstanding == 2
    one.engine_answered(b"")
    one.close()
    assert (path.forgotten, path.freed) == ([5], [])
    one.engine_ended()
    assert path.freed == [5]


def test_the_number_is_free_when_the_owner_fails_at_the_last_end() -> None:
    path = Path()
    one = channel(path)
    one.give(CHANNEL)
    path.recalled = Recalled(outstanding=1)
    one.recall()
    one.close()

    def broken() -> None:
        raise MemoryError

    one._owner.engine_ended = broken  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        one.engine_ended()
    assert path.freed == [5]
