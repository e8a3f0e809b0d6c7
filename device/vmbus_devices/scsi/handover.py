"""Makes the data of disks safe before another emulator continues their guest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from vmbus.errors import DeviceError

from vmbus_devices.scsi.unit import LogicalUnit

TIMEOUT = 10.0
"""Seconds for all disks of a controller."""


def hand_over(units: Iterable[LogicalUnit]) -> None:
    """Write back what the host caches of the images of ``units``, and wait for that.

    The other emulator may be on another machine. Raises :class:`~vmbus.errors.DeviceError` if data would be lost.
    """
    end = time.monotonic() + TIMEOUT
    under_way = []
    for unit in units:
        errors: list[Exception] = []
        thread = threading.Thread(target=_write_back, args=(unit, errors), name="write-back", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise DeviceError(
                f"disk {unit.identity.serial}: its data cannot be made safe: {error}"
            ) from error
        under_way.append((unit, thread, errors))
    for unit, thread, errors in under_way:
        thread.join(max(end - time.monotonic(), 0))
        why = (
            str(errors[0])
            if errors
            else "the host's file system does not answer"
            if thread.is_alive()
            else ""
        )
        if why:
            raise DeviceError(
                f"disk {unit.identity.serial}: what was written is not safe in its image yet: {why}"
            )


def _write_back(unit: LogicalUnit, errors: list[Exception]) -> None:
    try:
        unit.backend.hand_over()
    except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
        errors.append(error)
