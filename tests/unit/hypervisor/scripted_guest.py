"""A scripted guest: the MSR accesses, hypercalls, message slots and event flags of a kernel, step by step."""

from __future__ import annotations

from collections.abc import Callable, Set

from vmbus.hypervisor import CrashReport, Features, HypercallRegisters, Partition, PartitionEvents
from vmbus.ports import PAGE_SIZE
from vmbus.testing.fakes import FakeInterrupts, FakeMemory, FakeTimers
from vmbus.wire.hypercall import POST_MESSAGE_INPUT, PostMessageInput
from vmbus.wire.msr import Msr
from vmbus.wire.synic import (
    EVENT_AREA_SIZE,
    MESSAGE_PENDING,
    MESSAGE_SLOT,
    MESSAGE_SLOT_SIZE,
    MessageSlot,
)

LINUX_6_1 = 0x8100_0006_0100_0000
VECTOR = 0xF3
MASKED = 1 << 16
AUTO_EOI = 1 << 17
POLLING = 1 << 18
RAM_SIZE = 1 << 20
NOT_RAM = 0xFF << 32


class FakeClock:
    """A guest clock on top of :class:`FakeTimers`; ``drift`` shifts the TSC, ``elapsed``: time before the start."""

    apic_frequency = 1_000_000_000

    def __init__(self, timers: FakeTimers, tsc_frequency: int = 2_000_000_000) -> None:
        self._timers = timers
        self.tsc_frequency = tsc_frequency
        self.tsc_known = True
        self.tsc_base = 0

    def now(self) -> int:
        return self._timers.now()

    def guest_tsc(self) -> int:
        return self.tsc_base + self._timers.now() * self.tsc_frequency // 10_000_000


class RacingMemory(FakeMemory):
    """Memory that calls ``at_fence`` once, at the next fence, for actions of the guest between two host accesses."""

    at_fence: Callable[[], None] | None = None

    def fence(self) -> None:
        super().fence()
        action, self.at_fence = self.at_fence, None
        if action is not None:
            action()


class RecordedEvents(PartitionEvents):
    """The notifications of a partition, in order."""

    def __init__(self) -> None:
        self.os_ids: list[int] = []
        self.crashes: list[CrashReport] = []
        self.resets = 0
        self.auto_eoi: list[tuple[int, Set[int]]] = []
        self.synic_changes: list[int] = []

    def guest_os_changed(self, os_id: int) -> None:
        self.os_ids.append(os_id)

    def crashed(self, report: CrashReport) -> None:
        self.crashes.append(report)

    def reset_requested(self) -> None:
        self.resets += 1

    def synic_changed(self, vp: int) -> None:
        self.synic_changes.append(vp)

    def auto_eoi_changed(self, vp: int, vectors: Set[int]) -> None:
        self.auto_eoi.append((vp, vectors))


