"""Messages of a host with a journal: none is written before it is recorded, and it can be seen which one was."""

from __future__ import annotations

import pytest
from vmbus.hypervisor.messages import MAX_MARK

from tests.unit.hypervisor.scripted_guest import ScriptedGuest


@pytest.fixture
def gated(running: ScriptedGuest) -> ScriptedGuest:
    running.synic.gate = lambda: None
    return running


def test_nothing_is_written_before_it_is_delivered_and_then_one_to_a_slot(gated: ScriptedGuest) -> None:
    asked: list[int] = []
    gated.synic.gate = lambda: asked.append(1)
    for each in (b"one", b"two"):
        gated.synic.post_message(0, 2, each)
    assert asked and gated.slot().message_type == 0 and gated.vectors() == []
    ready = gated.synic.ready()
    assert ready == {(0, 2): 1}
    gated.synic.deliver(ready)
    assert gated.synic.queued_messages(0, 2) == 1
    assert gated.slot().flags == 1, "the guest writes EOM"
    assert gated.take_message() == b"one"
    assert gated.take_message() is None
    ready = gated.synic.ready()
    assert ready == {(0, 2): 2}
    gated.synic.deliver(ready)
    assert gated.take_message() == b"two"


def test_a_busy_slot_is_not_ready_and_asks_for_eom(gated: ScriptedGuest) -> None:
    gated.synic.post_message(0, 2, b"one")
    gated.synic.deliver(gated.synic.ready())
    assert gated.slot().flags == 0
    gated.synic.post_message(0, 2, b"two")
    assert gated.synic.ready() == {}
    assert gated.slot().flags == 1


@pytest.mark.parametrize("consumed", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_a_message_is_dropped_if_it_was_delivered(
    gated: ScriptedGuest, written: bool, consumed: bool
) -> None:
    gated.synic.post_message(0, 2, b"one")
    gated.synic.post_message(0, 2, b"two")
    before = gated.partition.save()
    ready = gated.synic.ready()
    if written:
        gated.synic.deliver(ready)
        if consumed:
            assert gated.take_message() == b"one"
    after = gated.make_partition()
    after.pause()
    after.restore(before)
    after.synic.take_delivered(ready)
    assert after.synic.queued_messages(0, 2) == (1 if written else 2)


def test_marks_begin_anew_behind_the_last(gated: ScriptedGuest) -> None:
    gated.synic.post_message(0, 2, b"one")
    gated.synic.ready()
    gated.synic.deliver({(0, 2): MAX_MARK})
    assert gated.take_message() == b"one"
    gated.synic.post_message(0, 2, b"two")
    assert gated.synic.ready() == {(0, 2): 1}
