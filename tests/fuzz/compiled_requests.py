"""The requests of :mod:`tests.fuzz.storvsc_requests`, with the compiled fast path.

Two disks are files, and guest memory is mapped; all guest pages are compared after each request.

    python -m tests.fuzz.compiled_requests --count 50000 --seed 7
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

from vmbus.ports import PAGE_SIZE
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.file import Cache, FileBackend

from tests.fuzz.storvsc_requests import DATA_PAGES, Fuzzer, main
from tests.unit.fastpath.fast_guest import HIGH, HOLE, RAM, FastGuest


class CompiledFuzzer(Fuzzer):
    """A fuzzer with the compiled fast path; ``folder``: for the files of the disks."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.folder = folder
        super().__init__(seed)
        self.shadow = bytearray()
        self.forget_stores()

    def make_guest(self) -> None:
        image = self.folder / "disk.img"
        image.write_bytes(bytes(2 << 20))
        for cache, lun in ((Cache.WRITEBACK, 0), (Cache.NONE, 1)):
            self.device.detach(0, lun)
            self.device.attach(Disk(FileBackend(image, cache=cache), cache.value), 0, lun)
            image = self.folder / "direct.img"
            image.write_bytes(bytes(2 << 20))
        self.fast = FastGuest(self.device)
        self.guest = self.fast
        self.memory = self.fast.memory
        self.guest.close()

    def digest(self) -> bytes:
        return hashlib.sha256(self.memory.read(HIGH, RAM - HOLE)).digest()

    def data(self) -> bytearray:
        return bytearray(self.memory.read(DATA_PAGES.start * PAGE_SIZE, len(DATA_PAGES) * PAGE_SIZE))

    def look(self) -> None:
        found = self.data()
        base = DATA_PAGES.start * PAGE_SIZE
        for runs, _ in self.open.values():
            for gpa, length in runs:
                if 0 <= gpa - base < len(found):
                    self.shadow[gpa - base : gpa - base + length] = found[gpa - base : gpa - base + length]
        if found != self.shadow:
            at = next(index for index, byte in enumerate(found) if byte != self.shadow[index])
            raise AssertionError(f"something was stored at {base + at:#x}, where no request allowed it")

    def forget_stores(self) -> None:
        self.shadow = self.data()

    def wait(self) -> None:
        self.fast.settle()

    def finish(self) -> None:
        """Close, and report how many requests the compiled code did."""
        taken = self.fast.taken_before + self.fast.taken
        print(f"{taken} requests were done by the fast path")
        if not taken:
            raise AssertionError("the fast path did nothing")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.exit(main(lambda seed: CompiledFuzzer(seed, Path(place))))