class ScriptedGuest:
    """A machine with ``vps`` processors and 1 MiB of RAM."""

    def __init__(self, vps: int = 1, features: Features | None = None) -> None:
        self.vps = vps
        self.features = features or Features()
        self.timers = FakeTimers()
        self.memory = RacingMemory(RAM_SIZE)
        self.interrupts = FakeInterrupts()
        self.clock = FakeClock(self.timers)
        self.events = RecordedEvents()
        self._next_page = 16
        self.partition = self.make_partition()
        self.synic = self.partition.synic

    def make_partition(self) -> Partition:
        """Return another partition on the same memory, like that of a migration's target."""
        return Partition(
            vp_count=self.vps,
            memory=self.memory,
            interrupts=self.interrupts,
            clock=self.clock,
            timers=self.timers,
            features=self.features,
            events=self.events,
        )

    def move_to(self, partition: Partition) -> None:
        self.partition = partition
        self.synic = partition.synic

    def rd(self, msr: int, vp: int = 0) -> int:
        return self.partition.read_msr(vp, msr)

    def wr(self, msr: int, value: int, vp: int = 0) -> None:
        self.partition.write_msr(vp, msr, value)

    def page(self) -> int:
        """Return the address of an unused page that contains old data."""
        gpa = self._next_page * PAGE_SIZE
        self._next_page += 1
        self.memory.write(gpa, b"\xa5" * PAGE_SIZE)
        return gpa

    def enable_hypercalls(self) -> int:
        """Return the address of the hypercall page."""
        gpa = self.page()
        self.wr(Msr.GUEST_OS_ID, LINUX_6_1)
        self.wr(Msr.HYPERCALL, gpa | 1)
        return gpa

    def enable_synic(self, vp: int = 0, sint: int = 2, flags: int = 0, vector: int = VECTOR) -> None:
        """Set up SIMP, SIEFP, a SINT and SCONTROL, in the order of Linux."""
        self.wr(Msr.SIMP, self.page() | 1, vp)
        self.wr(Msr.SIEFP, self.page() | 1, vp)
        self.wr(Msr.SINT0 + sint, vector | flags, vp)
        self.wr(Msr.SCONTROL, 1, vp)

    # --- message slots ---

    def slot_address(self, vp: int = 0, sint: int = 2) -> int:
        return (self.rd(Msr.SIMP, vp) & ~0xFFF) + sint * MESSAGE_SLOT_SIZE

    def slot(self, vp: int = 0, sint: int = 2) -> MessageSlot:
        return MESSAGE_SLOT.parse(self.memory.read(self.slot_address(vp, sint), MESSAGE_SLOT_SIZE))

    def free_slot(self, vp: int = 0, sint: int = 2) -> bool:
        """Clear the type word; return whether the guest must write EOM."""
        address = self.slot_address(vp, sint)
        self.memory.write(address, bytes(4))
        return bool(self.memory.read(address + 5, 1)[0] & MESSAGE_PENDING)

    def eom(self, vp: int = 0) -> None:
        self.wr(Msr.EOM, 0, vp)

    def take_message(self, vp: int = 0, sint: int = 2) -> bytes | None:
        """Return the message in the slot, or None, and free the slot as Linux does."""
        slot = self.slot(vp, sint)
        if slot.message_type == 0:
            return None
        if self.free_slot(vp, sint):
            self.eom(vp)
        return slot.payload[: slot.payload_size]

    # --- event flags ---

    def flags(self, vp: int = 0, sint: int = 2) -> set[int]:
        base = (self.rd(Msr.SIEFP, vp) & ~0xFFF) + sint * EVENT_AREA_SIZE
        area = int.from_bytes(self.memory.read(base, EVENT_AREA_SIZE), "little")
        return {flag for flag in range(EVENT_AREA_SIZE * 8) if area >> flag & 1}

    def clear_flags(self, vp: int = 0, sint: int = 2) -> None:
        base = (self.rd(Msr.SIEFP, vp) & ~0xFFF) + sint * EVENT_AREA_SIZE
        self.memory.write(base, bytes(EVENT_AREA_SIZE))

    # --- hypercalls ---

    def vmcall(self, control: int, first: int = 0, second: int = 0, *, vp: int = 0, long: bool = True) -> int:
        mask = 0xFFFFFFFF
        if long:
            registers = HypercallRegisters(long_mode=True, rcx=control, rdx=first, r8=second)
        else:
            registers = HypercallRegisters(
                long_mode=False,
                rdx=control >> 32,
                rax=control & mask,
                rbx=first >> 32,
                rcx=first & mask,
                rdi=second >> 32,
                rsi=second & mask,
            )
        result = self.partition.hypercall(vp, registers)
        if result.act_afterwards is not None:
            result.act_afterwards()
        return result.value

    def post(
        self,
        payload: bytes = b"payload!",
        *,
        connection: int = 1,
        message_type: int = 1,
        size: int | None = None,
        address: int = 0x1000,
        control: int = 0x5C,
        long: bool = True,
        vp: int = 0,
    ) -> int:
        size = len(payload) if size is None else size
        block = POST_MESSAGE_INPUT.build(
            PostMessageInput(connection, message_type, size, payload.ljust(240, b"\xcc")[:240])
        )
        if self.memory.is_ram(address, len(block)):
            self.memory.write(address, block)
        return self.vmcall(control, address, long=long, vp=vp)

    def vectors(self) -> list[tuple[int, int]]:
        """Return (VP, vector) of the interrupts since the last call."""
        taken = [(vp, vector) for vp, vector, _ in self.interrupts.requests]
        self.interrupts.requests.clear()
        return taken
