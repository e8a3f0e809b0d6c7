"""Kernels without their compression: taken from a bzImage, with a bound and a check of everything it says."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import stat
import struct
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zstandard
from vmbus.errors import UserError
from vmbus.provision import cache, unpacked
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


def test_a_cache_that_cannot_be_written_is_told_and_the_fastest_image_is_the_compressed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setenv("VMBUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "write_atomically", read_only)
    kernel = GuestKernel("debian-x", "6.12-x", bz_image(tmp_path / "vmlinuz", zstd(elf())), None)
    with pytest.raises(UserError, match=r"vmlinux-6.12-x: Read-only file system\): boot it compressed"):
        unpacked_kernel(kernel)
    assert fastest_image(kernel) == kernel.vmlinuz


def test_who_waits_for_a_setup_to_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = GuestKernel("debian-x", "6.12-x", bz_image(tmp_path / "vmlinuz", zstd(elf())), None)
    with ThreadPoolExecutor() as executor:
        with cache.locked(tmp_path / "cache"):
            made = executor.submit(unpacked_kernel, kernel, tmp_path / "cache")
            end = time.monotonic() + 10
            while not (said := capsys.readouterr().err) and time.monotonic() < end:
                time.sleep(0.01)
        assert made.result().is_file()
    assert "waiting for another use of the cache to end" in said


def test_a_name_that_was_exchanged_meanwhile_changes_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that another user can change, the name of a new file may soon be a link of theirs."""
    victim = tmp_path / "victim"
    victim.touch(mode=0o600)
    make = tempfile.mkstemp

    def exchanged(**words: Any) -> tuple[int, str]:
        handle, name = make(**words)
        Path(name).unlink()
        Path(name).symlink_to(victim)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", exchanged)
    cache.write_atomically(tmp_path / "cache/file", b"")
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


@pytest.mark.parametrize("value", ["~no-such-user/cache", None])
def test_a_user_without_a_home_folder_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("VMBUS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if value:
        monkeypatch.setenv("VMBUS_CACHE", value)
    else:
        monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(UserError, match="set VMBUS_CACHE"):
        cache.cache_folder()
