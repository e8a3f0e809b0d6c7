"""Synthetic MSRs: existence, scope, reset values and refused values.

Source: docs/protocol/discovery.md#synthetic-msrs.
"""

from __future__ import annotations

from typing import Any

import pytest
from vmbus.errors import InternalError
from vmbus.hypervisor import Features, GeneralProtection, UndefinedOpcode, describe_guest_os
from vmbus.ports import PAGE_SIZE
from vmbus.wire.gateway import MSR_ADD_VCPU
from vmbus.wire.msr import Msr

from tests.unit.hypervisor.scripted_guest import AUTO_EOI, LINUX_6_1, MASKED, NOT_RAM, ScriptedGuest

EVERYTHING = Features(vp_runtime=True, stimer=True, stimer_direct=True)

RESET_VALUES = {
    Msr.GUEST_OS_ID: 0,
    Msr.HYPERCALL: 0,
    Msr.RESET: 0,
    Msr.REFERENCE_TSC: 0,
    Msr.VP_ASSIST_PAGE: 0,
    Msr.SCONTROL: 0,
    Msr.SVERSION: 1,
    Msr.SIEFP: 0,
    Msr.SIMP: 0,
    Msr.EOM: 0,
    Msr.SINT0: 0x10000,
    Msr.SINT0 + 15: 0x10000,
    Msr.STIMER0_CONFIG: 0,
    Msr.STIMER0_COUNT + 6: 0,
    Msr.CRASH_P0: 0,
    Msr.CRASH_P0 + 4: 0,
    Msr.CRASH_CTL: 3 << 62,
    Msr.TSC_INVARIANT_CONTROL: 0,
}


@pytest.mark.parametrize(("msr", "value"), RESET_VALUES.items())
def test_reset_value(msr: int, value: int) -> None:
    guest = ScriptedGuest(vps=2, features=EVERYTHING)
    assert [guest.rd(msr, vp) for vp in (0, 1)] == [value, value]


@pytest.mark.parametrize(
    "msr",
    [
        0x40000004,
        0x40000070,  # EOI, ICR, TPR
        0x40000071,
        0x40000072,
        0x40000085,  # SIRBP
        0x400000A0,
        0x400000B8,
        0x400000F0,  # GUEST_IDLE
        0x40000106,  # re-enlightenment
        0x40000107,
        0x40000108,
        0x40001080,  # nested
        0x10,
        0xC0000080,
    ],
)
def test_msr_that_is_never_offered_faults(msr: int) -> None:
    guest = ScriptedGuest(features=EVERYTHING)
    with pytest.raises(GeneralProtection):
        guest.rd(msr)
    with pytest.raises(GeneralProtection):
        guest.wr(msr, 0)
    assert guest.partition.refusals.counts["msr-not-offered"] == 2


@pytest.mark.parametrize(
    ("feature", "msrs"),
    [
        ("reset", [Msr.RESET]),
        ("reference_counter", [Msr.TIME_REF_COUNT]),
        ("reference_tsc", [Msr.REFERENCE_TSC]),
        ("frequency", [Msr.TSC_FREQUENCY, Msr.APIC_FREQUENCY]),
        ("invariant_tsc", [Msr.TSC_INVARIANT_CONTROL]),
        ("crash", [Msr.CRASH_P0, Msr.CRASH_P0 + 4, Msr.CRASH_CTL]),
        ("vp_runtime", [Msr.VP_RUNTIME]),
        ("stimer", [Msr.STIMER0_CONFIG, Msr.STIMER0_COUNT + 6]),
    ],
)
def test_msr_exists_exactly_when_its_feature_is_offered(feature: str, msrs: list[int]) -> None:
    offered: dict[str, Any] = {feature: True}
    refused: dict[str, Any] = {feature: False}
    with_it = ScriptedGuest(features=Features(**offered))
    without = ScriptedGuest(features=Features(**refused))
    for msr in msrs:
        with_it.rd(msr)
        with pytest.raises(GeneralProtection):
            without.rd(msr)


@pytest.mark.parametrize(
    "msr",
    [
        Msr.VP_INDEX,
        Msr.VP_RUNTIME,
        Msr.TIME_REF_COUNT,
        Msr.TSC_FREQUENCY,
        Msr.APIC_FREQUENCY,
        Msr.SVERSION,
    ],
)
def test_writing_a_read_only_msr_faults(msr: int) -> None:
    guest = ScriptedGuest(features=EVERYTHING)
    with pytest.raises(GeneralProtection):
        guest.wr(msr, 0)


