"""Monitor pages and the interrupt page.

Source: docs/protocol/messages.md#monitor-pages, docs/protocol/messages.md#interrupt-page.

A monitor page has 4 trigger groups of 32 bits; monitor id m is bit ``m % 32`` of group ``m // 32``. The interrupt
page, used below version 2.4, has one bit per channel in each half: host to guest, then guest to host.
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record

MONITOR_GROUPS = 4
MONITORS_PER_GROUP = 32
MONITOR_COUNT = MONITOR_GROUPS * MONITORS_PER_GROUP

TRIGGER_GROUPS_OFFSET = 0x008
LATENCY_OFFSET = 0x240
PARAMETER_OFFSET = 0x440
"""Offsets in a monitor page, in bytes."""


@dataclass(frozen=True, slots=True)
class TriggerGroup:
    """32 monitored notifications, 8 bytes: bits of requested ones, and bits that the hypervisor has armed."""

    pending: int
    armed: int


TRIGGER_GROUP = Record(TriggerGroup, "pending" / c.Int32ul, "armed" / c.Int32ul)


@dataclass(frozen=True, slots=True)
class MonitorParameter:
    """Connection and event flag that a monitored notification signals, 8 bytes."""

    connection_id: int
    event_flag: int


MONITOR_PARAMETER = Record(
    MonitorParameter,
    "connection_id" / c.Int32ul,
    "event_flag" / c.Int16ul,
    "_reserved" / c.Padding(2),
)


@dataclass(frozen=True, slots=True)
class MonitorPage:
    """A monitor page, 4096 bytes; the arrays are raw bytes of the elements declared here."""

    trigger_state: int
    trigger_groups: bytes
    next_check_time: bytes
    latency: bytes
    parameters: bytes


MONITOR_PAGE = Record(
    MonitorPage,
    "trigger_state" / c.Int32ul,
    "_reserved1" / c.Padding(4),
    "trigger_groups" / c.Bytes(MONITOR_GROUPS * TRIGGER_GROUP.size),
    "_reserved2" / c.Padding(24),
    "next_check_time" / c.Bytes(MONITOR_COUNT * 4),
    "latency" / c.Bytes(MONITOR_COUNT * 2),
    "_reserved3" / c.Padding(256),
    "parameters" / c.Bytes(MONITOR_COUNT * MONITOR_PARAMETER.size),
    "_reserved4" / c.Padding(0x1000 - 0x840),
)

INTERRUPT_PAGE_HALF = 2048
HOST_TO_GUEST_BITS = 0
GUEST_TO_HOST_BITS = INTERRUPT_PAGE_HALF
"""Offsets of the halves of the interrupt page, in bytes."""
