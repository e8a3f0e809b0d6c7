"""Answers of an emulator that was killed, given by the next one: unless they were given, and to nobody else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import Fault, GivenAnswer
from vmbus.wire import gateway as wire

from tests.unit.gateway.gateway_harness import MSR, RDMSR, VMCALL, WRMSR, Harness, traps

Launch = Callable[..., Harness]


@pytest.mark.parametrize(
    ("instruction", "fault", "how"),
    [
        (RDMSR, None, "stepped"),
        (VMCALL, None, "stepped"),
        (WRMSR, Fault.GP, "fault"),
        (VMCALL, Fault.UD, "native"),
    ],
)
def test_an_answer_that_was_not_given_is_given(
    harness: Harness, instruction: str, fault: Fault | None, how: str
) -> None:
    first = harness.active()
    harness.start(instruction, rcx=MSR)
    (trap,) = traps(first)
    given = Gateway.given(trap, 0x12345, fault)
    first.close()
    second = harness.active()
    second.repeat_answer(given)
    done = harness.done()
    assert done.how == how
    if instruction == RDMSR:
        assert done.rax | done.rdx << 32 == 0x12345
    assert second.traps() == []


def test_it_is_given_to_the_vcpu_that_waits_for_it(launch: Launch) -> None:
    harness = launch(vcpus=3)
    first = harness.active()
    for vcpu in range(3):
        harness.start(RDMSR, vcpu, rcx=MSR)
    held = {trap.vcpu: trap for trap in traps(first, 3)}
    given = [Gateway.given(held[vcpu], 0x40 + vcpu, None) for vcpu in (2, 0)]
    first.close()
    second = harness.active()
    for each in given:
        second.repeat_answer(each)
    assert {harness.done().rax, harness.done().rax} == {0x40, 0x42}
    (left,) = traps(second)
    assert left.vcpu == 1
    second.answer(left, 0x41)
    assert harness.done().rax == 0x41


def slot(gateway: Gateway, answer: GivenAnswer) -> list[int]:
    """The words of an answer in shared memory."""
    at = gateway._answer_at[answer.place]
    return gateway._quads[at : at + wire.ANSWER_SIZE // 8].tolist()


def test_an_answer_that_was_given_stays_as_it_is(harness: Harness) -> None:
    first = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(first)
    first.answer(trap, 5)
    given = Gateway.given(trap, 9, None)
    assert harness.done().rax == 5
    first.close()
    second = harness.active()
    before = slot(second, given)
    second.repeat_answer(given)
    assert slot(second, given) == before


def test_the_next_trap_of_the_same_slot_does_not_get_it(harness: Harness) -> None:
    first = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(first)
    first.answer(trap, 5)
    assert harness.done().rax == 5
    harness.start(RDMSR, rcx=MSR)
    (later,) = traps(first)
    assert (later.vcpu, later.slot) == (trap.vcpu, trap.slot)
    first.close()
    second = harness.active()
    second.repeat_answer(Gateway.given(trap, 9, None))
    (found,) = traps(second)
    second.answer(found, 7)
    assert harness.done().rax == 7


def test_a_trap_that_was_forgotten_in_a_reset_does_not_get_it(harness: Harness) -> None:
    first = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(first)
    given = Gateway.given(trap, 9, None)
    first.close()
    second = harness.active()
    second.forget_requests()
    second.repeat_answer(given)
    assert slot(second, given)[2] & 0xFFFFFFFF == wire.Verdict.AGAIN
    (again,) = traps(second)
    second.answer(again, 8)
    assert harness.done().rax == 8


def test_a_place_that_there_is_not_is_left_alone(harness: Harness) -> None:
    gateway = harness.active()
    before = gateway._region[:]
    for place in (wire.SLOTS, 1 << 31):
        gateway.repeat_answer(GivenAnswer(place, 0, int(wire.Verdict.OK), 1))
    assert gateway._region[:] == before
