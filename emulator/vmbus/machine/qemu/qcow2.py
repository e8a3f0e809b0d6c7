"""Reads the header of a qcow2 image and its table of internal snapshots; another process may have the image open.

Source: QEMU, docs/interop/qcow2.rst. Whoever makes an image may put anything there: reading is bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vmbus.errors import UserError

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_V2_LENGTH = 72
_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQ")
_MAX_SNAPSHOTS = 65536
MAX_TABLE = 64 << 20
"""Bytes of a table of snapshots, in QEMU as well."""


class CannotLook(UserError):
    """An image that is not read here: of another format, or with features that are not known here."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an image, as far as it is needed; sizes are in bytes."""

    cluster_bits: int
    size: int
    encrypted: bool
    features: int
    table: int
    """Offset of the table of snapshots."""
    count: int
    length: int
    """Bytes of the header itself; its extensions are behind it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One internal snapshot; sizes are in bytes."""

    name: bytes
    disk_size: int
    state_size: int
    l1_offset: int
    l1_size: int
    """Entries of its L1 table."""


def read_header(file: BinaryIO) -> Header:
    """Return the header. Raises :class:`CannotLook`, and ``struct.error`` for a file that is too short."""
    file.seek(0)
    magic, version, _, _, bits, size, crypt, _, _, _, _, count, table, features, *_, length = _HEADER.unpack(
        file.read(_HEADER.size)
    )
    if magic != MAGIC or version not in (2, 3) or not 9 <= bits <= 21:
        raise CannotLook("it is not a qcow2 image that can be read here (encrypted, or another format)")
    if version == 2:  # the fields behind are not there: the bytes belong to something else
        features, length = 0, _V2_LENGTH
    return Header(bits, size, bool(crypt), features, table, min(count, _MAX_SNAPSHOTS), length)


def read_entries(file: BinaryIO, header: Header) -> Iterator[Entry]:
    """Yield the snapshots. Of a damaged table raises :class:`CannotLook`, ``OSError`` or ``struct.error``."""
    at = header.table
    for _ in range(header.count):
        file.seek(at)
        l1_offset, l1_size, id_size, name_size, _, _, _, state_size, extra_size = _ENTRY.unpack(
            file.read(_ENTRY.size)
        )
        extra = file.read(min(extra_size, _EXTRA.size)).ljust(_EXTRA.size, b"\0")
        large, disk_size = _EXTRA.unpack(extra)
        at += _ENTRY.size + extra_size + id_size
        file.seek(at)
        yield Entry(
            file.read(name_size),
            disk_size if extra_size >= _EXTRA.size else header.size,
            large if extra_size >= _EXTRA.size // 2 else state_size,
            l1_offset,
            l1_size,
        )
        at = -(-(at + name_size) // 8) * 8
        if at - header.table > MAX_TABLE:
            raise CannotLook(f"its table of snapshots is larger than {MAX_TABLE >> 20} MiB")
