"""Reference time and the reference TSC page (docs/protocol/discovery.md#reference-tsc-page)."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.hypervisor.reference_time import next_sequence, scale_for
from vmbus.wire.msr import Msr
from vmbus.wire.synic import REFERENCE_TSC_PAGE, ReferenceTscPage

from tests.unit.hypervisor.scripted_guest import NOT_RAM, ScriptedGuest


def page_of(guest: ScriptedGuest) -> ReferenceTscPage:
    gpa = guest.rd(Msr.REFERENCE_TSC) & ~0xFFF
    return REFERENCE_TSC_PAGE.parse(guest.memory.read(gpa, REFERENCE_TSC_PAGE.size))


def read_as_guest(guest: ScriptedGuest) -> int:
    page = page_of(guest)
    assert page.sequence not in (0, 0xFFFFFFFF)
    return (
        (guest.clock.guest_tsc() * page.scale >> 64) + page.offset
    ) & 0xFFFFFFFFFFFFFFFF  # 64-bit sums wrap


def enable(guest: ScriptedGuest) -> int:
    gpa = guest.page()
    guest.wr(Msr.REFERENCE_TSC, gpa | 1)
    return gpa


@pytest.mark.parametrize(
    ("frequency", "scale"),
    [
        (2_000_000_000, 0x147AE147AE147AE),
        (3_000_000_000, 0xDA740DA740DA74),
        (10_000_001, (10_000_000 << 64) // 10_000_001),
        (10_000_000, 0),
        (0, 0),
    ],
)
def test_scale(frequency: int, scale: int) -> None:
    assert scale_for(frequency) == scale


@pytest.mark.parametrize(
    ("sequence", "following"), [(0, 1), (1, 2), (0xFFFFFFFE, 1), (0xFFFFFFFD, 0xFFFFFFFE)]
)
def test_sequence_skips_the_special_numbers(sequence: int, following: int) -> None:
    assert next_sequence(sequence) == following


def test_page_and_counter_are_one_clock(guest: ScriptedGuest) -> None:
    guest.clock.tsc_base = 123_456_789_012
    guest.timers.advance(3.25)
    enable(guest)
    for _ in range(20):
        assert read_as_guest(guest) == guest.rd(Msr.TIME_REF_COUNT)
        guest.timers.advance(0.0371)
    assert guest.rd(Msr.TIME_REF_COUNT) == pytest.approx(guest.timers.now(), abs=2)


def test_time_is_continuous_when_the_page_is_enabled(guest: ScriptedGuest) -> None:
    guest.timers.advance(7)
    before = guest.rd(Msr.TIME_REF_COUNT)
    enable(guest)
    assert guest.rd(Msr.TIME_REF_COUNT) - before in (0, 1)


def test_only_the_three_fields_are_written(guest: ScriptedGuest) -> None:
    gpa = enable(guest)
    assert guest.memory.read(gpa + REFERENCE_TSC_PAGE.size, 8) == b"\xa5" * 8


def test_reserved_bits_come_back_as_written(guest: ScriptedGuest) -> None:
    guest.wr(Msr.REFERENCE_TSC, 0x20000 | 0xABC | 1)
    assert guest.rd(Msr.REFERENCE_TSC) == 0x20000 | 0xABC | 1


def test_enabling_again_takes_a_new_sequence(guest: ScriptedGuest) -> None:
    gpa = enable(guest)
    first = page_of(guest)
    guest.wr(Msr.REFERENCE_TSC, gpa)
    guest.timers.advance(1)
    guest.wr(Msr.REFERENCE_TSC, gpa | 1)
    again = page_of(guest)
    assert again.sequence == first.sequence + 1
    assert (again.scale, again.offset) == (first.scale, first.offset)


def test_disabled_page_is_not_written(guest: ScriptedGuest) -> None:
    gpa = enable(guest)
    guest.wr(Msr.REFERENCE_TSC, 0)
    guest.memory.write(gpa, b"reused")
    guest.partition.publish_reference_tsc()
    assert guest.memory.read(gpa, 6) == b"reused"


def test_unknown_tsc_makes_the_page_invalid_until_it_is_published(guest: ScriptedGuest) -> None:
    guest.clock.tsc_known = False
    guest.timers.advance(1)
    enable(guest)
    assert page_of(guest).sequence == 0
    assert guest.rd(Msr.TIME_REF_COUNT) == 10_000_000
    guest.clock.tsc_known = True
    guest.partition.publish_reference_tsc()
    assert read_as_guest(guest) == guest.rd(Msr.TIME_REF_COUNT)
    assert guest.rd(Msr.TIME_REF_COUNT) - 10_000_000 in (0, 1)


def test_page_outside_ram_is_accepted_and_not_written(guest: ScriptedGuest) -> None:
    guest.wr(Msr.REFERENCE_TSC, NOT_RAM | 1)
    assert guest.rd(Msr.REFERENCE_TSC) == NOT_RAM | 1
    guest.partition.publish_reference_tsc()
    assert guest.partition.refusals.counts == {"page-not-ram": 1}


def test_another_frequency_gets_new_constants_and_time_does_not_jump(guest: ScriptedGuest) -> None:
    enable(guest)
    guest.timers.advance(10)
    before = read_as_guest(guest)
    guest.clock.tsc_base = guest.clock.guest_tsc() - guest.timers.now() * 300
    guest.clock.tsc_frequency = 3_000_000_000
    guest.partition.publish_reference_tsc()
    page = page_of(guest)
    assert page.scale == scale_for(3_000_000_000)
    assert read_as_guest(guest) - before in (0, 1)
    assert guest.rd(Msr.TIME_REF_COUNT) == read_as_guest(guest)
    guest.timers.advance(10)
    assert read_as_guest(guest) == pytest.approx(before + 100_000_000, abs=2)


def test_time_never_goes_back(guest: ScriptedGuest) -> None:
    enable(guest)
    guest.timers.advance(10)
    before = guest.rd(Msr.TIME_REF_COUNT)
    guest.clock.tsc_base = -10 * 2_000_000_000
    assert guest.rd(Msr.TIME_REF_COUNT) == before
    guest.partition.reset()
    assert guest.rd(Msr.TIME_REF_COUNT) >= before


def test_restored_time_is_continuous_at_another_tsc_rate(guest: ScriptedGuest) -> None:
    enable(guest)
    guest.timers.advance(5)
    guest.partition.pause()
    state = guest.partition.save()
    sequence = page_of(guest).sequence
    guest.timers.advance(0.2)
    guest.clock.tsc_base, guest.clock.tsc_frequency = 77, 3_000_000_000
    guest.move_to(guest.make_partition())
    guest.partition.restore(state)
    guest.partition.resume()
    assert page_of(guest).sequence == sequence + 1
    assert read_as_guest(guest) == guest.rd(Msr.TIME_REF_COUNT) >= state.time.time
    assert read_as_guest(guest) == pytest.approx(52_000_000, abs=2)


def test_restored_page_is_left_alone_at_the_same_rate(guest: ScriptedGuest) -> None:
    enable(guest)
    guest.partition.pause()
    state = guest.partition.save()
    before = page_of(guest)
    guest.move_to(guest.make_partition())
    guest.partition.restore(state)
    guest.partition.resume()
    assert page_of(guest) == before
    assert dataclasses.replace(guest.partition.save(), time=state.time) == state


@settings(deadline=None)
@given(
    frequency=st.integers(10_000_001, 10_000_000_000),
    tsc=st.integers(0, (1 << 64) - 1),
    steps=st.lists(st.integers(1, 1 << 40), max_size=5),
)
def test_any_tsc_gives_a_page_that_agrees_with_the_counter(
    frequency: int, tsc: int, steps: list[int]
) -> None:
    guest = ScriptedGuest()
    guest.clock.tsc_frequency = frequency
    guest.clock.tsc_base = tsc
    enable(guest)
    for step in steps:
        guest.clock.tsc_base = min(guest.clock.tsc_base + step, (1 << 64) - 1)
        assert read_as_guest(guest) == guest.rd(Msr.TIME_REF_COUNT)
