"""The trap gateway in a real QEMU, with guests of a few instructions."""

from __future__ import annotations

import time

import pytest
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import Fault, Trap
from vmbus.wire.gateway import DoorbellRule, PostRule, RamRange, TrapKind

from tests.qemu.gateway_guests import HELD, Start, active, refuse, start
from tests.qemu.machine_under_test import next_trap, serve

__all__ = ["start"]
pytestmark = pytest.mark.qemu


# --- the four instructions ---


def test_cpuid_comes_from_the_table_and_only_in_its_range(start: Start) -> None:
    program = """
    main:
        xor %ecx, %ecx
        mov $0x80000000, %eax   /* native; two and more in one block */
        cpuid
        mov $0x40000000, %eax
        mov $7, %ecx
        cpuid
        call hex
        mov %rbx, %rax
        call hex
        mov %rcx, %rax
        call hex
        mov %rdx, %rax
        call hex
        mov $0x400000ff, %eax
        cpuid
        or %rbx, %rax
        or %rcx, %rax
        or %rdx, %rax
        call hex
        mov $0x40000100, %eax
        mov %eax, %esi
        cpuid
        mov $0x4000000040000001, %rax   /* only EAX counts; prefixes do not */
        .byte 0x3e, 0x48, 0x0f, 0xa2
        call hex
        jmp done
    """
    with start(program) as machine:
        serve(active(machine), refuse)
        assert machine.output() == [0x40000001, 0x11, 0x22, 0x33, 0, 0xA]


def test_msrs_reach_the_emulator(start: Start) -> None:
    program = """
    main:
        mov $-1, %rax
        mov $-1, %rdx
        mov $0x40000020, %ecx
        rdmsr
        call hex
        mov %rdx, %rax
        call hex
        mov $0xfeedfacecafebabe, %rax
        mov $0x0123456789abcdef, %rdx
        mov $0x40000021, %ecx
        wrmsr
        call hex
        mov $0xc0000080, %ecx     /* EFER is none of the emulator's */
        rdmsr
        call hex
        jmp done
    """
    seen: list[tuple[TrapKind, int, int]] = []

    with start(program) as machine:
        gateway = active(machine)

        def answer(trap: Trap) -> None:
            seen.append((trap.kind, trap.msr, trap.msr_value if trap.kind is TrapKind.WRMSR else 0))
            assert trap.long_mode
            gateway.answer(trap, 0x1122334455667788)

        serve(gateway, answer)
        output = machine.output()
        assert output[:3] == [0x55667788, 0x11223344, 0xFEEDFACECAFEBABE]
        assert output[3] & 0x500 == 0x500
    assert seen == [(TrapKind.RDMSR, 0x40000020, 0), (TrapKind.WRMSR, 0x40000021, 0x89ABCDEFCAFEBABE)]


def test_vmcall_in_64_bit_code_and_in_32_bit_code_of_a_64_bit_guest(start: Start) -> None:
    program = """
    main:
        mov $0x1111111111111111, %rcx
        mov $0x2222222222222222, %rdx
        mov $0x3333333333333333, %r8
        vmcall
        call hex
        mov %rdx, %rax
        call hex
        mov $0x4444444444444444, %rbx
        mov $0x5555555566666666, %rax
        push $24
        push $1f
        lretq
        .code32
    1:  vmcall
        ljmp $8, $2f
        .code64
    2:  call hex
        mov %rdx, %rax
        call hex
        jmp done
    """
    seen: list[Trap] = []
    with start(program) as machine:
        gateway = active(machine)

        def answer(trap: Trap) -> None:
            seen.append(trap)
            gateway.answer(trap, 0x9988776655443322)

        serve(gateway, answer)
        assert machine.output() == [0x9988776655443322, 0x2222222222222222, 0x55443322, 0x99887766]
    long, compatible = seen
    assert (long.rcx, long.rdx, long.r8) == (0x1111111111111111, 0x2222222222222222, 0x3333333333333333)
    assert long.long_mode and not compatible.long_mode
    assert (compatible.rax, compatible.rbx, compatible.r8) == (0x66666666, 0x44444444, 0)


