"""The connection between the process that serves a guest and the one that takes its place.

A message is a kind, named values, bytes, and descriptors (:mod:`vmbus.wire.reload`). One side sends at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmbus.errors import MalformedError, UserError, system_reason
from vmbus.wire.reload import FORMAT, MAX_DATA, MAX_DESCRIPTORS, MAX_FIELDS, RELOAD_HEADER, ReloadHeader

REFUSED = "refused"
"""Kind of the message of a side that cannot go on, with its ``reason``."""

ANSWER_TIMEOUT = 10.0
"""Seconds for an answer that takes no work."""
_READ_SIZE = 1 << 18


class ReloadFailed(UserError):
    """A reload that came to nothing; the message says why. The guest is served as before."""


class ReloadEnded(ReloadFailed):
    """The end of the process at the other end."""


class ReloadLeft(ReloadEnded):
    """The peer has closed its end, after it had read all that it was told."""


@dataclass(slots=True)
class Received:
    """A message. ``descriptors`` belong to the receiver."""

    kind: str
    values: dict[str, Any]
    data: bytes
    descriptors: list[int] = field(default_factory=list)


class Link:
    """One end of the connection."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """``peer``: who is at the other end, for messages."""
        connection.setblocking(False)
        self._connection = connection
        self._peer = peer
        self._lost_descriptors = False
        """Whether the kernel could not pass on some of the message that is being read."""

    async def tell(
        self,
        kind: str,
        values: Mapping[str, Any] | None = None,
        *,
        data: bytes = b"",
        descriptors: Sequence[int] = (),
        timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        """Send a message. Raises :class:`ReloadFailed` if it cannot be sent within ``timeout`` seconds."""
        body = json.dumps({"kind": kind, **(values or {})}).encode()
        if len(body) > MAX_FIELDS or len(data) > MAX_DATA:
            raise ReloadFailed(
                f"{len(body)} + {len(data)} bytes are more than a message to {self._peer} can have"
            )
        whole = memoryview(RELOAD_HEADER.build(ReloadHeader(FORMAT, len(body), len(data))) + body + data)
        try:
            async with asyncio.timeout(timeout):
                if descriptors:
                    whole = whole[await self._send_descriptors(whole, descriptors) :]
                await asyncio.get_running_loop().sock_sendall(self._connection, whole)
        except TimeoutError as error:
            raise ReloadFailed(f"{self._peer} does not take what it is sent") from error
        except ConnectionError as error:
            raise ReloadEnded(f"{self._peer} ended: {error.strerror}") from error
        except OSError as error:
            raise ReloadFailed(f"{self._peer} cannot be told anything: {system_reason(error)}") from error

    async def _send_descriptors(self, whole: memoryview, descriptors: Sequence[int]) -> int:
        while True:
            try:
                return socket.send_fds(self._connection, [whole], descriptors)
            except BlockingIOError:
                await self._ready(
                    asyncio.get_running_loop().add_writer, asyncio.get_running_loop().remove_writer
                )

    async def hear(self, *kinds: str, timeout: float | None = ANSWER_TIMEOUT) -> Received:
        """Return the next message, which is of one of ``kinds``.

        Raises :class:`ReloadFailed` for a refusal, at the end of the peer, and after ``timeout`` seconds.
        """
        descriptors: list[int] = []
        self._lost_descriptors = False
        try:
            async with asyncio.timeout(timeout):
                message = await self._receive(descriptors)
            if self._lost_descriptors:
                raise ReloadFailed(f"this process has no room for the descriptors that {self._peer} sent")
            if message.kind == REFUSED:
                raise ReloadFailed(str(message.values.get("reason")))
            if message.kind not in kinds:
                raise ReloadFailed(
                    f"{self._peer} said {message.kind!r} where {' or '.join(kinds) or 'nothing'} was expected"
                )
        except BaseException as error:
            for number in descriptors:
                os.close(number)
            if isinstance(error, TimeoutError):
                raise ReloadFailed(f"{self._peer} does not answer") from error
            if isinstance(error, OSError):
                raise ReloadFailed(f"{self._peer} cannot be heard: {system_reason(error)}") from error
            raise
        return message

    async def _receive(self, descriptors: list[int]) -> Received:
        data = await self._read(RELOAD_HEADER.size, descriptors)
        try:
            header = RELOAD_HEADER.parse(data)
        except MalformedError as error:
            raise ReloadFailed(f"{self._peer} does not speak the protocol of a reload: {error}") from error
        if header.format != FORMAT:
            raise ReloadFailed(
                f"{self._peer} speaks format {header.format} of the protocol of a reload, and this one {FORMAT}"
            )
        if header.fields > MAX_FIELDS or header.data > MAX_DATA:
            raise ReloadFailed(f"{self._peer} announces a message of {header.fields} + {header.data} bytes")
        body = await self._read(header.fields, descriptors)
        content = await self._read(header.data, descriptors)
        try:
            values = json.loads(body)
            kind = str(values.pop("kind"))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ReloadFailed(f"{self._peer} sent a message that cannot be parsed: {error!r}") from error
        return Received(kind, values, content, descriptors)

    async def _read(self, size: int, descriptors: list[int]) -> bytes:
        found = bytearray()
        while len(found) < size:
            try:
                part, numbers, flags, _ = socket.recv_fds(
                    self._connection, min(size - len(found), _READ_SIZE), MAX_DESCRIPTORS
                )
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await self._ready(loop.add_reader, loop.remove_reader)
                continue
            except ConnectionError as error:  # it ended without reading all that it was sent
                raise ReloadEnded(f"{self._peer} ended: {error.strerror}") from error
            for number in numbers:
                os.set_inheritable(number, False)  # recv_fds of Python 3.11 loses MSG_CMSG_CLOEXEC
            descriptors += numbers
            self._lost_descriptors |= bool(flags & socket.MSG_CTRUNC)
            if len(descriptors) > MAX_DESCRIPTORS:
                raise ReloadFailed(f"{self._peer} sends too many descriptors")
            if not part:
                raise ReloadLeft(f"{self._peer} ended")
            found += part
        return bytes(found)

    async def _ready(self, add: Callable[..., Any], remove: Callable[[socket.socket], Any]) -> None:
        ready = asyncio.Event()
        add(self._connection, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self._connection)

    async def refuse(self, reason: str) -> None:
        """Send a refusal, as far as the peer takes it."""
        with contextlib.suppress(ReloadFailed):
            await self.tell(REFUSED, {"reason": reason})

    async def taken(self) -> None:
        """Wait until the peer has read all that it was told, and has closed its end.

        Raises :class:`ReloadFailed` if it ended before it had read that.
        """
        with contextlib.suppress(ReloadLeft):
            await self.hear(timeout=None)

    def leave(self) -> None:
        """Close this end, of which another process may have a copy, after all that was told was read."""
        with contextlib.suppress(OSError):  # the peer has ended
            self._connection.shutdown(socket.SHUT_RDWR)
        self.close()

    def fileno(self) -> int:
        """Return the descriptor of this end."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close this end; safe to call twice."""
        self._connection.close()
