"""Attaching, requests over their whole life, taking over, and what outlives whom."""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from vmbus.errors import GatewayError, InternalError
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.tables import Tables
from vmbus.machine.gateway.traps import Fault, Trap
from vmbus.wire import gateway as wire
from vmbus.wire.cpuid import CpuidLeaf
from vmbus.wire.gateway import DoorbellRule

from tests.unit.gateway.gateway_harness import MSR, RDMSR, VMCALL, WRMSR, Harness, traps, work

Launch = Callable[..., Harness]


# --- attaching ------------------------------------------------------------------------------------------------


def test_no_gateway_says_how_to_start_qemu(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="-plugin"):
        Gateway.attach(tmp_path / "nothing")


def test_the_socket_is_private_and_goes_with_the_process(harness: Harness) -> None:
    assert stat.S_IMODE(harness.socket.stat().st_mode) == 0o600
    harness.quit()
    harness.process.wait(30)
    assert not harness.socket.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(launch: Launch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "gateway.sock"))
    launch()
    with pytest.raises(AssertionError, match="expected 'ready'"):
        launch()


@pytest.mark.parametrize("argument", ["wait=maybe", "colour=red", "ram-limit=0", "ram-limit=x", "socket="])
def test_wrong_arguments_are_refused(harness_program: Path, tmp_path: Path, argument: str) -> None:
    with pytest.raises(AssertionError, match="expected 'ready'"):
        Harness(harness_program, tmp_path, arguments=(argument,))


def test_a_second_emulator_is_refused_with_the_first_s_process_id(harness: Harness) -> None:
    first = harness.active()
    with pytest.raises(GatewayError, match=r"process \d+.*--take-over"):
        Gateway.attach(harness.socket)
    assert not first.closed
    assert first.traps() == []


def test_taking_over_wakes_and_ends_the_first(harness: Harness) -> None:
    first = harness.active()
    assert first.traps() == []
    assert not first.sleep_prepare()
    second = harness.attach(takeover=True)
    assert select.select([first.fileno()], [], [], 30)[0]
    assert first.closed
    with pytest.raises(GatewayError, match="taken over"):
        first.traps()
    second.activate()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(second)
    second.answer(trap, 6)
    assert harness.done().rax == 6


def test_an_emulator_that_was_sent_away_answers_nothing_any_more(harness: Harness) -> None:
    first = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (seen_by_first,) = traps(first)
    second = harness.attach(takeover=True)
    (seen_by_second,) = traps(second)
    first.answer(seen_by_first, 1)
    second.answer(seen_by_second, 2)
    assert harness.done().rax == 2


def test_closed_is_seen_when_the_other_side_ends(harness: Harness) -> None:
    gateway = harness.active()
    assert not gateway.closed
    harness.quit()
    assert select.select([gateway.connection_fileno()], [], [], 30)[0]
    assert gateway.closed
    gateway.close()
    assert gateway.closed
    gateway.close()


