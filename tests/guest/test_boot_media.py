"""Guests that firmware boots from a CD-ROM or a disk: they are Linux here, and find the same VMBus."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement
from vmbus.provision import cache
from vmbus.provision.apt import Archive
from vmbus.provision.firmware import find_firmware
from vmbus.provision.initramfs import KERNEL_ARGUMENTS, build_initramfs
from vmbus.provision.kernel import find_kernel
from vmbus.provision.mirror import find_mirror
from vmbus.provision.progress import Silent

from tests.guest.boot_media import fat_image, iso_image
from tests.guest.emulator import Emulator, asked
from tests.guest.harness import LOADED_MODULES
from tests.guest.matrix import full

pytestmark = pytest.mark.guest

KERNEL = "debian-6.12"
NAME = "booted"


def linux() -> dict[str, bytes]:
    """Return a kernel, and an initramfs that waits to be shut down, as files of a medium."""
    kernel = find_kernel(KERNEL)
    initrd = build_initramfs(kernel, modules=LOADED_MODULES)
    return {"VMLINUZ.EFI": kernel.vmlinuz.read_bytes(), "INITRD": initrd.read_bytes()}


def uefi_files() -> bytes:
    """Return a FAT file system with Linux, and the script that OVMF's shell runs when there is no boot loader."""
    words = rf"\VMLINUZ.EFI initrd=\INITRD {' '.join(KERNEL_ARGUMENTS)}"
    return fat_image({**linux(), "STARTUP.NSH": f"{words}\r\n".encode()})


def bios_cdrom(folder: Path) -> bytes:
    """Return a CD-ROM with Linux and ISOLINUX, which can be booted as a disk, too.

    ISOLINUX comes from the packages that the kernels come from.
    """
    with cache.locked(cache.cache_folder()):
        archive = Archive(cache.cache_folder() / "apt/trixie", "trixie", find_mirror(), Silent())
        archive.refresh()
        archive.unpack(
            archive.exact([archive.versions(name)[0] for name in ("isolinux", "syslinux-common")]), folder
        )
    library = folder / "usr/lib"
    settings = "DEFAULT linux\nLABEL linux\n KERNEL VMLINUZ.EFI\n INITRD INITRD\n"
    settings += f" APPEND {' '.join(KERNEL_ARGUMENTS)}\n"
    return iso_image(
        {
            "ISOLINUX.BIN": (library / "ISOLINUX/isolinux.bin").read_bytes(),
            "LDLINUX.C32": (library / "syslinux/modules/bios/ldlinux.c32").read_bytes(),
            "ISOLINUX.CFG": settings.encode(),
            **linux(),
        },
        bios="ISOLINUX.BIN",
        mbr=(library / "ISOLINUX/isohdpfx.bin").read_bytes(),
    )


async def heard(folder: Path, *words: str) -> str:
    """Run ``vmbus run WORDS`` until three heartbeats of the guest were answered; return its console."""
    console = folder / "console.txt"
    with tempfile.TemporaryDirectory(prefix="vm-") as name:  # short, for the sockets in it
        runtime = Path(name)
        guest = Emulator.start(runtime, "run", "--name", NAME, "--serial", str(console), *words, logs=folder)
        try:
            await guest.more_beats(NAME)
            await asked(runtime, "shutdown", NAME, logs=folder)
            assert (await guest.ended())[0] == 0, guest.errors
        finally:
            await guest.stop()
    return console.read_text(errors="replace")


@pytest.fixture(scope="module")
def ovmf() -> Path:
    try:
        return find_firmware()
    except MissingRequirement as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("medium", ["cdrom", full("disk")])
async def test_uefi_boots_linux_which_finds_its_vmbus(tmp_path: Path, ovmf: Path, medium: str) -> None:
    image = tmp_path / "image,1"
    image.write_bytes(iso_image({}, efi=uefi_files()) if medium == "cdrom" else uefi_files())
    named = str(image) if medium == "cdrom" else str(image).replace(",", ",,")
    words: Sequence[str] = ["--cdrom", named] if medium == "cdrom" else ["--disk-boot", named]
    console = await heard(tmp_path, *words, "--firmware", "ovmf")
    assert "efi: EFI v2" in console
    assert "Hypervisor detected: Microsoft Hyper-V" in console


@pytest.mark.full
@pytest.mark.parametrize("option", ["--cdrom", "--disk-boot"])
async def test_seabios_boots_a_boot_loader(tmp_path: Path, option: str) -> None:
    image = tmp_path / "cd.iso"
    image.write_bytes(bios_cdrom(tmp_path / "packages"))
    console = await heard(tmp_path, option, str(image))
    assert "ISOLINUX" in console
    assert "Hypervisor detected: Microsoft Hyper-V" in console
