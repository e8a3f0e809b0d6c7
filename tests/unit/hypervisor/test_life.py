"""The life cycle of a Linux guest: boot, unload, kexec, crash, hibernation, reset.

Source: docs/protocol/discovery.md#boot-sequence, docs/protocol/messages.md#life-cycle.
"""

from __future__ import annotations

import json

import pytest
from vmbus.hypervisor import Features, GeneralProtection, UndefinedOpcode
from vmbus.ports import PAGE_SIZE
from vmbus.wire.msr import Msr

from tests.unit.hypervisor.scripted_guest import LINUX_6_1, MASKED, VECTOR, ScriptedGuest


class Linux:
    """The MSR traffic of a Linux kernel, step by step as in docs/protocol/discovery.md#boot-sequence."""

    def __init__(self, guest: ScriptedGuest) -> None:
        self.guest = guest
        self.hypercall_page = 0
        self.pages: dict[tuple[int, int], int] = {}

    def boot(self) -> None:
        guest = self.guest
        assert guest.rd(Msr.TSC_FREQUENCY) > 0  # 1
        assert guest.rd(Msr.APIC_FREQUENCY) > 0
        guest.wr(Msr.TSC_INVARIANT_CONTROL, 1)  # 2
        reserved = guest.rd(Msr.REFERENCE_TSC) & 0xFFF  # 3
        self.tsc_page = guest.page()
        guest.wr(Msr.REFERENCE_TSC, reserved | 1 | self.tsc_page)
        assert guest.rd(Msr.CRASH_CTL) >> 62 & 1  # 4
        self.start_cpu(0)  # 5, 6
        guest.wr(Msr.GUEST_OS_ID, LINUX_6_1)  # 7
        self.hypercall_page = guest.page()
        value = guest.rd(Msr.HYPERCALL)  # 8
        guest.wr(Msr.HYPERCALL, value & 0xFFE | 1 | self.hypercall_page)
        for cpu in range(1, guest.vps):  # 10
            self.start_cpu(cpu)

    def start_cpu(self, cpu: int) -> None:
        assert self.guest.rd(Msr.VP_INDEX, cpu) == cpu
        page = self.guest.page()
        self.guest.memory.write(page, bytes(PAGE_SIZE))
        self.guest.wr(Msr.VP_ASSIST_PAGE, page | 1, cpu)

    def load_bus(self) -> None:
        assert self.guest.rd(Msr.HYPERCALL) & 1  # 11
        for cpu in range(self.guest.vps):
            self.enable_synic(cpu)

    def enable_synic(self, cpu: int) -> None:
        guest = self.guest
        for msr in (Msr.SIMP, Msr.SIEFP):  # 12
            page = self.pages.setdefault((cpu, msr), guest.page())
            guest.memory.write(page, bytes(PAGE_SIZE))
            guest.wr(msr, guest.rd(msr, cpu) & 0xFFE | 1 | page, cpu)
        sint = guest.rd(Msr.SINT0 + 2, cpu)
        guest.wr(Msr.SINT0 + 2, sint & ~(MASKED | 0xFF) | VECTOR, cpu)
        guest.wr(Msr.SCONTROL, guest.rd(Msr.SCONTROL, cpu) | 1, cpu)

    def disable_synic(self, cpu: int) -> None:
        guest = self.guest
        guest.wr(Msr.SINT0 + 2, guest.rd(Msr.SINT0 + 2, cpu) | MASKED, cpu)
        for msr in (Msr.SIMP, Msr.SIEFP):
            guest.wr(msr, guest.rd(msr, cpu) & 0xFFE, cpu)
        guest.wr(Msr.SCONTROL, guest.rd(Msr.SCONTROL, cpu) & ~1, cpu)

    def leave_hypervisor(self) -> None:
        """Write what hyperv_cleanup writes, in this order."""
        self.guest.wr(Msr.GUEST_OS_ID, 0)
        self.guest.wr(Msr.HYPERCALL, 0)
        self.guest.wr(Msr.REFERENCE_TSC, 0)


