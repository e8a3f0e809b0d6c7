"""A gateway that is served with a journal: nothing of a round is seen before it is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from vmbus.hypervisor.hypercalls import HypercallResult
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.posts import Post
from vmbus.machine.gateway.traps import Fault, GivenAnswer, Trap
from vmbus.machine.host import Host
from vmbus.machine.journal.recorder import Round
from vmbus.wire.gateway import TrapKind
from vmbus.wire.msr import Msr

from tests.unit.machine.test_host_posts import EOM, TEARDOWN, Scripted, serve, wrmsr
from tests.unit.machine.test_host_state import host


class Logged(Scripted):
    """A gateway whose log has the order of all that the guest can see."""

    def __init__(self, traps: list[Trap], posts: list[Post], doorbells: list[int]) -> None:
        super().__init__(traps, posts, doorbells)
        self.rounds: list[Round] = []

    given = staticmethod(Gateway.given)

    def promise(self, messages: int) -> None:
        self.log.append("promise")

    def withdraw(self) -> None:
        self.log.append("promise")

    def release(self) -> None:
        self.log.append("room")

    def answer(self, trap: Trap, value: int = 0) -> None:
        self.log.append(("answer", trap.sequence))

    def answer_fault(self, trap: Trap, fault: Fault) -> None:
        self.log.append(("fault", trap.sequence))

    # --- a recorder ---

    def round_ended(self, done: Round) -> None:
        self.rounds.append(done)
        self.log.append("commit")

    def deliver(self) -> None:
        self.log.append("messages")

    def want(self) -> None:
        self.log.append("wanted")

    def reset(self) -> None:
        self.log.append("wanted")


def served(
    made: Host, traps: Sequence[Trap], posts: Sequence[Post] = (), doorbells: Sequence[int] = ()
) -> Logged:
    gateway = Logged(list(traps), list(posts), list(doorbells))
    made.service.recorder = gateway  # type: ignore[assignment]
    serve(made, gateway)
    return gateway


def at(trap: Trap, sequence: int, vcpu: int = 0) -> Trap:
    return trap._replace(sequence=sequence, vcpu=vcpu)


def rdmsr(msr: int) -> Trap:
    return wrmsr(msr, 0)._replace(kind=TrapKind.RDMSR)


async def test_a_round_is_recorded_before_its_answers_its_room_and_its_messages(tmp_path: Path) -> None:
    with host(tmp_path) as made:
        gateway = served(made, [at(wrmsr(Msr.SIMP, 0), 5), at(rdmsr(Msr.VP_INDEX), 6)], [TEARDOWN, EOM], [3])
    assert gateway.log == [
        *[TEARDOWN.payload, "EOM", "bell"],
        *["commit", "promise", ("answer", 5), ("answer", 6), "room", "messages"],
    ]
    [done] = gateway.rounds
    assert done.guest
    assert done.answers == [GivenAnswer(0, 5, 0, 0), GivenAnswer(0, 6, 0, 0)]


async def test_the_value_and_the_fault_of_each_answer_are_recorded(tmp_path: Path) -> None:
    with host(tmp_path) as made:
        made.partition.guest_os_id = 0x1234
        gateway = served(made, [at(rdmsr(Msr.GUEST_OS_ID), 1), at(rdmsr(0x4000_00FF), 2)])
    [done] = gateway.rounds
    assert done.answers == [GivenAnswer(0, 1, 0, 0x1234), Gateway.given(at(rdmsr(0), 2), 0, Fault.GP)]
    assert gateway.log[-4:] == [("answer", 1), ("fault", 2), "room", "messages"]
    assert not done.guest


@pytest.mark.parametrize(
    ("traps", "posts", "guest", "timers"),
    [
        ([], [], False, 0),
        ([], [EOM], False, 0),
        ([], [TEARDOWN], True, 0),
        ([wrmsr(Msr.EOM, 0)], [], False, 0),
        ([rdmsr(Msr.TIME_REF_COUNT)], [], False, 0),
        ([wrmsr(Msr.SIEFP, 0)], [], True, 0),
        ([wrmsr(Msr.STIMER0_CONFIG, 0)], [], False, 1),
        ([at(wrmsr(Msr.STIMER0_COUNT + 6, 0), 1, 2), wrmsr(Msr.STIMER0_CONFIG, 0)], [], False, 3),
        ([wrmsr(Msr.STIMER0_CONFIG + 8, 0)], [], True, 0),
        ([wrmsr(0, 0)._replace(kind=TrapKind.VMCALL)], [], True, 0),
    ],
)
async def test_what_a_round_may_have_changed(
    tmp_path: Path, traps: list[Trap], posts: list[Post], guest: bool, timers: int
) -> None:
    with host(tmp_path) as made:
        made.partition.write_msr = lambda vp, msr, value: None  # type: ignore[method-assign]
        made.partition.hypercall = lambda vp, registers: HypercallResult(0, None)  # type: ignore[method-assign]
        gateway = served(made, traps, posts)
    [done] = gateway.rounds
    assert (done.guest, done.timers) == (guest, timers)
    assert gateway.log[-2:] == ["room", "messages"]


async def test_a_message_is_noted_once(tmp_path: Path) -> None:
    with host(tmp_path) as made:
        assert served(made, [], [TEARDOWN]).rounds[0].guest
        assert not served(made, []).rounds[0].guest


async def test_an_internal_error_is_answered_after_the_commit_too(tmp_path: Path) -> None:
    def broken(vp: int, msr: int, value: int) -> None:
        raise RuntimeError("a bug")

    with host(tmp_path) as made:
        made.partition.write_msr = broken  # type: ignore[method-assign]
        gateway = served(made, [at(wrmsr(Msr.SIMP, 0), 9)])
    assert gateway.log.index("commit") < gateway.log.index(("fault", 9))
