"""Kernels without their compression: taken from a bzImage, with a bound and a check of everything it says."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from vmbus.provision import unpacked
from vmbus.provision.kernel import GuestKernel
from vmbus.provision.unpacked import CannotUnpack, fastest_image, unpack, unpacked_kernel

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_PT_NOTE = 4
_X86_64 = 62


def elf(*, note: int = 18, owner: bytes = b"Xen\0", machine: int = _X86_64) -> bytes:
    """An ELF file whose only segment has one note: what QEMU looks for in a kernel that it starts directly."""
    text = struct.pack("<III4sI", len(owner), 4, note, owner, 0x1000450)
    start = _ELF.size + _SEGMENT.size
    return (
        _ELF.pack(
            b"\x7fELF\2\1\1", 2, machine, 1, 0x1000000, _ELF.size, 0, 0, _ELF.size, _SEGMENT.size, 1, 64, 0, 0
        )
        + _SEGMENT.pack(_PT_NOTE, 4, start, start, start, len(text), len(text), 4)
        + text
    )


def xz(kernel: bytes) -> bytes:
    return lzma.compress(kernel, check=lzma.CHECK_CRC32) + struct.pack("<I", len(kernel))


def zstd(kernel: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(kernel) + struct.pack("<I", len(kernel))


def bz_image(path: Path, payload: bytes, *, protocol: int = 0x20F, length: int | None = None) -> Path:
    """A bzImage: one sector of set-up code, decompression code of 100 bytes, and the compressed kernel."""
    head = bytearray(2 * 512 + 100)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<II", head, 0x248, 100, len(payload) if length is None else length)
    path.write_bytes(bytes(head) + payload)
    return path


@pytest.mark.parametrize("compress", [gzip.compress, xz, zstd])
def test_the_kernel_comes_out_however_it_is_compressed(
    tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    assert unpack(bz_image(tmp_path / "vmlinuz", compress(elf()))) == elf()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (elf(note=17), "no PVH entry point"),
        (elf(owner=b"GNU\0"), "no PVH entry point"),
        (elf(machine=3), "no PVH entry point"),
        (b"no ELF file", "cannot be unpacked"),
        (elf()[:80], "cannot be unpacked"),
    ],
)
def test_a_kernel_that_qemu_cannot_start_is_refused(tmp_path: Path, kernel: bytes, reason: str) -> None:
    with pytest.raises(CannotUnpack, match=f"{reason}.*boot it compressed"):
        unpack(bz_image(tmp_path / "vmlinuz", xz(kernel)))


@pytest.mark.parametrize("compress", [gzip.compress, xz, zstd])
@pytest.mark.parametrize("damage", ["half is missing", "another size"])
def test_a_damaged_payload_is_refused(
    tmp_path: Path, compress: Callable[[bytes], bytes], damage: str
) -> None:
    data = compress(elf())
    payload = data[: len(data) // 2] + data[-4:] if damage == "half is missing" else data[:-1] + b"\x01"
    with pytest.raises(CannotUnpack, match="cannot be unpacked"):
        unpack(bz_image(tmp_path / "vmlinuz", payload))


def test_a_kernel_that_is_larger_than_it_says_is_not_decompressed_whole(tmp_path: Path) -> None:
    payload = lzma.compress(bytes(1 << 20)) + struct.pack("<I", 4096)
    with pytest.raises(CannotUnpack, match="cannot be unpacked"):
        unpack(bz_image(tmp_path / "vmlinuz", payload))


def test_a_kernel_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "MAX_KERNEL", 16)
    with pytest.raises(CannotUnpack, match="more than"):
        unpack(bz_image(tmp_path / "vmlinuz", xz(elf())))


@pytest.mark.parametrize(
    ("payload", "words", "reason"),
    [
        (b"\x02\x21\x4c\x18....", {}, "neither gzip, xz nor zstd"),
        (xz(elf()), {"protocol": 0x207}, "boot protocol 2.07"),
        (xz(elf()), {"length": 1 << 20}, "outside the file"),
        (b"", {}, "outside the file"),
    ],
)
def test_an_image_that_is_of_no_use_says_why(
    tmp_path: Path, payload: bytes, words: dict[str, int], reason: str
) -> None:
    with pytest.raises(CannotUnpack, match=reason):
        unpack(bz_image(tmp_path / "vmlinuz", payload, **words))


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(0x300)])
def test_a_file_that_is_no_bz_image_says_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "vmlinuz").write_bytes(data)
    with pytest.raises(CannotUnpack, match="no bzImage"):
        unpack(tmp_path / "vmlinuz")


def test_it_is_made_once_and_lies_beside_the_image(tmp_path: Path) -> None:
    kernel = GuestKernel("debian-x", "6.12-x", bz_image(tmp_path / "vmlinuz", zstd(elf())), None)
    path = unpacked_kernel(kernel, tmp_path / "cache")
    assert path == tmp_path / "vmlinux-6.12-x"
    assert path.read_bytes() == elf()
    kernel.vmlinuz.write_bytes(b"gone")
    assert unpacked_kernel(kernel, tmp_path / "cache") == path


def test_the_image_itself_boots_fastest_where_it_cannot_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBUS_CACHE", str(tmp_path / "cache"))
    kernel = GuestKernel("debian-x", "6.1-x", bz_image(tmp_path / "vmlinuz", b"\x02\x21\x4c\x18...."), None)
    assert fastest_image(kernel) == kernel.vmlinuz
