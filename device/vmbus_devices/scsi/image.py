"""A disk in an image file of QEMU's: qcow2 with its overlays, and the formats of other machines.

QEMU's own code reads and writes the file, in a process of its own that serves it over NBD to nobody but this disk.
Who starts such processes is given from outside (:class:`ImageServers`); nothing here knows where QEMU is.

    made        the file is looked at, shared with whoever uses it: its size
    lock()      a process opens it for writing, and holds QEMU's locks; requests wait until it has
    unlock()    the process ends, and with it the locks: the guest goes on elsewhere

A process that died is replaced, as a server that hung up is connected to again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import socket
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vmbus.errors import DeviceError, UserError

from vmbus_devices.nbd.client import Client
from vmbus_devices.nbd.handshake import Export, negotiate
from vmbus_devices.nbd.wire import ExportFlag
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.nbd import NbdBackend

EXPORT = "disk"
"""The name under which an image is served."""
QCOW2_MAGIC = b"QFI\xfb"
_LIMIT = 20.0
"""Seconds that a server has to answer each step of the negotiation."""

_WRITABLE = ExportFlag.TRIM | ExportFlag.WRITE_ZEROES


class DetectZeroes(enum.Enum):
    """What is done with zeros that the guest writes: nothing, a record in the image, a hole."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """How an image is to be opened. ``format`` is the name of QEMU's driver; ``share``: whoever else has it."""

    path: Path
    format: str
    read_only: bool = False
    share: bool = False
    cache: Cache = Cache.NONE
    discard: bool = True
    detect_zeroes: DetectZeroes = DetectZeroes.OFF


class ImageServer(Protocol):
    """Serves one image over NBD, as the export :data:`EXPORT`."""

    def start(self, connections: int) -> list[socket.socket]:
        """Open the image; connections to it. Raises :class:`~vmbus.errors.DeviceError` if it cannot be opened."""

    def stop(self) -> None:
        """Write everything back and let go of the image; returns when that is done."""


class ImageServers(Protocol):
    """Who can serve images."""

    def server(self, image: ImageFile) -> ImageServer:
        """A server that is not started. Raises :class:`~vmbus.errors.UserError` where there can be none."""

    def resize(self, image: ImageFile, size: int) -> None:
        """Make an image that nobody has open ``size`` bytes large. Raises :class:`~vmbus.errors.UserError`."""


class ServerConnector:
    """Connections to a server that is started for a session, and stopped after it."""

    export = EXPORT

    def __init__(self, server: ImageServer, connections: int) -> None:
        self._server = server
        self._connections = connections
        self._waiting: deque[socket.socket] = deque()

    def connect(self, number: int) -> socket.socket:
        if not number:
            self._waiting.extend(self._server.start(self._connections))
        stream = self._waiting.popleft()
        stream.settimeout(_LIMIT)
        return stream

    def ended(self) -> None:
        while self._waiting:
            self._waiting.popleft().close()
        self._server.stop()


def look(servers: ImageServers, image: ImageFile) -> Export:
    """What an image is, whoever has it open. Raises :class:`~vmbus.errors.UserError`."""
    image = dataclasses.replace(image, read_only=True, share=True)
    connector = ServerConnector(servers.server(image), 1)
    try:
        with contextlib.closing(connector.connect(0)) as stream:
            return negotiate(stream, EXPORT)
    except (DeviceError, OSError) as error:
        raise UserError(f"cannot open the image {image.path}: {error}") from error
    finally:
        connector.ended()


class ImageBackend(NbdBackend):
    """``image`` as a disk. Raises :class:`~vmbus.errors.UserError` if it cannot be opened as asked."""

    kind = "image"

    def __init__(
        self, servers: ImageServers, image: ImageFile, *, connections: int = 2, reconnect: float = 5.0
    ) -> None:
        export = look(servers, image)
        if not image.read_only:
            export = dataclasses.replace(export, flags=export.flags & ~ExportFlag.READ_ONLY | _WRITABLE)
        self.image = image
        self._servers = servers
        connector = ServerConnector(servers.server(image), connections)
        client = Client(connector, str(image.path), connections=connections, reconnect=reconnect)
        super().__init__(
            client, export, read_only=image.read_only, cache=image.cache, can_discard=image.discard
        )
        client.export = export

    def lock(self) -> None:
        self.client.activate()

    def unlock(self) -> None:
        self.client.deactivate()

    def grow(self, size: int) -> None:
        def work() -> None:
            self._servers.resize(self.image, size)
            if self.client.export is not None:
                self.client.export = dataclasses.replace(self.client.export, size=size)

        self.client.interlude(work)

    def status(self) -> dict[str, Any]:
        return {**super().status(), "format": self.image.format}


def probe(path: Path) -> str:
    """``qcow2`` or ``raw``: what a file is whose format was not said.

    A guest with a raw disk can make it look like anything: only for images that no guest has written to as raw.
    """
    try:
        with path.open("rb") as file:
            return "qcow2" if file.read(len(QCOW2_MAGIC)) == QCOW2_MAGIC else "raw"
    except OSError as error:
        raise UserError(f"cannot open the image {path}: {error.strerror}") from error
