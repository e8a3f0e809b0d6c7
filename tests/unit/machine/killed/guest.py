"""The guest of a :class:`~tests.unit.machine.killed.machine.Machine`: a kernel that believes what it is told.

It looks at messages and rings only when it is interrupted, writes EOM only where it is asked to, and rings a doorbell
only if the host wants it: so whatever is not signalled is never seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vmbus.bus.messages import PostResult
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeMemory, FakeSynic
from vmbus.testing.loopback import GuestPacket, RingReader, RingWriter, guest_packet
from vmbus.testing.scripted import ScriptedGuest, parse_host_message
from vmbus.wire.gateway import TrapKind
from vmbus.wire.gpadl import GpaRange
from vmbus.wire.hypercall import POST_MESSAGE_INPUT, HvStatus, PostMessageInput
from vmbus.wire.msr import Msr
from vmbus.wire.synic import (
    EVENT_AREA_SIZE,
    MESSAGE_PENDING,
    MESSAGE_SLOT,
    MESSAGE_SLOT_SIZE,
    TIMER_EXPIRED,
    MessageType,
    TimerExpired,
)

from tests.unit.machine.killed.machine import Machine

LINUX_6_1 = 0x8100_0006_0100_0000
VECTOR, TIMER_VECTOR, DIRECT_VECTOR = 0xF3, 0xF4, 0xEC
SINT, TIMER_SINT = 2, 3
_HYPERCALL, _INPUT, TSC_PAGE, _OF_VCPUS = 1, 2, 4, 6
"""Page numbers; each vCPU has an input page, and two pages of its SynIC."""
POST_MESSAGE = 0x5C
RING_PAGES = 3


class Rings:
    """The guest's end of an open channel."""

    def __init__(self, guest: KilledGuest, relid: int, max_packet: int, vcpu: int) -> None:
        self.relid = relid
        self.vcpu: int | None = vcpu
        """Where it is signalled; ``None`` while it is moved."""
        self.pfns = guest.pages(2 * RING_PAGES)
        self.outgoing = guest.memory.pages(self.pfns[:RING_PAGES])
        self.incoming = guest.memory.pages(self.pfns[RING_PAGES:])
        for pages in (self.outgoing, self.incoming):
            pages.write(0, bytes(PAGE_SIZE))
            pages.store_u32(64, 1)
        self.writer = RingWriter(self.outgoing)
        self.reader = RingReader(self.incoming, max_packet)
        self.reads = True


