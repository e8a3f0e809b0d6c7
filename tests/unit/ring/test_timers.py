"""The timers of a channel's device: they wait while the channel is paused, and end with its opening."""

from __future__ import annotations

import pytest
from vmbus.bus.io.state import IoState
from vmbus.bus.io.timers import ChannelTimers
from vmbus.testing import FakeTimers


class Rig:
    """Timers of a channel in ``state``; ``calls``: what was called."""

    def __init__(self) -> None:
        self.state = IoState.RUNNING
        self.loop = FakeTimers()
        self.calls: list[str] = []
        self.timers = ChannelTimers(self.loop, lambda: self.state, lambda callback: callback())

    def later(self, name: str, delay: float = 1.0) -> None:
        self.timers.call_later(delay, lambda: self.calls.append(name))

    def resume(self) -> None:
        self.state = IoState.RUNNING
        self.timers.resume()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_what_comes_due_in_a_pause_is_called_once_at_its_end_and_in_order(rig: Rig) -> None:
    rig.later("second", 2)
    rig.later("first", 1)
    rig.later("third", 9)
    rig.state = IoState.PAUSED
    rig.loop.advance(5)
    assert rig.calls == []
    rig.resume()
    rig.resume()
    assert rig.calls == ["first", "second"]
    rig.loop.advance(5)
    assert rig.calls == ["first", "second", "third"]


def test_a_timer_that_is_cancelled_in_a_pause_is_not_called_at_its_end(rig: Rig) -> None:
    timer = rig.timers.call_later(1, lambda: rig.calls.append("cancelled"))
    rig.state = IoState.PAUSED
    rig.loop.advance(5)
    timer.cancel()
    rig.resume()
    assert rig.calls == []


@pytest.mark.parametrize("due_in_a_pause", [False, True])
def test_another_opening_calls_nothing_of_the_one_before(rig: Rig, due_in_a_pause: bool) -> None:
    rig.later("of the first opening")
    if due_in_a_pause:
        rig.state = IoState.PAUSED
        rig.loop.advance(5)
    rig.timers.forget()
    rig.resume()
    rig.later("of the second opening")
    rig.loop.advance(5)
    assert rig.calls == ["of the second opening"]


@pytest.mark.parametrize("state", [IoState.CLOSED, IoState.FAILED])
def test_a_channel_that_ended_calls_nothing(rig: Rig, state: IoState) -> None:
    rig.later("late")
    rig.state = state
    rig.loop.advance(5)
    rig.resume()
    assert rig.calls == []
