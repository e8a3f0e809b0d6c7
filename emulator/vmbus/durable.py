"""Files that survive a loss of power: written back before they get the name under which they are looked for."""

from __future__ import annotations

import os
from pathlib import Path


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
