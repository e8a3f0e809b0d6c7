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

from vmbus.errors import QemuError, QemuGone, QemuUnsuitable
from vmbus.machine import unix_path

_POLL = 0.005
"""Seconds between two ``query-status`` until QEMU has finished a migration: there is no event for that."""


def _event(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(message["event"]), dict(message.get("data", {}))


class Qmp:
    """An open QMP connection. Made by :meth:`connect`."""

    def __init__(self, client: QMPClient, path: str, pid: int) -> None:
        self._client = client
        self._listener = EventListener()
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
        client = QMPClient(name)
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
        return cls(client, path, pid)

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
                        yield _event(message)
                    return
                message = event.result()
                yield _event(message)
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
            return
        with contextlib.suppress(QMPError, EOFError, OSError):  # the peer may have ended
            await self._client.disconnect()
