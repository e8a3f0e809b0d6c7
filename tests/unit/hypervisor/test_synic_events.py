"""Event flags.

Source: docs/protocol/discovery.md#event-flags-page, docs/protocol/discovery.md#event-delivery.
"""

from __future__ import annotations

import pytest
from vmbus.wire.msr import Msr

from tests.unit.hypervisor.scripted_guest import (
    AUTO_EOI,
    MASKED,
    NOT_RAM,
    POLLING,
    VECTOR,
    RacingMemory,
    ScriptedGuest,
)


@pytest.mark.parametrize("flag", [0, 1, 31, 32, 63, 1000, 2047])
def test_flag_is_set_and_signalled(running: ScriptedGuest, flag: int) -> None:
    running.synic.signal_event(1, 2, flag)
    assert running.flags(1) == {flag}
    assert running.vectors() == [(1, VECTOR)]
    assert running.flags(0) == set()


def test_flags_of_each_sint_have_their_own_area(guest: ScriptedGuest) -> None:
    guest.enable_synic(sint=2)
    guest.wr(Msr.SINT0 + 15, 0x77)
    guest.synic.signal_event(0, 15, 2047)
    assert guest.flags(0, 15) == {2047}
    assert guest.flags(0, 2) == set()
    assert guest.vectors() == [(0, 0x77)]


@pytest.mark.conformance(84)
def test_flag_already_set_is_not_signalled_again(running: ScriptedGuest) -> None:
    running.synic.signal_event(0, 2, 5)
    running.synic.signal_event(0, 2, 5)
    assert running.vectors() == [(0, VECTOR)]
    running.clear_flags()
    running.synic.signal_event(0, 2, 5)
    assert running.vectors() == [(0, VECTOR)]


def test_other_flags_of_the_same_word_are_kept(running: ScriptedGuest) -> None:
    running.synic.signal_event(0, 2, 5)
    running.synic.signal_event(0, 2, 6)
    assert running.flags() == {5, 6}
    assert len(running.vectors()) == 2


def test_flag_is_looked_at_after_a_fence(running: ScriptedGuest) -> None:
    running.synic.signal_event(0, 2, 5)
    running.vectors()
    assert isinstance(running.memory, RacingMemory)
    # A flag that the guest clears before the fence is set and signalled again.
    running.memory.at_fence = running.clear_flags
    running.synic.signal_event(0, 2, 5)
    assert running.flags() == {5}
    assert running.vectors() == [(0, VECTOR)]


def test_interrupt_of_an_auto_eoi_sint_has_the_flag(guest: ScriptedGuest) -> None:
    guest.enable_synic(flags=AUTO_EOI)
    guest.synic.signal_event(0, 2, 1)
    assert guest.interrupts.requests == [(0, VECTOR, True)]


def test_polling_sint_stores_without_interrupt(guest: ScriptedGuest) -> None:
    guest.enable_synic(flags=POLLING)
    guest.synic.signal_event(0, 2, 1)
    assert guest.flags() == {1}
    assert guest.vectors() == []


@pytest.mark.parametrize(
    ("msr", "off"),
    [(Msr.SCONTROL, 0), (Msr.SINT0 + 2, MASKED | VECTOR), (Msr.SIEFP, 0), (Msr.SIEFP, NOT_RAM | 1)],
)
def test_event_is_dropped_while_the_sint_cannot_take_it(running: ScriptedGuest, msr: int, off: int) -> None:
    area = (running.rd(Msr.SIEFP) & ~0xFFF) + 2 * 256
    running.wr(msr, off)
    running.synic.signal_event(0, 2, 1)
    assert running.vectors() == []
    assert running.memory.read(area, 256) == bytes(256)
    assert running.synic.counters.events_dropped == 1


def test_unmasking_reminds_of_flags_that_are_still_set(running: ScriptedGuest) -> None:
    running.synic.signal_event(0, 2, 5)
    running.wr(Msr.SINT0 + 2, MASKED | VECTOR)
    running.vectors()
    running.wr(Msr.SINT0 + 2, VECTOR)
    assert running.vectors() == [(0, VECTOR)]
    running.wr(Msr.SINT0 + 2, VECTOR)
    assert running.vectors() == []


@pytest.mark.parametrize("flag", [-1, 2048])
def test_flag_out_of_range_is_refused(running: ScriptedGuest, flag: int) -> None:
    running.synic.signal_event(0, 2, flag)
    assert running.vectors() == []
    assert running.partition.refusals.counts == {"event-flag-out-of-range": 1}
