"""Queues to servers of disks: their memory, and their way into the engine (``queues.c``).

Another process maps the memory, and has the eventfds. It cannot make the memory smaller, which would kill this
process at its next access.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable

from vmbus.machine.engine.layout import (
    MAX_SLOTS,
    QUEUE_AVAILABLE,
    QUEUE_MEMORY,
    QUEUE_SIZE,
    QUEUE_USED,
    QueueTrouble,
)
from vmbus.machine.engine.thread import Engine
from vmbus.machine.io.addresses import address_of
from vmbus.ports import QueueLayout, SharedFile

_NANOSECOND = 1e-9
_REASONS = {
    QueueTrouble.TOO_MANY: "it has answered more requests than there are",
    QueueTrouble.UNKNOWN: "it has answered a request that it does not have",
    QueueTrouble.TOO_LONG: "it has stored more than was asked for",
    QueueTrouble.NO_POLL: "this kernel cannot wait for its eventfd",
}


class EngineQueue:
    """:class:`~vmbus.ports.DataPathQueue`. ``ram``: the file of guest RAM, as the server sees it.

    Raises ``OSError`` where there are no descriptors, or no memory, left.
    """

    def __init__(self, engine: Engine, ram: SharedFile) -> None:
        self._engine = engine
        self._number = 0
        self._descriptors: list[int] = []
        try:
            memory = os.memfd_create("vmbus-queue", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._descriptors.append(memory)
            os.ftruncate(memory, QUEUE_SIZE)
            fcntl.fcntl(
                memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            self._memory = mmap.mmap(memory, QUEUE_SIZE)
            for _ in range(2):
                self._descriptors.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        except BaseException:
            self._close_descriptors()
            raise
        _, kick, call = self._descriptors
        self.layout = QueueLayout(
            files=(ram, SharedFile(memory, QUEUE_SIZE, QUEUE_MEMORY)),
            entries=MAX_SLOTS,
            descriptors=QUEUE_MEMORY,
            available=QUEUE_MEMORY + QUEUE_AVAILABLE,
            used=QUEUE_MEMORY + QUEUE_USED,
            kick_fd=kick,
            call_fd=call,
        )

    def open(self, broken: Callable[[str], None]) -> int:
        address = address_of(self._memory)
        self._number = self._engine.open_queue(
            address,
            self.layout.kick_fd,
            self.layout.call_fd,
            lambda trouble: broken(_REASONS.get(trouble, trouble.name.lower())),
        )
        return self._number

    def activity(self) -> tuple[int, int]:
        return self._engine.queue_activity(self._number)

    def oldest(self) -> float | None:
        return self._engine.queue_times(self._number)[0] * _NANOSECOND or None

    def overtaken(self) -> float | None:
        return self._engine.queue_times(self._number)[1] * _NANOSECOND or None

    def close(self) -> None:
        number, self._number = self._number, 0
        if number:
            self._engine.close_queue(number)
        self._close_descriptors()
        self._memory.close()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
