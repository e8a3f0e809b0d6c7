"""Signals to processors that halt, in a real QEMU: none is lost, whoever raises the interrupt."""

from __future__ import annotations

import asyncio
import itertools
import random
import time

import pytest
from vmbus.machine.host import POLL_NS, Host

from tests.bench.bare import bare_guest
from tests.guest.matrix import full

pytestmark = pytest.mark.qemu

VECTOR = 0x40
PAGES = 0x900
"""Page frame number of the first processor's page; the next processor has the next page."""
FLAG, SENT, SEEN, READY = 0, 4, 8, 12
LIMIT = 30.0

_XAPIC = {
    "APIC_ON": "mov $0xfee00000, %ebp\nmovl $0x1ff, 0xf0(%rbp)",
    "EOI": "movl $0, 0xb0(%rbp)",
    "INIT_OTHERS": "movl $0xc4500, 0x300(%rbp)",
    "START_OTHERS": "movl $0xc4608, 0x300(%rbp)",
}
_X2APIC = {
    "APIC_ON": """
        mov $0x1b, %ecx
        rdmsr
        or $0xc00, %eax
        wrmsr
        write_msr 0x80f, 0x1ff
    """,
    "EOI": """
        push %rcx
        push %rdx
        write_msr 0x80b, 0
        pop %rdx
        pop %rcx
    """,
    "INIT_OTHERS": "write_msr 0x830, 0xc4500",
    "START_OTHERS": "write_msr 0x830, 0xc4608",
}

_PROGRAM = """
    APIC_ON
    mov $first, %esi
    mov $0x8000, %edi
    mov $(first_end - first), %ecx
    rep movsb
    INIT_OTHERS
    mov $50, %ebx
2:  pause_for %r11
    dec %ebx
    jnz 2b
    START_OTHERS
cpu:
    mov $1, %eax
    cpuid
    shr $24, %ebx               /* APIC id: the number of the processor */
    mov %ebx, %r14d
    shl $12, %r14d
    lea 0x601000(%r14), %rsp
    add $0x900000, %r14
    APIC_ON
    movl $1, 12(%r14)
    sti
3:  hlt
    jmp 3b
irq40:
    push %rax
    xor %eax, %eax
    xchg %eax, (%r14)           /* the flag, before what was sent */
    mov 4(%r14), %eax
    mov %eax, 8(%r14)
    EOI
    pop %rax
    iretq
    .code16
first:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl first_gdtr - first + 0x8000
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $24, $second
first_gdtr:
    .word 47
    .long gdt
first_end:
    .code32
second:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x201000, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmp $8, $third
    .code64
third:
    lidt idtr(%rip)
    jmp cpu
"""


class _Processor:
    """One processor of the guest, and what was sent to it."""

    def __init__(self, host: Host, number: int) -> None:
        self._host = host
        self._number = number
        self._page = host.memory.pages([PAGES + number])
        self._sent = 0

    @property
    def ready(self) -> bool:
        return self._page.load_u32(READY) == 1

    def signal(self) -> None:
        self._sent += 1
        self._page.store_u32(SENT, self._sent)
        if not self._page.set_bits_u32(FLAG, 1) & 1:
            self._host.interrupts.request(self._number, VECTOR)

    def seen(self) -> bool:
        return self._page.load_u32(SEEN) == self._sent


def raised(host: Host) -> int:
    """Interrupts that processors have raised by themselves."""
    return sum(each["raised"] for each in host.gateway.counters())


@pytest.mark.parametrize(
    ("mode", "smp", "signals", "extra"),
    [
        ("x2apic", 1, 3_000, ""),
        ("xapic", 2, 3_000, ""),
        full("xapic", 1, 1_000_000, ""),
        full("x2apic", 2, 1_000_000, ""),
        full("x2apic", 4, 1_000_000, ""),
        full("xapic", 4, 1_000_000, ""),
        full("x2apic", 1, 3_000, "-icount shift=auto"),
        full("x2apic", 2, 3_000, "-accel tcg,thread=single"),
    ],
)
async def test_no_signal_is_lost(mode: str, smp: int, signals: int, extra: str) -> None:
    program = _PROGRAM
    for name, text in (_X2APIC if mode == "x2apic" else _XAPIC).items():
        program = program.replace(name, text)
    chance = random.Random(signals)
    one_thread = smp > 1 and "single" in extra  # none of them polls then
    async with bare_guest(program, smp=smp, extra=extra.split()) as host:
        host.gateway.set_poll(POLL_NS)  # also where no processor is to spare
        processors = [_Processor(host, number) for number in range(smp)]
        end = time.monotonic() + LIMIT
        while not all(each.ready for each in processors):
            assert time.monotonic() < end, "a processor did not start"
            await asyncio.sleep(0.01)
        for number in itertools.count():
            if number >= signals and (raised(host) or one_thread):
                break
            processor = processors[chance.randrange(smp)]
            processor.signal()
            if chance.randrange(4):
                end = time.monotonic() + LIMIT
                while not processor.seen():
                    assert time.monotonic() < end, f"signal {number} was lost: {host.gateway.counters()}"
            pause = time.perf_counter_ns() + chance.choice((0, 0, 2_000, 20_000, 100_000, 400_000))
            while time.perf_counter_ns() < pause:
                pass
            if number % 100 == 0:
                await asyncio.sleep(0)
            assert number < 100 * signals, "no processor polls: nothing was tested"
        end = time.monotonic() + LIMIT
        while not all(each.seen() for each in processors):
            assert time.monotonic() < end, f"a signal was lost: {host.gateway.counters()}"
        assert host.gateway.pending.waiting() == []
        print(f"{raised(host)} of {host.interrupts.requests} interrupts were raised by the vCPUs")
