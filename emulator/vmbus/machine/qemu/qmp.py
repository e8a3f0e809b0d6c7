"""The QMP connection to one QEMU, with this project's errors.

QMP reports the guest's life (``RESET``, ``STOP``, ``RESUME``, ``SHUTDOWN``, ``MIGRATION`` …) and everything that
:mod:`vmbus.machine.qemu.discovery` needs. A QMP socket serves one client at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
)
from qemu.qmp.protocol import Runstate, StateError

from vmbus.errors import InternalError, QemuError, QemuGone, QemuUnsuitable
from vmbus.machine import unix_path

_POLL = 0.005
"""Seconds between two ``query-status`` until QEMU has finished a migration: there is no event for that."""


_READ_SIZE = 1 << 16
_LONGEST_LINE = 10 << 20
"""Bytes of the longest message of QEMU that is read."""


class _Client(QMPClient):
    """A client whose connection can be handed over: it knows what it has read and not handled."""

    def __init__(self, name: str, *, unread: bytes = b"", greets: bool = True) -> None:
        """``unread``: what another process has read of the connection; ``greets``: whether the connection is new."""
        super().__init__(name)
        self.await_greeting = self.negotiate = greets
        self.unread = unread
        self._waits = False

    async def _readline(self) -> bytes:
        reader = self._reader
        if reader is None:
            raise EOFError
        while (end := self.unread.find(b"\n")) < 0:
            self._waits = True
            try:
                data = await reader.read(_READ_SIZE)
            finally:
                self._waits = False
            if not data:
                raise EOFError
            self.unread += data
            if len(self.unread) > _LONGEST_LINE:
                raise QMPError(f"a message of more than {_LONGEST_LINE} bytes")
        line, self.unread = self.unread[: end + 1], self.unread[end + 1 :]
        return line

    async def pause(self) -> None:
        """Read nothing more, and handle what was read, but for a message that has not come to its end."""
        transport = self._transport()
        transport.pause_reading()
        for _ in range(2):  # what was read may just be passed on
            await asyncio.sleep(0)
        while not self._waits and self.runstate is Runstate.RUNNING:  # noqa: ASYNC110 - turns, and not time
            await asyncio.sleep(0)

    def resume(self) -> None:
        """Read on."""
        self._transport().resume_reading()

    def _transport(self) -> asyncio.Transport:
        if self._writer is None or not isinstance(self._writer.transport, asyncio.Transport):
            raise QemuGone("QEMU closed its QMP socket")
        return self._writer.transport


class _Listener(EventListener):
    """Counts the events that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0

    async def put(self, event: Message) -> None:
        self.given += 1
        await super().put(event)