def test_32_bit_guest_with_a_segment_base_that_is_no_page(start: Start) -> None:
    program = """
        .set NEAR, 0x777
    main:
        ljmp $24, $(1f - NEAR)
    1:  nop
        rdtsc                /* ends a block, and moves what the program counter reads as */
        nop
        mov $0x40000001, %eax
        cpuid
        mov $0x40000001, %eax
        cpuid
        mov %ebx, %edi
        mov $0x01234567, %edx
        mov $0x89abcdef, %eax
        mov $0x40000002, %ecx
        rdmsr
        mov %eax, %esi
        vmcall
        ljmp $8, $2f
    2:  call hex
        mov %edx, %eax
        call hex
        mov %edi, %eax
        call hex
        mov %esi, %eax
        call hex
        jmp done
    """
    with start(program, bits=32) as machine:
        gateway = active(machine)
        serve(gateway, lambda trap: gateway.answer(trap, trap.kind << 32 | 0x7000 + trap.kind))
        assert machine.output() == [0x7004, 4, 0xB, 0x7002]


def test_faults_leave_registers_as_they_were(start: Start) -> None:
    program = """
    main:
        mov $1f, %r12
        mov $0xabcd40000123, %rcx
        rdmsr
    1:  call fault
        mov $1f, %r12
        mov $0x40000124, %ecx
        wrmsr
    1:  call fault
        mov $1f, %r12
        mov $0x77, %ecx
        vmcall
    1:  call fault
        mov $0x40000125, %ecx
        rdmsr
        call hex
        jmp done
    fault:
        mov %r13, %rax
        call hex
        mov %r14, %rax
        call hex
        ret
    """
    with start(program) as machine:
        gateway = active(machine)

        def answer(trap: Trap) -> None:
            if trap.rcx & 0xFFFFFFFF == 0x40000125:
                gateway.answer(trap, 5)
            else:
                gateway.answer_fault(trap, Fault.UD if trap.kind is TrapKind.VMCALL else Fault.GP)

        serve(gateway, answer)
        assert machine.output() == [13, 0xABCD40000123, 13, 0x40000124, 6, 0x77, 5]


def test_user_code_faults_natively(start: Start) -> None:
    program = """
    main:
        mov $1f, %r12
        mov $user, %rax
        pushq $35
        pushq $0x2e0000
        pushq $2
        pushq $43
        push %rax
        iretq
    1:  mov %r13, %rax
        call hex
        mov $1f, %r12
        mov $user2, %rax
        pushq $35
        pushq $0x2e0000
        pushq $2
        pushq $43
        push %rax
        iretq
    1:  mov %r13, %rax
        call hex
        mov %r14, %rax
        call hex
        jmp done
    user:
        mov $0x40000020, %ecx
        rdmsr
    user2:
        mov $0x40000000, %eax
        cpuid
        vmcall
    """
    with start(program) as machine:
        serve(active(machine), refuse)
        assert machine.output() == [13, 6, 0x22]


@pytest.mark.parametrize("threads", ["multi", "single"])
def test_two_vcpus_one_of_them_in_real_mode(start: Start, threads: str) -> None:
    program = """
    main:
        lea other(%rip), %rsi
        mov $0x8000, %edi
        mov $(other_end - other), %ecx
        rep movsb
        movl $0, 0x9000
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        movl $0xc4500, 0x300(%rbx)       /* INIT to all others */
        mov $10000000, %ecx
    1:  dec %ecx
        jnz 1b
        movl $0xc4608, 0x300(%rbx)       /* start at 0x8000 */
        mov $100, %ebp
        xor %esi, %esi
    2:  mov $0x40000020, %ecx
        rdmsr
        add %eax, %esi
        dec %ebp
        jnz 2b
    3:  pause
        cmpl $100, 0x9000
        jne 3b
        mov %esi, %eax
        call hex
        mov 0x9004, %eax
        call hex
        jmp done
        .code16
    other:
        xor %ax, %ax
        mov %ax, %ds
        mov $100, %bp
        xor %esi, %esi
    1:  mov $0x40000021, %ecx
        rdmsr
        add %eax, %esi
        mov %esi, 0x9004
        incl 0x9000
        dec %bp
        jnz 1b
    2:  hlt
        jmp 2b
    other_end:
        .code64
    """
    with start(program, options=("-smp", "2", "-accel", f"tcg,thread={threads}")) as machine:
        gateway = active(machine)
        serve(gateway, lambda trap: gateway.answer(trap, (trap.msr - 0x40000020) * 1000 + trap.vcpu * 10))
        assert machine.output() == [0, 101_000]
        assert gateway.vcpus == 2


