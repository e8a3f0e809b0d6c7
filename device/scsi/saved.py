from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from device.scsi.controller import Scsi


def save_controller(controller: Scsi) -> bytes:
    return b""


def restore_controller(controller: Scsi, state: bytes) -> None:
    pass
