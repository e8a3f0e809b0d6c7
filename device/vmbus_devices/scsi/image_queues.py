"""The queue by which compiled code has an image's server do plain reads and writes, beside NBD for everything else.

    begin()   the server has started: it gets guest RAM and the queue (vhost-user), and the queue is published
    end()     the session ends: compiled code gets no more requests for the queue
    close()   the server has ended: what it did not answer comes back from compiled code, and goes to the next server

Both ways end at one block node in one process, so a flush over NBD covers what was written through the queue, and a
request that failed there is repeated over NBD, which says why. Where there can be no queue, NBD does everything.

``VMBUS_FASTPATH=nbd`` in the environment forbids queues.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Protocol

from vmbus.errors import DeviceError
from vmbus.ports import DataPath, DataPathQueue, NativeServices, Workers

from vmbus_devices.scsi.fast.path import requested_way
from vmbus_devices.vhost_user import offer_queue

_logger = logging.getLogger(__name__)

_TIMEOUT = 20.0
"""Seconds for each message of the negotiation."""


class QueueUser(Protocol):
    """Who has the queue: a back end."""

    queue: int
    leaves_fua: bool
    flush_needed: bool


class ImageQueues:
    """The queues of one back end, one after the other; ``writethrough``: each write is safe when it is answered.

    :meth:`use_native` is called in the event loop's thread, :meth:`activity`, :meth:`oldest` and :meth:`overtaken` in
    any, the other methods in that of the client, which makes the sessions.
    """

    def __init__(self, user: QueueUser, *, writethrough: bool) -> None:
        self._user = user
        self.writethrough = writethrough
        self.workers: Workers | None = None
        self.lost: Callable[[Exception], None] = lambda error: None
        """Called, in any thread, when the server is not to be used any more."""
        self._data_path: DataPath | None = None
        self._refused = False
        """Whether a queue was no use: there is none until the end."""
        self._queue: DataPathQueue | None = None
        self._stream: socket.socket | None = None
        self._stop_watching: Callable[[], None] | None = None
        self._hung_up = False

    def use_native(self, native: NativeServices) -> None:
        """Have queues from the next session on, if the machine has an engine."""
        if not requested_way():
            self._data_path = native.data_path

    @property
    def wanted(self) -> bool:
        """Whether the next session is to have a queue."""
        return self._data_path is not None and self.workers is not None and not self._refused

    def begin(self, stream: socket.socket | None) -> None:
        """Make a queue, with a server that has just started. Does nothing where that is not possible."""
        if stream is None:
            self._refused = True
            return
        self._stream = stream
        try:
            self._offer(stream)
        except (DeviceError, OSError) as error:
            self.give_up(str(error))

    def _offer(self, stream: socket.socket) -> None:
        queue = None if self._data_path is None else self._data_path.make_queue()
        if queue is None or self.workers is None:
            self._refused = True
            return
        self._queue = queue
        offer_queue(stream, queue.layout, _TIMEOUT)
        number = queue.open(self._broken)
        if not number:
            raise DeviceError("there are too many queues, or descriptors (ulimit -n)")
        self._stop_watching = self.workers.watch(stream.fileno(), self._ended)
        self._user.leaves_fua = self._user.flush_needed and not self.writethrough
        self._user.queue = number

    def give_up(self, why: str) -> None:
        """Have no queue from the next session on."""
        self._refused = True
        _logger.warning("an image is served over NBD alone, which is slower: no queue: %s", why)

    def activity(self) -> tuple[int, int]:
        """Return how many requests were answered through the queue, and how many are under way."""
        queue = self._queue
        return (0, 0) if queue is None else queue.activity()

    def oldest(self) -> float | None:
        """Return when (``time.monotonic``) the oldest request there was taken; ``None`` if there is none."""
        queue = self._queue
        return None if queue is None else queue.oldest()

    def overtaken(self) -> float | None:
        """Return since when (``time.monotonic``) the server answers others in place of one request, if it does."""
        queue = self._queue
        return None if queue is None else queue.overtaken()

    def _broken(self, why: str) -> None:
        """Give up a server that breaks the rules of the queue."""
        self.give_up(f"the server breaks its rules: {why}")
        self.lost(DeviceError(f"the storage daemon breaks the rules of its queue: {why}"))

    def _ended(self) -> None:
        """Note the end of the vhost-user connection, on which the server sends nothing."""
        self._hung_up = True
        if self._stop_watching is not None:
            self._stop_watching()
        self.lost(DeviceError("the storage daemon has closed its queue"))

    def end(self) -> None:
        """Have no more requests go into the queue, before the server is ended."""
        self._user.queue = 0
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None

    def close(self, *, clean: bool) -> None:
        """Take back what a server that has ended did not answer; ``clean``: it ended because it was told to."""
        if self._hung_up and clean:
            self.give_up("the server had closed it, and went on")
        self._hung_up = False
        if self._queue is not None:
            self._queue.close()
            self._queue = None
        if self._stream is not None:
            self._stream.close()
            self._stream = None
