"""Kernel modules are read from their own files; the order of loading follows from them."""

from __future__ import annotations

import gzip
import lzma
import uuid
from pathlib import Path

import pytest
import zstandard
from vmbus.provision.modules import ModuleError, ModuleTree, read_module, vmbus_interfaces

from tests.unit.provision.elf_writer import kernel_module
from tests.unit.provision.kernel_folder import HEARTBEAT_ALIAS, RELEASE, KernelFolder

MODINFO = ("name=hv_utils", "depends=hv_vmbus", "softdep=pre: ptp post: late-comer", HEARTBEAT_ALIAS)


@pytest.fixture
def kernel(tmp_path: Path) -> KernelFolder:
    return KernelFolder(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".ko", bytes),
        (".ko.xz", lambda data: lzma.compress(data, check=lzma.CHECK_CRC32)),
        (".ko.zst", lambda data: zstandard.ZstdCompressor().compress(data)),
        (".ko.gz", gzip.compress),
    ],
)
def test_modinfo_is_read_however_it_is_compressed(tmp_path: Path, suffix: str, compress: object) -> None:
    assert callable(compress)
    path = tmp_path / f"hv-utils{suffix}"
    path.write_bytes(compress(kernel_module(*MODINFO, "vermagic=6.1 SMP")))
    module = read_module(path)
    assert module.name == "hv_utils"
    assert module.depends == ("hv_vmbus",)
    assert module.soft_before == ("ptp",)
    assert module.soft_after == ("late_comer",)
    assert module.vermagic == "6.1 SMP"


def test_the_name_is_the_file_name_where_modinfo_has_none(tmp_path: Path) -> None:
    path = tmp_path / "pci-hyperv-intf.ko"
    path.write_bytes(kernel_module("license=GPL"))
    assert read_module(path).name == "pci_hyperv_intf"


def test_a_vmbus_alias_is_the_guid_as_on_the_wire(tmp_path: Path) -> None:
    path = tmp_path / "hv_utils.ko"
    path.write_bytes(kernel_module(*MODINFO, "alias=pci:v*", "alias=vmbus:short"))
    (wire,) = vmbus_interfaces(read_module(path))
    assert uuid.UUID(bytes_le=wire) == uuid.UUID("57164f39-9115-4e78-ab55-382f3bd5422d")


@pytest.mark.parametrize(
    "data", [b"", b"no module", kernel_module("x=y", section=".other"), kernel_module()[:70]]
)
def test_a_file_that_is_no_module_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.ko"
    path.write_bytes(data)
    with pytest.raises(ModuleError, match=r"broken\.ko"):
        read_module(path)


@pytest.mark.parametrize("suffix", [".xz", ".zst", ".gz"])
def test_a_damaged_archive_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken.ko{suffix}"
    path.write_bytes(b"not compressed at all")
    with pytest.raises(ModuleError, match="broken"):
        read_module(path)


def test_modules_are_loaded_after_what_they_need(kernel: KernelFolder) -> None:
    kernel.module("kernel/scsi/scsi_common.ko")
    kernel.module("kernel/scsi/scsi_mod.ko", depends="scsi_common")
    kernel.module("kernel/drivers/hv/hv_vmbus.ko")
    kernel.module("kernel/scsi/hv_storvsc.ko", depends="scsi_mod,hv_vmbus")
    order = [module.name for module in ModuleTree(kernel.folder).load_order(["hv_storvsc", "hv-vmbus"])]
    assert order == ["scsi_common", "scsi_mod", "hv_vmbus", "hv_storvsc"]


def test_soft_dependencies_are_followed_where_they_exist(kernel: KernelFolder) -> None:
    kernel.module("kernel/a.ko", "softdep=pre: b nowhere post: c")
    kernel.module("kernel/b.ko")
    kernel.module("kernel/c.ko", "softdep=pre: a")
    assert [module.name for module in ModuleTree(kernel.folder).load_order(["a"])] == ["b", "a", "c"]


EXT4 = ("kernel/fs/ext4/ext4.ko", "softdep=pre: crc32c")
CRC = ("alias=crypto-crc32c-generic", "alias=crypto-crc32c", "alias=crc32c")


def crc_modules(kernel: KernelFolder) -> None:
    kernel.module(*EXT4)
    kernel.module("kernel/crypto/crc32c_generic.ko", *CRC)
    kernel.module("kernel/arch/x86/crypto/crc32c-intel.ko", *CRC[1:], "alias=cpu:type:x86,ven*")
    kernel.module("kernel/crypto/sha256_generic.ko", "alias=sha256")


@pytest.mark.parametrize("depmod", [False, True])
def test_a_soft_dependency_may_name_an_alias(kernel: KernelFolder, depmod: bool) -> None:
    """Of several modules, the one that every processor can use."""
    crc_modules(kernel)
    if depmod:
        (kernel.folder / "modules.alias").write_text(
            "# Aliases\nalias pci:v00008086d*sv* other\nalias crc32c crc32c_intel\nalias crc32c crc32c_generic\n"
        )
    order = [module.name for module in ModuleTree(kernel.folder).load_order(["ext4"])]
    assert order == ["crc32c_generic", "ext4"]


def test_a_soft_dependency_on_an_alias_of_what_is_linked_in_needs_nothing(kernel: KernelFolder) -> None:
    crc_modules(kernel)
    kernel.builtin("crc32c_generic", *CRC)
    assert [module.name for module in ModuleTree(kernel.folder).load_order(["ext4"])] == ["ext4"]


def test_without_a_generic_module_all_are_tried(kernel: KernelFolder) -> None:
    kernel.module(*EXT4)
    for name in ("crc32c_b", "crc32c_a"):
        kernel.module(f"kernel/crypto/{name}.ko", "alias=crc32c")
    order = [module.name for module in ModuleTree(kernel.folder).load_order(["ext4"])]
    assert order == ["crc32c_a", "crc32c_b", "ext4"]


def test_what_is_linked_in_is_not_loaded(kernel: KernelFolder) -> None:
    kernel.builtin("hv_vmbus")
    kernel.module("kernel/drivers/hv/hv_utils.ko", depends="hv_vmbus")
    assert [module.name for module in ModuleTree(kernel.folder).load_order(["hv_vmbus", "hv_utils"])] == [
        "hv_utils"
    ]


def test_a_circle_is_refused(kernel: KernelFolder) -> None:
    kernel.module("kernel/a.ko", depends="b")
    kernel.module("kernel/b.ko", depends="a")
    with pytest.raises(ModuleError, match="a -> b -> a"):
        ModuleTree(kernel.folder).load_order(["a"])


def test_an_unknown_module_is_refused_with_near_names(kernel: KernelFolder) -> None:
    kernel.module("kernel/drivers/hv/hv_utils.ko")
    with pytest.raises(ModuleError, match="did you mean hv_utils"):
        ModuleTree(kernel.folder).module("hv_util")


def test_an_update_goes_before_the_kernel_s_own_module(kernel: KernelFolder) -> None:
    kernel.module("kernel/drivers/hv/hv_vmbus.ko")
    newer = kernel.module("updates/dkms/hv_vmbus.ko")
    assert ModuleTree(kernel.folder).module("hv_vmbus").path == newer


def test_release_of_a_module_is_in_its_vermagic(kernel: KernelFolder) -> None:
    path = kernel.module("kernel/a.ko")
    assert read_module(path).vermagic.split()[0] == RELEASE
