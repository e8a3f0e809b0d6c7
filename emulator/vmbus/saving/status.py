"""Results of saving and restoring: NTSTATUS values, and refusals with a stable reason and a sentence.

Source: docs/protocol/saving.md#status-values.

The KMCL functions return a status, which is too coarse for a log or for the person who started a migration. So every
refusal in this package is a :class:`StateRefused`, which has a status, a reason and a sentence.

Compare statuses by value and not by their severity bits: two results that mean success so far
(``STATUS_BUFFER_OVERFLOW``, ``STATUS_MORE_PROCESSING_REQUIRED``) are not of the success class.
"""

from __future__ import annotations

import enum

from vmbus.errors import VmbusError


class NtStatus(enum.IntEnum):
    """Status of a call, by its documented name; see :mod:`vmbus.saving.channel` for which function returns which."""

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


class Reason(enum.StrEnum):
    """Stable names of refusals, for logs, reports and tests."""

    DAMAGED = "damaged"
    """A magic number, a checksum or a record is not valid."""
    TRUNCATED = "truncated"
    """The bytes end within a chunk, or before the last chunk."""
    TRAILING_BYTES = "trailing-bytes"
    """Bytes follow the last chunk."""
    TOO_NEW = "too-new"
    """A format, a version or a flag of a later release."""
    TOO_OLD = "too-old"
    """A version that this release does not read any more."""
    UNKNOWN_KIND = "unknown-kind"
    """A kind of chunk of a later release that may not be skipped."""
    OUT_OF_ORDER = "out-of-order"
    """A chunk with an index above the expected one."""
    REPEATED = "repeated"
    """A chunk with an index below the expected one."""
    FOREIGN_SAVE = "foreign-save"
    """A chunk of another save run."""
    FOREIGN_CHANNEL = "foreign-channel"
    """Chunks of another channel."""
    INCONSISTENT = "inconsistent"
    """Valid chunks that contradict each other."""
    WRONG_STATE = "wrong-state"
    """The function may not be called in the present state of the channel, or with these arguments."""
    NO_RESTORE_CALLBACK = "no-restore-callback"
    """Packets were saved, and the device has no RestorePacket callback."""
    NOT_THERE = "not-there"
    """The state is of a channel or a section that this machine does not have."""
    NOT_ACCEPTED = "not-accepted"
    """The channel, the bus, the hypervisor section or guest memory does not accept the state."""
    DEVICE_FAILED = "device-failed"
    """A device's callback failed."""
    TOO_LARGE = "too-large"
    """More bytes than the transport carries."""
    REFUSED_AT_SOURCE = "refused-at-source"
    """The source sent a refusal instead of a state."""


class StateRefused(VmbusError):
    """A state that cannot be saved or restored.

    ``changed``: whether part of the state was applied before the refusal; otherwise nothing was changed.
    """

    def __init__(
        self,
        reason: Reason,
        detail: str,
        status: NtStatus = NtStatus.STATUS_INVALID_PARAMETER,
        *,
        changed: bool = False,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.status = status
        self.changed = changed
