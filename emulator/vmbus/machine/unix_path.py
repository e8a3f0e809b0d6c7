"""Paths of Unix sockets, of which the kernel takes 107 bytes: longer ones are reached through their folder.

That works for sockets that this process makes and connects to. QEMU is given whole paths; those are checked before it
is started, because it, its plug-in and the D-Bus daemon would each fail in its own way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 107
"""``sun_path`` has 108 bytes, the last of them is 0."""


def fits(path: Path) -> bool:
    """Return whether ``path`` can be the address of a socket."""
    return len(os.fsencode(path)) <= MAX_BYTES


@contextlib.contextmanager
def short(path: Path) -> Iterator[str]:
    """Give an address for the socket ``path``, valid in this process and in this block. Raises ``OSError``."""
    if fits(path):
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
