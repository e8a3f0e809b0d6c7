"""Why a target on this machine refused a guest, left for the source: QEMU's return path carries only a number.

    target    fails ──▶ leaves its reason under the address at which it waited
    source    hears "error 1" ──▶ takes the reason of that address, if it is newer than the migration

The reason is in a file of the user's runtime folder, which nobody else can enter. On another machine, or of another
user, it stays at the target.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from vmbus import private
from vmbus.machine import rundir

_PREFIX = ".refused-"
_MAX_REASON = 4096
"""Bytes of a reason."""
_KEPT = 120.0
"""Seconds after which nobody takes a reason any more."""
_CLOCK_STEP = 1.0
"""Seconds by which the time of a file may lag behind the clock."""


def _place(uri: str) -> Path | None:
    """Return the file for the reason of who waits at ``uri``; ``None`` for an address that tells nothing.

    TCP addresses are compared by their ports: the two sides name the host differently.
    """
    kind, _, rest = uri.partition(":")
    if kind == "unix" and rest:
        key = os.path.realpath(rest)
    elif kind == "tcp" and (port := rest.partition(",")[0].rpartition(":")[2]).isdecimal():
        key = str(int(port))
    else:
        return None
    digest = hashlib.sha256(os.fsencode(f"{kind}:{key}")).hexdigest()[:24]
    return rundir.runtime_root() / f"{_PREFIX}{digest}"


def leave(uri: str, reason: str) -> None:
    """Leave the reason why the guest that came to ``uri`` was refused. Where that is impossible, nothing happens."""
    if (place := _place(uri)) is None:
        return
    with contextlib.suppress(OSError):  # it is at the target anyway
        private.make_folder(place.parent)
        _sweep(place.parent)
        handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=place.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(reason.encode(errors="replace")[:_MAX_REASON])
        Path(name).replace(place)


def take(uri: str, since: float) -> str | None:
    """Return, and remove, the reason that was left for ``uri`` after ``since`` (``time.time()``)."""
    if (place := _place(uri)) is None:
        return None
    try:
        with place.open("rb") as file:
            written = os.fstat(file.fileno()).st_mtime
            reason = file.read(_MAX_REASON).decode(errors="replace").strip()
        place.unlink()
    except OSError:
        return None
    return reason if written >= since - _CLOCK_STEP and reason else None


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # taken meanwhile
            if time.time() - path.stat().st_mtime > _KEPT:
                path.unlink()