@pytest.mark.parametrize(
    "bytes_",
    [
        b"\0" * 16,
        b"GET / HTTP/1.1\r\n\r\n",
        wire.MESSAGE.build(wire.Message(wire.MessageType.ACTIVATE)),  # before HELLO
        wire.MESSAGE.build(wire.Message(wire.MessageType.JOURNAL)),
        wire.MESSAGE.build(wire.Message(99)),
    ],
)
def test_nonsense_on_the_socket_is_hung_up_on(harness: Harness, bytes_: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(30)
        stranger.connect(str(harness.socket))
        stranger.sendall(bytes_)
        with suppress(ConnectionResetError):  # bytes behind the first message were not read
            assert stranger.recv(100) == b""
    assert not harness.active().closed


def test_another_version_is_told_ours(harness: Harness) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(30)
        stranger.connect(str(harness.socket))
        stranger.sendall(wire.MESSAGE.build(wire.Message(wire.MessageType.HELLO, version=99)))
        reply = wire.REPLY.parse(stranger.recv(100))
    assert (reply.status, reply.version) == (wire.Status.VERSION, wire.VERSION)


def test_silent_connections_do_not_keep_an_emulator_out(harness: Harness) -> None:
    silent = []
    for _ in range(20):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(str(harness.socket))
        connection.send(b"V")
        silent.append(connection)
    assert not harness.active().closed
    for connection in silent:
        connection.close()


# --- requests -------------------------------------------------------------------------------------------------


def test_a_held_trap_is_retried_and_handed_out_once(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(gateway)
    deadline = time.monotonic() + 30
    while gateway.counters()[0]["retries"] < 3:
        assert gateway.traps() == []
        assert time.monotonic() < deadline
    gateway.answer(trap, 1)
    done = harness.done()
    assert done.rax == 1
    assert done.times >= 4
    assert gateway.counters()[0]["requests"] == 1


def test_a_trap_of_an_interrupt_handler_gets_a_slot_of_its_own(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(VMCALL, rcx=1)
    (outer,) = traps(gateway)
    harness.start(VMCALL, rcx=1, rsp=0x100)  # the same call in a handler
    (inner,) = traps(gateway)
    assert inner.slot != outer.slot
    gateway.answer(outer, 10)
    gateway.answer(inner, 20)
    assert harness.done().rax == 20
    assert harness.done().rax == 10


def test_slots_that_nobody_comes_back_for_are_reused_once_answered(harness: Harness) -> None:
    gateway = harness.active()
    for number in range(3 * wire.SLOTS):
        harness.start(RDMSR, rcx=MSR, rbx=number)
        (trap,) = traps(gateway)
        harness.send("abandon 0")
        harness.expect("abandoned")
        gateway.answer(trap, number)
    assert len(gateway.unclaimed()) == wire.SLOTS
    harness.start(RDMSR, rcx=MSR, rbx=3 * wire.SLOTS - 1)  # comes back after all
    assert harness.done().rax == 3 * wire.SLOTS - 1


def test_with_all_slots_pending_a_trap_waits_for_one(harness: Harness) -> None:
    gateway = harness.active()
    held = []
    for number in range(wire.SLOTS):
        harness.start(RDMSR, rcx=MSR, rbx=number)
        held += traps(gateway)
        harness.send("abandon 0")
        harness.expect("abandoned")
    harness.start(RDMSR, rcx=MSR, rbx=100)
    deadline = time.monotonic() + 30
    while not gateway.counters()[0]["no_slot"]:
        assert gateway.traps() == []
        assert time.monotonic() < deadline
    gateway.answer(held[3], 3)
    (trap,) = traps(gateway)
    assert (trap.rbx, trap.slot) == (100, held[3].slot)
    gateway.answer(trap, 5)
    assert harness.done().rax == 5


def test_forgotten_requests_are_asked_anew_by_who_comes_back(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(WRMSR, rcx=MSR, rax=1)
    (trap,) = traps(gateway)
    gateway.forget_requests()
    (again,) = traps(gateway)
    gateway.answer(trap, 1)  # ignored: it was forgotten
    assert again.identity == trap.identity
    gateway.answer(again)
    assert harness.done().how == "stepped"
    assert gateway.unclaimed() == []


def test_an_answer_given_twice_is_our_bug(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(gateway)
    harness.send("abandon 0")
    harness.expect("abandoned")
    gateway.answer(trap, 1)
    with pytest.raises(InternalError, match="twice"):
        gateway.answer(trap, 1)


def test_a_fault_that_the_instruction_cannot_raise_is_our_bug(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (trap,) = traps(gateway)
    with pytest.raises(InternalError, match="UD"):
        gateway.answer_fault(trap, Fault.UD)
    gateway.answer(trap)
    harness.done()


def test_a_trap_of_unknown_kind_is_the_gateway_s_fault(harness: Harness) -> None:
    gateway = harness.active()
    assert gateway.traps() == []
    harness.start(RDMSR, rcx=MSR)
    while not gateway.sleep_prepare():  # until there is a trap, which stays unread
        assert select.select([gateway], [], [], 30)[0]
        gateway.awake()
    gateway._region[gateway._slot_at[0]] = 0x77
    with pytest.raises(GatewayError, match="unknown kind"):
        gateway.traps()


def test_tables_have_limits() -> None:
    gateway = Gateway.__new__(Gateway)
    gateway._tables = Tables.__new__(Tables)
    with pytest.raises(InternalError, match="33 entries"):
        gateway.set_cpuid([CpuidLeaf(0x40000000 + leaf) for leaf in range(33)])
    with pytest.raises(InternalError, match="doorbell numbers"):
        gateway.set_doorbells([DoorbellRule(0x1005D, 0, count=2, first=wire.DOORBELLS - 1)])


# --- one emulator after the other -------------------------------------------------------------------------------


def test_pending_requests_are_seen_by_the_successor_and_answered_ones_are_not(launch: Launch) -> None:
    harness = launch(vcpus=3)
    first = harness.active()
    for vcpu in range(3):
        harness.start(RDMSR, vcpu, rcx=MSR, rbx=vcpu)
    held = sorted(traps(first, 3))
    first.answer(held[1], 0x11)
    first.close()
    assert harness.done().rax == 0x11
    second = harness.active()
    pending = sorted(traps(second, 2))
    assert [trap.vcpu for trap in pending] == [0, 2]
    for trap in pending:
        second.answer(trap, 0x20 + trap.vcpu)
    assert {harness.done().rax, harness.done().rax} == {0x20, 0x22}


def test_a_trap_made_while_nobody_is_there_waits(harness: Harness) -> None:
    harness.active().close()
    harness.start(RDMSR, rcx=MSR)
    successor = harness.attach()
    (trap,) = traps(successor)
    successor.answer(trap, 8)  # attached is enough once the guest knows a hypervisor
    assert harness.done().rax == 8


def test_answers_that_were_not_fetched_are_carried_to_another_gateway(launch: Launch, tmp_path: Path) -> None:
    source = launch()
    gateway = source.active()
    source.start(VMCALL, rcx=0x5C, rdx=0x1000)
    (trap,) = traps(gateway)
    source.send("abandon 0")  # stopped for the migration
    source.expect("abandoned")
    gateway.answer(trap, 0x55)
    (carried,) = gateway.unclaimed()
    gateway.close()
    source.quit()
    source.process.wait(30)

    target = launch()
    successor = target.attach()
    successor.carry([carried])
    successor.activate()
    assert successor.unclaimed() == [carried]
    target.start(VMCALL, rcx=0x5C, rdx=0x2000)  # another one is a request
    (other,) = traps(successor)
    successor.answer(other, 1)
    assert target.done().rax == 1
    target.start(VMCALL, rcx=0x5C, rdx=0x1000)
    seen: list[Trap] = []
    work(successor, until=lambda: not target.silent(), answer=seen.append)
    assert (target.done().rax, seen) == (0x55, [])
    target.start(VMCALL, rcx=0x5C, rdx=0x1000)  # only once
    assert len(traps(successor)) == 1
    target.send("abandon 0")
    target.expect("abandoned")


# --- many at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spin", [0, 20_000])
def test_many_vcpus_at_once_get_their_own_answers(launch: Launch, spin: int) -> None:
    vcpus, count = 4, 500
    harness = launch(vcpus=vcpus)
    gateway = harness.active()
    gateway.set_spin(spin)
    for vcpu in range(vcpus):
        harness.send(f"storm {vcpu} {count}")
    finished: dict[str, int] = {}

    def finish() -> bool:
        while not harness.silent():
            vcpu, total = harness.expect("stormed")
            finished[vcpu] = int(total, 16)
        return len(finished) == vcpus

    work(gateway, until=finish, answer=lambda trap: gateway.answer(trap, trap.msr << 8 | trap.vcpu))
    msrs = sum(0x40000000 + index % 0x200 for index in range(count))
    assert finished == {str(vcpu): (msrs << 8) + count * vcpu for vcpu in range(vcpus)}
    assert [counters["requests"] for counters in gateway.counters()] == [count] * vcpus
    assert gateway.vcpus == vcpus


# --- in another process ---------------------------------------------------------------------------------------


def adopted(gateway: Gateway, harness: Harness) -> Gateway:
    """The same attachment, as another process gets it."""
    return Gateway.adopt([os.dup(each) for each in gateway.descriptors()], gateway.size, harness.socket)


def test_an_attachment_goes_on_elsewhere_with_what_is_not_answered(harness: Harness) -> None:
    first = harness.active()
    harness.start(RDMSR, rcx=MSR)
    (seen,) = traps(first)
    second = adopted(first, harness)
    assert not second.closed
    second.take()
    first.close()
    assert not second.closed
    (trap,) = second.traps()
    assert trap == seen
    second.answer(trap, 4)
    assert harness.done().rax == 4
    # The gateway has noticed nothing: nobody has to activate it, and a wake-up comes.
    assert not second.sleep_prepare()
    harness.start(RDMSR, rcx=MSR)
    assert select.select([second.fileno()], [], [], 30)[0]
    second.awake()
    (trap,) = traps(second)
    second.answer(trap, 5)
    assert harness.done().rax == 5
    second.close()


def test_until_it_is_taken_an_adopted_attachment_changes_nothing(harness: Harness) -> None:
    first = harness.active()
    assert first.traps() == []
    assert not first.sleep_prepare()
    second = adopted(first, harness)
    event = second.engine_event()
    os.eventfd_write(event, 1)  # a descriptor of its own, which the gateway does not know
    os.close(event)
    assert second.engine_waiting_address() != first.engine_waiting_address()
    second.close()
    harness.start(RDMSR, rcx=MSR)
    assert select.select([first.fileno()], [], [], 30)[0], "the first one is still to be woken"
    (trap,) = traps(first)
    first.answer(trap, 7)
    assert harness.done().rax == 7


def test_a_region_of_another_size_is_refused_and_the_descriptors_are_closed(harness: Harness) -> None:
    first = harness.active()
    descriptors = [os.dup(each) for each in first.descriptors()]
    with pytest.raises(GatewayError, match="bytes of shared memory"):
        Gateway.adopt(descriptors, first.size + 8, harness.socket)
    for each in descriptors:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(each)
    assert not first.closed
