"""A storage daemon of a test: one disk over NBD and through a queue, of which it leaves out what the test wants."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence

from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus_devices.scsi.image import EXPORT, ImageFile

from tests.unit.fastpath.queue_server import QueueServer
from tests.unit.nbd.nbd_server import Server
from tests.unit.vhost_user.back_end import QueueOwner


class ImageDaemon:
    """``disk``: a file with the content; ``left_out``: offsets of requests that get no answer in the queue."""

    clean = True

    def __init__(self, disk: int, left_out: set[int]) -> None:
        self._disk = disk
        self._left_out = left_out
        self.delay = 0.0
        """Seconds before each answer in the queue."""
        self._nbd = Server(bytearray(os.pread(disk, os.fstat(disk).st_size, 0)), export=EXPORT)
        self._owner: QueueOwner | None = None
        self._worker: threading.Thread | None = None
        self._ending = threading.Event()
        self.with_queue: list[bool] = []
        """For each start, whether a queue was wanted."""

    def start(self, connections: int) -> list[socket.socket]:
        self.with_queue.append(False)
        return [self._nbd.connect(number) for number in range(connections)]

    def start_with_queue(
        self, connections: int, *, writethrough: bool
    ) -> tuple[list[socket.socket], socket.socket | None]:
        streams = self.start(connections)
        self.with_queue[-1] = True
        here, there = socket.socketpair()
        self._ending.clear()
        self._owner = QueueOwner(there)
        self._worker = threading.Thread(target=self._work, args=(self._owner,), daemon=True)
        self._worker.start()
        return streams, here

    def _work(self, owner: QueueOwner) -> None:
        while owner.layout is None:
            if self._ending.wait(0.001):
                return
        server = QueueServer(owner.layout)
        while not self._ending.wait(0.001):
            for one in server.come(server.layout.entries):
                if one.offset not in self._left_out and not self._ending.wait(self.delay):
                    server.move(one, self._disk)
                    server.answer(one)
        server.close()

    def stop(self) -> None:
        self._nbd.hang_up()
        self._ending.set()
        if self._worker is not None and self._owner is not None:
            self._worker.join()
            self._owner.stream.shutdown(socket.SHUT_RDWR)
            self._owner.close()
            self._worker = self._owner = None

    def save_snapshot(self, name: str) -> None:
        raise NotImplementedError

    def delete_snapshot(self, name: str) -> None:
        raise NotImplementedError


class ImageDaemons:
    """The machine's service: ``daemon`` serves the only image."""

    def __init__(self, daemon: ImageDaemon) -> None:
        self.daemon = daemon

    def server(self, image: ImageFile, *, seen: object = None) -> ImageDaemon:
        return self.daemon

    def resize(self, image: ImageFile, size: int) -> None:
        raise NotImplementedError

    def snapshots(self, image: ImageFile) -> Sequence[DiskSnapshot]:
        raise NotImplementedError

    def load_snapshot(self, image: ImageFile, name: str) -> None:
        raise NotImplementedError
