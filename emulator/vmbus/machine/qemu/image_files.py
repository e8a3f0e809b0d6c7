"""The files of an image: those that the user named, and those that the image itself names.

An image is written by somebody, perhaps by a stranger or by a guest, and can name any file of the host: a backing
file, an external data file, the extents of a VMDK. QEMU follows such a name when it opens the image. Here a name in
an image opens nothing; it is compared with what the user allowed:

    | the image names       | opened                                                              |
    | a backing file        | with ``backing=on``, or if it is one of the files in ``backing=``   |
    | an external data file | never; instead the file that the user gives in ``data_file=``       |
    | extents (VMDK)        | with ``extents=on``                                                 |

    look at the header, open with ``backing: null`` ──▶ name of the next image ──▶ allowed? ──▶ again for that image
    open all images as one explicit tree of nodes ──▶ every file that the daemon has open is one of the tree

Sources of the layouts: QEMU, docs/interop/qcow2.rst; VMware, Virtual Disk Format 5.0.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from vmbus.errors import DeviceError
from vmbus.machine.qemu.qcow2 import CannotLook, read_header

MAX_IMAGES = 64
"""Images of one disk: itself, its backing file, the backing file of that, and so on."""
WITH_BACKING = ("qcow2", "qcow", "qed", "vmdk")
"""Formats that can name a backing file."""
FORMATS = (*WITH_BACKING, "raw", "vdi", "vhdx", "vpc", "parallels")
"""Formats of images and of backing files."""

_EXTERNAL_DATA = 1 << 2
_DATA_FILE_NAME = 0x44415441
_MAX_EXTENSIONS = 64
_VMDK_SPARSE = (b"KDMV", b"COWD")
_MAX_DESCRIPTOR = 1 << 20
_EXTENT = re.compile(rb'^RW\s+\S+\s+\S+\s+"([^"\r\n]+)"', re.MULTILINE)
_MAX_NAME = 1024

Execute = Callable[..., Any]
"""Executes a QMP command: name, and arguments as keywords. Raises :class:`~vmbus.errors.DeviceError`."""


class Image(Protocol):
    """The part of an image that is used here; the class is in device/vmbus_devices/scsi/image.py."""

    @property
    def path(self) -> Path: ...
    @property
    def format(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def share(self) -> bool: ...
    @property
    def discard(self) -> bool: ...
    @property
    def cache(self) -> Any: ...
    @property
    def detect_zeroes(self) -> Any: ...
    @property
    def backing(self) -> bool | Sequence[Path]: ...
    @property
    def data_file(self) -> Path | None: ...
    @property
    def extents(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Level:
    """One image of a disk, and the files that it consists of."""

    path: Path
    format: str
    files: tuple[str, ...]
    head: bytes | None
    """What its file began with: all that names other files; ``None``: they may be named elsewhere, too."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The images of a disk, one below the other, as they were found. Made by :func:`examine`."""

    levels: tuple[_Level, ...]

    def tree(self, image: Image) -> Tree:
        """Return the nodes of ``image``, which is opened as its user wants it."""
        node: dict[str, Any] | None = None
        for index, level in reversed(tuple(enumerate(self.levels))):
            node = _node(image, level, node, top=not index)
        return Tree(node or {}, {file for level in self.levels for file in level.files})

    def unchanged(self) -> bool:
        """Return whether it is certain that no image names other files than it did."""
        try:
            return all(
                level.head is not None and level.head == _head(level.path, level.format)
                for level in self.levels
            )
        except OSError:
            return False


_HEAD_SIZE = 1 << 16
"""Bytes in which a qcow2 names its files: of its first cluster, which is as long by default, and may be longer."""


def _head(path: Path, format: str) -> bytes | None:
    if format == "raw":
        return b""
    if format != "qcow2":
        return None
    with path.open("rb") as file:
        return file.read(_HEAD_SIZE)


@dataclass(slots=True)
class Tree:
    """The nodes of a disk, for ``blockdev-add``, and the only files that they may open."""

    node: dict[str, Any]
    files: set[str] = field(default_factory=set)

    def check(self, execute: Execute) -> None:
        """Compare with the nodes that the daemon has. Raises :class:`~vmbus.errors.DeviceError`."""
        for node in execute("query-named-block-nodes", flat=True):
            if node["drv"] not in FORMATS and node["file"] not in self.files:
                raise DeviceError(
                    f"the image opens {shown(node['file'])}, which image=, data_file= and backing= do not allow"
                )


