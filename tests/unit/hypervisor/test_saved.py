"""Saving and restoring of a partition.

Source: docs/protocol/saving.md#hypervisor-state, docs/conformance.md#row-55.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vmbus.errors import MalformedError
from vmbus.hypervisor import Features, Partition, PartitionState
from vmbus.hypervisor.saved_state.layout import SAVED_PARTITION
from vmbus.hypervisor.saved_state.values import QueuedMessage, VpState
from vmbus.wire.msr import Msr
from vmbus.wire.synic import TIMER_EXPIRED

from tests.unit.hypervisor.scripted_guest import AUTO_EOI, VECTOR, ScriptedGuest
from tests.unit.hypervisor.test_stimer import MILLISECOND, config


def migrate(guest: ScriptedGuest) -> PartitionState:
    """Restore into another partition on the same memory, without resuming it."""
    guest.partition.pause()
    state = guest.partition.save()
    guest.move_to(guest.make_partition())
    guest.partition.restore(state)
    return state


@pytest.mark.conformance(55)
def test_restoring_the_pages_clears_neither_them_nor_the_queue(running: ScriptedGuest) -> None:
    for text in (b"in the slot", b"queued", b"queued too"):
        running.synic.post_message(1, 2, text)
    running.synic.signal_event(1, 2, 7)
    ram = bytes(running.memory.ram)
    migrate(running)
    assert bytes(running.memory.ram) == ram
    assert running.synic.queued_messages(1, 2) == 2
    running.partition.resume()
    assert [running.take_message(1) for _ in range(4)] == [b"in the slot", b"queued", b"queued too", None]
    assert running.flags(1) == {7}


def test_all_state_is_restored_and_a_second_save_is_the_same() -> None:
    guest = ScriptedGuest(vps=2, features=Features(stimer=True, stimer_direct=True))
    guest.enable_hypercalls()
    guest.enable_synic(0)
    guest.enable_synic(1, sint=5, flags=AUTO_EOI)
    guest.wr(Msr.VP_ASSIST_PAGE, 0x30001, 1)
    guest.wr(Msr.REFERENCE_TSC, guest.page() | 1)
    guest.wr(Msr.TSC_INVARIANT_CONTROL, 1)
    guest.wr(Msr.CRASH_P0 + 3, 77)
    guest.wr(Msr.STIMER0_CONFIG, config(enable=False, auto_enable=True, periodic=True))
    guest.wr(Msr.STIMER0_COUNT, 20 * MILLISECOND)
    guest.synic.post_message(0, 2, b"slot")
    guest.synic.post_message(0, 2, b"queue")
    registers = {
        (vp, msr): guest.rd(msr, vp)
        for vp in (0, 1)
        for msr in guest.partition.msr_numbers
        if msr not in (Msr.TIME_REF_COUNT, Msr.VP_RUNTIME)
    }
    state = migrate(guest)
    assert guest.partition.save() == state
    assert {key: guest.rd(key[1], key[0]) for key in registers} == registers
    assert guest.events.auto_eoi[-1] == (1, {VECTOR})
    assert guest.vmcall(0xFFFF) == 2


def test_nothing_reaches_the_guest_between_restore_and_resume(running: ScriptedGuest) -> None:
    migrate(running)
    ram = bytes(running.memory.ram)
    running.vectors()
    running.synic.post_message(0, 2, b"late")
    running.synic.signal_event(0, 2, 3)
    running.synic.signal_event(0, 2, 3)
    running.eom()
    running.timers.advance(10)
    assert running.vectors() == []
    assert bytes(running.memory.ram) == ram
    running.partition.resume()
    assert sorted(running.vectors()) == [(0, VECTOR)] * 2
    assert running.take_message() == b"late"
    assert running.flags() == {3}


def test_events_deferred_while_paused_are_part_of_the_state(running: ScriptedGuest) -> None:
    running.partition.pause()
    running.synic.signal_event(1, 2, 9)
    state = migrate(running)
    assert state.vps[1].deferred_events == ((2, 9),)
    running.partition.resume()
    assert running.flags(1) == {9}


def test_resume_interrupts_for_messages_and_flags_that_the_guest_has_not_seen(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"unseen")
    running.synic.signal_event(1, 2, 4)
    running.vectors()
    migrate(running)
    assert running.vectors() == []
    running.partition.resume()
    assert running.vectors() == [(0, VECTOR), (1, VECTOR)]


def test_source_resumes_after_a_save_without_a_restore(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    running.partition.pause()
    running.partition.save()
    running.synic.post_message(0, 2, b"3")
    running.partition.resume()
    assert [running.take_message() for _ in range(4)] == [b"1", b"2", b"3", None]


def test_page_enabled_again_after_restore_is_still_the_same_page(running: ScriptedGuest) -> None:
    value = running.rd(Msr.SIMP)
    running.wr(Msr.SIMP, value & ~1)
    migrate(running)
    running.partition.resume()
    running.memory.write(value & ~1, b"kept")
    running.wr(Msr.SIMP, value)
    assert running.memory.read(value & ~1, 4) == b"kept"


def test_timers_continue_after_a_restore() -> None:
    guest = ScriptedGuest(features=Features(stimer=True))
    guest.enable_synic()
    guest.synic.post_message(0, 2, b"busy")
    guest.wr(Msr.STIMER0_CONFIG, config(enable=False, auto_enable=True, periodic=True))
    guest.wr(Msr.STIMER0_COUNT, 10 * MILLISECOND)
    guest.wr(Msr.STIMER0_COUNT + 2, 1)
    guest.wr(Msr.STIMER0_CONFIG + 2, config())
    guest.timers.advance(0.005)
    migrate(guest)
    guest.timers.advance(0.002)
    guest.partition.resume()
    assert guest.take_message() == b"busy"
    payload = guest.take_message()
    assert payload is not None
    assert TIMER_EXPIRED.parse(payload).timer == 1
    guest.timers.advance(0.0035)
    payload = guest.take_message()
    assert payload is not None
    assert (TIMER_EXPIRED.parse(payload).timer, TIMER_EXPIRED.parse(payload).expiration) == (
        0,
        10 * MILLISECOND,
    )


@pytest.mark.parametrize("periodic", [False, True])
def test_a_timer_that_never_expires_can_be_saved(periodic: bool) -> None:
    """A guest must not be able to stop its migration by a COUNT."""
    guest = ScriptedGuest(features=Features(stimer=True))
    guest.enable_synic()
    guest.timers.advance(1)
    guest.wr(Msr.STIMER0_CONFIG, config(periodic=periodic))
    guest.wr(Msr.STIMER0_COUNT, (1 << 64) - 1)
    state = migrate(guest)
    assert SAVED_PARTITION.parse(SAVED_PARTITION.build(state)) == state
    guest.partition.resume()


def test_restore_cancels_the_state_that_the_partition_had(running: ScriptedGuest) -> None:
    """A restore into a running partition (loading of a snapshot) replaces all of its state."""
    fresh = ScriptedGuest(vps=2).partition.save()
    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    running.partition.restore(fresh)
    running.partition.resume()
    assert running.partition.save() == fresh
    assert running.synic.queued_messages(0, 2) == 0


def with_vp(state: PartitionState, **changes: Any) -> PartitionState:
    return dataclasses.replace(state, vps=(dataclasses.replace(state.vps[0], **changes), *state.vps[1:]))


def with_message(state: PartitionState, **changes: Any) -> PartitionState:
    message = dataclasses.replace(QueuedMessage(2, 1, b"x"), **changes)
    return with_vp(state, messages=(message,))


def with_time(state: PartitionState, **changes: Any) -> PartitionState:
    return dataclasses.replace(state, time=dataclasses.replace(state.time, **changes))


TIMER_MESSAGE = QueuedMessage(2, 0x80000010, b"", 1, 5)


@pytest.mark.parametrize(
    ("reason", "damage"),
    [
        ("saved-vp-count", lambda s: dataclasses.replace(s, vps=s.vps * 2)),
        ("saved-vp-count", lambda s: dataclasses.replace(s, vps=())),
        ("saved-crash-parameters", lambda s: dataclasses.replace(s, crash_parameters=(1,))),
        ("saved-value", lambda s: dataclasses.replace(s, guest_os_id=1 << 64)),
        ("saved-value", lambda s: dataclasses.replace(s, hypercall=-1)),
        ("saved-tsc-sequence", lambda s: with_time(s, sequence=1 << 32)),
        ("saved-tsc-offset", lambda s: with_time(s, offset=1 << 64)),
        ("saved-tsc-offset", lambda s: with_time(s, offset=(1 << 64) - 1)),
        ("saved-tsc-offset", lambda s: with_time(s, offset=s.time.time + 1)),
        ("saved-time", lambda s: with_time(s, time=(1 << 64) - 1)),
        ("saved-tsc-scale", lambda s: with_time(s, frequency=2_000_000_000, scale=(1 << 64) - 1)),
        ("saved-tsc-scale", lambda s: with_time(s, frequency=0, scale=1)),
        ("saved-tsc-frequency", lambda s: with_time(s, frequency=1)),
        ("saved-sint-count", lambda s: with_vp(s, sints=(0,))),
        ("saved-sint-vector", lambda s: with_vp(s, sints=(0,) * 16)),
        ("saved-timer-count", lambda s: with_vp(s, timers=())),
        ("saved-value", lambda s: with_vp(s, scontrol=1 << 64)),
        ("saved-message-sint", lambda s: with_message(s, sint=16)),
        ("saved-message-size", lambda s: with_message(s, payload=bytes(241))),
        ("saved-message-type", lambda s: with_message(s, message_type=0)),
        ("saved-message-timer", lambda s: with_message(s, message_type=0x80000010, timer=4)),
        ("saved-message-type", lambda s: with_message(s, timer=1)),
        ("saved-message-timer", lambda s: with_vp(s, messages=(TIMER_MESSAGE, TIMER_MESSAGE))),
        ("saved-message-count", lambda s: with_vp(s, messages=(QueuedMessage(2, 1, b""),) * 4097)),
        ("saved-event", lambda s: with_vp(s, deferred_events=((2, 2048),))),
        ("saved-event", lambda s: with_vp(s, deferred_events=((16, 1),))),
    ],
)
def test_impossible_state_is_refused_before_anything_changes(
    running: ScriptedGuest, reason: str, damage: Any
) -> None:
    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    before = running.partition.save()
    with pytest.raises(MalformedError) as refused:
        running.partition.restore(damage(before))
    assert refused.value.reason == reason
    assert running.partition.save() == before
    assert [running.take_message(), running.take_message()] == [b"1", b"2"]


def test_records_hold_plain_values_only(running: ScriptedGuest) -> None:
    def check(value: object) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                check(getattr(value, field.name))
        elif isinstance(value, tuple):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (int, bytes), value

    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    state = running.partition.save()
    check(state)
    assert isinstance(state.vps[0], VpState)


def test_a_processor_that_may_be_added_is_saved_once_it_was_used() -> None:
    def partition() -> Partition:
        return Partition(
            vp_count=3,
            present=1,
            memory=guest.memory,
            interrupts=guest.interrupts,
            clock=guest.clock,
            timers=guest.timers,
        )

    guest = ScriptedGuest(vps=3)
    guest.move_to(partition())
    guest.enable_synic(0)
    assert len(guest.partition.save().vps) == len(guest.partition.status()["vps"]) == 1  # type: ignore[arg-type]
    before = guest.partition.save()
    guest.enable_synic(1)
    guest.synic.signal_event(1, 2, 5)
    assert guest.interrupts.requests[-1][0] == 1
    state = guest.partition.save()
    assert len(state.vps) == len(guest.partition.status()["vps"]) == 2  # type: ignore[arg-type]
    target = partition()
    target.restore(state)
    assert target.save() == state
    target.restore(before)
    assert target.save() == before, "and a processor that the state does not name is at power-on"
