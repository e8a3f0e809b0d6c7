"""Addresses of NBD servers, as NBD URIs.

    nbd://HOST[:PORT]/EXPORT              TCP, by default port 10809
    nbd+unix:///EXPORT?socket=PATH        a Unix socket

Source: NetworkBlockDevice/nbd, doc/uri.md. TLS (``nbds``) is not supported.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from vmbus.errors import UsageError

DEFAULT_PORT = 10809
CONNECT_TIMEOUT = 10.0
"""Seconds for a server to accept a connection, and for each step of the negotiation."""

_DEAD_PEER = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""A server machine that fails without closing its connections is detected after half a minute."""


@dataclass(frozen=True, slots=True)
class Address:
    """A server and an export of it."""

    text: str
    export: str
    host: str = ""
    port: int = DEFAULT_PORT
    path: str = ""
    """Of a Unix socket; empty: TCP."""

    def connect(self) -> socket.socket:
        """Return a new connection, with :data:`CONNECT_TIMEOUT` as its timeout. Raises ``OSError``."""
        if not self.path:
            connection = socket.create_connection((self.host, self.port), CONNECT_TIMEOUT)
            for level, option, value in _DEAD_PEER:
                connection.setsockopt(level, option, value)
            return connection
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_TIMEOUT)
            connection.connect(self.path)
        except BaseException:
            connection.close()
            raise
        return connection

    def __str__(self) -> str:
        return self.text


def is_uri(text: str) -> bool:
    """Return whether ``text`` is meant to be an NBD URI."""
    return text.startswith(("nbd:", "nbds:", "nbd+", "nbds+"))


def parse_uri(text: str) -> Address:
    """Return the address in an NBD URI. Raises :class:`~vmbus.errors.UsageError`."""
    wanted = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"
    try:
        parts = urlsplit(text)
        port = parts.port or DEFAULT_PORT
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
        (parts.hostname or "").encode("idna")  # a label that is empty or too long fails when it is looked up
    except ValueError as error:
        raise UsageError(f"{text}: {error}; {wanted}") from error
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme in ("nbds", "nbds+unix"):
        raise UsageError(f"{text}: TLS is not supported; {wanted}")
    if parts.scheme == "nbd" and parts.hostname and not query:
        return Address(text, export, host=parts.hostname, port=port)
    if parts.scheme == "nbd+unix" and not parts.netloc and list(query) == ["socket"]:
        return Address(text, export, path=query["socket"][0])
    raise UsageError(f"{text}: not an NBD URI; {wanted}")
