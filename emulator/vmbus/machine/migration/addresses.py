"""Addresses of migrations, as users write them and as QEMU expects them.

tcp:HOST:PORT   unix:PATH   vsock:CID:PORT     sockets: the target answers
exec:COMMAND    file:PATH[,offset=N]           one way
fd:N                                           descriptor N of the calling process, passed to QEMU
"""

from __future__ import annotations

import os
import re
import stat
from typing import Any

from vmbus.errors import UsageError

MAX_PORT = 65535

_SOCKETS = ("tcp:", "unix:", "vsock:")
_TCP_PORT = re.compile(r"tcp:(?:\[[^\]]*\]|[^:,]*):([0-9]{1,19})(?:,|$)")


def descriptor_number(uri: str) -> int | None:
    """Return the N of ``fd:N``; ``None`` for any other address.

    Raises :class:`~vmbus.errors.UsageError` for a descriptor's name: names belong to the monitor on which they were
    created, and the emulator's monitor has none.
    """
    kind, _, name = uri.partition(":")
    if kind != "fd":
        return None
    if not name.isdecimal():
        raise UsageError(f"{uri}: give the number of a descriptor of your own process, as in fd:3")
    return int(name)


def check_port(uri: str) -> None:
    """Refuse ``tcp:HOST:PORT`` with a port that does not exist: QEMU takes the lowest 16 bits of any number.

    Raises :class:`~vmbus.errors.UsageError`.
    """
    found = _TCP_PORT.match(uri)
    if found is not None and int(found[1]) > MAX_PORT:
        raise UsageError(f"{uri}: there is no port {found[1]}; write a number up to {MAX_PORT}")


def two_way(uri: str, descriptor: int | None = None) -> bool:
    """Return whether a target can answer over ``uri``."""
    if descriptor is not None:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    return uri.startswith(_SOCKETS)


def structured(uri: str) -> dict[str, Any]:
    """Return ``uri`` as a QMP ``MigrationAddress``. Raises :class:`~vmbus.errors.UsageError` for an unknown form."""
    kind, _, rest = uri.partition(":")
    if kind == "unix" and rest:
        return {"transport": "socket", "type": "unix", "path": rest}
    if kind == "fd" and rest:
        return {"transport": "socket", "type": "fd", "str": rest}
    if kind in ("tcp", "vsock"):
        first, _, port = rest.rpartition(":")
        if first and port.isdecimal():
            name = "host" if kind == "tcp" else "cid"
            return {
                "transport": "socket",
                "type": "inet" if kind == "tcp" else "vsock",
                name: first.removeprefix("[").removesuffix("]"),
                "port": port,
            }
    raise UsageError(f"{uri!r} is not the address of a migration channel; write unix:PATH or tcp:HOST:PORT")
