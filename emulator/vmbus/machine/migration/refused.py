"""Why a target on this machine refused a guest, left for the source: QEMU's return path carries only a number.

    target    fails ──▶ leaves its reason under the address at which it waited
    source    hears "error 1" ──▶ takes the reason of that address, if it is newer than the migration
              fails, or is cancelled ──▶ removes for a moment what the target says about that

The two sides may know each other by several addresses: where QEMU listens, the ends of a connection that was made
before (``fd:``), and the UUID of the machine, the same on both sides. The reason is left under all of them.

It is in files of the user's runtime folder, which nobody else can enter. On another machine, or of another user, it
stays at the target.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from vmbus import private
from vmbus.errors import QemuError
from vmbus.machine import rundir
from vmbus.machine.migration.ports import Monitor

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
    elif kind in ("machine", "connection") and rest:
        key = rest
    else:
        return None
    digest = hashlib.sha256(os.fsencode(f"{kind}:{key}")).hexdigest()[:24]
    return rundir.runtime_root() / f"{_PREFIX}{digest}"


def of_descriptor(number: int) -> tuple[str, ...]:
    """Return the addresses by which both ends of the socket ``number`` know it; nothing for anything else."""
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        return ()
    with socket.socket(fileno=os.dup(number)) as end:
        try:
            ends = end.getsockname(), end.getpeername()
        except OSError:  # not connected
            return ()
        if end.family in (socket.AF_INET, socket.AF_INET6):
            return ("connection:" + "|".join(sorted(f"{each[0]}:{each[1]}" for each in ends)),)
        names = [each for each in ends if isinstance(each, str) and each.startswith("/")]  # of who listened
        return tuple(f"unix:{each}" for each in names) if end.family == socket.AF_UNIX else ()


async def of_machine(qmp: Monitor) -> tuple[str, ...]:
    """Return the address that is the UUID of QEMU's machine; nothing if it has none."""
    try:
        uuid = UUID((await qmp.execute("query-uuid"))["UUID"])
    except (QemuError, KeyError):
        return ()
    return (f"machine:{uuid}",) if uuid.int else ()


def of_listener(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the addresses at which QEMU listens, of its ``query-migrate``."""
    addresses = []
    for each in found.get("socket-address", ()):
        if each.get("type") == "unix":
            addresses.append(f"unix:{each['path']}")
        elif each.get("type") == "inet":
            addresses.append(f"tcp:{each['host']}:{each['port']}")
    return tuple(addresses)


class RefusalNotices:
    """The target's end: where the expected guest comes to, and what is left there if it is refused."""

    def __init__(self, qmp: Monitor) -> None:
        self._qmp = qmp
        self._addresses: tuple[str, ...] = ()
        self._left = False
        """Whether the reason for the present failure is there: QEMU would only say that it failed."""

    async def learn(self) -> None:
        """Find out where QEMU waits for the guest. QEMU may end as soon as a guest is refused."""
        _sweep(rundir.runtime_root())
        self._left = False
        try:
            found = await self._qmp.execute("query-migrate")
        except QemuError:
            return
        self._addresses = (*of_listener(found), *await of_machine(self._qmp))

    async def leave_words_of_qemu(self) -> None:
        """Leave QEMU's own reason for a migration that failed, if it still answers and nothing better is known."""
        if self._left:
            return
        try:
            found = await self._qmp.execute("query-migrate")
        except QemuError:
            return
        if found.get("error-desc") and not self._left:
            self.leave(str(found["error-desc"]))

    def leave(self, reason: str) -> None:
        """Leave ``reason`` for the source."""
        self._left = True
        for each in self._addresses:
            leave(each, reason)


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


def take_any(uris: Iterable[str], since: float) -> str | None:
    """Do the same for several addresses of one target: return the first reason, and remove all."""
    return next(iter([found for each in uris if (found := take(each, since)) is not None]), None)


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # taken meanwhile
            if time.time() - path.stat().st_mtime > _KEPT:
                path.unlink()
