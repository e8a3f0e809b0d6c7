"""What the gateway does with each instruction, in the stand-in for QEMU."""

from __future__ import annotations

import ctypes
import os
import select
from collections.abc import Callable

import pytest
from vmbus.machine.gateway.traps import Fault
from vmbus.wire.cpuid import CpuidLeaf
from vmbus.wire.gateway import (
    DOORBELL_ENGINE,
    DOORBELL_RUNG,
    MSR_ADD_VCPU,
    ConstantMsr,
    DoorbellRule,
    TrapKind,
)

from tests.unit.gateway.gateway_harness import (
    CPUID,
    MSR,
    PC,
    RDMSR,
    VMCALL,
    VMMCALL,
    WRMSR,
    Harness,
    traps,
)

Launch = Callable[..., Harness]
ONES = 0xFFFFFFFFFFFFFFFF


# --- which instructions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bytes_", "name"),
    [
        ("0fa2", "cpuid"),
        ("0f32", "rdmsr"),
        ("0f30", "wrmsr"),
        ("0f01c1", "vmcall"),
        ("0f01d9", "vmcall"),
        ("480f32", "rdmsr"),  # REX.W
        ("66f30fa2", "cpuid"),
        ("2e650f30", "wrmsr"),
        ("480f01c1", "vmcall"),
        ("f30f01c1", "-"),  # another instruction
        ("660f01c1", "-"),
        ("f00fa2", "-"),  # LOCK makes it undefined
        ("0f31", "before"),
        ("0f01f9", "before"),
        ("0f01c8", "-"),
        ("0f0b", "-"),
        ("90", "-"),
        ("b80f320000", "-"),  # MOV EAX, 0x320F
        ("0fa3", "-"),
        ("0f", "-"),
    ],
)
def test_instructions_are_told_apart(harness: Harness, bytes_: str, name: str) -> None:
    harness.send(f"translate 1 0 1000 1000 {bytes_}")
    assert harness.expect("translated") == [name]


def test_the_block_behind_an_rdtsc_is_timed_too(harness: Harness) -> None:
    harness.send("translate 1 0 1000 1000 90 0f31")
    assert harness.expect("translated") == ["-", "before"]
    harness.send("translate 1 0 1003 1003 90 90")
    assert harness.expect("translated") == ["after", "-"]


def test_pages_of_the_first_and_last_byte_of_a_block_are_noted(harness: Harness) -> None:
    gateway = harness.active()
    harness.send("translate 1 0 3000 3000 90 90")
    harness.send("translate 1 0 5ffe 5ffe 90 b800000000")
    harness.expect("translated")
    harness.expect("translated")
    assert gateway.code_pages.test_and_clear(0, 16) == [3, 5, 6]
    assert gateway.code_pages.test_and_clear(0, 16) == []
    assert gateway.code_pages.test_and_clear(3, 1) == []


# --- CPUID ----------------------------------------------------------------------------------------------------