# --- posts ---


@pytest.mark.parametrize("bits", [64, 32])
def test_messages_are_posted_in_order_until_the_ring_is_full(start: Start, bits: int) -> None:
    """The guest posts 100 messages numbered in their second word, and an EOM after each; then one from no RAM."""
    registers = (
        "mov $0x5c, %ecx\nmov $message, %edx\nxor %r8d, %r8d"
        if bits == 64
        else "mov $0x5c, %eax\nxor %edx, %edx\nxor %ebx, %ebx\nmov $message, %ecx"
    )
    program = f"""
    main:
        xor %ebp, %ebp
    1:  mov %ebp, message + 20
        mov %ebp, %esi
        {registers}
        vmcall
        or %eax, result
        mov $0x40000084, %ecx
        wrmsr
        inc %ebp
        cmp $100, %ebp
        jb 1b
        mov result, %eax
        call hex
        {registers.replace("$message", "$0xfee00300")}
        vmcall
        call hex
        jmp done
        .balign 256
    message: .long 1, 0, 1, 16, 8, 0, 0x11, 0x22
        .skip 224
    result: .long 0
    """
    with start(program, bits=bits) as machine:
        gateway = machine.attach()
        gateway.set_posts(PostRule(0x5C, 1 << 8, 1 << 1, 0x40000084), [RamRange(1 << 20, 63 << 20)])
        gateway.posts.promise(200)
        gateway.activate()
        numbers: list[int] = []
        eoms = 0

        def handle() -> None:
            nonlocal eoms
            for post in gateway.posts.take():
                if post.kind is TrapKind.VMCALL:
                    assert (post.vcpu, post.connection_id, len(post.payload)) == (0, 1, 16)
                    assert post.payload[8:] == bytes.fromhex("1100000022000000")
                    numbers.append(int.from_bytes(post.payload[4:8], "little"))
                else:
                    eoms += 1

        def answer(trap: Trap) -> None:
            nonlocal eoms
            handle()
            if trap.kind is TrapKind.WRMSR:
                eoms += 1
            elif trap.rdx == 0xFEE00300 or trap.rcx == 0xFEE00300:
                gateway.answer(trap, 3)
                return
            else:
                numbers.append(trap.rsi)
            gateway.answer(trap, 0)
            gateway.posts.promise(200)

        serve(gateway, answer)
        handle()
        assert machine.output() == [0, 3]
        assert numbers == list(range(100))
        assert eoms == 100
        counters = gateway.counters()[0]
        assert counters["posts"] + counters["requests"] == 201
        assert counters["posts"] >= 64 and counters["posts_held"] >= 1


# --- doorbells ---


def test_doorbells_are_posted_and_do_not_wait(start: Start) -> None:
    program = """
    main:
        mov $0x1005d, %ecx
        mov $0x2003, %edx
        mov $-1, %rax
        vmcall
        call hex
        mov $0x2010, %edx        /* the first that is no doorbell */
        vmcall
        call hex
        mov $0x40000020, %ecx
        rdmsr
        mov $0x1005d, %ecx
        mov $0x2000, %edx
        vmcall
        jmp done
    """
    with start(program) as machine:
        gateway = machine.attach()
        gateway.set_doorbells([DoorbellRule(0x1005D, 0x2000, 0x10, 0x100, 0)])
        gateway.activate()
        kinds: list[TrapKind] = []

        def answer(trap: Trap) -> None:
            kinds.append(trap.kind)
            gateway.answer(trap, 0x12)

        rung = serve(gateway, answer)
        assert machine.output() == [0, 0x12]
        assert sorted(rung) == [0x100, 0x103]
        assert kinds == [TrapKind.VMCALL, TrapKind.RDMSR]
        assert gateway.counters()[0]["doorbells"] == 2