def test_vp_index_is_the_processor() -> None:
    guest = ScriptedGuest(vps=3)
    assert [guest.rd(Msr.VP_INDEX, vp) for vp in range(3)] == [0, 1, 2]


def test_a_processor_that_does_not_exist_is_our_bug(guest: ScriptedGuest) -> None:
    with pytest.raises(InternalError):
        guest.rd(Msr.VP_INDEX, 1)


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (Msr.GUEST_OS_ID, LINUX_6_1),
        (Msr.REFERENCE_TSC, 0x20000 | 1),
        (Msr.TSC_INVARIANT_CONTROL, 1),
        (Msr.CRASH_P0 + 2, 0x123456789ABCDEF0),
    ],
)
def test_partition_msr_reads_the_same_on_every_processor(msr: int, value: int) -> None:
    guest = ScriptedGuest(vps=2)
    guest.wr(msr, value, vp=1)
    assert [guest.rd(msr, vp) for vp in (0, 1)] == [value, value]


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        (Msr.VP_ASSIST_PAGE, 0x21001),
        (Msr.SCONTROL, 1),
        (Msr.SIEFP, 0x21001 | 0xFFE),
        (Msr.SIMP, 0x22001 | 0x2A4),
        (Msr.SINT0 + 2, 0xF3),
        (Msr.SINT0 + 5, MASKED | 0xFF00),
    ],
)
def test_processor_msr_keeps_all_its_bits_and_leaves_the_other_processor_alone(msr: int, value: int) -> None:
    guest = ScriptedGuest(vps=2)
    before = guest.rd(msr, 0)
    guest.wr(msr, value, vp=1)
    assert guest.rd(msr, 1) == value
    assert guest.rd(msr, 0) == before


def test_frequencies_are_those_of_the_clock(guest: ScriptedGuest) -> None:
    assert guest.rd(Msr.TSC_FREQUENCY) == 2_000_000_000
    assert guest.rd(Msr.APIC_FREQUENCY) == 1_000_000_000


def test_reference_counter_counts_100_ns(guest: ScriptedGuest) -> None:
    guest.timers.advance(1.5)
    assert guest.rd(Msr.TIME_REF_COUNT) == 15_000_000


def test_assist_page_refuses_reserved_bits(guest: ScriptedGuest) -> None:
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.VP_ASSIST_PAGE, 0x21003)
    assert guest.rd(Msr.VP_ASSIST_PAGE) == 0


def test_assist_page_is_never_written(guest: ScriptedGuest) -> None:
    page = guest.page()
    guest.wr(Msr.VP_ASSIST_PAGE, page | 1)
    assert guest.memory.read(page, PAGE_SIZE) == b"\xa5" * PAGE_SIZE


def test_tsc_invariant_control_refuses_reserved_bits(guest: ScriptedGuest) -> None:
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.TSC_INVARIANT_CONTROL, 2)


def test_reset_register_notifies_the_owner_and_reads_zero(guest: ScriptedGuest) -> None:
    guest.wr(Msr.RESET, 0)
    guest.wr(Msr.RESET, 2)
    assert guest.events.resets == 0
    guest.wr(Msr.RESET, 1)
    assert guest.events.resets == 1
    assert guest.rd(Msr.RESET) == 0


# --- GUEST_OS_ID and HYPERCALL ---


def test_hypercall_page_holds_the_stub_and_breakpoints(guest: ScriptedGuest) -> None:
    page = guest.enable_hypercalls()
    content = guest.memory.read(page, PAGE_SIZE)
    assert content == bytes.fromhex("f30f1efa0f01c1c3") + b"\xcc" * (PAGE_SIZE - 8)
    assert guest.memory.code_writes == [(page, content)]


def test_hypercall_page_is_not_enabled_before_the_guest_identifies_itself(guest: ScriptedGuest) -> None:
    page = guest.page()
    guest.wr(Msr.HYPERCALL, page | 1)
    assert guest.rd(Msr.HYPERCALL) == page
    assert guest.memory.code_writes == []
    with pytest.raises(UndefinedOpcode):
        guest.vmcall(0x5C, 0x1000)


def test_lock_is_not_taken_before_the_guest_identifies_itself(guest: ScriptedGuest) -> None:
    guest.wr(Msr.HYPERCALL, 2)
    guest.enable_hypercalls()
    assert guest.rd(Msr.HYPERCALL) & 1


def test_rewriting_the_same_value_does_not_write_the_page_again(guest: ScriptedGuest) -> None:
    page = guest.enable_hypercalls()
    guest.wr(Msr.HYPERCALL, page | 1)
    assert len(guest.memory.code_writes) == 1


