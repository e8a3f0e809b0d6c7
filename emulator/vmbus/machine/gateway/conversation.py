"""Requests of the emulator over the gateway's socket, and their replies (docs/gateway.md#attaching)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from vmbus.errors import GatewayError, MalformedError
from vmbus.wire import gateway as wire

TIMEOUT = 10.0
"""Seconds in which the gateway answers; it has a thread of its own for that."""


def converse(connection: socket.socket, message: wire.Message) -> tuple[wire.Reply, list[int]]:
    """Send a request; return its reply and the descriptors that come with the reply."""
    descriptors: list[int] = []
    connection.settimeout(TIMEOUT)
    try:
        connection.sendall(wire.MESSAGE.build(message))
        data = b""
        while len(data) < wire.REPLY.size:
            part, received, _, _ = socket.recv_fds(
                connection, wire.REPLY.size - len(data), 2, socket.MSG_CMSG_CLOEXEC
            )
            descriptors += received
            if not part:
                raise GatewayError(
                    "the trap gateway closed the connection: QEMU has ended, or another emulator took over"
                )
            data += part
        reply = wire.REPLY.parse(data)
        if reply.magic != wire.MESSAGE_MAGIC:
            raise GatewayError("the server at that socket is not a trap gateway")
    except OSError as error:
        close_all(descriptors)
        raise GatewayError(f"the trap gateway does not answer: {error}") from error
    except (GatewayError, MalformedError):
        close_all(descriptors)
        raise
    finally:
        connection.setblocking(False)  # with a timeout, Gateway.closed would wait
    return reply, descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close ``descriptors``."""
    for descriptor in descriptors:
        os.close(descriptor)


def check_reply(path: Path | str, reply: wire.Reply) -> None:
    """Raise :class:`~vmbus.errors.GatewayError` if the gateway on ``path`` refused."""
    if reply.status == wire.Status.OK:
        return
    if reply.status == wire.Status.BUSY:
        raise GatewayError(
            f"an emulator (process {reply.argument}) is attached to {path}: end it, or detach it with "
            "vmbus attach --take-over"
        )
    if reply.status == wire.Status.VERSION:
        raise GatewayError(
            f"the gateway on {path} has protocol version {reply.version}, this emulator {wire.VERSION}: "
            "restart QEMU with this emulator's own gateway"
        )
    if reply.status == wire.Status.REFUSED:
        raise GatewayError(f"the gateway on {path} belongs to another user: run the emulator as QEMU's user")
    raise GatewayError(f"the gateway on {path} refused with status {reply.status}")