def test_doorbells_of_a_32_bit_guest_wake_a_sleeping_emulator_and_outlive_it(start: Start) -> None:
    program = """
    main:
        mov $0x1005d, %eax
        xor %edx, %edx
        xor %ebx, %ebx
        mov $0x2005, %ecx
        vmcall
        mov $0x40000020, %ecx
        rdmsr
        mov $0x1005d, %eax
        xor %edx, %edx
        mov $0x2006, %ecx
        vmcall
        mov $0x40000021, %ecx
        rdmsr
        jmp done
    """
    with start(program, bits=32) as machine:
        gateway = machine.attach()
        gateway.set_doorbells([DoorbellRule(0x1005D, 0x2000, 0x10, 0, 0)])
        gateway.activate()
        rung: list[int] = []
        trap = next_trap_and_doorbells(gateway, rung)
        assert rung == [5]
        gateway.answer(trap, 0)
        gateway.close()  # the second doorbell rings while no emulator is attached
        time.sleep(0.1)
        successor = machine.attach()
        assert next_trap_and_doorbells(successor, rung).msr == 0x40000021
        assert rung == [5, 6]


def next_trap_and_doorbells(gateway: Gateway, rung: list[int]) -> Trap:
    found: list[Trap] = []
    rung += serve(gateway, found.append, until=lambda: bool(found))
    return found[0]


# --- interrupts ---


def test_a_trap_in_an_interrupt_handler_while_another_is_held(start: Start) -> None:
    program = """
    main:
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)          /* APIC on */
        movl $0x0000000b, 0x3e0(%rbx)    /* timer: divide by 1, one shot, vector 0x40 */
        movl $0x40, 0x320(%rbx)
        movl $100000000, 0x380(%rbx)     /* 100 ms */
        sti
        mov $0x11, %ecx
        vmcall
        call hex
        jmp done
    irq40:
        push %rax
        push %rcx
        push %rdx
        mov $0x40000020, %ecx
        rdmsr
        call hex
        mov $0xfee00000, %ecx
        movl $0, 0xb0(%rcx)
        pop %rdx
        pop %rcx
        pop %rax
        iretq
    """
    with start(program) as machine:
        gateway = active(machine)
        outer = next_trap(gateway)
        inner = next_trap(gateway)
        assert (outer.kind, inner.kind) == (TrapKind.VMCALL, TrapKind.RDMSR)
        assert outer.slot != inner.slot
        gateway.answer(inner, 0xAA)
        gateway.answer(outer, 0xBB)
        serve(gateway, refuse)
        assert machine.output() == [0xAA, 0xBB]


@pytest.mark.parametrize("auto_eoi", [True, False])
def test_auto_eoi_vectors_are_ended_by_the_gateway(start: Start, auto_eoi: bool) -> None:
    program = """
    main:
        mov $0xfee00000, %ebx
        movl $0x1ff, 0xf0(%rbx)
        xor %r15, %r15
        mov $0x40000020, %ecx
        wrmsr
        sti
        mov $3, %ebp
    1:  movl $0, 0x310(%rbx)
        movl $0x44040, 0x300(%rbx)       /* to itself, fixed, vector 0x40 */
        mov $1000000, %ecx
    2:  dec %ecx
        jnz 2b
        dec %ebp
        jnz 1b
        mov %r15, %rax
        call hex
        mov 0x120(%rbx), %eax            /* in service, vectors 0x40.. */
        call hex
        jmp done
    irq40:
        inc %r15
        iretq
    """
    with start(program) as machine:
        gateway = active(machine)

        def answer(trap: Trap) -> None:
            if auto_eoi:
                gateway.set_auto_eoi(0, {0x40, 0x99})
            gateway.answer(trap)

        serve(gateway, answer)
        assert machine.output() == ([3, 0] if auto_eoi else [1, 1])
        assert gateway.counters()[0]["auto_eois"] == (3 if auto_eoi else 0)


