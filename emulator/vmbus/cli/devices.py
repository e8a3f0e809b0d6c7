"""The devices of all installed packages, with what they may use of this machine."""

from __future__ import annotations

from vmbus.devices.registry import Registry
from vmbus.machine.qemu.storage_daemon import QemuImages


def registry() -> Registry:
    """Devices that are made by it can open images of QEMU's formats."""
    return Registry(services={"images": QemuImages()})
