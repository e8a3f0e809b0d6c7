"""Unpacks the kernel in a compressed image, so that QEMU starts it directly and the guest need not decompress it.

A guest under TCG needs more than two seconds for its own decompression. QEMU loads an ELF kernel that has a PVH entry
point (CONFIG_PVH) in its place. Such a guest has no KASLR: the decompression code chooses the address. It cannot wake
from ACPI S3: QEMU loads the file anew at each reset, and a wake-up is one (QEMU 11.1.3, measured).

Sources: Linux ``Documentation/arch/x86/boot.rst`` (setup_sects, payload_offset, payload_length); Xen
``xen/include/public/elfnote.h`` (PHYS32_ENTRY).
"""

from __future__ import annotations

import io
import logging
import lzma
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import zstandard
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from vmbus.errors import UserError
from vmbus.provision import cache
from vmbus.provision.kernel import GuestKernel
from vmbus.provision.progress import say

_logger = logging.getLogger(__name__)

MAX_KERNEL = 256 << 20
"""Bytes of an unpacked kernel; those of Debian have some 60 MiB."""
_SECTOR = 512
_HEADER = 0x250
_PAYLOAD_PROTOCOL = 0x208
_PHYS32_ENTRY = 18


class CannotUnpack(UserError):
    """A kernel image from which no kernel can be taken that QEMU starts directly."""


def unpacked_kernel(kernel: GuestKernel, folder: Path | None = None) -> Path:
    """Return the file of an embedded guest's kernel without its compression; it is made at the first call.

    It lies beside the compressed image in the cache ``folder``, and is removed with it. Raises
    :class:`CannotUnpack`, and :class:`~vmbus.errors.UserError` where the cache cannot be written.
    """
    target = kernel.vmlinuz.with_name(f"vmlinux-{kernel.release}")
    if target.is_file():
        return target
    try:
        with cache.locked(
            folder or cache.cache_folder(), lambda: say("waiting for another use of the cache to end")
        ):
            if not target.is_file():
                cache.write_atomically(target, unpack(kernel.vmlinuz))
    except OSError as error:
        raise UserError(
            f"the kernel {kernel.release} cannot be unpacked into the cache ({error.filename}: {error.strerror}): "
            "boot it compressed, or set VMBUS_CACHE to a folder of yours"
        ) from error
    return target


def fastest_image(kernel: GuestKernel) -> Path:
    """Return the file of an embedded guest's kernel that boots fastest: unpacked where that is possible."""
    try:
        return unpacked_kernel(kernel)
    except UserError as reason:
        _logger.debug("%s", reason)
        return kernel.vmlinuz


def unpack(image: Path) -> bytes:
    """Return the ELF kernel in a bzImage. Raises :class:`CannotUnpack` with the reason."""
    data = image.read_bytes()
    try:
        kernel = _decompress(_payload(data))
        entry = _has_direct_entry(kernel)
    except (struct.error, ValueError, ELFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise CannotUnpack(f"{image}: its kernel cannot be unpacked ({error}): boot it compressed") from error
    if not entry:
        raise CannotUnpack(f"{image}: its kernel has no PVH entry point (CONFIG_PVH): boot it compressed")
    return kernel


def _payload(data: bytes) -> bytes:
    """Return the compressed kernel inside a bzImage, whose protocol is 2.08 or newer."""
    if len(data) < _HEADER or data[0x202:0x206] != b"HdrS":
        raise ValueError("it is no bzImage")
    (protocol,) = struct.unpack_from("<H", data, 0x206)
    if protocol < _PAYLOAD_PROTOCOL:
        raise ValueError(
            f"its boot protocol {protocol >> 8}.{protocol & 0xFF:02} does not say where the kernel is"
        )
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((data[0x1F1] or 4) + 1) * _SECTOR + offset
    if not length or start + length > len(data):
        raise ValueError("its header names a kernel outside the file")
    return data[start : start + length]


def _decompress(payload: bytes) -> bytes:
    for magic, decompress in _FORMATS.items():
        if payload.startswith(magic):
            # The build appends the size to what xz and zstd make; the last field of gzip is the same.
            (size,) = struct.unpack("<I", payload[-4:])
            if size > MAX_KERNEL:
                raise ValueError(f"it has {size} bytes, more than {MAX_KERNEL >> 20} MiB")
            kernel = decompress(payload, size)
            if len(kernel) != size:
                raise ValueError(f"it has {len(kernel)} bytes, and its trailer says {size}")
            return kernel
    raise ValueError("it is compressed with neither gzip, xz nor zstd")


def _gzip(payload: bytes, limit: int) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(payload, limit)


def _xz(payload: bytes, limit: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, limit)


def _zstd(payload: bytes, limit: int) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=MAX_KERNEL).stream_reader(payload) as stream:
        return stream.read(limit)


_FORMATS: Mapping[bytes, Callable[[bytes, int], bytes]] = {
    b"\x1f\x8b": _gzip,
    b"\xfd7zXZ\0": _xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def _has_direct_entry(kernel: bytes) -> bool:
    """Return whether a 64-bit x86 ELF file has the note with the address where QEMU starts it."""
    file = ELFFile(io.BytesIO(kernel))
    if file.elfclass != 64 or file.header["e_machine"] != "EM_X86_64":
        return False
    return any(
        note["n_name"] == "Xen" and note["n_type"] in (_PHYS32_ENTRY, "XEN_ELFNOTE_PHYS32_ENTRY")
        for segment in file.iter_segments()
        if isinstance(segment, NoteSegment)
        for note in segment.iter_notes()
    )