class KilledGuest(ScriptedGuest):
    """``packets``: what came through the rings, by relid; ``messages``: all payloads of channel messages in their
    order; ``expired``: timer messages, with their vCPU; ``ticks``: vCPUs that direct timers interrupted.
    """

    def __init__(self, machine: Machine) -> None:
        memory = FakeMemory(0)
        memory.ram = machine.ram  # type: ignore[assignment]
        self.machine = machine
        self.channels: dict[int, Rings] = {}
        self.packets: dict[int, list[GuestPacket]] = defaultdict(list)
        self.messages: list[bytes] = []
        self.expired: list[tuple[int, TimerExpired]] = []
        self.ticks: list[int] = []
        self.on_packet: dict[int, Callable[[GuestPacket], None]] = {}
        super().__init__(None, FakeSynic(1), memory, machine.loop)  # type: ignore[arg-type]

    @property
    def bus(self) -> Any:
        """The bus of the emulator of now, of which a script asks what was agreed."""
        assert self.machine.host is not None
        return self.machine.host.bus

    @bus.setter
    def bus(self, value: Any) -> None:
        """Nothing: the machine has it."""

    # --- the processor ---

    def rdmsr(self, msr: int, vcpu: int = 0) -> int:
        return self.machine.trap(TrapKind.RDMSR, vcpu, rcx=msr)

    def wrmsr(self, msr: int, value: int, vcpu: int = 0) -> None:
        if msr == Msr.EOM and self.machine.post(TrapKind.WRMSR, vcpu=vcpu):
            return
        self.machine.trap(TrapKind.WRMSR, vcpu, rcx=msr, rax=value & 0xFFFFFFFF, rdx=value >> 32)

    def boot(self) -> None:
        """Set up the hypercall page and the SynICs."""
        self.machine.run()
        self.wrmsr(Msr.GUEST_OS_ID, LINUX_6_1)
        self.wrmsr(Msr.HYPERCALL, _HYPERCALL * PAGE_SIZE | 1)
        for vcpu in range(self.machine.vcpus):
            self.wrmsr(Msr.SIMP, _page(vcpu, 0) | 1, vcpu)
            self.wrmsr(Msr.SIEFP, _page(vcpu, 1) | 1, vcpu)
            self.wrmsr(Msr.SINT0 + SINT, VECTOR, vcpu)
            self.wrmsr(Msr.SINT0 + TIMER_SINT, TIMER_VECTOR, vcpu)
            self.wrmsr(Msr.SCONTROL, 1, vcpu)

    def post(
        self, payload: bytes, *, connection_id: int | None = None, vcpu: int = 0, **more: Any
    ) -> PostResult:
        """Post a message through the gateway, again and again while the host has no room."""
        connection = self.connection_id if connection_id is None else connection_id
        if self.machine.post(TrapKind.VMCALL, connection, payload, vcpu):
            return PostResult.OK
        block = POST_MESSAGE_INPUT.build(
            PostMessageInput(connection, 1, len(payload), payload.ljust(240, b"\xcc"))
        )
        page = (_INPUT + vcpu) * PAGE_SIZE
        for _ in range(10):
            self.memory.write(page, block)
            status = self.machine.trap(TrapKind.VMCALL, vcpu, rcx=POST_MESSAGE, rdx=page)
            if status == HvStatus.SUCCESS:
                return PostResult.OK
            assert status == HvStatus.INSUFFICIENT_BUFFERS, status
            self.settle()
        raise AssertionError("the host takes no message")

    # --- interrupts ---

    def settle(self) -> None:
        """Run until neither the emulator nor an interrupt handler has anything to do."""
        for _ in range(2000):
            self.machine.run()
            if self.machine.interrupts:
                self.interrupted()
            elif self.machine.idle:
                return
        raise AssertionError(f"there is no end of it, deaths: {self.machine.deaths}")

    def sleep(self, seconds: float, step: float = 0.001) -> None:
        """Let time pass, in steps after each of which the guest runs."""
        for _ in range(round(seconds / step)):
            self.machine.advance(step)
            self.settle()

    def interrupted(self) -> None:
        """Handle what the local APICs have."""
        while self.machine.interrupts:
            vcpu, vector = self.machine.interrupts.pop(0)
            if vector == DIRECT_VECTOR:
                self.ticks.append(vcpu)
                continue
            sint = {VECTOR: SINT, TIMER_VECTOR: TIMER_SINT}[vector]
            self._take_message(vcpu, sint)
            if sint == SINT:
                self._take_events(vcpu)

    def _take_message(self, vcpu: int, sint: int) -> None:
        at = _page(vcpu, 0) + sint * MESSAGE_SLOT_SIZE
        slot = MESSAGE_SLOT.parse(self.memory.read(at, MESSAGE_SLOT_SIZE))
        if not slot.message_type:
            return
        payload = slot.payload[: slot.payload_size]
        if slot.message_type == MessageType.TIMER_EXPIRED:
            self.expired.append((vcpu, TIMER_EXPIRED.parse(payload)))
        else:
            self.messages.append(payload)
            self.synic.messages.append((vcpu, sint, payload))
        self.memory.write(at, bytes(4))
        if self.memory.read(at + 5, 1)[0] & MESSAGE_PENDING:
            self.wrmsr(Msr.EOM, 0, vcpu)

    def _take_events(self, vcpu: int) -> None:
        at = _page(vcpu, 1) + SINT * EVENT_AREA_SIZE
        flags = int.from_bytes(self.memory.read(at, EVENT_AREA_SIZE), "little")
        self.memory.write(at, bytes(EVENT_AREA_SIZE))
        for relid, rings in tuple(self.channels.items()):
            if flags >> relid & 1:
                assert rings.vcpu in (None, vcpu), f"channel {relid} was signalled on vCPU {vcpu}"
                if rings.reads:
                    self.read_ring(relid)

    def read_ring(self, relid: int) -> None:
        """Take everything that the host has sent; signal it if it waits for room."""
        packets, signal = self.channels[relid].reader.read()
        self.packets[relid] += packets
        if signal:
            self.machine.ring(relid)
        for packet in packets:
            if relid in self.on_packet:
                self.on_packet[relid](packet)

    def take(self) -> list[Any]:
        """Return the messages of the host since the last call, once it has no more to do."""
        self.settle()
        return super().take()

    # --- channels ---

    def open_rings(self, relid: int, *, max_packet: int = 1 << 16, vcpu: int = 0) -> int:
        """Share two rings and open the channel with them, for ``vcpu``; return the GPADL id."""
        rings = Rings(self, relid, max_packet, vcpu)
        gpadl_id = self.new_gpadl_id()
        [created] = self.post_ranges(relid, [GpaRange(len(rings.pfns) * PAGE_SIZE, 0, rings.pfns)], gpadl_id)
        assert (created.gpadl_id, created.status) == (gpadl_id, 0)
        self.channels[relid] = rings
        self.packets[relid] = []
        [opened] = self.open(relid, gpadl_id, downstream=RING_PAGES, vp=vcpu)
        assert opened.status == 0
        return gpadl_id

    def move(self, relid: int, vcpu: int) -> None:
        """Have a channel signalled on another vCPU."""
        self.channels[relid].vcpu = None
        [answer] = self.modify(relid, vcpu)
        assert answer.status == 0
        self.channels[relid].vcpu = vcpu

    def send(self, relid: int, *packets: bytes) -> bool:
        """Write packets, and ring the doorbell if the host wants it; False if they do not fit."""
        signal = self.channels[relid].writer.write(*packets)
        if signal:
            self.machine.ring(relid)
        return signal is not None

    def request(self, payload: bytes, transaction_id: int) -> bytes:
        """Build a packet that asks for a completion."""
        return guest_packet(payload, transaction_id=transaction_id, completion_requested=True)

    def names(self) -> list[str]:
        """Return the kinds of all messages that came."""
        return [parse_host_message(each)[0].name for each in self.messages]


def _page(vcpu: int, number: int) -> int:
    """Return the address of the message page (0) or the event page (1) of a vCPU."""
    return (_OF_VCPUS + 2 * vcpu + number) * PAGE_SIZE
