"""The CPUID leaves of the hypervisor range.

Source: docs/protocol/discovery.md#cpuid-leaves, docs/protocol/discovery.md#published-cpuid-values.

A leaf of 0x40000000 to 0x400000FF that is not in the table is all zeros, so that no second hypervisor signature
appears at a higher base.
"""

from __future__ import annotations

from vmbus.hypervisor.features import Features
from vmbus.wire.cpuid import (
    HOST_VERSION,
    INTERFACE_SIGNATURE,
    NEVER_SPIN_WAIT,
    VENDOR,
    CpuidLeaf,
    Leaf,
    OptionalFeature,
    PartitionFlag,
    Privilege,
    Recommendation,
)

__all__ = ["CpuidLeaf", "cpuid_table"]


def cpuid_table(features: Features, vp_count: int) -> tuple[CpuidLeaf, ...]:
    """Return the leaves of :class:`~vmbus.wire.cpuid.Leaf`, in order of their numbers."""
    vendor = tuple(int.from_bytes(VENDOR[start : start + 4], "little") for start in (0, 4, 8))
    version = HOST_VERSION.build(features.host_version)
    return (
        CpuidLeaf(Leaf.VENDOR, max(Leaf), *vendor),
        CpuidLeaf(Leaf.INTERFACE, INTERFACE_SIGNATURE),
        CpuidLeaf(Leaf.VERSION, *(version >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96))),
        CpuidLeaf(
            Leaf.FEATURES, _privileges(features), _partition_flags(features), 0, _optional_features(features)
        ),
        CpuidLeaf(Leaf.RECOMMENDATIONS, _recommendations(features), NEVER_SPIN_WAIT),
        CpuidLeaf(Leaf.LIMITS, vp_count, vp_count),
        CpuidLeaf(Leaf.HARDWARE),
    )


def _privileges(features: Features) -> int:
    bits = Privilege.SYNIC | Privilege.HYPERCALL | Privilege.VP_INDEX
    for offered, bit in (
        (features.vp_runtime, Privilege.VP_RUNTIME),
        (features.reference_counter, Privilege.TIME_REF_COUNT),
        (features.stimer, Privilege.SYNTHETIC_TIMERS),
        (features.reset, Privilege.RESET),
        (features.reference_tsc, Privilege.REFERENCE_TSC),
        (features.frequency, Privilege.FREQUENCY),
        (features.invariant_tsc, Privilege.TSC_INVARIANT),
    ):
        if offered:
            bits |= bit
    return int(bits)


def _partition_flags(features: Features) -> int:
    bits = PartitionFlag(0)
    if features.post_messages:
        bits |= PartitionFlag.POST_MESSAGES
    if features.signal_events:
        bits |= PartitionFlag.SIGNAL_EVENTS
    return int(bits)


def _optional_features(features: Features) -> int:
    bits = OptionalFeature(0)
    for offered, bit in (
        (features.frequency, OptionalFeature.FREQUENCY_MSRS),
        (features.crash, OptionalFeature.GUEST_CRASH_MSRS),
        (features.sint_polling, OptionalFeature.SINT_POLLING),
        (features.hypercall_lock, OptionalFeature.HYPERCALL_MSR_LOCK),
        (features.stimer and features.stimer_direct, OptionalFeature.STIMER_DIRECT),
    ):
        if offered:
            bits |= bit
    return int(bits)


def _recommendations(features: Features) -> int:
    bits = Recommendation(0)
    if features.relaxed_timing:
        bits |= Recommendation.RELAXED_TIMING
    if features.deprecate_auto_eoi:
        bits |= Recommendation.DEPRECATE_AUTO_EOI
    return int(bits)
