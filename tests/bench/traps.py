"""What a trap costs the guest, by kind: timed with RDTSC around the instruction, in a guest of a few instructions.

``after a pause``: nothing has happened for 200 us, so the emulator sleeps. ``in a row``: one trap after another,
as when a guest sets itself up; each comes while the emulator is still about to fall asleep. After BURST messages in
a row (a contact drops older answers: after each) the guest takes their answers, outside of the times: one that does
not is refused more messages.
"""

from __future__ import annotations

import asyncio
import statistics
import uuid
from collections.abc import Mapping

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device
from vmbus.bus.offers import Offer
from vmbus.machine.gateway_service import EVENT_CONNECTIONS
from vmbus.machine.host import Host
from vmbus.wire.gpadl import GPADL_TEARDOWN, GpadlTeardown, GpaRange, split_gpadl
from vmbus.wire.messages import INITIATE_CONTACT, REQUESTOFFERS, HeaderOnly, InitiateContact
from vmbus.wire.packet import Packet
from vmbus.wire.version import Version

from tests.bench.bare import DONE, MESSAGE_SLOT, RESULTS, bare_guest, finished, microseconds
from tests.bench.report import Result

COUNT = 2000
UNUSED_CONNECTION = EVENT_CONNECTIONS + 2
BURST = 16
_RELID = 1
_GPADL = 0xE1E10
_AIM = "median < 40"

_CONTACT = INITIATE_CONTACT.build(InitiateContact(Version.IRON, 0, bytes(8), 0, 0))
_SHARE = split_gpadl(_RELID, _GPADL, [GpaRange(4096, 0, [0x500])])[0]
_UNSHARE = GPADL_TEARDOWN.build(GpadlTeardown(_RELID, _GPADL))

_MESSAGES = {
    "contact": _CONTACT,
    "request_offers": REQUESTOFFERS.build(HeaderOnly()),
    "share": _SHARE,
    "unshare": _UNSHARE,
}
"""Label → what is posted there."""


class Silent(Device):
    """Offered, never opened."""

    name = "silent"

    def offer(self) -> Offer:
        return Offer(uuid.UUID(int=0xBE7C), uuid.UUID(int=1))

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        """Nothing comes: it is not opened."""


def _post(label: str) -> str:
    return f"""
        mov $0x5c, %ecx
        mov ${label}, %edx
        xor %r8d, %r8d
        vmcall
        or %rax, %r14"""


KINDS: Mapping[str, tuple[str, ...]] = {
    "nothing": ("",),
    "CPUID (table)": ("mov $0x40000000, %eax\ncpuid",),
    "RDMSR (VP_INDEX)": ("mov $0x40000002, %ecx\nrdmsr",),
    "RDMSR (SCONTROL)": ("mov $0x40000080, %ecx\nrdmsr",),
    "WRMSR (EOM)": ("xor %eax, %eax\nxor %edx, %edx\nmov $0x40000084, %ecx\nwrmsr",),
    "HvPostMessage (GPADL, teardown)": (_post("share"), _post("unshare")),
    "HvPostMessage (contact)": (_post("contact"),),
    "HvSignalEvent (posted)": (
        f"""
        mov $0x1005d, %ecx
        mov ${UNUSED_CONNECTION:#x}, %edx
        xor %r8d, %r8d
        vmcall
        or %rax, %r14""",
    ),
}
"""Name → instructions; several of them take turns."""


def _take_answers(count: int) -> str:
    """Wait for that many messages, and free the slot as Linux does."""
    return f"""
        mov ${count}, %ebx
    61: pause
        cmpl $0, {MESSAGE_SLOT:#x}
        je 61b
        movl $0, {MESSAGE_SLOT:#x}
        mfence
        testb $1, {MESSAGE_SLOT + 5:#x}
        jz 62f
        write_msr 0x40000084, 0
    62: dec %ebx
        jnz 61b
    """


def _loop(instructions: tuple[str, ...], pause: bool, answered: bool) -> str:
    """Each trap, timed; ``answered``: each is a message that has an answer."""
    burst = BURST if answered and not pause and len(instructions) > 1 else len(instructions)
    each_alone = answered and (pause or burst == 1)
    text = f"mov ${COUNT // burst}, %r10d\n5:\n"
    for number in range(burst):
        each = instructions[number % len(instructions)]
        text += f"""
            {"pause_for %r11" if pause else ""}
            tsc %r9
            {each}
            tsc %r13
            sub %r9, %r13
            mov %r13d, (%r15)
            add $4, %r15
            {_take_answers(1) if each_alone else ""}
        """
    if answered and not each_alone:
        text += _take_answers(burst)
    return text + "dec %r10d\njnz 5b\n"


def _program() -> str:
    take_messages = f"""
        mov $20, %ebx
    6:  movl $0, {MESSAGE_SLOT:#x}
        write_msr 0x40000084, 0
        pause_for %r11
        dec %ebx
        jnz 6b
    """
    text = f"mov ${RESULTS:#x}, %r15d\nxor %r14d, %r14d\n"
    text += _post("contact") + take_messages + _post("request_offers") + take_messages
    for name, instructions in KINDS.items():
        for pause in (True, False):
            text += _loop(instructions, pause, name.startswith("HvPostMessage"))
    text += f"mov %r14, (%r15)\nmovl $1, {DONE:#x}\ncli\n9: hlt\njmp 9b\n"
    for label, message in _MESSAGES.items():
        data = ", ".join(str(byte) for byte in message)
        text += f".balign 256\n{label}: .long 1, 0, 1, {len(message)}\n.byte {data}\n"
    return text + ".balign 256\n"


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result("Trap round trips in the guest (RDTSC around the instruction, less an empty pair)")
    await measure(result)
    return result


async def measure(result: Result, *, journal: bool = False) -> None:
    """Add all times to ``result``."""
    async with bare_guest(_program(), [Silent()], journal=journal) as host:
        host.partition.synic.connect_event_port(UNUSED_CONNECTION, lambda: None)
        await finished(host)
        _read(host, result)
        status = host.memory.read(RESULTS + 8 * COUNT * len(KINDS), 8)
        refused = {**host.partition.refusals.counts, **host.bus.refusals.counts}
        if any(status) or refused:
            result.notes.append(f"NOT AS PLANNED: hypercall status {status.hex()}, refused {refused}")


def _read(host: Host, result: Result) -> None:
    offset = 0
    empty = 0.0
    for name in KINDS:
        for when in ("after a pause", "in a row"):
            samples = microseconds(host, offset, COUNT)
            offset += 4 * COUNT
            if name == "nothing":
                empty = statistics.median(samples)
                continue
            aim = _AIM if when == "after a pause" and name[:3] in ("RDM", "WRM", "HvP") else ""
            result.add(f"{name}, {when}", [max(sample - empty, 0.0) for sample in samples], aim)
