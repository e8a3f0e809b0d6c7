"""A disk on an image, whose server has a queue to the engine of a test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vmbus.machine.engine.layout import QUEUE_RAM
from vmbus.machine.engine.queue import EngineQueue
from vmbus.machine.io.workers import WorkerThreads
from vmbus.ports import SharedFile
from vmbus_devices.scsi.image import ImageBackend, ImageFile, ImageServers

from tests.unit.engine.engine_guest import RAM
from tests.unit.fastpath.test_engine_storage import Disk

LIMIT = 60.0


class ImageDisk(Disk):
    """The guest of the engine's tests, with an image in place of the file."""

    def __init__(self, device: Path, servers: ImageServers, image: ImageFile) -> None:
        super().__init__(device)
        self.backend = ImageBackend(servers, image)
        self.workers = WorkerThreads(asyncio.get_running_loop())
        ram = SharedFile(self.guest.ram_fd, RAM, QUEUE_RAM)
        path = SimpleNamespace(make_queue=lambda: EngineQueue(self.guest.engine, ram))
        native: Any = SimpleNamespace(data_path=path)
        self.backend.use_native(native)
        self.backend.use(self.workers)
        self.backend.lock()

    async def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < end, "it does not come"
            await asyncio.sleep(0.01)

    def use(self) -> None:
        self.unit.queue = self.backend.queue
        assert self.unit.queue
        self.path.change_unit(self.number, self.unit)

    async def end(self) -> None:
        self.backend.close()
        assert await asyncio.to_thread(self.backend.wait_closed, LIMIT)
        self.workers.close()
        super().close()
