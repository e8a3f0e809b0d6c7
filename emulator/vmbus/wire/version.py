"""Versions of the VMBus protocol and the feature flags of version 6.0.

Source: docs/protocol/messages.md#versions.
"""

from __future__ import annotations

import enum


class Version(enum.IntEnum):
    """Protocol version as in INITIATE_CONTACT: bits 31:16 major, bits 15:0 minor number."""

    V1 = 0x0000_000D
    WIN7 = 0x0001_0001
    WIN8 = 0x0002_0004
    WIN8_1 = 0x0003_0000
    WIN10 = 0x0004_0000
    WIN10_RS3_0 = 0x0004_0001
    WIN10_RS3_1 = 0x0005_0000
    WIN10_RS4 = 0x0005_0001
    WIN10_RS5 = 0x0005_0002
    IRON = 0x0005_0003
    COPPER = 0x0006_0000

    def __str__(self) -> str:
        return f"{self >> 16}.{self & 0xFFFF}"


class Feature(enum.IntFlag):
    """Feature flags of INITIATE_CONTACT and VERSION_RESPONSE, 32 bits, from version 6.0 on."""

    GUEST_SPECIFIED_SIGNAL_PARAMETERS = 0x1
    CHANNEL_INTERRUPT_REDIRECTION = 0x2
    MODIFY_CONNECTION = 0x4
    CLIENT_ID = 0x8
    CONFIDENTIAL_CHANNELS = 0x10
    PAUSE_RESUME = 0x20
    SERVER_SPECIFIED_MONITOR_PAGES = 0x40
    GPA_PINNING = 0x80


NO_FEATURES = Feature(0)
ALL_FEATURES = Feature(0xFF)
