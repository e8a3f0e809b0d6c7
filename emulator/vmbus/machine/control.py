"""The control socket of a served guest: one JSON object per line, a request or its answer.

    → {"command": "status"}
    ← {"return": {...}}            or {"error": "what went wrong and what to do"}

Descriptors may come with a request (``SCM_RIGHTS``); its handler finds their numbers in ``descriptors``. They are
closed when it is answered.

The socket is in the guest's run directory (mode 0700), so only its user can connect. ``vmbus status`` and the other
commands for a running emulator use :func:`ask`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmbus.errors import InternalError, UserError, VmbusError
from vmbus.machine import unix_path

_logger = logging.getLogger(__name__)
_LINE_LIMIT = 1 << 20
_READ_SIZE = 1 << 16
_MAX_DESCRIPTORS = 8
_BACKLOG = 16

_MAX_WAIT = 20 * 24 * 3600.0
"""Seconds that a wait of the socket module can have: it keeps its milliseconds in 31 bits."""

Handler = Callable[[Mapping[str, Any]], Awaitable[object]]


class ControlServer:
    """Serves the control socket; ``handlers`` maps a command to the coroutine function that answers it."""

    def __init__(
        self, path: Path, handlers: Mapping[str, Handler], listener: socket.socket | None = None
    ) -> None:
        """``listener``: a socket that listens at ``path`` already, which another process has left (:meth:`leave`)."""
        self._path = path
        self._handlers = handlers
        self._given = listener
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; a socket left by a killed emulator is replaced."""
        listener, self._given = self._given or self._bound(), None
        listener.setblocking(False)
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _bound(self) -> socket.socket:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with unix_path.short(self._path) as address:
            listener.bind(address)
        self._path.chmod(0o600)
        listener.listen(_BACKLOG)
        return listener

    def fileno(self) -> int:
        """Return the descriptor of the socket that listens."""
        listener = self._listener or self._given
        if listener is None:
            raise InternalError("a control server that does not listen")
        return listener.fileno()

    def hold(self) -> None:
        """Accept no connection until :meth:`start`: those that come meanwhile wait."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._given, self._listener = self._listener, None

    def leave(self) -> None:
        """Stop listening, after :meth:`hold`: another process does, with the same socket.

        Connections end, but that of the command which calls this: it still gets its answer.
        """
        if self._given is not None:
            self._given.close()
            self._given = None
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    async def answered(self) -> None:
        """Wait until every connection has ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Stop listening, end every connection, remove the socket."""
        self.hold()
        if self._given is not None:
            self._path.unlink(missing_ok=True)
            self._given.close()
            self._given = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _accept(self, listener: socket.socket) -> None:
        # Not sock_accept(): if its task is cancelled at the wrong moment, an accepted connection is lost, and stays.
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            # Here, not in the task: one that is cancelled before its first step does nothing at all.
            self._begin(self._connected(connection)).add_done_callback(functools.partial(_close, connection))

    async def _connected(self, connection: socket.socket) -> None:
        requests = _Requests(connection)
        try:
            while line := await requests.next():
                answer = json.dumps(await self._answer(line, requests.descriptors)).encode() + b"\n"
                requests.close_descriptors()
                await asyncio.get_running_loop().sock_sendall(connection, answer)
        except (OSError, ValueError, asyncio.CancelledError) as error:
            _logger.debug("control connection ended: %r", error)
        finally:
            requests.close_descriptors()

    async def _answer(self, line: bytes, descriptors: Sequence[int]) -> dict[str, object]:
        try:
            request = json.loads(line)
            command = request["command"]
        except (ValueError, KeyError, TypeError):
            return {"error": 'a request is a line such as {"command": "status"}'}
        handler = self._handlers.get(command) if isinstance(command, str) else None
        if handler is None:
            return {"error": f"unknown command {command!r}; known: {', '.join(sorted(self._handlers))}"}
        try:
            return {"return": await handler({**request, "descriptors": tuple(descriptors)})}
        except VmbusError as error:
            return {"error": str(error)}
        except Exception as error:
            _logger.exception("internal error in the answer to the command %r; please report this", command)
            return {
                "error": f"internal error in the emulator ({error!r}); its log says more, please report this"
            }


def _close(connection: socket.socket, _: object) -> None:
    connection.close()


class _Requests:
    """The lines of one connection, and the descriptors that came with the last of them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self.descriptors: list[int] = []

    async def next(self) -> bytes:
        """The next line; empty at the end. Raises ``ValueError`` for one that is too long."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _LINE_LIMIT:
                raise ValueError(f"a request of more than {_LINE_LIMIT} bytes")
            await self._readable()
            try:
                data, descriptors, _, _ = socket.recv_fds(self._connection, _READ_SIZE, _MAX_DESCRIPTORS)
            except BlockingIOError:
                continue
            for number in descriptors:
                os.set_inheritable(number, False)  # recv_fds of Python 3.11 loses MSG_CMSG_CLOEXEC
            self.descriptors += descriptors
            if not data:
                return b""
            self._buffer += data
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line

    def close_descriptors(self) -> None:
        """Close the descriptors that came."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._connection, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._connection)


def ask(
    path: Path,
    command: str,
    *,
    answer_timeout: float = 30.0,
    descriptors: Sequence[int] = (),
    **arguments: object,
) -> Any:
    """Send a request to a running emulator and return its answer; ``descriptors`` of this process go along.

    Raises :class:`~vmbus.errors.UserError`, also after ``answer_timeout`` seconds without an answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(min(answer_timeout, _MAX_WAIT))
        try:
            with unix_path.short(path) as address:
                connection.connect(address)
            request = json.dumps({"command": command, **arguments}).encode() + b"\n"
            sent = socket.send_fds(connection, [request], descriptors) if descriptors else 0
            connection.sendall(request[sent:])
            with connection.makefile("rb") as stream:
                line = stream.readline()
        except OSError as error:
            raise UserError(f"the emulator at {path} does not answer: {error}") from error
    if not line.endswith(b"\n"):
        raise UserError(
            f"the emulator at {path} ended before it answered; `vmbus status` shows whether it runs"
        )
    try:
        answer = json.loads(line)
        if "error" not in answer:
            return answer["return"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the control socket of an emulator: its answer cannot be parsed"
        ) from error
    raise UserError(str(answer["error"]))
