"""Synthetic timers (docs/protocol/discovery.md#synthetic-timers)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vmbus.hypervisor import Features, GeneralProtection
from vmbus.wire.msr import STIMER_CONFIG, Msr, StimerConfig
from vmbus.wire.synic import TIMER_EXPIRED, MessageType, TimerExpired

from tests.unit.hypervisor.scripted_guest import MASKED, VECTOR, ScriptedGuest

MILLISECOND = 10_000
DIRECT_VECTOR = 0xED


def config(
    *,
    enable: bool = True,
    periodic: bool = False,
    lazy: bool = False,
    auto_enable: bool = False,
    direct: bool = False,
    vector: int = 0,
    sint: int = 2,
) -> int:
    return STIMER_CONFIG.build(StimerConfig(enable, periodic, lazy, auto_enable, vector, direct, sint))


DIRECT = config(direct=True, vector=DIRECT_VECTOR, sint=0)


@pytest.fixture
def guest() -> ScriptedGuest:
    guest = ScriptedGuest(vps=2, features=Features(stimer=True, stimer_direct=True))
    guest.enable_synic(0)
    guest.enable_synic(1)
    guest.timers.advance(1)
    return guest


def start(guest: ScriptedGuest, timer: int, config_value: int, count: int, vp: int = 0) -> None:
    guest.wr(Msr.STIMER0_COUNT + 2 * timer, count, vp)
    guest.wr(Msr.STIMER0_CONFIG + 2 * timer, config_value, vp)


def take_expiration(guest: ScriptedGuest, vp: int = 0) -> TimerExpired:
    slot = guest.slot(vp)
    assert slot.message_type == MessageType.TIMER_EXPIRED
    assert slot.payload_size == 24
    payload = guest.take_message(vp)
    assert payload is not None
    return TIMER_EXPIRED.parse(payload)


def is_enabled(guest: ScriptedGuest, timer: int = 0) -> bool:
    return bool(guest.rd(Msr.STIMER0_CONFIG + 2 * timer) & 1)


@pytest.mark.conformance(86)
@pytest.mark.parametrize("timer", range(4))
def test_one_shot_message_carries_timer_expiration_and_delivery(guest: ScriptedGuest, timer: int) -> None:
    start(guest, timer, config(), 10_000_000 + 5 * MILLISECOND, vp=1)
    guest.timers.advance(0.0049)
    assert guest.vectors() == []
    guest.timers.advance(0.0002)
    assert guest.vectors() == [(1, VECTOR)]
    expired = take_expiration(guest, 1)
    assert (expired.timer, expired.expiration) == (timer, 10_000_000 + 5 * MILLISECOND)
    assert expired.expiration <= expired.delivery <= guest.rd(Msr.TIME_REF_COUNT)
    assert guest.rd(Msr.STIMER0_CONFIG + 2 * timer, 1) & 1 == 0
    guest.timers.advance(1)
    assert guest.vectors() == []


@pytest.mark.conformance(86)
def test_one_shot_in_the_past_expires_at_once(guest: ScriptedGuest) -> None:
    start(guest, 0, config(), 1)
    assert take_expiration(guest).expiration == 1
    assert not is_enabled(guest)


@pytest.mark.conformance(86)
def test_periodic_timer_expires_the_right_number_of_times(guest: ScriptedGuest) -> None:
    start(guest, 0, config(periodic=True), 10 * MILLISECOND)
    expirations = []
    for _ in range(105):
        guest.timers.advance(0.001)
        if guest.slot().message_type:
            expirations.append(take_expiration(guest).expiration)
    assert expirations == [10_000_000 + 10 * MILLISECOND * n for n in range(1, 11)]
    assert is_enabled(guest)


@pytest.mark.conformance(86)
@pytest.mark.parametrize("periodic", [False, True])
def test_auto_enable_starts_the_timer_with_its_count(guest: ScriptedGuest, periodic: bool) -> None:
    guest.wr(Msr.STIMER0_CONFIG, config(enable=False, auto_enable=True, periodic=periodic))
    assert not is_enabled(guest)
    guest.wr(Msr.STIMER0_COUNT, MILLISECOND if periodic else 10_000_000 + MILLISECOND)
    assert is_enabled(guest)
    guest.timers.advance(0.0015)
    assert take_expiration(guest).expiration == 10_000_000 + MILLISECOND
    assert is_enabled(guest) == periodic


@pytest.mark.conformance(86)
def test_direct_mode_raises_its_vector_and_needs_no_synic() -> None:
    guest = ScriptedGuest(features=Features(stimer=True, stimer_direct=True))
    start(guest, 3, DIRECT, 5 * MILLISECOND)
    guest.timers.advance(0.01)
    assert guest.interrupts.requests == [(0, DIRECT_VECTOR, False)]
    start(guest, 3, DIRECT | 2, MILLISECOND)
    guest.timers.advance(0.00999)
    assert len(guest.interrupts.requests) == 10


@pytest.mark.conformance(86)
def test_one_shot_behind_a_busy_slot_is_delivered_after_eom(guest: ScriptedGuest) -> None:
    guest.synic.post_message(0, 2, b"channel message")
    start(guest, 0, config(), 10_000_000 + MILLISECOND)
    guest.timers.advance(0.003)
    assert guest.slot().flags == 1
    assert not is_enabled(guest)
    assert guest.vectors() == [(0, VECTOR)]
    guest.take_message()
    assert guest.vectors() == [(0, VECTOR)]
    expired = take_expiration(guest)
    assert expired.expiration == 10_000_000 + MILLISECOND
    assert expired.delivery == 10_000_000 + 3 * MILLISECOND


@pytest.mark.conformance(86)
def test_periodic_behind_a_busy_slot_resumes_after_eom_without_a_pile(guest: ScriptedGuest) -> None:
    start(guest, 0, config(periodic=True), MILLISECOND)
    guest.timers.advance(0.0105)
    assert guest.vectors() == [(0, VECTOR)]
    assert take_expiration(guest).expiration == 10_000_000 + MILLISECOND
    assert take_expiration(guest).expiration == 10_000_000 + 2 * MILLISECOND
    assert guest.slot().message_type == 0
    guest.timers.advance(0.001)
    assert take_expiration(guest).expiration == 10_000_000 + 11 * MILLISECOND


def test_lazy_periodic_timer_drops_what_finds_the_slot_busy(guest: ScriptedGuest) -> None:
    start(guest, 0, config(periodic=True, lazy=True), MILLISECOND)
    guest.timers.advance(0.0105)
    assert take_expiration(guest).expiration == 10_000_000 + MILLISECOND
    assert guest.slot().message_type == 0
    guest.timers.advance(0.001)
    assert take_expiration(guest).expiration == 10_000_000 + 11 * MILLISECOND


def test_lazy_one_shot_is_not_lost(guest: ScriptedGuest) -> None:
    guest.synic.post_message(0, 2, b"busy")
    start(guest, 0, config(lazy=True), 1)
    guest.take_message()
    assert take_expiration(guest).expiration == 1


def test_channel_messages_and_timers_share_the_slot_in_order(guest: ScriptedGuest) -> None:
    guest.synic.post_message(0, 2, b"a")
    start(guest, 0, config(), 1)
    guest.synic.post_message(0, 2, b"b")
    assert guest.take_message() == b"a"
    assert take_expiration(guest).timer == 0
    assert guest.take_message() == b"b"


def test_count_zero_stops_the_timer(guest: ScriptedGuest) -> None:
    start(guest, 0, config(periodic=True), MILLISECOND)
    guest.wr(Msr.STIMER0_COUNT, 0)
    assert not is_enabled(guest)
    guest.timers.advance(1)
    assert guest.vectors() == []


def test_disabling_withdraws_the_message_that_still_waits(guest: ScriptedGuest) -> None:
    guest.synic.post_message(0, 2, b"busy")
    start(guest, 0, config(), 1)
    guest.wr(Msr.STIMER0_CONFIG, 0)
    guest.take_message()
    assert guest.slot().message_type == 0


def test_enable_without_count_waits_for_the_count(guest: ScriptedGuest) -> None:
    guest.wr(Msr.STIMER0_CONFIG, config())
    assert is_enabled(guest)
    guest.timers.advance(1)
    assert guest.vectors() == []
    guest.wr(Msr.STIMER0_COUNT, 1)
    assert take_expiration(guest).timer == 0


def test_message_timer_cannot_use_sint0(guest: ScriptedGuest) -> None:
    guest.wr(Msr.STIMER0_CONFIG, config(sint=0, auto_enable=True))
    assert not is_enabled(guest)
    guest.wr(Msr.STIMER0_COUNT, 1)
    assert not is_enabled(guest)


def test_direct_mode_that_is_not_offered_faults() -> None:
    guest = ScriptedGuest(features=Features(stimer=True))
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.STIMER0_CONFIG, DIRECT)


def test_direct_mode_refuses_low_vectors(guest: ScriptedGuest) -> None:
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.STIMER0_CONFIG, config(direct=True, vector=15))
    guest.wr(Msr.STIMER0_CONFIG, config(direct=True, vector=15, enable=False, auto_enable=True))
    guest.wr(Msr.STIMER0_COUNT, 1)
    assert not is_enabled(guest)
    assert guest.vectors() == []


def test_a_tiny_period_is_stretched(guest: ScriptedGuest) -> None:
    start(guest, 0, DIRECT | 2, 1)
    guest.timers.advance(0.01)
    assert 90 <= len(guest.vectors()) <= 110


def test_a_late_host_skips_periods_but_keeps_the_beat(guest: ScriptedGuest) -> None:
    start(guest, 0, DIRECT | 2, 10 * MILLISECOND)
    guest.partition.pause()
    guest.timers.advance(0.055)
    guest.partition.resume()
    assert guest.vectors() == [(0, DIRECT_VECTOR)]
    guest.timers.advance(0.0049)
    assert guest.vectors() == []
    guest.timers.advance(0.0002)
    assert guest.vectors() == [(0, DIRECT_VECTOR)]


def test_far_expiration_is_waited_for_in_steps(guest: ScriptedGuest) -> None:
    start(guest, 0, config(), 10_000_000 + 3 * 3600 * 10_000_000)
    guest.timers.advance(3 * 3600 - 1)
    assert guest.vectors() == []
    guest.timers.advance(1.001)
    assert take_expiration(guest).timer == 0


def test_stopped_guest_is_not_polled_at_full_speed(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(guest, 0, config(), 10_000_000 + 1)
    monkeypatch.setattr(guest.clock, "now", lambda: 10_000_000)
    wakes: list[float] = []
    call_later = guest.timers.call_later

    def counted(delay: float, callback: Callable[[], None]) -> object:
        wakes.append(delay)
        return call_later(delay, callback)

    monkeypatch.setattr(guest.timers, "call_later", counted)
    guest.timers.advance(10)
    assert 0 < len(wakes) < 250
    monkeypatch.undo()
    guest.timers.advance(0.06)
    assert take_expiration(guest).timer == 0


def test_timer_message_waits_for_its_sint(guest: ScriptedGuest) -> None:
    guest.wr(Msr.SINT0 + 2, MASKED | VECTOR)
    start(guest, 0, config(periodic=True), MILLISECOND)
    guest.timers.advance(0.0105)
    assert guest.slot().message_type == 0
    guest.wr(Msr.SINT0 + 2, VECTOR)
    assert take_expiration(guest).expiration == 10_000_000 + MILLISECOND


def test_reset_stops_all_timers(guest: ScriptedGuest) -> None:
    start(guest, 0, DIRECT | 2, MILLISECOND)
    guest.partition.reset()
    guest.timers.advance(1)
    assert guest.vectors() == []
    assert guest.rd(Msr.STIMER0_COUNT) == guest.rd(Msr.STIMER0_CONFIG) == 0
