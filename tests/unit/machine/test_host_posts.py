"""What the gateway has posted: its order among traps and doorbells, and when the host promises to handle it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vmbus.bus.messages import MAX_UNDELIVERED, POSTED
from vmbus.machine.gateway.posts import Post
from vmbus.machine.gateway.traps import Fault, Trap
from vmbus.machine.host import Host
from vmbus.testing.scripted import ScriptedGuest
from vmbus.wire.gateway import TrapKind
from vmbus.wire.header import MessageType
from vmbus.wire.msr import Msr
from vmbus.wire.version import Version

from tests.unit.hypervisor.scripted_guest import LINUX_6_1
from tests.unit.machine.test_host_state import host

TEARDOWN = Post(0, TrapKind.VMCALL, 1, int(MessageType.GPADL_TEARDOWN).to_bytes(4, "little") + bytes(12))
EOM = Post(0, TrapKind.WRMSR, 0, b"")


class Scripted:
    """A gateway with one round of work; what a guest does while it is served comes with a call of ``during``."""

    carries = False

    def __init__(self, traps: list[Trap], posts: list[Post], doorbells: list[int]) -> None:
        self.log: list[object] = []
        self.ring = posts
        self.work, self._doorbells = traps, doorbells
        self.posts = self
        self.promises: list[int | None] = []
        self.during: Callable[[], None] = lambda: None
        self.guest = None

    def traps(self) -> list[Trap]:
        return self.work

    def doorbells(self) -> list[int]:
        self.during()
        return self._doorbells

    def take(self) -> list[Post]:
        found, self.ring = self.ring, []
        return found

    def promise(self, messages: int) -> None:
        self.promises.append(messages)

    def withdraw(self) -> None:
        self.promises.append(None)

    def answer(self, trap: Trap, value: int = 0) -> None:
        self.log.append(("answer", trap.kind, self.promises[-1:]))

    def answer_fault(self, trap: Trap, fault: Fault) -> None:
        self.log.append(fault)


def wrmsr(msr: int, value: int) -> Trap:
    return Trap(0, 0, 1, TrapKind.WRMSR, True, 0, 0, value & 0xFFFFFFFF, 0, msr, value >> 32, 0, 0, 0, 0)


def serve(made: Host, gateway: Scripted) -> None:
    made.gateway = made.service._gateway = gateway  # type: ignore[assignment]
    made.bus.handle_acknowledged = lambda connection_id, payload: gateway.log.append(payload)  # type: ignore[method-assign]
    made.partition.synic.end_of_message = lambda vp: gateway.log.append("EOM")  # type: ignore[method-assign]
    made.partition.synic.ring_event_port = lambda connection_id: gateway.log.append("bell")  # type: ignore[method-assign]
    made.serve_gateway()


async def test_a_trap_and_a_doorbell_come_after_what_was_posted_before_them(tmp_path: Path) -> None:
    with host(tmp_path) as made:
        gateway = Scripted([wrmsr(Msr.SIMP, 0)], [TEARDOWN, EOM], [3])

        def more() -> None:  # the guest has its answer: it posts, and rings
            gateway.ring = [TEARDOWN]

        gateway.during = more
        serve(made, gateway)
        kinds = [entry[1] if isinstance(entry, tuple) else entry for entry in gateway.log]
        assert kinds == [TEARDOWN.payload, "EOM", TrapKind.WRMSR, TEARDOWN.payload, "bell"]
        assert made.service.posts == 3
        assert made.partition.hypercalls.counters.messages == 2


async def test_messages_are_promised_while_the_guest_may_call_and_takes_its_answers(tmp_path: Path) -> None:
    with host(tmp_path) as made:
        gateway = Scripted([wrmsr(Msr.SIMP, 0)], [], [])
        serve(made, gateway)
        assert set(gateway.promises) == {0}, "EOM alone: a hypercall raises #UD"
        gateway.promises.clear()
        made.partition.guest_os_id, made.partition.hypercall_value = LINUX_6_1, 0x1001
        serve(made, gateway)
        assert gateway.promises == [MAX_UNDELIVERED]
        made.bus.outbox.undelivered = lambda target: MAX_UNDELIVERED - 3  # type: ignore[method-assign]
        serve(made, gateway)
        made.bus.outbox.undelivered = lambda target: MAX_UNDELIVERED + 3  # type: ignore[method-assign]
        serve(made, gateway)
        assert gateway.promises[1:] == [3, 0]
        gateway.carries = True  # a message that was answered elsewhere is repeated here
        serve(made, gateway)
        assert gateway.promises[3:] == [None]


@pytest.mark.parametrize("msr", [Msr.GUEST_OS_ID, Msr.HYPERCALL])
async def test_a_guest_that_ends_its_hypercalls_has_no_promise_when_it_continues(
    tmp_path: Path, msr: Msr
) -> None:
    with host(tmp_path) as made:
        made.partition.guest_os_id, made.partition.hypercall_value = LINUX_6_1, 0x1001
        gateway = Scripted([wrmsr(msr, 0)], [], [])
        gateway.promises = [64]
        serve(made, gateway)
        assert gateway.log == [("answer", TrapKind.WRMSR, [0])]


async def test_a_host_that_pauses_handles_what_was_posted_and_promises_nothing(tmp_path: Path) -> None:
    with host(tmp_path) as made:
        made.partition.guest_os_id, made.partition.hypercall_value = LINUX_6_1, 0x1001
        gateway = Scripted([wrmsr(Msr.SIMP, 0)], [], [])
        serve(made, gateway)
        gateway.ring, gateway.work, gateway.log = [TEARDOWN, EOM], [], []
        made.state.pause()
        assert gateway.log == [TEARDOWN.payload, "EOM"]
        assert gateway.promises[-1] is None
        serve(made, gateway)
        assert gateway.promises[-1] is None
        made.state.resume()
        gateway.work = [wrmsr(Msr.SIMP, 0)]
        serve(made, gateway)
        assert gateway.promises[-1] == MAX_UNDELIVERED


def test_a_paused_bus_keeps_a_message_that_has_its_result() -> None:
    guest = ScriptedGuest.on_fakes()
    guest.connect(Version.IRON)
    guest.bus.pause()
    assert guest.bus.acknowledgeable == 0
    guest.bus.handle_acknowledged(1, TEARDOWN.payload)
    assert [each.payload for each in guest.bus.save().inbox] == [TEARDOWN.payload]
    guest.bus.resume()
    assert guest.bus.save().inbox == ()
    assert guest.bus.refusals.counts == {"teardown-unknown-relid": 1}


def test_what_may_be_posted_has_at_most_one_answer() -> None:
    assert int(MessageType.REQUESTOFFERS) not in POSTED
    assert int(MessageType.INITIATE_CONTACT) not in POSTED and int(MessageType.UNLOAD) not in POSTED
