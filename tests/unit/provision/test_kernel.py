"""Guest kernels: the user's own, and those in the cache."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement, UsageError
from vmbus.provision import cache
from vmbus.provision.apt import Version
from vmbus.provision.kernel import (
    GUESTS,
    fetch_kernel,
    find_kernel,
    image_release,
    is_32_bit,
    own_kernel,
)

from tests.unit.provision.kernel_folder import RELEASE, KernelFolder


def bz_image(path: Path, release: str = RELEASE, *, protocol: int = 0x20F, load_flags: int = 1) -> Path:
    """The part of an x86 kernel image that names its release, and whether it is a 64-bit kernel."""
    text_at = 0x3000
    head = bytearray(text_at + 0x200)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<H", head, 0x20E, text_at)
    struct.pack_into("<H", head, 0x236, load_flags)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(head) + f"{release} (builder) #1 SMP".encode() + bytes(64))
    return path


def test_a_kernel_image_names_its_release(tmp_path: Path) -> None:
    assert image_release(bz_image(tmp_path / "vmlinuz")) == RELEASE


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(0x300)])
def test_a_file_that_is_no_kernel_image_names_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "vmlinux").write_bytes(data)
    assert image_release(tmp_path / "vmlinux") == ""


@pytest.mark.parametrize(
    ("protocol", "load_flags", "narrow"),
    [(0x20F, 0x7F, False), (0x20F, 0x7E, True), (0x20C, 0, True), (0x20B, 0, False)],
)
def test_a_32_bit_kernel_is_told_by_its_image(
    tmp_path: Path, protocol: int, load_flags: int, narrow: bool
) -> None:
    image = bz_image(tmp_path / "vmlinuz", protocol=protocol, load_flags=load_flags)
    assert is_32_bit(image) is narrow


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(0x300)])
def test_whether_another_file_is_a_32_bit_kernel_is_not_known(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "vmlinux").write_bytes(data)
    assert not is_32_bit(tmp_path / "vmlinux")


def test_own_modules_are_found_by_the_kernel_s_release(tmp_path: Path) -> None:
    modules = KernelFolder(tmp_path)
    (modules.folder.parent / "5.0-other/kernel").mkdir(parents=True)
    kernel = own_kernel(bz_image(tmp_path / "vmlinuz"), tmp_path)
    assert (kernel.release, kernel.modules) == (RELEASE, modules.folder)


def test_own_modules_of_several_other_releases_are_refused(tmp_path: Path) -> None:
    for release in ("5.0-a", "5.0-b"):
        (tmp_path / "lib/modules" / release / "kernel").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"5\.0-a, 5\.0-b, but the kernel is"):
        own_kernel(bz_image(tmp_path / "vmlinuz"), tmp_path)


def test_an_own_kernel_needs_no_modules(tmp_path: Path) -> None:
    assert own_kernel(bz_image(tmp_path / "vmlinuz")).modules is None


def test_an_own_kernel_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        own_kernel(tmp_path / "vmlinuz")


def test_an_unknown_guest_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=", ".join(GUESTS)):
        find_kernel("debian-99", tmp_path)


def test_a_guest_that_is_not_fetched_says_how(tmp_path: Path) -> None:
    with pytest.raises(MissingRequirement, match=r"vmbus setup --guest debian-6\.1"):
        find_kernel("debian-6.1", tmp_path)


class FakeArchive:
    """Offers a kernel in the packages that ``depends`` says, each of which unpacks to a part of it."""

    codename = "trixie"

    def __init__(self, offered: list[Version], depends: dict[str, str], parts: dict[str, list[str]]) -> None:
        self.offered, self.depends, self.parts = offered, depends, parts
        self.fetched: list[Version] = []
        self.forgotten: list[Path] = []

    def versions(self, package: str) -> list[Version]:
        return [version for version in self.offered if version.package == package]

    def field(self, package: Version, name: str) -> str:
        return self.depends.get(package.package, "") if name == "Depends" else ""

    def exact(self, packages: list[Version]) -> list[Path]:
        self.fetched = list(packages)
        return [Path(package.package) for package in packages]

    def unpack(self, files: list[Path], root: Path) -> None:
        for file in files:
            for part in self.parts[file.name]:
                if part.endswith("vmlinuz"):
                    bz_image(root / part, "7.3.4")
                else:
                    (root / part).mkdir(parents=True)
                    (root / part / "modules.builtin").touch()

    def forget(self, files: list[Path]) -> None:
        self.forgotten = files


META = "linux-image-cloud-amd64"


def test_a_kernel_that_is_split_over_packages_is_put_together(tmp_path: Path) -> None:
    archive = FakeArchive(
        [Version(META, "7.3-1", "trixie-backports/main"), Version(META, "6.12-1", "trixie/main")],
        {
            META: "linux-base-cloud-amd64 (= 7.3-1), linux-image-7.3.4-cloud (= 7.3-1)",
            "linux-image-7.3.4-cloud": "kmod, dracut | initramfs-tools, linux-binary-7.3.4-cloud (= 7.3-1), "
            "linux-modules-7.3.4-cloud (= 7.3-1)",
            "linux-modules-7.3.4-cloud": "kmod (>= 1), linux-image-7.3.4-cloud (= 7.3-1)",
        },
        {
            "linux-image-7.3.4-cloud": [],
            "linux-binary-7.3.4-cloud": ["usr/lib/modules/7.3.4/vmlinuz"],
            "linux-modules-7.3.4-cloud": ["usr/lib/modules/7.3.4"],
        },
    )
    archive.parts = dict(sorted(archive.parts.items(), reverse=True))
    archive.unpack = lambda files, root: FakeArchive.unpack(archive, sorted(files, reverse=True), root)  # type: ignore[method-assign]
    kernel = fetch_kernel("debian-backports", tmp_path, archive)  # type: ignore[arg-type]
    assert {version.package for version in archive.fetched} == set(archive.parts)
    assert kernel.release == "7.3.4"
    assert image_release(kernel.vmlinuz) == "7.3.4"
    assert kernel.modules is not None
    assert (kernel.modules / "modules.builtin").is_file()
    assert find_kernel("debian-backports", tmp_path) == kernel
    assert archive.forgotten


def test_a_newer_kernel_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for release in ("6.12.1", "6.12.2"):
        archive = FakeArchive(
            [Version(META, release, "trixie-security/main")],
            {META: f"linux-image-{release} (= {release})"},
            {f"linux-image-{release}": [f"lib/modules/{release}", "boot/vmlinuz"]},
        )
        fetch_kernel("debian-6.12", tmp_path, archive)  # type: ignore[arg-type]
    assert find_kernel("debian-6.12", tmp_path).release == "6.12.2"
    assert len(cache.complete_folders(tmp_path / "kernels/debian-6.12")) == 1


def test_a_suite_without_the_kernel_is_a_missing_requirement(tmp_path: Path) -> None:
    archive = FakeArchive([Version(META, "6.12-1", "trixie/main")], {}, {})
    with pytest.raises(MissingRequirement, match="trixie-backports"):
        fetch_kernel("debian-backports", tmp_path, archive)  # type: ignore[arg-type]


def test_packages_without_a_kernel_leave_nothing_behind(tmp_path: Path) -> None:
    archive = FakeArchive(
        [Version(META, "1", "trixie/main")],
        {META: "linux-image-1-x (= 1)"},
        {"linux-image-1-x": []},
    )
    with pytest.raises(Exception, match="lack a kernel image"):
        fetch_kernel("debian-6.12", tmp_path, archive)  # type: ignore[arg-type]
    assert not list((tmp_path / "kernels/debian-6.12").iterdir())