def _event(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(message["event"]), dict(message.get("data", {}))


class Qmp:
    """An open QMP connection. Made by :meth:`connect`, or by :meth:`adopt` from one of another process."""

    def __init__(self, client: _Client, path: str, pid: int, handed: socket.socket | None = None) -> None:
        self._client = client
        self._socket = handed
        self._listener = _Listener()
        self._handled = 0
        """Events that were yielded, and whose user came back for the next one."""
        client.register_listener(self._listener)
        self.path = path
        self.pid = pid
        """Id of the process that made the socket: QEMU."""

    @classmethod
    async def connect(cls, path: str, *, name: str = "vmbus", timeout: float = 10.0) -> Qmp:
        """Connect to ``path``.

        Raises :class:`~vmbus.errors.QemuUnsuitable` when no QEMU answers within ``timeout`` seconds.
        """
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with unix_path.short(Path(path)) as address:
                raw.connect(address)
        except OSError as error:
            raw.close()
            raise QemuUnsuitable(
                f"cannot connect to the QMP socket {path}: {error.strerror}; "
                "start QEMU with the options that `vmbus qemu-args` prints, and name the socket that is in them"
            ) from error
        credentials = raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]
        raw.setblocking(False)
        client = _Client(name)
        client.logger.setLevel(logging.CRITICAL)  # failures are raised, and not logged as well
        try:
            await asyncio.wait_for(client.connect(raw), timeout)
        except TimeoutError as error:
            raw.close()
            raise QemuUnsuitable(
                f"no QMP greeting from {path} within {timeout:g} s; a QMP socket serves one client at a time: "
                "give the emulator one of its own"
            ) from error
        except ConnectError as error:
            raw.close()
            raise QemuUnsuitable(f"the server at {path} does not answer in QMP: {error}") from error
        return cls(client, path, pid, raw)

    @classmethod
    def adopt(cls, descriptor: int, unread: bytes, path: str, pid: int, *, name: str = "vmbus") -> Qmp:
        """Return a connection of another process, which :meth:`pause` has left; takes the descriptor.

        ``unread``: what that process has read and not handled. :meth:`begin` reads on.
        """
        client = _Client(name, unread=unread, greets=False)
        client.logger.setLevel(logging.CRITICAL)
        handed = socket.socket(fileno=descriptor)
        handed.setblocking(False)
        return cls(client, path, pid, handed)

    async def begin(self) -> None:
        """Use a connection that was adopted, before :meth:`events`. Raises :class:`~vmbus.errors.QemuGone`."""
        try:
            await self._client.connect(self._handed_socket())
        except ConnectError as error:
            raise QemuGone(f"QEMU closed its QMP socket: {error}") from error

    async def pause(self) -> bytes:
        """Stop reading; return what was read and not handled, when all events that were read have been handled.

        There is a user of :meth:`events`, and no command is under way. :meth:`resume` goes on. Raises
        :class:`~vmbus.errors.QemuGone`.
        """
        if self.connected:
            await self._client.pause()
        while self._handled < self._listener.given and self.connected:  # noqa: ASYNC110 - turns, and not time
            await asyncio.sleep(0)
        if not self.connected:
            raise QemuGone("QEMU closed its QMP socket")
        return self._client.unread

    def resume(self) -> None:
        """Read on after :meth:`pause`, also one that raised: the connection was not handed over."""
        if self.connected:
            self._client.resume()

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return self._handed_socket().fileno()

    def _handed_socket(self) -> socket.socket:
        if self._socket is None:
            raise InternalError("a QMP connection without its socket")
        return self._socket

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Execute one command and return its result.

        Raises :class:`QemuError` if QEMU refuses it, :class:`QemuGone` if QEMU ended.
        """
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {command}: {error}") from error
        except (ExecInterruptedError, StateError) as error:
            raise QemuGone(f"QEMU closed its QMP socket during {command}") from error
        except QMPError as error:
            raise QemuError(f"{command}: {error}") from error

    async def hand_over(self, descriptor: int, name: str) -> None:
        """Pass QEMU a copy of a descriptor of this process, as ``fd:NAME`` in a later command here."""
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", {"fdname": name})

    async def lend(self, descriptors: Sequence[int]) -> int:
        """Pass QEMU copies of descriptors of one file; return the number of their ``/dev/fdset``."""
        number: int | None = None
        for descriptor in descriptors:
            self._client.send_fd_scm(descriptor)
            found = await self.execute("add-fd", {} if number is None else {"fdset-id": number})
            number = int(found["fdset-id"])
        if number is None:
            raise QemuError("no descriptor was passed to QEMU")
        return number

    async def cont(self, timeout: float = 10.0) -> None:
        """Resume the guest.

        For a moment after the end of a migration QEMU still finishes it, and refuses this. Raises :class:`QemuError`
        when QEMU refuses it otherwise, or still after ``timeout`` seconds.
        """
        end = asyncio.get_running_loop().time() + timeout
        while (await self.execute("query-status"))["status"] == "finish-migrate":
            if asyncio.get_running_loop().time() > end:
                break  # QEMU's own message says the most
            await asyncio.sleep(_POLL)
        await self.execute("cont")

    async def monitor(self, line: str) -> str:
        """Execute one command of the human monitor and return its output."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Yield every event as ``(name, data)``, until the connection ends."""
        ended = asyncio.ensure_future(self._wait_end())
        event: asyncio.Task[Message] | None = None
        try:
            while True:
                event = asyncio.ensure_future(self._listener.get())
                await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    while not self._listener.empty():
                        message = await self._listener.get()
                        try:
                            yield _event(message)
                        finally:
                            self._handled += 1
                    return
                message = event.result()
                try:
                    yield _event(message)
                finally:
                    self._handled += 1
        finally:
            ended.cancel()
            if event is not None:
                event.cancel()

    async def _wait_end(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    @property
    def connected(self) -> bool:
        """Whether QEMU still has the connection open."""
        return self._client.runstate is Runstate.RUNNING

    async def close(self) -> None:
        """Disconnect; safe to call twice."""
        if self._client.runstate is Runstate.IDLE:
            if self._socket is not None:  # adopted, and not begun
                self._socket.close()
            return
        with contextlib.suppress(QMPError, EOFError, OSError):  # the peer may have ended
            await self._client.disconnect()
