"""Disks that a snapshot of the machine takes in: :meth:`Device.snapshot_disks` returns them by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class DiskSnapshot:
    """The content of a disk at one moment. ``size``: bytes of the disk then."""

    name: str
    size: int


class SnapshotDisk(Protocol):
    """A disk that keeps its content under names.

    The guest is stopped and no request is under way in :meth:`save_snapshot` and :meth:`load_snapshot`; requests that
    come in :meth:`delete_snapshot` wait. All methods may block, and are called in any thread. They raise
    :class:`~vmbus.errors.UserError` or :class:`~vmbus.errors.DeviceError`.
    """

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    def snapshots(self) -> Sequence[DiskSnapshot]:
        """Return what is kept, while the guest may use the disk."""

    def save_snapshot(self, name: str) -> None:
        """Keep the content as ``name``, with all that was written, flushed or not."""

    def load_snapshot(self, name: str, *, keep: str | None = None) -> None:
        """Put the content of ``name`` back; before that, keep the present one as ``keep``. All of it or nothing."""

    def delete_snapshot(self, name: str) -> None:
        """Delete what is kept as ``name``."""
