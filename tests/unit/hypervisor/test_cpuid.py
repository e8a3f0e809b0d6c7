"""CPUID leaves.

Source: docs/protocol/discovery.md#cpuid-leaves, docs/protocol/discovery.md#published-cpuid-values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vmbus.hypervisor import Features, cpuid_table
from vmbus.wire.cpuid import CPUID_LEAF, CpuidLeaf, HostVersion, OptionalFeature, Privilege


def leaf(number: int, features: Features | None = None, vp_count: int = 2) -> CpuidLeaf:
    return {entry.leaf: entry for entry in cpuid_table(features or Features(), vp_count)}[number]


def test_vendor_leaf_spells_the_vendor_and_names_a_highest_leaf_that_linux_accepts() -> None:
    vendor = leaf(0x40000000)
    assert (vendor.ebx, vendor.ecx, vendor.edx) == (0x7263694D, 0x666F736F, 0x76482074)
    assert 0x40000005 <= vendor.eax <= 0x4000FFFF


def test_interface_leaf_is_hv1() -> None:
    assert leaf(0x40000001) == CpuidLeaf(0x40000001, 0x31237648)


def test_version_leaf_carries_each_part_where_it_belongs() -> None:
    version = HostVersion(
        build=0x11223344,
        minor=0x5566,
        major=0x7788,
        service_pack=9,
        service_number=0xABCDEF,
        service_branch=0x12,
    )
    found = leaf(0x40000002, Features(host_version=version))
    assert found == CpuidLeaf(0x40000002, 0x11223344, 0x77885566, 9, 0x12ABCDEF)


def test_default_privileges_are_the_recommended_set() -> None:
    features = leaf(0x40000003)
    # TIME_REF_COUNT, SynIC, hypercall, VP index, reset, reference TSC, frequencies, invariant TSC
    assert features.eax == 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 15
    assert features.ebx == 1 << 4 | 1 << 5
    assert features.edx == 1 << 8 | 1 << 10


def test_default_recommendations_are_relaxed_timing_no_auto_eoi_and_no_spin_wait() -> None:
    hints = leaf(0x40000004)
    assert hints.eax == 1 << 5 | 1 << 9
    assert hints.ebx == 0xFFFFFFFF


@pytest.mark.parametrize("vp_count", [1, 2, 255])
def test_limits_hold_as_many_processors_as_there_are(vp_count: int) -> None:
    limits = leaf(0x40000005, vp_count=vp_count)
    assert limits.eax == limits.ebx == vp_count


def test_minimum_set_is_what_the_bus_needs() -> None:
    minimum = Features(
        reference_counter=False,
        reference_tsc=False,
        invariant_tsc=False,
        frequency=False,
        crash=False,
        reset=False,
    )
    assert (leaf(0x40000003, minimum).eax, leaf(0x40000003, minimum).edx) == (0x64, 0)


@pytest.mark.parametrize(
    ("name", "register", "bit"),
    [
        ("vp_runtime", "eax", Privilege.VP_RUNTIME),
        ("stimer", "eax", Privilege.SYNTHETIC_TIMERS),
        ("sint_polling", "edx", OptionalFeature.SINT_POLLING),
        ("hypercall_lock", "edx", OptionalFeature.HYPERCALL_MSR_LOCK),
    ],
)
def test_a_feature_shows_as_its_bit(name: str, register: str, bit: int) -> None:
    assert not getattr(leaf(0x40000003), register) & bit
    changes: dict[str, Any] = {name: True}
    offered = dataclasses.replace(Features(), **changes)
    assert getattr(leaf(0x40000003, offered), register) & bit


def test_direct_timers_are_offered_only_with_timers() -> None:
    assert not leaf(0x40000003, Features(stimer_direct=True)).edx & OptionalFeature.STIMER_DIRECT
    both = Features(stimer=True, stimer_direct=True)
    assert leaf(0x40000003, both).edx & OptionalFeature.STIMER_DIRECT


def test_leaves_are_in_order_without_gaps_and_fit_their_wire_form() -> None:
    table = cpuid_table(Features(), 2)
    assert [entry.leaf for entry in table] == list(range(0x40000000, table[0].eax + 1))
    for entry in table:
        assert CPUID_LEAF.parse(CPUID_LEAF.build(entry)) == entry