@pytest.fixture
def linux() -> Linux:
    guest = ScriptedGuest(vps=2)
    linux = Linux(guest)
    linux.boot()
    linux.load_bus()
    return linux


def answers_messages(linux: Linux) -> bool:
    """Return whether a message posted on VP 1 is answered by one to VP 0."""
    guest = linux.guest
    guest.vectors()
    guest.partition.connect_message_port(
        4, lambda vp, connection, payload: guest.synic.post_message(0, 2, payload[::-1])
    )
    assert guest.post(b"contact", connection=4, vp=1) == 0
    return guest.vectors() == [(0, VECTOR)] and guest.take_message(0) == b"tcatnoc"


def test_boot_order_of_linux(linux: Linux) -> None:
    guest = linux.guest
    assert guest.partition.refusals.counts == {}
    assert guest.memory.read(linux.hypercall_page, 4) == bytes.fromhex("f30f1efa")
    assert guest.rd(Msr.HYPERCALL, 1) == linux.hypercall_page | 1
    assert guest.rd(Msr.GUEST_OS_ID, 1) == LINUX_6_1
    assert guest.rd(Msr.SINT0 + 2, 1) == VECTOR
    assert answers_messages(linux)


def test_boot_with_the_least_features_needs_no_optional_msr() -> None:
    guest = ScriptedGuest(
        features=Features(
            reference_counter=False,
            reference_tsc=False,
            invariant_tsc=False,
            frequency=False,
            crash=False,
            reset=False,
        )
    )
    linux = Linux(guest)
    linux.start_cpu(0)
    guest.enable_hypercalls()
    linux.enable_synic(0)
    guest.synic.post_message(0, 2, b"hello")
    assert guest.take_message() == b"hello"
    with pytest.raises(GeneralProtection):
        guest.rd(Msr.CRASH_CTL)


def test_module_unload_and_load(linux: Linux) -> None:
    for cpu in (0, 1):
        linux.disable_synic(cpu)
    linux.guest.synic.signal_event(0, 2, 1)
    assert linux.guest.vectors() == []
    linux.load_bus()
    assert answers_messages(linux)


def test_cpu_taken_offline_and_online(linux: Linux) -> None:
    linux.disable_synic(1)
    assert answers_messages(linux)
    linux.enable_synic(1)
    linux.guest.vectors()
    linux.guest.synic.signal_event(1, 2, 3)
    assert linux.guest.vectors() == [(1, VECTOR)]


def test_kexec_leaves_in_order_and_the_new_kernel_starts_over(linux: Linux) -> None:
    guest = linux.guest
    linux.guest.synic.post_message(0, 2, b"never read")
    linux.guest.synic.post_message(0, 2, b"nor this")
    guest.synic.discard_messages()
    for cpu in (0, 1):
        linux.disable_synic(cpu)
        guest.wr(Msr.VP_ASSIST_PAGE, 0, cpu)
    linux.leave_hypervisor()
    assert guest.events.os_ids[-1] == 0
    assert guest.rd(Msr.HYPERCALL) == 0
    with pytest.raises(UndefinedOpcode):
        guest.vmcall(0x1005D, 2)
    guest.memory.write(linux.hypercall_page, b"reused by the new kernel")
    new = Linux(guest)
    new.boot()
    new.load_bus()
    assert answers_messages(new)
    assert guest.memory.read(linux.hypercall_page, 6) == b"reused"


def test_id_cleared_first_disables_the_hypercall_page_and_keeps_its_place(linux: Linux) -> None:
    guest = linux.guest
    guest.wr(Msr.GUEST_OS_ID, 0)
    assert guest.rd(Msr.HYPERCALL) == linux.hypercall_page
    with pytest.raises(UndefinedOpcode):
        guest.vmcall(0x1005D, 2)


