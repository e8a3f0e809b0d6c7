"""The devices of all installed packages, with what they may use of this machine."""

from __future__ import annotations

from device.registry import Registry
from emulator.machine.storage_daemon import QemuImages


def registry() -> Registry:
    """Devices that are made by it can open images of QEMU's formats."""
    return Registry(services={"images": QemuImages()})
