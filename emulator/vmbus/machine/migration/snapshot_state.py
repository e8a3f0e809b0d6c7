"""Reads the emulator's state out of a snapshot, before anything of the running guest is given up for it.

Source: docs/protocol/migration.md#dbus-vmstate; qcow2 as in QEMU's docs/interop/qcow2.rst.

QEMU has no command that shows what a snapshot contains. A snapshot's machine state is in the image's clusters behind
the virtual disk, through the snapshot's own L1 table; the emulator's part is near its end, behind guest memory:

    u32 length, "vmbus-emulator", u32 length, state        big-endian

Whoever makes an image may put anything there. What is found here is only checked; what is restored comes from QEMU.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from vmbus.errors import UserError
from vmbus.machine.migration.vmstate import HELPER_ID

_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQ")
_HEADER_V2 = 72
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_UNKNOWN_FEATURES = ~0b01011  # dirty, corrupt and the compression type do not matter here
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1
_MAX_SNAPSHOTS = 65536
_TAIL = 16 << 20
"""Bytes at the end of the machine's state in which the emulator's is looked for."""
_MAX_STATE = 1 << 20
_MAX_L1 = 1 << 20
_MARK = struct.pack(">I", len(HELPER_ID)) + HELPER_ID.encode()


class CannotLook(UserError):
    """An image that is not read here: of another format, or with features that are not known here."""


def read_state(image: Path, tag: str) -> bytes | None:
    """Return the emulator's state in snapshot ``tag`` of a qcow2 image; ``None`` if it has none.

    Raises :class:`CannotLook`.
    """
    try:
        with image.open("rb") as file:
            tail = _Image(file).tail(tag, _TAIL)
    except (OSError, OverflowError, ValueError, struct.error) as error:
        raise CannotLook(f"{image}: {error}") from error
    at = tail.rfind(_MARK)
    if at < 0:
        return None
    start = at + len(_MARK) + 4
    (length,) = struct.unpack(">I", tail[start - 4 : start].ljust(4, b"\0"))
    state = tail[start : start + length]
    return state if length <= _MAX_STATE and len(state) == length else None


class _Image:
    """A qcow2 image, as far as snapshots need it. Where it is damaged, this raises what reading it raises."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        header = file.read(_HEADER.size)
        magic, version, _, _, bits, self._size, crypt, _, _, _, _, count, table, features = _HEADER.unpack(
            header
        )
        if magic != _MAGIC or version not in (2, 3) or not 9 <= bits <= 21 or crypt:
            raise CannotLook("it is no plain qcow2 image")
        if version == 3 and features & _UNKNOWN_FEATURES:
            raise CannotLook(f"it has features ({features:#x}) that are not known here")
        self._bits: int = bits
        self._snapshots = (table, min(count, _MAX_SNAPSHOTS))

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def tail(self, tag: str, limit: int) -> bytes:
        """Return the last bytes of the machine's state of a snapshot."""
        l1_offset, l1_size, disk_size, size = self._find(tag)
        l2_bits = self._bits - 3
        covered = self._bits + l2_bits
        first = -(-disk_size // (1 << covered)) << covered
        if l1_size > _MAX_L1:
            raise CannotLook(f"a table of {l1_size} entries")
        l1 = struct.unpack(f">{l1_size}Q", self._at(l1_offset, 8 * l1_size))
        begin = first + max(size - limit, 0)
        parts = []
        for cluster in range(begin >> self._bits, -(-(first + size) >> self._bits)):
            index = cluster >> l2_bits
            table = l1[index] & _OFFSET if index < l1_size else 0
            entry = 0
            if table:
                (entry,) = struct.unpack(">Q", self._at(table + 8 * (cluster & ((1 << l2_bits) - 1)), 8))
            if entry & _COMPRESSED:
                raise CannotLook("it has compressed clusters")
            data = b""
            if entry & _OFFSET and not entry & _ZERO:
                data = self._at(entry & _OFFSET, 1 << self._bits)
            parts.append(data.ljust(1 << self._bits, b"\0"))
        whole = b"".join(parts)
        skip = begin & ((1 << self._bits) - 1)
        return whole[skip : skip + min(size, limit)]

    def _find(self, tag: str) -> tuple[int, int, int, int]:
        """Return offset and size of the L1 table, and the sizes of disk and machine state in bytes."""
        at, count = self._snapshots
        for _ in range(count):
            l1_offset, l1_size, id_size, name_size, _, _, _, vm_size, extra_size = _SNAPSHOT.unpack(
                self._at(at, _SNAPSHOT.size)
            )
            at += _SNAPSHOT.size
            extra = self._at(at, min(extra_size, 16)).ljust(16, b"\0")
            at += extra_size + id_size
            if self._at(at, name_size) == tag.encode():
                large, disk_size = struct.unpack(">QQ", extra)
                return (
                    l1_offset,
                    l1_size,
                    disk_size if extra_size >= 16 else self._size,
                    large if extra_size >= 8 else vm_size,
                )
            at = -(-(at + name_size) // 8) * 8
        raise CannotLook(f"it has no snapshot {tag}")
