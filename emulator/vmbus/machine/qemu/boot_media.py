"""What firmware boots from: a CD-ROM and a disk of QEMU's own, and the firmware itself.

SeaBIOS and OVMF have no driver for VMBus disks. So what they boot from is on QEMU's AHCI or IDE controller, as on
Hyper-V's first generation of virtual machines; the guest's disks on VMBus are beside it. The order is disk, CD-ROM:
an empty disk cannot be booted, and after an installation the installed system is.

Images are opened as everywhere: raw unless another format is named, and no file that an image itself names.
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbus.errors import DeviceError, UsageError
from vmbus.machine.qemu.image_files import FORMATS, check_names, name_for_json

FIRMWARE_NODE = "vmbus-firmware"
DISK_NODE = "vmbus-boot-disk"
CDROM_NODE = "vmbus-cdrom"

_BIOS_UNIT = 64 << 10
"""QEMU's ``-bios`` takes whole multiples of this many bytes."""


@dataclass(frozen=True, slots=True)
class BootDisk:
    """The image of a disk to boot from."""

    path: Path
    format: str = "raw"

    @classmethod
    def parse(cls, text: str) -> BootDisk:
        """Return the disk of ``FILE[,format=FORMAT]``; a comma in the name is doubled.

        Raises :class:`~vmbus.errors.UsageError`.
        """
        name, *pairs = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
        disk = cls(Path(name).absolute())
        for pair in pairs:
            key, _, value = pair.partition("=")
            if key != "format" or value not in FORMATS:
                raise UsageError(
                    f"--disk-boot {text}: {pair!r} is unknown; after the file only format= may follow, with one of "
                    f"{', '.join(FORMATS)}; a comma in a file name is written twice"
                )
            disk = cls(disk.path, value)
        if not name:
            raise UsageError(f"--disk-boot {text}: the name of an image is missing")
        return disk


@dataclass(frozen=True, slots=True)
class BootMedia:
    """What QEMU's own firmware, or another one, boots a guest from."""

    disk: BootDisk | None = None
    cdrom: Path | None = None
    firmware: Path | None = None

    def check(self) -> None:
        """Look whether the files can be used. Raises :class:`~vmbus.errors.UsageError`."""
        named = (
            ("--cdrom", self.cdrom),
            ("--firmware", self.firmware),
            ("--disk-boot", self.disk.path if self.disk is not None else None),
        )
        for option, path in named:
            if path is not None:
                _check_file(option, path)
                if option != "--firmware" or not _is_bios(path):
                    try:
                        name_for_json(path)
                    except DeviceError as error:
                        raise UsageError(f"{option} {error}") from error
        if self.disk is not None:
            try:
                check_names(self.disk.path, self.disk.format)
            except DeviceError as error:
                raise UsageError(
                    f"--disk-boot {self.disk.path}: the image names another file, and a disk to boot from must be "
                    "one file: convert it with `qemu-img convert`"
                ) from error

    def argv(self) -> list[str]:
        """Return QEMU's options for them."""
        line: list[str] = []
        if self.firmware is not None:
            line += _firmware(self.firmware)
        if self.disk is not None:
            line += _drive(DISK_NODE, self.disk.path, self.disk.format, "ide-hd", 0)
        if self.cdrom is not None:
            line += _drive(CDROM_NODE, self.cdrom, "raw", "ide-cd", 1)
        return line


NO_MEDIA = BootMedia()


def _check_file(option: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
        kind = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}; name a file that you can read") from error
    if not (stat.S_ISREG(kind) or (stat.S_ISBLK(kind) and option != "--firmware")):
        raise UsageError(f"{option} {path} is neither a file nor a block device; name an image")


def _firmware(path: Path) -> list[str]:
    """Return the options for a firmware. Its variables are in memory, unless the file has a place for them.

    ``-bios`` is for a whole image, such as OVMF.fd; OVMF's code without its variables has the size of no BIOS, and is
    a flash memory.
    """
    if _is_bios(path):
        return ["-bios", str(path)]
    node = _node(FIRMWARE_NODE, path, "raw", read_only=True)
    return ["-blockdev", json.dumps(node), "-machine", f"pflash0={FIRMWARE_NODE}"]


def _is_bios(path: Path) -> bool:
    return path.stat().st_size % _BIOS_UNIT == 0


def _drive(name: str, path: Path, format: str, device: str, order: int) -> list[str]:
    node = _node(name, path, format, read_only=device == "ide-cd")
    # The id is part of what a migration compares.
    return [
        "-blockdev",
        json.dumps(node),
        "-device",
        f"{device},id={name}-drive,drive={name},bootindex={order}",
    ]


def _node(name: str, path: Path, format: str, *, read_only: bool) -> dict[str, Any]:
    kind = "host_device" if stat.S_ISBLK(path.stat().st_mode) else "file"
    file = {"driver": kind, "filename": name_for_json(path), "read-only": read_only}
    node: dict[str, Any] = {"driver": format, "node-name": name, "read-only": read_only, "file": file}
    if format in ("qcow2", "qcow", "qed", "vmdk"):
        node["backing"] = None
    if not read_only:
        node["discard"] = file["discard"] = "unmap"
    return node
