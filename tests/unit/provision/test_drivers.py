"""Which VMBus devices a kernel drives."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from vmbus.errors import UsageError
from vmbus.provision.drivers import guest_info, modules_for, present
from vmbus.provision.kernel import GuestKernel
from vmbus.provision.modules import ModuleTree

from tests.unit.provision.kernel_folder import HEARTBEAT_ALIAS, RELEASE, SCSI_ALIAS, KernelFolder

HEARTBEAT = UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
SCSI = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
PCI = UUID("44c4f61d-4444-4400-9d52-802e27ede19f")


@pytest.fixture
def kernel(tmp_path: Path) -> KernelFolder:
    return KernelFolder(tmp_path)


def test_a_module_drives_the_types_in_its_aliases(kernel: KernelFolder) -> None:
    kernel.module("kernel/drivers/hv/hv_vmbus.ko")
    kernel.module("kernel/drivers/hv/hv_utils.ko", HEARTBEAT_ALIAS, depends="hv_vmbus")
    info = guest_info(kernel.folder)
    (driver,) = info.drivers
    assert (driver.interface_id, driver.device) == (HEARTBEAT, "heartbeat")
    assert (driver.module, driver.builtin) == ("hv_utils", False)
    assert driver.load_order == ("hv_vmbus", "hv_utils")
    assert info.bus == "module"
    assert "SCSI storage" in info.missing
    assert "heartbeat" not in info.missing


def test_a_linked_in_driver_is_known_by_its_aliases(kernel: KernelFolder) -> None:
    kernel.builtin("hv_vmbus")
    kernel.builtin("hv_utils", HEARTBEAT_ALIAS)
    info = guest_info(kernel.folder)
    assert info.bus == "built-in"
    assert [(x.interface_id, x.builtin, x.load_order) for x in info.drivers] == [(HEARTBEAT, True, ())]


def test_a_linked_in_driver_without_aliases_is_known_by_its_name(kernel: KernelFolder) -> None:
    kernel.builtin("pci-hyperv", "license=GPL")
    assert [x.interface_id for x in guest_info(kernel.folder).drivers] == [PCI]


def test_a_kernel_without_the_bus_says_so(kernel: KernelFolder) -> None:
    kernel.module("kernel/lib/crc16.ko")
    info = guest_info(kernel.folder)
    assert (info.bus, info.drivers, info.release) == ("absent", (), RELEASE)


def test_a_driver_from_elsewhere_with_its_own_type_is_found(kernel: KernelFolder) -> None:
    kernel.module("extra/mydriver.ko", "alias=vmbus:" + UUID(int=7).bytes_le.hex())
    (driver,) = guest_info(kernel.folder).drivers
    assert (driver.device, driver.module, driver.interface_id) == ("unknown", "mydriver", UUID(int=7))


def test_modules_for_a_device_bring_what_makes_it_useful(kernel: KernelFolder) -> None:
    kernel.module("kernel/drivers/hv/hv_vmbus.ko")
    kernel.module("kernel/drivers/scsi/hv_storvsc.ko", SCSI_ALIAS, depends="hv_vmbus")
    kernel.module("kernel/drivers/scsi/sd_mod.ko")
    kernel.module("kernel/drivers/hv/hv_utils.ko", HEARTBEAT_ALIAS)
    assert modules_for(ModuleTree(kernel.folder), [SCSI, PCI]) == ("hv_vmbus", "hv_storvsc", "sd_mod")


def test_present_leaves_out_what_a_kernel_has_not(kernel: KernelFolder) -> None:
    kernel.module("kernel/drivers/hv/hv_vmbus.ko")
    guest = GuestKernel("own", RELEASE, Path("vmlinuz"), kernel.folder)
    assert present(guest, ["hv_vmbus", "hid_hyperv"]) == ("hv_vmbus",)
    assert present(GuestKernel("own", RELEASE, Path("vmlinuz"), None), ["hv_vmbus"]) == ()


def test_a_folder_above_the_modules_will_do(kernel: KernelFolder, tmp_path: Path) -> None:
    kernel.builtin("hv_vmbus")
    assert guest_info(tmp_path).modules == kernel.folder


def test_a_folder_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no kernel modules there"):
        guest_info(tmp_path)


def test_the_report_can_be_written_as_json(kernel: KernelFolder) -> None:
    kernel.builtin("hv_utils", HEARTBEAT_ALIAS)
    report = guest_info(kernel.folder).as_json()
    assert report["devices"] == [
        {
            "interface": str(HEARTBEAT),
            "device": "heartbeat",
            "module": "hv_utils",
            "builtin": True,
            "load_order": [],
        }
    ]
