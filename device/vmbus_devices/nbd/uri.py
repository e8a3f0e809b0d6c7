"""Where an NBD server is: the NBD URIs that every NBD program reads.

    nbd://HOST[:PORT]/EXPORT              TCP, port 10809 if it is not said
    nbd+unix:///EXPORT?socket=PATH        a Unix socket

Source: NetworkBlockDevice/nbd, doc/uri.md. TLS (``nbds``) is not spoken.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from vmbus.errors import UsageError

DEFAULT_PORT = 10809
CONNECT_LIMIT = 10.0
"""Seconds in which a server must take a connection, and answer each step of the negotiation."""

_DEAD_PEER = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""A machine that is gone without a word is noticed after half a minute."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server and the export that is wanted of it."""

    text: str
    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    """Of a Unix socket; empty: TCP."""

    def connect(self) -> socket.socket:
        """A new connection, with :data:`CONNECT_LIMIT` as its time limit. Raises ``OSError``."""
        if not self.path:
            connection = socket.create_connection((self.host, self.port), CONNECT_LIMIT)
            for level, option, value in _DEAD_PEER:
                connection.setsockopt(level, option, value)
            return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_LIMIT)
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def __str__(self) -> str:
        return self.text


def is_uri(text: str) -> bool:
    """Whether ``text`` is meant to name an NBD server."""
    return text.startswith(("nbd:", "nbds:", "nbd+", "nbds+"))


def parse_uri(text: str) -> Address:
    """Raises :class:`~vmbus.errors.UsageError`."""
    wanted = "nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH is wanted"
    try:
        parts = urlsplit(text)
        port = parts.port or DEFAULT_PORT
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise UsageError(f"{text}: {error}; {wanted}") from error
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme in ("nbds", "nbds+unix"):
        raise UsageError(f"{text}: TLS is not spoken; {wanted}")
    if parts.scheme == "nbd" and parts.hostname and not query:
        return Address(text, export, host=parts.hostname, port=port)
    if parts.scheme == "nbd+unix" and not parts.netloc and list(query) == ["socket"]:
        return Address(text, export, path=query["socket"][0])
    raise UsageError(f"{text}: {wanted}")
