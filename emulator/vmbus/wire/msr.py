"""Synthetic model-specific registers: numbers, reset values and layouts.

Source: docs/protocol/discovery.md#synthetic-msrs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import construct as c

from vmbus.wire.bits import BitRecord


class Msr(IntEnum):
    """Register numbers; SINTn is ``SINT0 + n``, STIMERn_CONFIG is ``STIMER0_CONFIG + 2 * n``."""

    GUEST_OS_ID = 0x40000000
    HYPERCALL = 0x40000001
    VP_INDEX = 0x40000002
    RESET = 0x40000003
    VP_RUNTIME = 0x40000010
    TIME_REF_COUNT = 0x40000020
    REFERENCE_TSC = 0x40000021
    TSC_FREQUENCY = 0x40000022
    APIC_FREQUENCY = 0x40000023
    VP_ASSIST_PAGE = 0x40000073
    SCONTROL = 0x40000080
    SVERSION = 0x40000081
    SIEFP = 0x40000082
    SIMP = 0x40000083
    EOM = 0x40000084
    SINT0 = 0x40000090
    STIMER0_CONFIG = 0x400000B0
    STIMER0_COUNT = 0x400000B1
    GUEST_IDLE = 0x400000F0
    CRASH_P0 = 0x40000100
    CRASH_CTL = 0x40000105
    REENLIGHTENMENT_CONTROL = 0x40000106
    TSC_EMULATION_CONTROL = 0x40000107
    TSC_EMULATION_STATUS = 0x40000108
    TSC_INVARIANT_CONTROL = 0x40000118


SINT_COUNT = 16
STIMER_COUNT = 4
CRASH_PARAMETER_COUNT = 5
SYNIC_VERSION = 1
SINT_RESET = 0x10000
"""Value of a SINT after reset: masked, vector 0."""


@dataclass(frozen=True, slots=True)
class HypercallPage:
    """HYPERCALL, 64 bits: the guest page that the hypercall page is placed at."""

    enable: bool
    locked: bool
    reserved: int
    gpn: int


HYPERCALL_PAGE = BitRecord(
    HypercallPage,
    "enable" / c.Flag,
    "locked" / c.Flag,
    "reserved" / c.BitsInteger(10),
    "gpn" / c.BitsInteger(52),
)


@dataclass(frozen=True, slots=True)
class PageRegister:
    """REFERENCE_TSC, VP_ASSIST_PAGE, SIEFP and SIMP, 64 bits each: a guest page and whether it is enabled."""

    enable: bool
    reserved: int
    gpn: int


PAGE_REGISTER = BitRecord(
    PageRegister, "enable" / c.Flag, "reserved" / c.BitsInteger(11), "gpn" / c.BitsInteger(52)
)


@dataclass(frozen=True, slots=True)
class Sint:
    """SINT0 to SINT15, 64 bits each: a synthetic interrupt source.

    Source: docs/protocol/discovery.md#synthetic-interrupt-sources.
    """

    vector: int
    masked: bool
    auto_eoi: bool
    polling: bool


SINT = BitRecord(
    Sint,
    "vector" / c.BitsInteger(8),
    "_reserved" / c.BitsInteger(8),
    "masked" / c.Flag,
    "auto_eoi" / c.Flag,
    "polling" / c.Flag,
    "_as_intercept" / c.Flag,
    "_proxy" / c.Flag,
    "_reserved_high" / c.BitsInteger(43),
)


@dataclass(frozen=True, slots=True)
class StimerConfig:
    """STIMERn_CONFIG, 64 bits: mode of a synthetic timer, and its effect when it expires (TLFS 12.3)."""

    enable: bool
    periodic: bool
    lazy: bool
    auto_enable: bool
    vector: int
    direct: bool
    sint: int


STIMER_CONFIG = BitRecord(
    StimerConfig,
    "enable" / c.Flag,
    "periodic" / c.Flag,
    "lazy" / c.Flag,
    "auto_enable" / c.Flag,
    "vector" / c.BitsInteger(8),
    "direct" / c.Flag,
    "_reserved" / c.BitsInteger(3),
    "sint" / c.BitsInteger(4),
    "_reserved_high" / c.BitsInteger(44),
)


@dataclass(frozen=True, slots=True)
class CrashControl:
    """CRASH_CTL, 64 bits; when read, ``message`` and ``notify`` are capabilities (TLFS 2.6)."""

    pre_os_id: int = 0
    no_dump: bool = False
    message: bool = False
    notify: bool = False


CRASH_CONTROL = BitRecord(
    CrashControl,
    "_reserved" / c.BitsInteger(58),
    "pre_os_id" / c.BitsInteger(3),
    "no_dump" / c.Flag,
    "message" / c.Flag,
    "notify" / c.Flag,
)


@dataclass(frozen=True, slots=True)
class OpenSourceOsId:
    """GUEST_OS_ID, 64 bits, of an open-source system (bit 63 set) (TLFS 3.6)."""

    build: int
    version: int
    distribution: int
    os_type: int
    open_source: bool


OPEN_SOURCE_OS_ID = BitRecord(
    OpenSourceOsId,
    "build" / c.BitsInteger(16),
    "version" / c.BitsInteger(32),
    "distribution" / c.BitsInteger(8),
    "os_type" / c.BitsInteger(7),
    "open_source" / c.Flag,
)


@dataclass(frozen=True, slots=True)
class ProprietaryOsId:
    """GUEST_OS_ID, 64 bits, of a proprietary system (bit 63 clear) (TLFS 3.6)."""

    build: int
    service_version: int
    minor: int
    major: int
    os_id: int
    vendor: int


PROPRIETARY_OS_ID = BitRecord(
    ProprietaryOsId,
    "build" / c.BitsInteger(16),
    "service_version" / c.BitsInteger(8),
    "minor" / c.BitsInteger(8),
    "major" / c.BitsInteger(8),
    "os_id" / c.BitsInteger(8),
    "vendor" / c.BitsInteger(15),
    "_open_source" / c.Flag,
)