def shown(name: str) -> str:
    """Return a name out of an image for a message: printable, and not longer than 200 characters."""
    text = name.encode(errors="replace").decode(errors="replace")
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def name_for_json(path: Path) -> str:
    """Return the absolute name of a file as QEMU's JSON has it, whose strings are UTF-8.

    Raises :class:`~vmbus.errors.DeviceError` for any other name: QEMU would refuse the text without a word of it.
    """
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DeviceError(
            f"{shown(name)}: the name is not valid UTF-8, and QEMU's JSON can express no other; rename the file, or "
            "make a link with another name to it, or to its folder"
        ) from None
    return name


def file_node(path: Path, image: Image, *, read_only: bool) -> dict[str, Any]:
    """Return the node of a file or a block device that the user named.

    Raises ``OSError``, and :class:`~vmbus.errors.DeviceError` for a name that QEMU cannot be given.
    """
    kind = "host_device" if stat.S_ISBLK(path.stat().st_mode) else "file"
    return {"driver": kind, "filename": name_for_json(path), **_common(path, image, read_only=read_only)}


def _common(path: Path, image: Image, *, read_only: bool) -> dict[str, Any]:
    direct = image.cache.value in ("none", "directsync") and _direct_io(path)
    return {
        "discard": "unmap" if image.discard else "ignore",
        "cache": {"direct": direct, "no-flush": image.cache.value == "unsafe"},
        "read-only": read_only,
    }


