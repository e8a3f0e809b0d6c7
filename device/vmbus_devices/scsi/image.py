"""A disk in an image file of one of QEMU's formats: qcow2 with its overlays, and the formats of other hypervisors.

QEMU's own code reads and writes the file, in a process (``qemu-storage-daemon``) that serves it to this disk alone:
over NBD, and over a queue what is plain (:mod:`vmbus_devices.scsi.image_queues`). The machine starts such processes
(:class:`ImageServers`); this module does not depend on QEMU.

    created     the image is opened for reading, shared with other users, to find its size
    lock()      a process opens the image for writing and holds QEMU's locks; requests wait until it does
    unlock()    the process ends, and its locks are released: the guest continues elsewhere

A process that died is replaced, as a lost connection to a server is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError, UserError, VmbusError
from vmbus.ports import NativeServices, Workers

from vmbus_devices.nbd.client import Client
from vmbus_devices.nbd.handshake import Export, negotiate
from vmbus_devices.nbd.wire import ExportFlag
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.image_queues import ImageQueues
from vmbus_devices.scsi.nbd import NbdBackend

EXPORT = "disk"
"""The name of the export that an image is."""
QCOW2_MAGIC = b"QFI\xfb"
_NEGOTIATION_TIMEOUT = 20.0
"""Seconds for each step of the negotiation with a server."""

_WRITETHROUGH = (Cache.WRITETHROUGH, Cache.DIRECTSYNC)
_WRITABLE = ExportFlag.TRIM | ExportFlag.WRITE_ZEROES


class DetectZeroes(enum.Enum):
    """How zeros that the guest writes are stored: as data, as a mark in the image, or as a hole."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """How an image is opened. ``format``: name of QEMU's driver; ``share``: although another process locked it.

    An image can name other files. ``backing``: whether a backing file is opened, or which files may be one;
    ``data_file``: opened in place of the external data file; ``extents``: a VMDK may name its extents.
    """

    path: Path
    format: str
    read_only: bool = False
    share: bool = False
    cache: Cache = Cache.NONE
    discard: bool = True
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    backing: bool | tuple[Path, ...] = False
    data_file: Path | None = None
    extents: bool = False


class ImageServer(Protocol):
    """Serves one image over NBD, as the export :data:`EXPORT`."""

    def start(self, connections: int) -> list[socket.socket]:
        """Open the image and return connections. Raises :class:`~vmbus.errors.DeviceError` if that fails."""

    @property
    def clean(self) -> bool:
        """Whether the last :meth:`stop` has written all data back."""

    def start_with_queue(
        self, connections: int, *, writethrough: bool
    ) -> tuple[list[socket.socket], socket.socket | None]:
        """As :meth:`start`, and return a vhost-user connection to the same disk, if the server can have one.

        ``writethrough``: every write over it is safe when it is answered.
        """

    def stop(self) -> None:
        """Write all data back and close the image; return when that is done."""

    def save_snapshot(self, name: str) -> None:
        """Make an internal snapshot while the image is closed. Raises :class:`~vmbus.errors.DeviceError`."""

    def delete_snapshot(self, name: str) -> None:
        """Delete an internal snapshot while the image is closed. Raises :class:`~vmbus.errors.DeviceError`."""


class ImageServers(Protocol):
    """Servers for images, made by the machine."""

    def server(self, image: ImageFile, *, seen: Any = None) -> ImageServer:
        """Return a server, not started. Raises :class:`~vmbus.errors.UserError` where none is available.

        ``seen``: another server of this image, which has opened it: what it has found need not be looked for again.
        """

    def resize(self, image: ImageFile, size: int) -> None:
        """Resize an image that is not open to ``size`` bytes. Raises :class:`~vmbus.errors.UserError`."""

    def snapshots(self, image: ImageFile) -> Sequence[DiskSnapshot]:
        """Return the internal snapshots of an image, open or not. Raises :class:`~vmbus.errors.DeviceError`."""

    def load_snapshot(self, image: ImageFile, name: str) -> None:
        """Put an image that is not open back to a snapshot. Raises :class:`~vmbus.errors.DeviceError`."""


class ServerConnector:
    """Connections to a server that is started for each session, and stopped after it.

    ``queues``: how its disk is served to compiled code, too.
    """

    export = EXPORT

    def __init__(self, server: ImageServer, connections: int, queues: ImageQueues | None = None) -> None:
        self._server = server
        self._connections = connections
        self._queues = queues
        self._waiting: deque[socket.socket] = deque()

    def connect(self, number: int) -> socket.socket:
        if not number:
            self._waiting.extend(self._start())
        stream = self._waiting.popleft()
        stream.settimeout(_NEGOTIATION_TIMEOUT)
        return stream

    def _start(self) -> list[socket.socket]:
        if self._queues is None or not self._queues.wanted:
            return self._server.start(self._connections)
        streams, stream = self._server.start_with_queue(
            self._connections, writethrough=self._queues.writethrough
        )
        self._queues.begin(stream)
        return streams

    def activity(self) -> tuple[int, int]:
        return (0, 0) if self._queues is None else self._queues.activity()

    def oldest(self) -> float | None:
        return None if self._queues is None else self._queues.oldest()

    def overtaken(self) -> float | None:
        return None if self._queues is None else self._queues.overtaken()

    def give_up(self, why: str) -> None:
        if self._queues is not None:
            self._queues.give_up(why)

    def ended(self) -> None:
        while self._waiting:
            self._waiting.popleft().close()
        if self._queues is not None:
            self._queues.end()
        self._server.stop()
        if self._queues is not None:
            self._queues.close(clean=self._server.clean)


def inspect(servers: ImageServers, image: ImageFile) -> tuple[Export, ImageServer]:
    """Return size and abilities of an image, which may be open elsewhere, and the server that has opened it.

    Raises :class:`~vmbus.errors.UserError`.
    """
    image = dataclasses.replace(image, read_only=True, share=True)
    server = servers.server(image)
    connector = ServerConnector(server, 1)
    try:
        with contextlib.closing(connector.connect(0)) as stream:
            return negotiate(stream, EXPORT), server
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
        export, seen = inspect(servers, image)
        if not image.read_only:
            export = dataclasses.replace(export, flags=export.flags & ~ExportFlag.READ_ONLY | _WRITABLE)
        self.image = image
        self._servers = servers
        self._server = servers.server(image, seen=seen)  # which opens it while its guest stands still
        self._queues = ImageQueues(self, writethrough=image.cache in _WRITETHROUGH)
        connector = ServerConnector(self._server, connections, self._queues)
        client = Client(connector, str(image.path), connections=connections, reconnect=reconnect)
        self._queues.lost = client.lose
        super().__init__(
            client, export, read_only=image.read_only, cache=image.cache, can_discard=image.discard
        )
        client.export = export
        if image.format == "qcow2" and not image.read_only and image.data_file is None:
            self.snapshot_disk = ImageSnapshots(self, servers, self._server)

    def use_native(self, native: NativeServices) -> None:
        self._queues.use_native(native)

    def use(self, workers: Workers) -> None:
        self._queues.workers = workers
        super().use(workers)

    def lock(self) -> None:
        self.client.activate()

    def claim(self, timeout: float) -> None:
        try:
            self.client.connect(timeout)
        except DeviceError as error:
            raise DeviceError(
                f"the image {self.image.path} cannot be opened for this guest: {error}"
            ) from error

    def unlock(self) -> None:
        self.client.deactivate()

    def grow(self, size: int) -> None:
        def work() -> None:
            self._servers.resize(self.image, size)
            if self.client.export is not None:
                self.client.export = dataclasses.replace(self.client.export, size=size)

        self.client.interlude(work)

    def status(self) -> dict[str, Any]:
        return {
            **super().status(),
            "format": self.image.format,
            "path": "vhost-user" if self.queue else "nbd",
            "queued": self._queues.activity()[0],
        }


class ImageSnapshots:
    """The internal snapshots of a qcow2: :class:`~vmbus.bus.io.snapshots.SnapshotDisk`.

    They are made, put back and deleted while no server has the image open. Its user's requests wait meanwhile.
    """

    def __init__(self, backend: ImageBackend, servers: ImageServers, server: ImageServer) -> None:
        self._backend = backend
        self._servers = servers
        self._server = server

    @property
    def size(self) -> int:
        return self._backend.size

    def snapshots(self) -> Sequence[DiskSnapshot]:
        return self._servers.snapshots(self._backend.image)

    def save_snapshot(self, name: str) -> None:
        def work() -> None:
            if not self._server.clean:  # the guest's memory has as written what the image has not
                raise DeviceError(
                    f"the server of {self._backend.image.path} did not end properly: what was written may be missing"
                )
            self._server.save_snapshot(name)

        self._closed(work)

    def load_snapshot(self, name: str, *, keep: str | None = None) -> None:
        def work() -> None:
            if keep is not None:
                self._server.save_snapshot(keep)
            try:
                self._servers.load_snapshot(self._backend.image, name)
            except VmbusError as error:
                if keep is not None:
                    self._undo(keep, error)
                raise

        self._closed(work)

    def _undo(self, keep: str, why: VmbusError) -> None:
        """Go back to ``keep``: where qemu-img was interrupted, the content may be either."""
        try:
            self._servers.load_snapshot(self._backend.image, keep)
            self._server.delete_snapshot(keep)
        except VmbusError as error:
            raise DeviceError(
                f"{why}; what was in the image is in its snapshot {keep}, which could not be put back: {error}"
            ) from error

    def delete_snapshot(self, name: str) -> None:
        self._closed(lambda: self._server.delete_snapshot(name))

    def _closed(self, work: Callable[[], None]) -> None:
        """Call ``work`` while no server has the image open."""
        self._backend.client.interlude(work)


def probe(path: Path) -> str:
    """Return ``qcow2`` or ``raw``, by the first bytes of a file.

    Only for images that no guest has written to as raw: a guest can give a raw disk the first bytes of a qcow2.
    """
    try:
        with path.open("rb") as file:
            return "qcow2" if file.read(len(QCOW2_MAGIC)) == QCOW2_MAGIC else "raw"
    except OSError as error:
        raise UserError(f"cannot open the image {path}: {error.strerror}") from error
