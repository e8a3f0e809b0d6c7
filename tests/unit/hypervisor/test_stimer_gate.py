"""Synthetic timers of a host with a journal: their messages wait for it, and lazy ones only behind nothing."""

from __future__ import annotations

import pytest
from vmbus.hypervisor import Features
from vmbus.wire.msr import STIMER_CONFIG, Msr, StimerConfig
from vmbus.wire.synic import TIMER_EXPIRED, MessageType

from tests.unit.hypervisor.scripted_guest import ScriptedGuest

MILLISECOND = 10_000
DIRECT_VECTOR = 0xED


@pytest.fixture
def gated() -> ScriptedGuest:
    guest = ScriptedGuest(vps=2, features=Features(stimer=True, stimer_direct=True))
    guest.enable_synic(0)
    guest.enable_synic(1)
    guest.timers.advance(1)
    guest.synic.gate = lambda: None
    return guest


def start(
    guest: ScriptedGuest,
    *,
    period: int,
    lazy: bool = False,
    direct: bool = False,
    timer: int = 0,
    vp: int = 0,
) -> None:
    config = StimerConfig(True, True, lazy, False, DIRECT_VECTOR if direct else 0, direct, 0 if direct else 2)
    guest.wr(Msr.STIMER0_COUNT + 2 * timer, period * MILLISECOND, vp)
    guest.wr(Msr.STIMER0_CONFIG + 2 * timer, STIMER_CONFIG.build(config), vp)


def deliver(guest: ScriptedGuest) -> bool:
    """Commit, and deliver what waits; return whether there was anything."""
    ready = guest.synic.ready()
    guest.synic.deliver(ready)
    return bool(ready)


def taken(guest: ScriptedGuest) -> int:
    """Take the message of a timer; return its expiration, in milliseconds after the first second."""
    assert guest.slot().message_type == MessageType.TIMER_EXPIRED
    payload = guest.take_message()
    assert payload is not None
    return TIMER_EXPIRED.parse(payload).expiration // MILLISECOND - 1000


@pytest.mark.parametrize("lazy", [False, True])
def test_a_message_waits_for_the_journal(gated: ScriptedGuest, lazy: bool) -> None:
    asked: list[int] = []
    gated.synic.gate = lambda: asked.append(1)
    start(gated, period=2, lazy=lazy)
    gated.timers.advance(0.003)
    assert asked
    assert gated.slot().message_type == 0
    assert deliver(gated)
    assert taken(gated) == 2
    assert not deliver(gated)


@pytest.mark.parametrize("lazy", [False, True])
def test_later_expirations_add_nothing_to_one_that_waits(gated: ScriptedGuest, lazy: bool) -> None:
    start(gated, period=2, lazy=lazy)
    gated.timers.advance(0.009)
    assert deliver(gated)
    assert taken(gated) == 2
    assert not deliver(gated)
    gated.timers.advance(0.002)
    assert deliver(gated)
    assert taken(gated) == 10


@pytest.mark.parametrize(("lazy", "left"), [(False, True), (True, False)])
def test_a_lazy_one_is_dropped_where_the_slot_is_busy(gated: ScriptedGuest, lazy: bool, left: bool) -> None:
    gated.synic.post_message(0, 2, b"busy")
    assert deliver(gated)
    start(gated, period=2, lazy=lazy)
    gated.timers.advance(0.003)
    assert gated.partition.save().vps[0].timers[0].expiration is not None, "it goes on"
    assert gated.take_message() == b"busy"
    assert deliver(gated) is left
    assert gated.slot().message_type == (MessageType.TIMER_EXPIRED if left else 0)
    if not left:
        gated.timers.advance(0.002)
        assert deliver(gated)
        assert taken(gated) == 4


def test_a_message_that_waits_goes_with_its_timer(gated: ScriptedGuest) -> None:
    start(gated, period=2, lazy=True)
    gated.timers.advance(0.003)
    gated.wr(Msr.STIMER0_COUNT, 0)
    assert not deliver(gated)


def test_a_timer_that_leaves_no_message_is_told(gated: ScriptedGuest) -> None:
    told: list[int] = []
    gated.partition.synthetic_timers.silent = told.append
    start(gated, period=2)
    start(gated, period=3, direct=True, vp=1)
    gated.interrupts.requests.clear()
    gated.timers.advance(0.002)
    assert told == []
    gated.timers.advance(0.005)
    assert told == [1, 1]
    assert [each[:2] for each in gated.interrupts.requests] == [(1, DIRECT_VECTOR)] * 2
