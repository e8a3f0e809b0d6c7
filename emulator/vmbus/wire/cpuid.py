"""CPUID leaves of the hypervisor range, 0x40000000 to 0x400000FF.

Source: docs/protocol/discovery.md#cpuid-leaves, docs/protocol/discovery.md#privileges-and-features, TLFS 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import construct as c

from vmbus.wire.bits import BitRecord
from vmbus.wire.codec import Record

VENDOR = b"Microsoft Hv"
"""Leaf 0, EBX, ECX and EDX."""
INTERFACE_SIGNATURE = int.from_bytes(b"Hv#1", "little")
"""Leaf 1, EAX."""
NEVER_SPIN_WAIT = 0xFFFFFFFF
"""Leaf 4, EBX: the guest should never call HvNotifyLongSpinWait."""


class Leaf(IntEnum):
    """Numbers of the leaves of this emulator (TLFS 2.4)."""

    VENDOR = 0x40000000
    INTERFACE = 0x40000001
    VERSION = 0x40000002
    FEATURES = 0x40000003
    RECOMMENDATIONS = 0x40000004
    LIMITS = 0x40000005
    HARDWARE = 0x40000006


class Privilege(IntFlag):
    """Leaf 3, EAX: the synthetic MSRs that the partition may access (HV_PARTITION_PRIVILEGE_MASK, low half)."""

    VP_RUNTIME = 1 << 0
    TIME_REF_COUNT = 1 << 1
    SYNIC = 1 << 2
    SYNTHETIC_TIMERS = 1 << 3
    APIC = 1 << 4
    HYPERCALL = 1 << 5
    VP_INDEX = 1 << 6
    RESET = 1 << 7
    STATISTICS = 1 << 8
    REFERENCE_TSC = 1 << 9
    GUEST_IDLE = 1 << 10
    FREQUENCY = 1 << 11
    DEBUG = 1 << 12
    REENLIGHTENMENT = 1 << 13
    TSC_INVARIANT = 1 << 15


class PartitionFlag(IntFlag):
    """Leaf 3, EBX: the hypercalls that the partition may make (HV_PARTITION_PRIVILEGE_MASK, high half)."""

    ACCESS_PARTITION_ID = 1 << 1
    POST_MESSAGES = 1 << 4
    SIGNAL_EVENTS = 1 << 5
    EXTENDED_HYPERCALLS = 1 << 20
    ISOLATION = 1 << 22


class OptionalFeature(IntFlag):
    """Leaf 3, EDX: optional features that are present."""

    XMM_FAST_INPUT = 1 << 4
    FREQUENCY_MSRS = 1 << 8
    GUEST_CRASH_MSRS = 1 << 10
    SINT_POLLING = 1 << 17
    HYPERCALL_MSR_LOCK = 1 << 18
    STIMER_DIRECT = 1 << 19


class Recommendation(IntFlag):
    """Leaf 4, EAX: recommendations to the guest."""

    RESET_MSR = 1 << 4
    RELAXED_TIMING = 1 << 5
    DEPRECATE_AUTO_EOI = 1 << 9


@dataclass(frozen=True, slots=True)
class CpuidLeaf:
    """One leaf and the registers that CPUID returns for it; 20 bytes as a record."""

    leaf: int
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


CPUID_LEAF = Record(
    CpuidLeaf,
    "leaf" / c.Int32ul,
    "eax" / c.Int32ul,
    "ebx" / c.Int32ul,
    "ecx" / c.Int32ul,
    "edx" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class HostVersion:
    """Leaf 2, 128 bits: version of the hypervisor; guests only print it."""

    build: int = 20348
    minor: int = 0
    major: int = 10
    service_pack: int = 0
    service_number: int = 0
    service_branch: int = 0


HOST_VERSION = BitRecord(
    HostVersion,
    "build" / c.BitsInteger(32),
    "minor" / c.BitsInteger(16),
    "major" / c.BitsInteger(16),
    "service_pack" / c.BitsInteger(32),
    "service_number" / c.BitsInteger(24),
    "service_branch" / c.BitsInteger(8),
    width=128,
)
"""EAX in the lowest 32 bits, then EBX, ECX, EDX."""
