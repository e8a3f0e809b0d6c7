"""The QMP connection to one QEMU, with this project's errors.

QMP gives the guest's life (``RESET``, ``STOP``, ``RESUME``, ``SHUTDOWN``, ``MIGRATION`` …) and everything that
:mod:`vmbus.machine.qemu.discovery` asks. A QMP socket serves one client at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncGenerator, Mapping
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

_WINDING_UP = 0.005
"""Seconds between looks at a migration that QEMU tells no event about."""


def _event(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return str(message["event"]), dict(message.get("data", {}))


class Qmp:
    """An open QMP connection. Made by :meth:`connect`."""

    def __init__(self, client: QMPClient, path: str, pid: int) -> None:
        self._client = client
        self._listener = EventListener()
        client.register_listener(self._listener)
        self.path = path
        #: The process that made the socket: QEMU itself.
        self.pid = pid

    @classmethod
    async def connect(cls, path: str, *, name: str = "vmbus", limit: float = 10.0) -> Qmp:
        """Raises :class:`~vmbus.errors.QemuUnsuitable` when no QEMU answers within ``limit`` seconds."""
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            raw.connect(path)
        except OSError as error:
            raw.close()
            raise QemuUnsuitable(
                f"cannot connect to the QMP socket {path}: {error.strerror}; "
                f"start QEMU with -qmp unix:{path},server=on,wait=off"
            ) from error
        credentials = raw.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid = struct.unpack("3i", credentials)[0]
        raw.setblocking(False)
        client = QMPClient(name)
        client.logger.setLevel(logging.CRITICAL)  # its failures are raised; nothing is told twice
        try:
            await asyncio.wait_for(client.connect(raw), limit)
        except TimeoutError as error:
            raw.close()
            raise QemuUnsuitable(
                f"no QMP greeting from {path} within {limit:g} s; a QMP socket serves one client at a time: "
                "give the emulator one of its own"
            ) from error
        except ConnectError as error:
            raw.close()
            raise QemuUnsuitable(f"{path} does not speak QMP: {error}") from error
        return cls(client, path, pid)

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """One command. Raises :class:`QemuError` for QEMU's refusal, :class:`QemuGone` when it went away."""
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {command}: {error}") from error
        except (ExecInterruptedError, StateError) as error:
            raise QemuGone(f"QEMU closed its QMP socket during {command}") from error
        except QMPError as error:
            raise QemuError(f"{command}: {error}") from error

    async def hand_over(self, descriptor: int, name: str) -> None:
        """Give QEMU a descriptor of this process (which keeps it), for ``fd:NAME`` in a later command here."""
        self._client.send_fd_scm(descriptor)
        await self.execute("getfd", {"fdname": name})

    async def cont(self, limit: float = 10.0) -> None:
        """Let the guest run.

        A migration that has ended is still being wound up for a moment, and QEMU refuses this until it is. Raises
        :class:`QemuError` when QEMU refuses it, or when that moment is longer than ``limit`` seconds.
        """
        end = asyncio.get_running_loop().time() + limit
        while (await self.execute("query-status"))["status"] == "finish-migrate":
            if asyncio.get_running_loop().time() > end:
                break  # QEMU's own words are the best
            await asyncio.sleep(_WINDING_UP)
        await self.execute("cont")

    async def monitor(self, line: str) -> str:
        """One command of the human monitor."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def events(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        """Every event as ``(name, data)``, until the connection ends."""
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
        return self._client.runstate is Runstate.RUNNING

    async def close(self) -> None:
        """Disconnect; safe to call twice."""
        if self._client.runstate is Runstate.IDLE:
            return
        with contextlib.suppress(QMPError, EOFError, OSError):  # the peer may be gone: that is the aim
            await self._client.disconnect()