def test_cpuid_reads_the_table(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_cpuid([CpuidLeaf(0x40000000, 1, 2, 3, 4), CpuidLeaf(0x400000FF, 5, 6, 7, 8)])
    gateway.activate()
    done = harness.run(CPUID, rax=0x1234567840000000, rbx=ONES, rcx=ONES, rdx=ONES)
    assert done[:6] == ("stepped", PC + 3, 1, 2, 3, 4)
    assert harness.run(CPUID, rax=0x400000FF, cpl=3)[2:6] == (5, 6, 7, 8)
    assert harness.run(CPUID, rax=0x40000001, rcx=9)[2:6] == (0, 0, 0, 0)


@pytest.mark.parametrize("leaf", [0, 1, 0x3FFFFFFF, 0x40000100, 0x80000000])
def test_other_leaves_are_native(harness: Harness, leaf: int) -> None:
    harness.active()
    assert harness.run(CPUID, rax=leaf).how == "native"


def test_cpuid_outlives_the_emulator(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_cpuid([CpuidLeaf(0x40000000, 1, 2, 3, 4)])
    gateway.activate()
    gateway.close()
    assert harness.run(CPUID, rax=0x40000000).rax == 1


def test_cpuid_waits_while_the_table_is_being_written(harness: Harness) -> None:
    gateway = harness.active()
    sequence_at = 320 // 4
    gateway._words[sequence_at] |= 1  # a predecessor died while it wrote
    harness.start(CPUID, rax=0x40000000)
    gateway.set_cpuid([CpuidLeaf(0x40000000, 9)])
    assert harness.done().rax == 9
    assert gateway._words[sequence_at] % 2 == 0


# --- MSRs -----------------------------------------------------------------------------------------------------


def test_rdmsr_splits_its_value(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(RDMSR, rcx=0x9900000000 | MSR, rax=ONES, rdx=ONES)
    (trap,) = traps(gateway)
    assert (trap.kind, trap.msr, trap.long_mode, trap.pc) == (TrapKind.RDMSR, MSR, True, PC + 1)
    assert trap.tsc > 0
    gateway.answer(trap, 0x1122334455667788)
    assert harness.done()[:6] == ("stepped", PC + 3, 0x55667788, 0, 0x9900000000 | MSR, 0x11223344)


def test_wrmsr_changes_no_register(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(WRMSR, rcx=MSR, rax=0xA00000001, rdx=0xB00000002)
    (trap,) = traps(gateway)
    assert (trap.kind, trap.msr_value) == (TrapKind.WRMSR, 0x200000001)
    gateway.answer(trap)
    assert harness.done()[:6] == ("stepped", PC + 3, 0xA00000001, 0, MSR, 0xB00000002)


def test_constant_msrs_are_read_without_the_emulator(launch: Launch) -> None:
    harness = launch(vcpus=3)
    gateway = harness.attach()
    gateway.set_constant_msrs(
        [ConstantMsr(0x40000002, 5, MSR_ADD_VCPU), ConstantMsr(MSR, 0x1122334455667788)]
    )
    gateway.activate()
    done = harness.run(RDMSR, rcx=0x9900000000 | MSR, rax=ONES, rdx=ONES)
    assert done[:6] == ("stepped", PC + 3, 0x55667788, 0, 0x9900000000 | MSR, 0x11223344)
    assert harness.run(RDMSR, vcpu=2, rcx=0x40000002)[2:6] == (7, 0, 0x40000002, 0)
    assert harness.run(RDMSR, rcx=MSR, cpl=3).how == "native"
    gateway.close()
    assert harness.run(RDMSR, rcx=MSR).rax == 0x55667788
    assert gateway.closed


def test_a_write_of_a_constant_msr_and_a_read_of_another_are_requests(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_constant_msrs([ConstantMsr(MSR, 1)])
    gateway.activate()
    harness.start(WRMSR, rcx=MSR, rax=2)
    (trap,) = traps(gateway)
    gateway.answer_fault(trap, Fault.GP)
    assert harness.done().how == "fault"
    harness.start(RDMSR, rcx=MSR + 1)
    (trap,) = traps(gateway)
    gateway.answer(trap, 9)
    assert harness.done().rax == 9


@pytest.mark.parametrize("msr", [0x3FFFFFFF, 0x40000200, 0xC0000080, 0])
def test_other_msrs_are_native(harness: Harness, msr: int) -> None:
    harness.active()
    assert harness.run(RDMSR, rcx=msr).how == "native"
    assert harness.run(WRMSR, rcx=msr).how == "native"


@pytest.mark.parametrize("instruction", [RDMSR, WRMSR, VMCALL])
def test_user_code_runs_natively(harness: Harness, instruction: str) -> None:
    harness.active()
    assert harness.run(instruction, cpl=3, rcx=MSR).how == "native"


@pytest.mark.parametrize("instruction", [RDMSR, WRMSR])
def test_a_refused_msr_faults_with_rcx_as_it_was(harness: Harness, instruction: str) -> None:
    gateway = harness.active()
    harness.start(instruction, rcx=0x7700000000 | MSR, rax=5, rdx=6)
    (trap,) = traps(gateway)
    gateway.answer_fault(trap, Fault.GP)
    assert harness.done()[:6] == ("fault", PC, 5, 0, 0x7700000000 | MSR, 6)
    assert gateway.counters()[0]["faults"] == 1


# --- VMCALL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL])
def test_vmcall_of_64_bit_code_answers_in_rax(harness: Harness, instruction: str) -> None:
    gateway = harness.active()
    registers = {"rax": 1, "rbx": 2, "rcx": 3, "rdx": 4, "rsi": 5, "rdi": 6, "r8": 7, "rsp": 8}
    harness.start(instruction, **registers)
    (trap,) = traps(gateway)
    assert trap._asdict().items() >= registers.items()
    gateway.answer(trap, ONES - 1)
    assert harness.done()[:6] == ("stepped", PC + 4, ONES - 1, 2, 3, 4)


def test_vmcall_of_32_bit_code_answers_in_edx_eax(harness: Harness) -> None:
    gateway = harness.active()
    high = 0xEE00000000
    harness.start(VMCALL, bits=32, pc=0x1000, rax=high | 1, rbx=high | 2, rcx=high | 3, rdx=high | 4, r8=9)
    (trap,) = traps(gateway)
    assert (trap.long_mode, trap.rax, trap.rbx, trap.rcx, trap.rdx, trap.r8) == (False, 1, 2, 3, 4, 0)
    gateway.answer(trap, 0x1122334455667788)
    done = harness.done()
    assert (done.pc, done.rax, done.rdx) == (0x1004, 0x55667788, 0x11223344)


def test_a_refused_vmcall_runs_natively(harness: Harness) -> None:
    gateway = harness.active()
    harness.start(VMCALL, rcx=3)
    (trap,) = traps(gateway)
    gateway.answer_fault(trap, Fault.UD)
    assert harness.done()[:6] == ("native", PC, 0, 0, 3, 0)


# --- doorbells ------------------------------------------------------------------------------------------------

RULE = DoorbellRule(control=0x1005D, base=0x2000, count=16, first=100, result=0)


def test_a_doorbell_is_posted_while_the_emulator_works(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_doorbells([RULE])
    gateway.activate()
    done = harness.run(VMCALL, rcx=0x1005D, rdx=0x2003, rax=ONES)
    assert (done.how, done.rax, done.times) == ("stepped", 0, 1)
    harness.run(VMCALL, rcx=0x1005D, rdx=0x2003)
    harness.run(VMCALL, bits=32, pc=0x1000, rax=0x1005D, rdx=0, rbx=0, rcx=0x200F)
    assert gateway.doorbells() == [103, 115]
    assert gateway.doorbells() == []


def test_a_doorbell_wakes_a_sleeping_emulator_and_is_seen_before_it_sleeps(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_doorbells([RULE])
    gateway.activate()
    assert gateway.traps() == []
    assert not gateway.sleep_prepare()
    harness.start(VMCALL, rcx=0x1005D, rdx=0x2000)
    traps_seen: list[object] = []
    import select

    assert select.select([gateway.fileno()], [], [], 30)[0]
    gateway.awake()
    assert gateway.sleep_prepare()
    assert gateway.doorbells() == [100]
    assert not gateway.sleep_prepare()
    assert not traps_seen
    harness.done()


@pytest.mark.parametrize(
    ("control", "first_input"),
    [(0x1005C, 0x2000), (0x1005D, 0x1FFF), (0x1005D, 0x2010), (0x1005D, 1 << 63), (0x10001005D, 0x2000)],
)
def test_other_vmcalls_are_requests(harness: Harness, control: int, first_input: int) -> None:
    gateway = harness.attach()
    gateway.set_doorbells([RULE])
    gateway.activate()
    harness.start(VMCALL, rcx=control, rdx=first_input)
    (trap,) = traps(gateway)
    gateway.answer(trap, 1)
    assert harness.done().rax == 1
    assert gateway.doorbells() == []


def test_a_doorbell_of_the_engine_wakes_the_engine_and_nobody_else(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_doorbells([RULE])
    gateway.activate()
    event = gateway.engine_event()
    try:
        bell = ctypes.c_uint8.from_address(gateway.doorbell_address(101))
        waiting = ctypes.c_uint32.from_address(gateway.engine_waiting_address())
        bell.value = DOORBELL_ENGINE
        assert gateway.traps() == []
        assert not gateway.sleep_prepare()
        assert harness.run(VMCALL, rcx=RULE.control, rdx=RULE.base + 1).how == "stepped"
        assert bell.value == DOORBELL_ENGINE | DOORBELL_RUNG
        assert not select.select([event, gateway.fileno()], [], [], 0)[0]
        waiting.value = 1
        assert harness.run(VMCALL, rcx=RULE.control, rdx=RULE.base + 1).how == "stepped"
        assert select.select([event, gateway.fileno()], [], [], 30)[0] == [event]
        assert gateway.doorbells() == []
        assert harness.run(VMCALL, rcx=RULE.control, rdx=RULE.base).how == "stepped"
        assert select.select([gateway.fileno()], [], [], 30)[0]
        assert gateway.doorbells() == [100]
    finally:
        os.close(event)


def test_doorbells_of_an_engine_that_ended_are_the_next_emulators(harness: Harness) -> None:
    gateway = harness.attach()
    os.close(gateway.engine_event())
    gateway.set_doorbells([RULE])
    gateway.activate()
    for number, value in ((100, DOORBELL_ENGINE), (101, DOORBELL_ENGINE | DOORBELL_RUNG)):
        ctypes.c_uint8.from_address(gateway.doorbell_address(number)).value = value
    ctypes.c_uint32.from_address(gateway.engine_waiting_address()).value = 1
    gateway.close()
    again = harness.attach()
    again.set_doorbells([RULE])
    assert again.doorbells() == [100, 101]
    assert ctypes.c_uint32.from_address(again.engine_waiting_address()).value == 0
    os.close(again.engine_event())


def test_doorbells_rung_while_nobody_is_there_are_kept(harness: Harness) -> None:
    gateway = harness.attach()
    gateway.set_doorbells([RULE])
    gateway.activate()
    gateway.close()
    assert harness.run(VMCALL, rcx=0x1005D, rdx=0x2001).how == "stepped"
    assert harness.attach().doorbells() == [101]


# --- nobody there -----------------------------------------------------------------------------------------------


def test_with_wait_on_the_first_trap_waits_for_activation(harness: Harness) -> None:
    harness.start(CPUID, rax=0x40000000)
    gateway = harness.attach()
    gateway.set_cpuid([CpuidLeaf(0x40000000, 7)])
    harness.send("abandon 0")  # only an instruction that was tried, and has to be again, can be abandoned
    harness.expect("abandoned")
    harness.start(CPUID, rax=0x40000000)
    gateway.activate()
    assert harness.done().rax == 7


@pytest.mark.parametrize("instruction", [CPUID, RDMSR, WRMSR, VMCALL])
def test_with_wait_off_everything_is_native_until_the_first_activation(
    launch: Launch, instruction: str
) -> None:
    harness = launch(arguments=("wait=off",))
    assert harness.run(instruction, rax=0x40000000, rcx=MSR).how == "native"
    gateway = harness.attach()
    assert harness.run(instruction, rax=0x40000000, rcx=MSR).how == "native"
    gateway.activate()
    harness.start(instruction, rax=0x40000000, rcx=MSR)
    if instruction != CPUID:
        gateway.answer(traps(gateway)[0])
    assert harness.done().how == "stepped"


def test_a_gone_emulator_s_message_calls_get_their_status_after_the_limit(harness: Harness) -> None:
    gateway = harness.active()
    gateway.set_hold_timeout(0.02, {0x5C: 0x13})
    harness.start(VMCALL, rcx=0x5C)
    (trap,) = traps(gateway)
    gateway.close()
    done = harness.done()
    assert (done.how, done.rax) == ("stepped", 0x13)
    assert harness.run(VMCALL, bits=32, pc=0x1000, rax=0x5C).rax == 0x13
    harness.start(RDMSR, rcx=MSR)  # still held
    successor = harness.active()
    (held,) = traps(successor)  # and the call that was given up is not seen
    assert held.kind is TrapKind.RDMSR
    assert held.sequence > trap.sequence or held.slot != trap.slot
    successor.answer(held, 4)
    assert harness.done().rax == 4
    assert successor.counters()[0]["gone_results"] == 2


# --- interrupts and the clock -----------------------------------------------------------------------------------


def test_auto_eoi_ends_only_its_vectors_and_only_the_highest(harness: Harness) -> None:
    gateway = harness.active()
    harness.send("deliver 0 50")
    assert harness.expect("delivered") == ["0", "1"]
    gateway.set_auto_eoi(0, [0x40, 0xF3])
    harness.send("deliver 0 f3")
    assert harness.expect("delivered") == ["0", "1"]
    harness.send("deliver 0 40")  # below 0x50, which the guest has not ended
    assert harness.expect("delivered") == ["0", "2"]
    gateway.set_auto_eoi(0, [])
    harness.send("deliver 0 f3")
    assert harness.expect("delivered") == ["0", "3"]
    assert gateway.counters()[0]["auto_eois"] == 1


def test_an_apic_that_does_not_respond_is_reported_and_wakes_the_emulator(harness: Harness) -> None:
    gateway = harness.active()
    harness.send("x2apic 0")
    assert harness.expect("x2apic") == ["0"]
    harness.send("deliver 0 f3")
    assert harness.expect("delivered") == ["0", "1"]
    assert gateway.auto_eoi_failures(0) == 0, "nothing is to be ended"
    gateway.set_auto_eoi(0, [0xF3])
    assert gateway.traps() == [] and not gateway.sleep_prepare()
    harness.send("deliver 0 f3")
    assert harness.expect("delivered") == ["0", "1"]
    assert select.select([gateway.fileno()], [], [], 10)[0], "the emulator slept"
    assert gateway.auto_eoi_failures(0) == gateway.counters()[0]["auto_eoi_failures"] == 1
    assert gateway.counters()[0]["auto_eois"] == 0


def test_the_tsc_offset_is_found_in_64_samples_and_then_costs_nothing(harness: Harness) -> None:
    gateway = harness.active()
    assert gateway.clock.guest_tsc_now() is None
    harness.send("resume 0")
    harness.send(f"rdtsc 0 {10**9:x} 1000")
    harness.expect("resumed")
    assert harness.expect("read") == ["0", "65"]  # the 65th finds that there are enough
    assert gateway.clock.samples == 64
    assert abs(gateway.clock.fields()[3] - 10**9) < 10**6
    assert gateway.clock.guest_tsc_now() is not None
    gateway.clock.arm()
    assert gateway.clock.guest_tsc_now() is None
    harness.send("resume 0")
    harness.send(f"rdtsc 0 {2 * 10**9:x} 3")
    harness.expect("resumed")
    harness.expect("read")
    assert gateway.clock.samples == 3
    assert abs(gateway.clock.fields()[3] - 2 * 10**9) < 10**6


def test_an_offset_that_changes_while_sampling_begins_anew(harness: Harness) -> None:
    gateway = harness.active()
    harness.send("resume 0")
    harness.send(f"rdtsc 0 {10**9:x} 10")
    harness.send(f"rdtsc 0 {3 * 10**9:x} 10")
    harness.send(f"rdtsc 0 {10**6:x} 10")
    for word in ("resumed", "read", "read", "read"):
        harness.expect(word)
    assert gateway.clock.samples == 10
    assert abs(gateway.clock.fields()[3] - 10**6) < 10**5
