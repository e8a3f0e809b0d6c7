"""NTSTATUS values that saving and restoring return, by their documented names.

Source: docs/protocol/saving.md#status-values. Compare values, never the severity bits: two results that
mean "fine so far" (``STATUS_BUFFER_OVERFLOW``, ``STATUS_MORE_PROCESSING_REQUIRED``) are not of the success class.
"""

from __future__ import annotations

import enum


class NtStatus(enum.IntEnum):
    """Status of a call; see :mod:`vmbus.saving.channel` for what each one means where."""

    STATUS_SUCCESS = 0x00000000
    STATUS_PENDING = 0x00000103
    STATUS_BUFFER_OVERFLOW = 0x80000005
    STATUS_UNSUCCESSFUL = 0xC0000001
    STATUS_INVALID_PARAMETER = 0xC000000D
    STATUS_MORE_PROCESSING_REQUIRED = 0xC0000016
    STATUS_BUFFER_TOO_SMALL = 0xC0000023
    STATUS_INSUFFICIENT_RESOURCES = 0xC000009A
    STATUS_NOT_SUPPORTED = 0xC00000BB
    STATUS_INVALID_PARAMETER_1 = 0xC00000EF
    STATUS_INVALID_PARAMETER_2 = 0xC00000F0
    STATUS_INVALID_PARAMETER_3 = 0xC00000F1
    STATUS_CANCELLED = 0xC0000120
    STATUS_INVALID_DEVICE_STATE = 0xC0000184
    STATUS_DEVICE_REMOVED = 0xC00002B6

    def __str__(self) -> str:
        return self.name