def _direct_io(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def examine(image: Image, execute: Execute) -> Chain:
    """Return ``image`` and the images under it.

    Raises :class:`~vmbus.errors.DeviceError` if they name files that the user did not allow, ``OSError`` for files
    that cannot be read.
    """
    levels: list[_Level] = []
    path, format = image.path, image.format
    while True:
        level, backing, backing_format = _look(image, path, format, execute, first=not levels)
        levels.append(level)
        if backing is None:
            break
        if len(levels) == MAX_IMAGES:
            raise DeviceError(f"it has more than {MAX_IMAGES} backing files, one below the other")
        path, format = _allowed(image, path, backing), _format(path, format, backing, backing_format)
    return Chain(tuple(levels))


def _look(
    image: Image, path: Path, format: str, execute: Execute, *, first: bool
) -> tuple[_Level, str | None, str | None]:
    """Look at one image; return it, the full name of its backing file, and the format of that."""
    try:
        check_names(path, format, data_file=first and image.data_file is not None, extents=image.extents)
    except DeviceError as error:
        raise DeviceError(f"{error}" if first else f"in its backing file {path}: {error}") from None
    head = _head(path, format)  # before all that is concluded from it
    node = _look_at(image, path, format, first=first)
    execute("blockdev-add", **node)
    try:
        nodes = {each["node-name"]: each for each in execute("query-named-block-nodes", flat=True)}
        found = nodes[node["node-name"]]
        allowed = [str(path.absolute())]
        if first and image.data_file is not None:
            allowed.append(str(image.data_file.absolute()))
        for child in found.get("children", ()):
            name = nodes[child["node-name"]]["file"]
            if child["child"].startswith("extents.") and image.extents:
                allowed.append(name)
            elif name not in allowed:
                raise DeviceError(
                    f"the image {path} opens {shown(name)}, which image=, data_file= and extents= do not allow"
                )
    finally:
        execute("blockdev-del", **{"node-name": node["node-name"]})
    about = found["image"]
    backing = about.get("full-backing-filename") or about.get("backing-filename")
    return _Level(path, format, tuple(allowed), head), backing, about.get("backing-filename-format")


def _look_at(image: Image, path: Path, format: str, *, first: bool) -> dict[str, Any]:
    node = {
        "driver": format,
        "node-name": "examined",
        "read-only": True,
        "force-share": True,
        "file": file_node(path, image, read_only=True),
    }
    if format in WITH_BACKING:
        node["backing"] = None
    if first and format == "qcow2" and image.data_file is not None:
        node["data-file"] = file_node(image.data_file, image, read_only=True)
    return node


def _allowed(image: Image, path: Path, name: str) -> Path:
    """Return the backing file with the full name ``name``, of the image ``path``, if the user allows it."""
    here = "it names" if path == image.path else f"its backing file {path} names"
    if image.backing is False:
        raise DeviceError(
            f"{here} the backing file {shown(name)}; add backing=on if you trust it, or backing= with the path of "
            "each file that it may use"
        )
    found = Path(name)
    if not found.is_absolute() or not found.exists():
        raise DeviceError(f"{here} the backing file {shown(name)}, which is not a file on this machine")
    if image.backing is True:
        return found
    for each in image.backing:
        if each.resolve() == found.resolve():
            return each.resolve()
    raise DeviceError(f"{here} the backing file {shown(name)}, which is not one of the files in backing=")


def _format(path: Path, format: str, name: str, recorded: str | None) -> str:
    """Return the format of a backing file. A guess would let a guest choose: it can write to a raw file."""
    if format == "vmdk":
        return "vmdk"
    if recorded is None:
        raise DeviceError(
            f"{path} does not say which format its backing file {shown(name)} has; "
            "write that into it with `qemu-img rebase -u -F FORMAT -b FILE`, or convert it"
        )
    if recorded not in FORMATS:
        raise DeviceError(
            f"the backing file {shown(name)} has the format {shown(recorded)}, not one of these: "
            f"{', '.join(FORMATS)}"
        )
    return recorded


def _node(image: Image, level: _Level, backing: dict[str, Any] | None, *, top: bool) -> dict[str, Any]:
    read_only = image.read_only or not top
    node: dict[str, Any] = {
        "driver": level.format,
        "file": file_node(level.path, image, read_only=read_only),
        **_common(level.path, image, read_only=read_only),
    }
    if level.format in WITH_BACKING:
        node["backing"] = backing
    if top:
        node["node-name"] = "image"
        node["force-share"] = image.share
        node["detect-zeroes"] = "off" if image.read_only else image.detect_zeroes.value
        if image.data_file is not None:
            node["data-file"] = file_node(image.data_file, image, read_only=read_only)
    return node


# --- headers ---


def check_names(path: Path, format: str, *, data_file: bool = False, extents: bool = False) -> None:
    """Refuse an image of which QEMU would open more than itself, apart from a backing file.

    ``data_file``: the user names the external data file; ``extents``: the user allows a VMDK to name its extents.

    Raises :class:`~vmbus.errors.DeviceError`, and ``OSError`` for a file that cannot be read.
    """
    if format == "qcow2":
        name = external_data_file(path)
        if name is not None and not data_file:
            what = f"the file {shown(name)}" if name else "another file"
            raise DeviceError(
                f"it keeps its data in {what}; add data_file= with the path of that file if you trust it"
            )
        if name is None and data_file:
            raise DeviceError("it has no external data file; remove data_file=")
    elif format == "vmdk" and not extents:
        names = extent_names(path)
        if names == []:
            raise DeviceError("it is not a VMDK of one file; write the format that it has (format=)")
        if names is not None:
            what = ", ".join(shown(each) for each in names[:4])
            raise DeviceError(
                f"it is a descriptor, and its data are in {what}; add extents=on if you trust it, or convert "
                "it to one file with `qemu-img convert`"
            )


def external_data_file(path: Path) -> str | None:
    """Return the name of the external data file in a qcow2, empty if it says none; ``None`` if it has none."""
    with _opened(path) as file:
        try:
            header = read_header(file)
        except (CannotLook, struct.error):  # QEMU does not open it as a qcow2 either
            return None
        if not header.features & _EXTERNAL_DATA:
            return None
        at = header.length
        for _ in range(_MAX_EXTENSIONS):
            file.seek(at)
            kind, length = (int.from_bytes(file.read(4), "big") for _ in range(2))
            if kind == _DATA_FILE_NAME:
                return file.read(min(length, _MAX_NAME)).decode(errors="replace")
            if not kind:
                break
            at += 8 + (length + 7) // 8 * 8
    return ""


def extent_names(path: Path) -> list[str] | None:
    """Return the files that the descriptor of a VMDK names as its extents; ``None`` for a VMDK in one file."""
    with _opened(path) as file:
        header = file.read(64)
        at = 0
        if header[:4] in _VMDK_SPARSE:
            capacity, descriptor = (int.from_bytes(header[each : each + 8], "little") for each in (12, 28))
            if header[:4] != b"KDMV" or capacity or not descriptor:
                return None
            at = descriptor << 9
        file.seek(min(at, (1 << 63) - 1))
        return [each.decode(errors="replace") for each in _EXTENT.findall(file.read(_MAX_DESCRIPTOR))]


def _opened(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return os.fdopen(fd, "rb")
