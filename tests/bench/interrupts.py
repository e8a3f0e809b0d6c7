"""Interrupt to guest, doorbell back, without any kernel: the floor under every device's round trip.

A guest of a few instructions answers each interrupt with a doorbell. Both sides stamp: the guest with RDTSC, the
host with what the gateway's clock makes of its own time, exact to a microsecond or so.

    to the guest  from before the interrupt is requested to the guest's handler
    write         how long the request takes alone; it may be overtaken by the thread that it wakes

A guest that halts is measured twice: with vCPUs that poll before they halt and raise the interrupt by themselves, and
with interrupts that all go through QEMU's main loop.
    doorbell      from the instruction before the hypercall to the host's event port
"""

from __future__ import annotations

import asyncio

from vmbus.machine.gateway_service import EVENT_CONNECTIONS
from vmbus.machine.host import Host

from tests.bench.bare import DONE, STAMP, bare_guest, finished
from tests.bench.report import Result

COUNT = 3000
WARM_UP = 100
VECTOR = 0x40
CONNECTION = EVENT_CONNECTIONS + 1

_DOORBELL = f"""
    mov $0x1005d, %ecx
    mov ${CONNECTION:#x}, %edx
    xor %r8d, %r8d
    tsc_keep {STAMP + 8:#x}
    vmcall
"""

_PROGRAM = f"""
    .macro tsc_keep where
    push %rdx
    push %rcx
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, \\where
    pop %rcx
    pop %rdx
    .endm
    mov $0xfee00000, %ebp
    movl $0x1ff, 0xf0(%rbp)
    jmp wait
irq40:
    tsc_keep {STAMP:#x}
    movl $0, 0xb0(%rbp)
    {_DOORBELL}
    iretq
wait:
    {_DOORBELL}
    sti
7:  IDLE
    jmp 7b
"""


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("Interrupt to a bare guest and doorbell back")
    for state, idle, polls in (("polling", "hlt", True), ("halted", "hlt", False), ("busy", "nop", True)):
        async with bare_guest(_PROGRAM.replace("IDLE", idle)) as host:
            if not polls:
                host.gateway.set_poll(0)
            samples = _Ping(host)
            await finished(host)
            if host.events.resets:
                result.notes.append(f"NOT AS PLANNED: the guest was reset {host.events.resets} times")
        for name, taken in samples.parts.items():
            result.add(f"{name}, guest {state}", taken)
    return result


class _Ping:
    def __init__(self, host: Host) -> None:
        self.parts: dict[str, list[float]] = {
            name: [] for name in ("round trip", "to the guest", "write", "doorbell")
        }
        self._host = host
        self._begun = self._sent = self._rounds = 0
        host.partition.synic.connect_event_port(CONNECTION, self._rung)

    def _rung(self) -> None:
        host = self._host
        now = host.clock.guest_tsc()
        if self._rounds > WARM_UP:
            stamps = memoryview(host.memory.read(STAMP, 16)).cast("Q")
            times = (
                now - self._begun,
                stamps[0] - self._begun,
                self._sent - self._begun,
                now - stamps[1],
            )
            scale = 1e6 / host.clock.tsc_frequency
            for taken, ticks in zip(self.parts.values(), times, strict=True):
                taken.append(ticks * scale)
        self._rounds += 1
        if self._rounds > WARM_UP + COUNT:
            host.memory.write(DONE, b"\1")
            return
        self._begun = host.clock.guest_tsc()
        host.interrupts.request(0, VECTOR)
        self._sent = host.clock.guest_tsc()
