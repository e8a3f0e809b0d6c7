"""In a real QEMU: emulators that come and go, and a guest that waits for one."""

from __future__ import annotations

import statistics
import time

import pytest
from vmbus.errors import GatewayError
from vmbus.machine.gateway.client import Gateway

from tests.qemu.gateway_guests import HELD, Start, active, predecessor, refuse, start
from tests.qemu.machine_under_test import LIMIT, next_trap, serve

__all__ = ["start"]
pytestmark = pytest.mark.qemu

WITHOUT_TRAPS = """
main:
    jmp main
"""
WAITS_FOR_AN_EMULATOR = """
main:
    mov $0x40000000, %eax
    cpuid
    jmp done
"""


@pytest.mark.parametrize("attached", [False, True])
def test_stop_and_reset_and_quit_are_prompt_while_a_trap_is_held(start: Start, attached: bool) -> None:
    """As prompt as for a guest without traps, that is: how long this takes is a matter of the machine."""
    held: list[float] = []
    free: list[float] = []
    for number in range(5 if attached else 12):
        for program, times in ((HELD if attached else WAITS_FOR_AN_EMULATOR, held), (WITHOUT_TRAPS, free)):
            with start(program) as machine:
                if attached and times is held:
                    next_trap(active(machine))
                else:
                    machine.qmp("query-status")
                    time.sleep(0.02 * number)  # firmware, boot loader, guest
                # A vCPU that cannot leave a trap keeps a command waiting for ever: for longer than LIMIT.
                commands = ("stop", "cont", "system_reset", "stop", "quit")
                times.append(sum(machine.qmp(command) for command in commands))
                machine.process.wait(LIMIT)
                (machine.socket.parent / "console").unlink(missing_ok=True)
    assert statistics.median(held) < 20 * statistics.median(free), (held, free)


def test_a_reset_forgets_the_request_and_the_guest_asks_anew(start: Start) -> None:
    with start(HELD) as machine:
        gateway = active(machine)
        first = next_trap(gateway)
        machine.qmp("system_reset")
        gateway.forget_requests()
        gateway.answer(first, 1)  # too late: nothing happens
        second = next_trap(gateway)
        gateway.answer(second, 2)
        assert machine.output() == [2]


def test_without_an_emulator_and_without_waiting_there_is_no_hypervisor_of_ours(start: Start) -> None:
    program = """
    main:
        mov $0x40000000, %eax
        cpuid
        mov %rbx, %rax
        call hex
        mov $0x40000020, %ecx
        rdmsr
        mov $1f, %r12
        vmcall
    1:  mov %r13, %rax
        call hex
        jmp done
    """
    with start(program, wait="off") as machine:
        assert machine.output() == [int.from_bytes(b"TCGT", "little"), 6]


_PREDECESSOR = """
import sys, time
from tests.qemu.machine_under_test import next_trap
from vmbus.machine.gateway.client import Gateway
gateway = Gateway.attach(sys.argv[1])
gateway.activate()
print(next_trap(gateway).msr, flush=True)
time.sleep(1000)
"""


def test_an_emulator_that_is_killed_is_replaced_and_the_guest_goes_on(start: Start) -> None:
    with start(HELD) as machine:
        with predecessor(machine, _PREDECESSOR) as (process, msr):
            assert msr == 0x40000020
            with pytest.raises(GatewayError, match=f"process {process}"):
                Gateway.attach(machine.socket)
        gateway = machine.attach()
        trap = next_trap(gateway)
        gateway.answer(trap, 0x77)
        serve(gateway, refuse)
        assert machine.output() == [0x77]


def test_taking_over_sends_the_other_away(start: Start) -> None:
    with start(HELD) as machine:
        first = active(machine)
        next_trap(first)
        second = machine.attach(takeover=True)
        assert first.closed
        with pytest.raises(GatewayError, match="taken over"):
            first.traps()
        first.close()
        trap = next_trap(second)
        second.answer(trap, 3)
        assert machine.output() == [3]


def test_after_the_hold_limit_a_message_hypercall_gets_its_status(start: Start) -> None:
    program = """
    main:
        mov $0x40000020, %ecx
        rdmsr
        mov $0x5c, %ecx
        vmcall
        call hex
        mov $0x5d, %ecx
        vmcall
        call hex
        jmp done
    """
    with start(program) as machine:
        gateway = active(machine)
        gateway.set_hold_timeout(0.1, {0x5C: 0x13})
        gateway.answer(next_trap(gateway), 0)
        next_trap(gateway)  # the message is left unanswered
        gateway.close()
        machine.prints([0x13])
        successor = machine.attach()
        trap = next_trap(successor)
        assert trap.rcx == 0x5D
        successor.answer(trap, 0x44)
        assert machine.output() == [0x13, 0x44]
