"""RAM of a guest that is not in the machine's memory backend: DIMMs, virtio-mem, NVDIMMs, at start or plugged later.

The emulator maps the file of the machine's memory backend alone. A guest that keeps a ring or a buffer elsewhere
would get errors (``not-ram``), or wait for ever in its boot. So a QEMU that was started with such RAM is not attached
to, and RAM that is plugged later becomes a problem with a name.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmbus.machine.qemu.qmp import Qmp

PERSISTENT = frozenset({"nvdimm", "virtio-pmem"})
"""Devices whose memory is a disk to the guest: only buffers that a program maps from it are out of reach."""

EVENTS = frozenset({"ACPI_DEVICE_OST", "MEMORY_DEVICE_SIZE_CHANGE", "DEVICE_DELETED"})
"""QMP events after which there may be more or less RAM. QEMU has none for a DIMM that is plugged, but passes on the
guest's answer to it (``_OST``)."""


@dataclass(frozen=True, slots=True)
class MemoryDevice:
    """A memory device of QEMU with ``size`` bytes of RAM, given or promised, from ``gpa`` on."""

    kind: str
    name: str
    gpa: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.size >> 20} MiB at {self.gpa:#x})"


async def memory_devices(qmp: Qmp) -> tuple[MemoryDevice, ...]:
    """Return the memory devices that have RAM for the guest; virtio-mem has none until it is asked for some."""
    found = []
    for each in await qmp.execute("query-memory-devices"):
        data = each["data"]
        size = max(int(data.get("size", 0)), int(data.get("requested-size", 0)))
        if size:
            gpa = int(data.get("addr", data.get("memaddr", 0)))
            found.append(MemoryDevice(each["type"], data.get("id") or each["type"], gpa, size))
    return tuple(found)


def out_of_reach(devices: tuple[MemoryDevice, ...]) -> str:
    """Return the sentence for RAM that the emulator cannot reach."""
    return (
        f"the guest has RAM outside the machine's memory backend, which the emulator cannot reach: "
        f"{', '.join(map(str, devices))}; channels and requests with pages there fail. Remove the device "
        "(device_del), or start QEMU with all of the guest's RAM in -m SIZE and its memory backend"
    )
