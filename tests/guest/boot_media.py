"""Media that firmware boots from: a FAT file system, and a CD-ROM with boot images for BIOS and UEFI.

They are written here, so that the tests need no tools of the machine. Sources: Microsoft, FAT: General Overview of
On-Disk Format 1.03 (FAT16); ECMA-119 (ISO 9660); El Torito Bootable CD-ROM Format 1.0; UEFI 2.10, 13.3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

SECTOR = 512
_CLUSTER = 8 * SECTOR
_ENTRIES = 512
"""Entries of the root directory."""
_END = 0xFFFF
_FOLDER, _FILE = 0x10, 0x20

BLOCK = 2048
"""Bytes of a block of a CD-ROM."""


@dataclass
class _Folder:
    files: dict[str, bytes] = field(default_factory=dict)
    folders: dict[str, _Folder] = field(default_factory=dict)


def _tree(files: Mapping[str, bytes]) -> _Folder:
    root = _Folder()
    for name, data in files.items():
        path = PurePosixPath(name)
        folder = root
        for part in path.parts[:-1]:
            folder = folder.folders.setdefault(part, _Folder())
        folder.files[path.name] = data
    return root


# --- FAT16 ---


def fat_image(files: Mapping[str, bytes]) -> bytes:
    """Return a FAT16 file system with ``files``, by paths of 8.3 names such as ``EFI/BOOT/BOOTX64.EFI``."""
    clusters: list[bytes] = []
    table = [0xFFF8, _END]

    def store(data: bytes) -> int:
        if not data:
            return 0
        count = -(-len(data) // _CLUSTER)
        first = len(table)
        table.extend([*range(first + 1, first + count), _END])
        clusters.extend(
            data[at : at + _CLUSTER].ljust(_CLUSTER, b"\0") for at in range(0, len(data), _CLUSTER)
        )
        return first

    def entries(folder: _Folder) -> bytes:
        found = b""
        for name, below in folder.folders.items():
            # The parent of a folder in `..` is never read by firmware; its own cluster is not known yet.
            dots = _fat_entry(b".".ljust(11), _FOLDER, 0, 0) + _fat_entry(b"..".ljust(11), _FOLDER, 0, 0)
            found += _fat_entry(_short(name), _FOLDER, store(dots + entries(below)), 0)
        for name, data in folder.files.items():
            found += _fat_entry(_short(name), _FILE, store(data), len(data))
        return found

    root = entries(_tree(files)).ljust(_ENTRIES * 32, b"\0")
    count = max(len(clusters), 4200)  # fewer than 4085 clusters are FAT12
    table_sectors = -(-(count + 2) * 2 // SECTOR)
    total = 1 + 2 * table_sectors + len(root) // SECTOR + count * _CLUSTER // SECTOR
    head = struct.pack(
        "<3s8sHBHBHHBHHHII",
        *(b"\xeb\x3c\x90", b"VMBUS   ", SECTOR, _CLUSTER // SECTOR, 1, 2, _ENTRIES),
        *(total if total < 0x10000 else 0, 0xF8, table_sectors, 32, 64, 0, total if total >= 0x10000 else 0),
    )
    head += struct.pack("<BBBI11s8s", 0x80, 0, 0x29, 0x1234, b"BOOT".ljust(11), b"FAT16   ")
    fat = struct.pack(f"<{len(table)}H", *table).ljust(table_sectors * SECTOR, b"\0")
    body = b"".join(clusters).ljust(count * _CLUSTER, b"\0")
    return head.ljust(SECTOR - 2, b"\0") + b"\x55\xaa" + fat + fat + root + body


def _short(name: str) -> bytes:
    stem, _, extension = name.upper().partition(".")
    assert len(stem) <= 8 and len(extension) <= 3, name
    return stem.ljust(8).encode() + extension.ljust(3).encode()


def _fat_entry(name: bytes, kind: int, cluster: int, size: int) -> bytes:
    return struct.pack("<11sB8xHHHHI", name, kind, 0, 0, 0x5821, cluster, size)


# --- ISO 9660 ---


def iso_image(
    files: Mapping[str, bytes], *, bios: str | None = None, efi: bytes | None = None, mbr: bytes = b""
) -> bytes:
    """Return a CD-ROM with ``files`` in its root directory.

    ``bios``: the file of a boot loader without emulation, which gets a boot information table. ``mbr``: code of
    ISOLINUX that starts the same loader from a disk. ``efi``: a FAT file system for UEFI.
    """
    catalogue, root_block, first = 19, 20, 21
    places: dict[str, int] = {}
    content: list[bytes] = []

    def place(data: bytes) -> int:
        block = first + sum(len(each) // BLOCK for each in content)
        content.append(data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0"))
        return block

    for name, data in files.items():
        if name == bios:
            at = first + sum(len(each) // BLOCK for each in content)
            data = with_boot_information(data, 16, at)
        places[name] = place(data)
    efi_block = place(efi) if efi is not None else 0

    records = _iso_record(b"\0", root_block, BLOCK, folder=True)
    records += _iso_record(b"\1", root_block, BLOCK, folder=True)
    for name in sorted(files, key=str.upper):
        records += _iso_record(f"{name.upper()};1".encode(), places[name], len(files[name]))
    assert len(records) <= BLOCK

    size = first + sum(len(each) // BLOCK for each in content)
    primary = bytearray(BLOCK)
    primary[:7] = b"\x01CD001\x01"
    primary[8:72] = b" " * 32 + b"VMBUS".ljust(32)
    primary[80:88] = _both(size, 4)
    primary[120:132] = _both(1, 2) + _both(1, 2) + _both(BLOCK, 2)
    primary[156:190] = _iso_record(b"\0", root_block, BLOCK, folder=True)
    primary[190:813] = b" " * 623
    primary[881] = 1
    boot = bytearray(BLOCK)
    boot[:7] = b"\x00CD001\x01"
    boot[7:39] = b"EL TORITO SPECIFICATION".ljust(32, b"\0")
    boot[71:75] = struct.pack("<I", catalogue)
    end = b"\xffCD001\x01".ljust(BLOCK, b"\0")
    entries = _boot_catalogue(places[bios] if bios is not None else None, efi_block, efi or b"")
    system_area = _hybrid(mbr, places[bios], size) if mbr and bios is not None else b""
    head = system_area.ljust(16 * BLOCK, b"\0") + bytes(primary) + bytes(boot) + end
    return head + entries.ljust(BLOCK, b"\0") + records.ljust(BLOCK, b"\0") + b"".join(content)


def with_boot_information(loader: bytes, descriptor: int, block: int) -> bytes:
    """Return a boot loader with the table in its bytes 8 to 63: where it is on the CD-ROM, and its checksum."""
    body = loader.ljust(-(-len(loader) // 4) * 4, b"\0")
    total = sum(word for (word,) in struct.iter_unpack("<I", body[64:])) & 0xFFFFFFFF
    return (
        loader[:8]
        + struct.pack("<IIII", descriptor, block, len(loader), total).ljust(56, b"\0")
        + loader[64:]
    )


def _hybrid(code: bytes, block: int, blocks: int) -> bytes:
    """Return a master boot record with ISOLINUX' ``code``, and one partition with the whole medium."""
    sectors = blocks * BLOCK // SECTOR
    head = code[:432].ljust(432, b"\0") + struct.pack("<QII", block * BLOCK // SECTOR, 0x1234, 0)[:14]
    partition = struct.pack("<B3sB3sII", 0x80, b"\0\1\0", 0x17, b"\xfe\xff\xff", 0, sectors)
    return head + partition + bytes(48) + b"\x55\xaa"


def _boot_catalogue(bios: int | None, efi: int, image: bytes) -> bytes:
    first_platform = 0 if bios is not None else 0xEF
    check = bytearray(struct.pack("<BBH24sHBB", 1, first_platform, 0, b"vmbus", 0, 0x55, 0xAA))
    total = -sum(word for (word,) in struct.iter_unpack("<H", check)) & 0xFFFF
    check[28:30] = struct.pack("<H", total)
    # UEFI 2.10, 13.3.2.1: sectors of 512 bytes; 0 and 1 stand for all until the end of the medium.
    sectors = len(image) // SECTOR if len(image) // SECTOR < 0x10000 else 0
    efi_entry = struct.pack("<BBHBBHI20x", 0x88, 0, 0, 0, 0, sectors, efi)
    if bios is None:
        return bytes(check) + efi_entry
    entry = struct.pack("<BBHBBHI20x", 0x88, 0, 0, 0, 0, 4, bios)
    if not image:
        return bytes(check) + entry
    return bytes(check) + entry + struct.pack("<BBH28s", 0x91, 0xEF, 1, b"UEFI") + efi_entry


def _both(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little") + value.to_bytes(size, "big")


def _iso_record(name: bytes, block: int, size: int, *, folder: bool = False) -> bytes:
    record = bytes(1) + _both(block, 4) + _both(size, 4) + bytes((126, 11, 28, 0, 0, 0, 0))
    record += bytes((2 if folder else 0, 0, 0)) + _both(1, 2) + bytes((len(name),)) + name
    record += bytes(len(record) % 2 == 0)
    return bytes((len(record) + 1,)) + record
