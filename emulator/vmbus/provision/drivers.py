"""Which VMBus devices a kernel can drive, by which module, and what has to be loaded for it.

A driver that is linked into the kernel names its devices in ``modules.builtin.modinfo`` only in newer kernels; in
older ones it is known by the name that Linux gives it (the last column of :data:`DEVICES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vmbus.provision.kernel import GuestKernel, find_modules
from vmbus.provision.modules import Module, ModuleTree, vmbus_interfaces

BUS_MODULE = "hv_vmbus"


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """A VMBus device type (docs/protocol/messages.md#interface-guids), Linux's drivers for it, and the modules
    (``companions``) that make it usable for programs."""

    interface_id: UUID
    name: str
    modules: tuple[str, ...]
    companions: tuple[str, ...] = ()


DEVICES = (
    DeviceKind(UUID("57164f39-9115-4e78-ab55-382f3bd5422d"), "heartbeat", ("hv_utils",)),
    DeviceKind(UUID("0e0b6031-5213-4934-818b-38d90ced39db"), "shutdown", ("hv_utils",)),
    DeviceKind(UUID("9527e630-d0ae-497b-adce-e80ab0175caf"), "time synchronisation", ("hv_utils",)),
    DeviceKind(UUID("a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"), "key-value pairs", ("hv_utils",)),
    DeviceKind(UUID("35fa2e29-ea23-4236-96ae-3a6ebacba440"), "backup (VSS)", ("hv_utils",)),
    DeviceKind(UUID("34d14be3-dee4-41c8-9ae7-6b174977c192"), "file copy", ("hv_utils", "uio_hv_generic")),
    DeviceKind(
        UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"), "SCSI storage", ("hv_storvsc",), ("sd_mod", "sr_mod")
    ),
    DeviceKind(
        UUID("32412632-86cb-44a2-9b5c-50d1417354f5"), "IDE storage", ("hv_storvsc",), ("sd_mod", "sr_mod")
    ),
    DeviceKind(UUID("2f9bcc4a-0069-4af3-b76b-6fd0be528cda"), "Fibre Channel", ("hv_storvsc",), ("sd_mod",)),
    DeviceKind(UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e"), "network", ("hv_netvsc",)),
    DeviceKind(UUID("8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501"), "network direct", ("mana_ib",)),
    DeviceKind(UUID("525074dc-8985-46e2-8057-a307dc18a502"), "dynamic memory", ("hv_balloon",)),
    DeviceKind(UUID("f912ad6d-2b17-48ea-bd65-f927a61c7684"), "keyboard", ("hyperv_keyboard",), ("evdev",)),
    DeviceKind(
        UUID("cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a"), "mouse", ("hid_hyperv",), ("hid_generic", "evdev")
    ),
    DeviceKind(UUID("da0a7802-e377-4aac-8e77-0558eb1073f8"), "video", ("hyperv_drm", "hyperv_fb")),
    DeviceKind(UUID("44c4f61d-4444-4400-9d52-802e27ede19f"), "PCI pass-through", ("pci_hyperv",)),
    # Sockets have a GUID for each service; this one is the template of AF_VSOCK ports
    # (docs/protocol/messages.md#sockets).
    DeviceKind(UUID("00000000-facb-11e6-bd58-64006a7986d3"), "sockets (hvsock)", ("hv_sock",)),
)
_KINDS = {kind.interface_id: kind for kind in DEVICES}
_NAMED_BY_FLAG = ("hv_sock",)  # its driver has no GUID: it takes every offer with the pipe flag


@dataclass(frozen=True, slots=True)
class Driver:
    """One device type that a kernel can drive. ``load_order`` is empty if nothing has to be loaded."""

    interface_id: UUID
    device: str
    module: str
    builtin: bool
    load_order: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """What ``vmbus guest-info`` reports."""

    release: str
    modules: Path
    bus: str
    """The bus driver: "built-in", "module" or "absent"."""
    drivers: tuple[Driver, ...]
    missing: tuple[str, ...]
    """Device types that Linux supports, but this kernel has no driver for."""
    generic: tuple[str, ...]
    """Drivers that can be bound to any device type (uio_hv_generic)."""

    def as_json(self) -> dict[str, object]:
        return {
            "release": self.release,
            "modules": str(self.modules),
            "bus": self.bus,
            "devices": [
                {
                    "interface": str(driver.interface_id),
                    "device": driver.device,
                    "module": driver.module,
                    "builtin": driver.builtin,
                    "load_order": list(driver.load_order),
                }
                for driver in self.drivers
            ],
            "missing": list(self.missing),
            "generic": list(self.generic),
        }


def vmbus_drivers(tree: ModuleTree) -> tuple[Driver, ...]:
    """Return every (device type, driver) pair of a kernel, in the order of :data:`DEVICES`, unknown types last."""
    found: dict[tuple[UUID, str], Module] = {}
    for module in tree.likely_drivers():
        for wire in vmbus_interfaces(module):
            found[UUID(bytes_le=wire), module.name] = module
    for kind in DEVICES:
        for name in kind.modules:
            silent = name in tree.builtins or (name in _NAMED_BY_FLAG and tree.has(name))
            if silent and not any(known == name for _, known in found):
                found[kind.interface_id, name] = tree.module(name)
    order = {kind.interface_id: position for position, kind in enumerate(DEVICES)}
    return tuple(
        Driver(
            interface_id,
            _KINDS[interface_id].name if interface_id in _KINDS else "unknown",
            name,
            module.builtin,
            tuple(needed.name for needed in tree.load_order([name])),
        )
        for (interface_id, name), module in sorted(
            found.items(), key=lambda item: (order.get(item[0][0], len(order)), str(item[0][0]), item[0][1])
        )
    )


def modules_for(tree: ModuleTree, interfaces: Iterable[UUID]) -> tuple[str, ...]:
    """Return the modules with which a guest drives ``interfaces``: bus, drivers and companions.

    A device type without a driver in this kernel is skipped. The result is for ``build_initramfs(modules=...)``.
    """
    names = [BUS_MODULE] if tree.has(BUS_MODULE) else []
    wanted = set(interfaces)
    for driver in vmbus_drivers(tree):
        if driver.interface_id in wanted:
            kind = _KINDS.get(driver.interface_id)
            names += [driver.module, *(name for name in (kind.companions if kind else ()) if tree.has(name))]
    return tuple(dict.fromkeys(names))


def present(kernel: GuestKernel, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of ``names`` that this kernel has, as a module or built in; none if it came without modules."""
    if kernel.modules is None:
        return ()
    tree = ModuleTree(kernel.modules)
    return tuple(name for name in names if tree.has(name))


def guest_info(kernel_dir: Path) -> GuestInfo:
    """Return what the kernel in ``kernel_dir`` can drive: ``lib/modules/RELEASE``, or a folder above it.

    Raises :class:`~vmbus.errors.UsageError` if there are no modules.
    """
    folder = find_modules(kernel_dir)
    tree = ModuleTree(folder)
    drivers = vmbus_drivers(tree)
    driven = {driver.interface_id for driver in drivers}
    bus = "absent"
    if tree.has(BUS_MODULE):
        bus = "built-in" if tree.module(BUS_MODULE).builtin else "module"
    return GuestInfo(
        release=_release(tree),
        modules=folder,
        bus=bus,
        drivers=drivers,
        missing=tuple(kind.name for kind in DEVICES if kind.interface_id not in driven),
        generic=tuple(name for name in ("uio_hv_generic",) if tree.has(name)),
    )


def _release(tree: ModuleTree) -> str:
    """Return the release that the modules name; the name of the folder may be anything."""
    for name in sorted(tree.files):
        if release := tree.module(name).vermagic.split(" ", 1)[0]:
            return release
    return tree.folder.resolve().name
