"""A guest of a few instructions under the real host: :class:`~vmbus.machine.host.Host` as users have it.

A program (see :mod:`tests.qemu.bare_guest`) begins with :data:`PROLOGUE`, leaves what it finds in its RAM from
:data:`RESULTS` on, and sets the word at :data:`DONE` when it has finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from vmbus.bus.io.device import Device
from vmbus.machine.gateway import build as gateway_build
from vmbus.machine.guest import Guest
from vmbus.machine.host import Host, HostOptions
from vmbus.machine.qemu.launch import GuestOptions
from vmbus.provision.qemu import find_qemu

from tests.qemu.bare_guest import long_mode_guest

MEMORY = 64 << 20
DONE = 0x800000
STAMP = 0x800008
RESULTS = 0x1000000
LIMIT = 60.0

_HYPERCALL_PAGE = 0x400000
_MESSAGE_PAGE = 0x401000
MESSAGE_SLOT = _MESSAGE_PAGE + 2 * 256
"""SINT2 slot of the message page."""

PROLOGUE = f"""
    .macro write_msr number, value
    mov $\\value, %eax
    xor %edx, %edx
    mov $\\number, %ecx
    wrmsr
    .endm
    .macro tsc to
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, \\to
    .endm
    .macro pause_for ticks
    tsc %rsi
    add \\ticks, %rsi
77: tsc %rdi
    cmp %rsi, %rdi
    jb 77b
    .endm
main:
    mov $0xff, %al      /* what SeaBIOS left running must not interrupt */
    out %al, $0x21
    out %al, $0xa1
    write_msr 0x40000000, 0x81000000
    write_msr 0x40000001, {_HYPERCALL_PAGE + 1:#x}
    write_msr 0x40000083, {_MESSAGE_PAGE + 1:#x}
    write_msr 0x40000092, 0x40040
    write_msr 0x40000080, 1
    mov $200, %ebx
1:  tsc %r8
    dec %ebx
    jnz 1b
    mov $0x40000022, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    xor %edx, %edx
    mov $5000, %ecx
    div %rcx
    mov %rax, %r11
"""
"""R11: TSC ticks of 200 microseconds. The guest has named itself, may call, and takes messages without interrupts."""


@contextlib.asynccontextmanager
async def bare_guest(
    program: str,
    devices: Sequence[Device] = (),
    *,
    smp: int = 1,
    extra: Sequence[str] = (),
    journal: bool = False,
) -> AsyncIterator[Host]:
    """Run a program behind :data:`PROLOGUE` and serve it; ``journal``: with one."""
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as folder:
        image = long_mode_guest(Path(folder), PROLOGUE + program)
        async with Guest.start(
            name=None,
            qemu=find_qemu(),
            gateway_library=gateway_build.build(),
            memory_size=MEMORY,
            options=GuestOptions(kernel=image, initrd=None, append="", smp=smp, extra=tuple(extra)),
            devices=devices,
            host_options=HostOptions(journal=journal),
        ) as guest:
            yield guest.host


async def finished(host: Host) -> None:
    """Wait until the program is done."""
    end = time.monotonic() + LIMIT
    while not host.memory.read(DONE, 1)[0]:
        if time.monotonic() > end:
            raise TimeoutError(f"the guest was not done within {LIMIT:g} s: {host.partition.status()}")
        await asyncio.sleep(0.05)


def microseconds(host: Host, offset: int, count: int) -> list[float]:
    """``count`` 32-bit tick counts from ``offset`` in the results, in microseconds."""
    data = memoryview(host.memory.read(RESULTS + offset, 4 * count)).cast("I")
    scale = 1e6 / host.clock.tsc_frequency
    return [ticks * scale for ticks in data]