def test_moving_the_hypercall_page_fills_the_new_one_only(guest: ScriptedGuest) -> None:
    first = guest.enable_hypercalls()
    guest.memory.write(first, b"reused")
    second = guest.page()
    guest.wr(Msr.HYPERCALL, second | 1)
    assert [gpa for gpa, _ in guest.memory.code_writes] == [first, second]
    assert guest.memory.read(first, 6) == b"reused"


def test_hypercall_page_outside_ram_faults_and_changes_nothing(guest: ScriptedGuest) -> None:
    guest.wr(Msr.GUEST_OS_ID, LINUX_6_1)
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.HYPERCALL, NOT_RAM | 1)
    assert guest.rd(Msr.HYPERCALL) == 0


def test_disabled_hypercall_page_may_be_anywhere(guest: ScriptedGuest) -> None:
    guest.wr(Msr.HYPERCALL, NOT_RAM)
    assert guest.rd(Msr.HYPERCALL) == NOT_RAM


def test_locked_register_faults_until_reset(guest: ScriptedGuest) -> None:
    page = guest.enable_hypercalls()
    guest.wr(Msr.HYPERCALL, page | 3)
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.HYPERCALL, 0)
    guest.wr(Msr.GUEST_OS_ID, 0)
    assert guest.rd(Msr.HYPERCALL) == page | 3
    guest.partition.reset()
    assert guest.rd(Msr.HYPERCALL) == 0
    guest.enable_hypercalls()


def test_guest_os_events_follow_the_register(guest: ScriptedGuest) -> None:
    guest.wr(Msr.GUEST_OS_ID, LINUX_6_1)
    guest.wr(Msr.GUEST_OS_ID, 0)
    assert guest.events.os_ids == [LINUX_6_1, 0]


@pytest.mark.parametrize(
    ("os_id", "text"),
    [
        (0, "none"),
        (LINUX_6_1, "Linux 6.1.0"),
        (0x8100_0006_0CFF_0000, "Linux 6.12.255"),
        (0x8200_0000_0005_0000, "FreeBSD version 0x5 build 0"),
        (0x0001_040A_0000_4F7C, "Windows NT 10.0 build 20348 service 0"),
        (0x0002_0900_0000_0000, "vendor 2 system 9 0.0 build 0 service 0"),
        (0xFF00_0000_0000_0001, "open-source system 127 version 0x0 build 1"),
    ],
)
def test_guest_os_is_described(os_id: int, text: str) -> None:
    assert describe_guest_os(os_id) == text


# --- SINTs ---


@pytest.mark.parametrize("vector", [0, 15])
def test_low_vector_on_an_unmasked_sint_faults(guest: ScriptedGuest, vector: int) -> None:
    with pytest.raises(GeneralProtection):
        guest.wr(Msr.SINT0 + 2, vector)
    assert guest.rd(Msr.SINT0 + 2) == 0x10000
    guest.wr(Msr.SINT0 + 2, MASKED | vector)
    guest.wr(Msr.SINT0 + 2, 16)


def test_auto_eoi_vectors_are_notified_when_they_change(guest: ScriptedGuest) -> None:
    guest.wr(Msr.SINT0 + 2, AUTO_EOI | 0xF3)
    guest.wr(Msr.SINT0 + 3, AUTO_EOI | 0xF3)
    guest.wr(Msr.SINT0 + 4, AUTO_EOI | 0x40)
    guest.wr(Msr.SINT0 + 2, AUTO_EOI | MASKED | 0xF3)
    guest.wr(Msr.SINT0 + 3, 0xF3)
    assert guest.events.auto_eoi == [(0, {0xF3}), (0, {0xF3, 0x40}), (0, {0x40})]
    guest.partition.reset()
    assert guest.events.auto_eoi[-1] == (0, set())


def test_synic_changes_are_notified(guest: ScriptedGuest) -> None:
    guest.enable_synic()
    assert guest.events.synic_changes == [0, 0, 0, 0]


def test_constant_msrs_are_what_every_processor_reads(running: ScriptedGuest) -> None:
    constants = running.partition.constant_msrs()
    assert (
        {Msr.VP_INDEX, Msr.SVERSION} <= {each.msr for each in constants} <= set(running.partition.msr_numbers)
    )
    for each in constants:
        for vp in range(running.partition.vp_count):
            added = vp if each.flags & MSR_ADD_VCPU else 0
            assert running.partition.read_msr(vp, each.msr) == each.value + added
        with pytest.raises(GeneralProtection):
            running.partition.write_msr(0, each.msr, each.value)