def test_crash_of_one_cpu_polls_the_slots_of_all(linux: Linux) -> None:
    """The SynIC stays enabled on the other CPU; VP 0 finds and frees UNLOAD_RESPONSE in the slot of VP 1."""
    guest = linux.guest
    guest.synic.post_message(1, 2, b"offer")
    guest.synic.post_message(1, 2, b"another offer")
    guest.synic.discard_messages()
    guest.synic.post_message(1, 2, b"unload response")
    found = []
    for _ in range(3):
        slot = guest.slot(1)
        if slot.message_type:
            found.append(slot.payload[: slot.payload_size])
            if guest.free_slot(1):
                guest.eom(vp=0)
    assert found == [b"offer", b"unload response"]


def test_crash_kernel_on_another_processor(linux: Linux) -> None:
    guest = linux.guest
    linux.disable_synic(1)
    linux.leave_hypervisor()
    kdump = Linux(guest)
    kdump.boot()
    kdump.enable_synic(1)
    guest.vectors()
    guest.synic.post_message(1, 2, b"version response")
    assert guest.vectors() == [(1, VECTOR)]
    assert guest.take_message(1) == b"version response"


def test_hibernation_disables_and_enables_the_hypercall_page(linux: Linux) -> None:
    guest = linux.guest
    value = guest.rd(Msr.HYPERCALL)
    guest.wr(Msr.HYPERCALL, value & ~1)
    with pytest.raises(UndefinedOpcode):
        guest.vmcall(0x1005D, 2)
    guest.wr(Msr.HYPERCALL, value)
    assert guest.vmcall(0x1005D, 2) == 0x12
    assert len(guest.memory.code_writes) == 2


def test_machine_reset_is_power_on(linux: Linux) -> None:
    guest = linux.guest
    guest.synic.connect_event_port(0x2001, lambda: None)
    guest.partition.connect_message_port(4, lambda *message: None)
    guest.synic.post_message(0, 2, b"1")
    guest.synic.post_message(0, 2, b"2")
    guest.partition.reset()
    fresh = ScriptedGuest(vps=2)
    for msr in (
        *range(0x40000000, 0x40000002),
        Msr.REFERENCE_TSC,
        *range(0x40000080, 0x400000A0),
        0x40000118,
    ):
        if msr == 0x40000085 or 0x40000086 <= msr < 0x40000090:
            continue
        assert guest.rd(msr, 1) == fresh.rd(msr, 1), hex(msr)
    assert guest.synic.queued_messages(0, 2) == 0
    assert guest.events.os_ids[-1] == 0
    ram = bytes(guest.memory.ram)
    guest.synic.post_message(0, 2, b"3")
    guest.synic.signal_event(0, 2, 1)
    guest.timers.advance(10)
    assert bytes(guest.memory.ram) == ram
    guest.synic.discard_messages()
    again = Linux(guest)
    again.boot()
    again.load_bus()
    assert answers_messages(again)
    assert guest.vmcall(0x1005D, 0x2001) == 0


def test_status_has_the_guest_os_and_queued_messages(linux: Linux) -> None:
    guest = linux.guest
    guest.synic.post_message(1, 2, b"1")
    guest.synic.post_message(1, 2, b"2")
    guest.vmcall(0xFFFF)
    status = json.loads(json.dumps(guest.partition.status()))
    assert status["guest_os"] == "Linux 6.1.0"
    assert status["hypercall_page"] == {
        "enabled": True,
        "locked": False,
        "gpn": linux.hypercall_page // PAGE_SIZE,
    }
    assert status["vps"][1]["sints"]["2"]["queued"] == 1
    assert status["vps"][0]["synic_enabled"]
    assert status["counters"]["hypercall_failures"] == {"0x2": 1}
    assert status["refusals"] == {"hypercall-unknown": 1}
    assert status["reference_tsc"]["tsc_frequency"] == 2_000_000_000
