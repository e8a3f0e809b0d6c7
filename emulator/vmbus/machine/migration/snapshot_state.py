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

from vmbus.machine.migration.vmstate import HELPER_ID
from vmbus.machine.qemu.qcow2 import CannotLook, Entry, read_entries, read_header

_UNKNOWN_FEATURES = ~0b01011  # dirty, corrupt and the compression type do not matter here
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED = 1 << 62
_ZERO = 1
_TAIL = 16 << 20
"""Bytes at the end of the machine's state in which the emulator's is looked for."""
_MAX_STATE = 1 << 20
_MAX_L1 = 1 << 20
_MARK = struct.pack(">I", len(HELPER_ID)) + HELPER_ID.encode()


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
        self._header = header = read_header(file)
        if header.encrypted:
            raise CannotLook("it is encrypted")
        if header.features & _UNKNOWN_FEATURES:
            raise CannotLook(f"it has features ({header.features:#x}) that are not known here")
        self._bits: int = header.cluster_bits

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def tail(self, tag: str, limit: int) -> bytes:
        """Return the last bytes of the machine's state of a snapshot."""
        found = self._find(tag)
        l1_offset, l1_size, disk_size, size = (
            found.l1_offset,
            found.l1_size,
            found.disk_size,
            found.state_size,
        )
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

    def _find(self, tag: str) -> Entry:
        for entry in read_entries(self._file, self._header):
            if entry.name == tag.encode():
                return entry
        raise CannotLook(f"it has no snapshot {tag}")
