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
from vmbus.wire.synic import EVENT_AREA_SIZE, MESSAGE_PENDING, MESSAGE_SLOT, MESSAGE_SLOT_SIZE

from tests.unit.machine.killed.machine import Machine

LINUX_6_1 = 0x8100_0006_0100_0000
VECTOR = 0xF3
SINT = 2
_HYPERCALL, _MESSAGES, _EVENTS, _INPUT = 1, 2, 3, 4
"""Page numbers."""
POST_MESSAGE = 0x5C
RING_PAGES = 3


class Rings:
    """The guest's end of an open channel."""

    def __init__(self, guest: KilledGuest, relid: int, max_packet: int) -> None:
        self.relid = relid
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
    """``packets``: what came through the rings, by relid; ``messages``: all payloads in their order."""

    def __init__(self, machine: Machine) -> None:
        memory = FakeMemory(0)
        memory.ram = machine.ram  # type: ignore[assignment]
        self.machine = machine
        self.channels: dict[int, Rings] = {}
        self.packets: dict[int, list[GuestPacket]] = defaultdict(list)
        self.messages: list[bytes] = []
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

    def wrmsr(self, msr: int, value: int) -> None:
        if msr == Msr.EOM and self.machine.post(TrapKind.WRMSR):
            return
        self.machine.trap(TrapKind.WRMSR, rcx=msr, rax=value & 0xFFFFFFFF, rdx=value >> 32)

    def boot(self) -> None:
        """Set up the hypercall page and the SynIC."""
        self.machine.run()
        self.wrmsr(Msr.GUEST_OS_ID, LINUX_6_1)
        self.wrmsr(Msr.HYPERCALL, _HYPERCALL * PAGE_SIZE | 1)
        self.wrmsr(Msr.SIMP, _MESSAGES * PAGE_SIZE | 1)
        self.wrmsr(Msr.SIEFP, _EVENTS * PAGE_SIZE | 1)
        self.wrmsr(Msr.SINT0 + SINT, VECTOR)
        self.wrmsr(Msr.SCONTROL, 1)

    def post(self, payload: bytes, *, connection_id: int | None = None, **more: Any) -> PostResult:
        """Post a message through the gateway, again and again while the host has no room."""
        connection = self.connection_id if connection_id is None else connection_id
        if self.machine.post(TrapKind.VMCALL, connection, payload):
            return PostResult.OK
        block = POST_MESSAGE_INPUT.build(
            PostMessageInput(connection, 1, len(payload), payload.ljust(240, b"\xcc"))
        )
        for _ in range(10):
            self.memory.write(_INPUT * PAGE_SIZE, block)
            status = self.machine.trap(TrapKind.VMCALL, rcx=POST_MESSAGE, rdx=_INPUT * PAGE_SIZE)
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

    def interrupted(self) -> None:
        """Handle what the local APIC has."""
        while self.machine.interrupts:
            assert self.machine.interrupts.pop(0) == VECTOR
            self._take_message()
            self._take_events()

    def _take_message(self) -> None:
        at = _MESSAGES * PAGE_SIZE + SINT * MESSAGE_SLOT_SIZE
        slot = MESSAGE_SLOT.parse(self.memory.read(at, MESSAGE_SLOT_SIZE))
        if not slot.message_type:
            return
        payload = slot.payload[: slot.payload_size]
        self.messages.append(payload)
        self.synic.messages.append((0, SINT, payload))
        self.memory.write(at, bytes(4))
        if self.memory.read(at + 5, 1)[0] & MESSAGE_PENDING:
            self.wrmsr(Msr.EOM, 0)

    def _take_events(self) -> None:
        at = _EVENTS * PAGE_SIZE + SINT * EVENT_AREA_SIZE
        flags = int.from_bytes(self.memory.read(at, EVENT_AREA_SIZE), "little")
        self.memory.write(at, bytes(EVENT_AREA_SIZE))
        for relid, rings in tuple(self.channels.items()):
            if flags >> relid & 1 and rings.reads:
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

    def open_rings(self, relid: int, *, max_packet: int = 1 << 16) -> int:
        """Share two rings and open the channel with them; return the GPADL id."""
        rings = Rings(self, relid, max_packet)
        gpadl_id = self.new_gpadl_id()
        [created] = self.post_ranges(relid, [GpaRange(len(rings.pfns) * PAGE_SIZE, 0, rings.pfns)], gpadl_id)
        assert (created.gpadl_id, created.status) == (gpadl_id, 0)
        self.channels[relid] = rings
        self.packets[relid] = []
        [opened] = self.open(relid, gpadl_id, downstream=RING_PAGES)
        assert opened.status == 0
        return gpadl_id

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
