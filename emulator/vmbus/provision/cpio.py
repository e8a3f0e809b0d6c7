"""Writes a cpio archive in the "newc" form that Linux takes as an initramfs.

``Documentation/driver-api/early-userspace/buffer-format.rst`` of Linux: a header of "070701" and thirteen fields of
eight hexadecimal digits, the name with its NUL, the data, each padded to four bytes; "TRAILER!!!" ends it.
The same calls make the same bytes: times are 0, owners are root, inode numbers count up.
"""

from __future__ import annotations

import os
import posixpath
import stat

from vmbus.errors import UsageError

_TRAILER = "TRAILER!!!"


class CpioWriter:
    """Collects entries for the archive; missing parent folders are added automatically."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._inode = 0
        self._names: dict[str, int] = {}

    def folder(self, path: str, permissions: int = 0o755) -> None:
        name = self._name(path)
        if name and name not in self._names:
            self._parents(name)
            self._entry(name, stat.S_IFDIR | permissions, links=2)

    def file(self, path: str, data: bytes, permissions: int = 0o644) -> None:
        name = self._new(path)
        self._entry(name, stat.S_IFREG | permissions, data)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        name = self._new(path)
        self._entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))

    def device(self, path: str, kind: str, major: int, minor: int, permissions: int = 0o600) -> None:
        """Add a device node; ``kind`` is "c" or "b"."""
        name = self._new(path)
        format_bits = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}[kind]
        self._entry(name, format_bits | permissions, device=(major, minor))

    def __contains__(self, path: str) -> bool:
        return self._name(path) in self._names

    def finish(self) -> bytes:
        """Return the whole archive, padded to 512 bytes."""
        self._inode = -1  # the trailer's inode is 0
        self._entry(_TRAILER, 0)
        archive = b"".join(self._chunks)
        return archive + bytes(-len(archive) % 512)

    def _name(self, path: str) -> str:
        name = posixpath.normpath("/" + path).lstrip("/")
        return "" if name == "." else name

    def _new(self, path: str) -> str:
        name = self._name(path)
        if not name or name in self._names:
            raise UsageError(f"/{name} would be in the initramfs twice: give one of the files another path")
        self._parents(name)
        return name

    def _parents(self, name: str) -> None:
        parent = posixpath.dirname(name)
        if parent and self._names.get(parent, stat.S_IFDIR) & stat.S_IFDIR == 0:
            raise UsageError(f"/{parent} is not a folder in the initramfs, so /{name} cannot be put there")
        self.folder(parent)

    def _entry(
        self, name: str, mode: int, data: bytes = b"", *, links: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        self._names[name] = mode
        encoded = os.fsencode(name) + b"\0"
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in fields)
        self._chunks += [header, encoded, bytes(-(len(header) + len(encoded)) % 4)]
        self._chunks += [data, bytes(-len(data) % 4)]
