"""Why a state is not taken or not given: a stable reason and a sentence.

The KMCL functions return a status, which is too coarse for a log or for the person who started a migration. So
everything in this package that refuses does it with a :class:`StateRefused`, which knows both.
"""

from __future__ import annotations

import enum

from vmbus.errors import VmbusError
from vmbus.saving.status import NtStatus


class Reason(enum.StrEnum):
    """Stable names of refusals."""

    DAMAGED = "damaged"
    """A magic number, a checksum or a record that is not what it claims to be."""
    TRUNCATED = "truncated"
    """Bytes end within a chunk, or before the last chunk."""
    TRAILING_BYTES = "trailing-bytes"
    """Something follows the last chunk."""
    TOO_NEW = "too-new"
    """A format, a version or a flag that this release does not know."""
    TOO_OLD = "too-old"
    """A version that is not read any more."""
    UNKNOWN_KIND = "unknown-kind"
    """A kind of chunk that this release does not know and may not skip."""
    OUT_OF_ORDER = "out-of-order"
    REPEATED = "repeated"
    FOREIGN_SAVE = "foreign-save"
    """A chunk of another save run."""
    FOREIGN_CHANNEL = "foreign-channel"
    """Chunks of another channel."""
    INCONSISTENT = "inconsistent"
    """Sound chunks that contradict each other, or what is here."""
    WRONG_STATE = "wrong-state"
    """Sound, but the channel is not in a state to take or give it."""
    NO_RESTORE_CALLBACK = "no-restore-callback"
    """Packets were saved, and the device has nothing that restores them."""
    NOT_THERE = "not-there"
    """The state is of a channel or a part that does not exist here."""
    NOT_ACCEPTED = "not-accepted"
    """The channel, the bus or the hypervisor part said no."""
    DEVICE_FAILED = "device-failed"
    """A device's callback failed."""
    TOO_LARGE = "too-large"
    """More than what carries it can hold."""
    REFUSED_AT_SOURCE = "refused-at-source"
    """Instead of a state the source sent why it could not save."""


class StateRefused(VmbusError):
    """A state cannot be saved, or cannot be restored; nothing was changed unless ``changed``."""

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
