"""The registry of all installed devices, with the services of this machine that devices may use."""

from __future__ import annotations

from vmbus.devices.registry import Registry
from vmbus.machine.qemu.storage_daemon import QemuImages


def registry() -> Registry:
    """Return a registry whose devices can open images of QEMU's formats."""
    return Registry(services={"images": QemuImages()})
