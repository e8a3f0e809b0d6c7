"""The control socket of a served guest: one JSON object a line, asked and answered.

    → {"command": "status"}
    ← {"return": {...}}            or {"error": "what went wrong and what to do"}

The socket lies in the guest's run directory (mode 0700), so only its user reaches it. ``vmbus status`` and the
other verbs that speak to a running emulator use :func:`ask`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from emulator.errors import UserError, VmbusError

_log = logging.getLogger(__name__)
_LINE_LIMIT = 1 << 20

Handler = Callable[[Mapping[str, Any]], Awaitable[object]]


class ControlServer:
    """Serves the control socket; ``handlers`` maps a command to the coroutine function that answers it."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen; a socket left by a killed emulator is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, str(self._path), limit=_LINE_LIMIT)
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Stop listening, end every connection, remove the socket."""
        if self._server is not None:
            self._server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            self._server = None
            self._path.unlink(missing_ok=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError) as error:
            _log.debug("control connection ended: %r", error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            command = request["command"]
        except (ValueError, KeyError, TypeError):
            return {"error": 'a request is a line such as {"command": "status"}'}
        handler = self._handlers.get(command) if isinstance(command, str) else None
        if handler is None:
            return {"error": f"unknown command {command!r}; known: {', '.join(sorted(self._handlers))}"}
        try:
            return {"return": await handler(request)}
        except VmbusError as error:
            return {"error": str(error)}


def ask(path: Path, command: str, *, limit: float = 30.0, **arguments: object) -> Any:
    """Ask a running emulator and wait for its answer. Raises :class:`~emulator.errors.UserError`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
        except OSError as error:
            raise UserError(f"the emulator at {path} does not answer: {error}") from error
    if not line.endswith(b"\n"):
        raise UserError(f"the emulator at {path} ended before it answered; is it still there? (vmbus status)")
    answer = json.loads(line)
    if "error" in answer:
        raise UserError(str(answer["error"]))
    return answer["return"]