def test_a_guest_in_x2apic_mode_is_reported_because_its_interrupts_cannot_be_ended(start: Start) -> None:
    program = """
    main:
        mov $0x1b, %ecx
        rdmsr
        or $0xc00, %eax                  /* x2APIC mode */
        wrmsr
        mov $0x1ff, %eax
        xor %edx, %edx
        mov $0x80f, %ecx
        wrmsr
        mov $0x40000020, %ecx
        wrmsr
        sti
        mov $0x40040, %eax               /* to itself, fixed, vector 0x40 */
        xor %edx, %edx
        mov $0x830, %ecx
        wrmsr
    1:  pause
        jmp 1b
    """
    with start(program) as machine:
        gateway = active(machine)

        def answer(trap: Trap) -> None:
            gateway.set_auto_eoi(0, {0x40})
            gateway.answer(trap)

        serve(gateway, answer, until=lambda: gateway.auto_eoi_failures(0) > 0)
        assert gateway.counters()[0]["auto_eois"] == 0


# --- clock and code pages ---


ROUNDS = 100


def test_guest_tsc_is_known_and_followed_over_stop_and_cont(start: Start) -> None:
    program = """
    main:
        mov $100, %ebx
    1:  rdtsc
        dec %ebx
        jnz 1b
        mov $0x40000020, %ecx
        rdmsr                            /* armed by this one */
        mov $100, %ebx
    1:  rdtsc
        dec %ebx
        jnz 1b
        rdtsc
        mov $0x40000021, %ecx
        wrmsr
        jmp main
    """
    with start(program) as machine:
        gateway = active(machine)
        offsets = []
        for _ in range(2):
            while (trap := next_trap(gateway)).kind is not TrapKind.RDMSR:
                gateway.answer(trap)
            gateway.clock.arm()
            assert gateway.clock.guest_tsc_now() is None
            gateway.answer(trap)
            while (trap := next_trap(gateway)).kind is not TrapKind.WRMSR or gateway.clock.samples < 64:
                gateway.answer(trap)
            frequency = gateway.clock.tsc_frequency
            now = gateway.clock.guest_tsc_now()
            assert frequency and now is not None
            # The guest read its TSC a moment before the trap, and that a moment before now.
            assert 0 < now - trap.msr_value < frequency
            # The vCPU may have lost its processor in between: then the next one is looked at.
            for _ in range(ROUNDS):
                offset = trap.tsc - trap.msr_value
                gateway.refresh_clock()
                if abs(offset - gateway.clock.fields()[3]) < frequency // 20_000:  # 50 us
                    break
                while True:
                    gateway.answer(trap)
                    if (trap := next_trap(gateway)).kind is TrapKind.WRMSR:
                        break
            else:
                raise AssertionError((offset, gateway.clock.fields()))
            offsets.append(offset)
            machine.qmp("stop")
            time.sleep(0.2)
            machine.qmp("cont")
            gateway.answer(trap)
        assert frequency is not None
        assert offsets[1] - offsets[0] > frequency // 10  # the guest's clock stood still


def test_pages_that_code_was_translated_from_are_noted(start: Start) -> None:
    with start(HELD) as machine:
        gateway = active(machine)
        next_trap(gateway)
        assert gateway.code_pages.test_and_clear(0x100, 2) == [0x100, 0x101]
        assert gateway.code_pages.test_and_clear(0x100, 1) == []
        assert gateway.code_pages.test_and_clear(0x200, 0x40) == []
        assert gateway.code_pages.test_and_clear(1 << 28, 1) == [1 << 28]
