"""Files that survive a loss of power: written back before they get the name under which they are looked for."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MANY = 100
"""Files that are written back one by one; more of them cost more than the whole file system (syncfs(2))."""


def synchronize(path: Path) -> None:
    """Have the content of a file, or the names in a folder, safe on the medium. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(new: Path, place: Path) -> None:
    """Give the file or folder ``new``, whose content is safe already, the name ``place``. Raises ``OSError``."""
    new.replace(place)
    synchronize(place.parent)


def synchronize_tree(folder: Path) -> None:
    """Have everything in ``folder`` safe on the medium. Raises ``OSError``."""
    files, folders = [], []
    for root, _, names in os.walk(folder):
        folders.append(Path(root))
        files += [path for name in names if not (path := Path(root, name)).is_symlink()]
    if len(files) > _MANY:
        _synchronize_file_system(folder)
        return
    for each in (*files, *folders):
        synchronize(each)


def _synchronize_file_system(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
    finally:
        os.close(descriptor)
