"""Guest memory for fuzzing: as strict as :class:`~vmbus.testing.fakes.FakeMemory`, several times as fast."""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, GuestPages
from vmbus.testing.fakes import FakeMemory, FakePages


class FlatPages(FakePages):
    """Pages in ascending order, without a gap."""

    def __init__(self, memory: FlatMemory, pfns: Sequence[int]) -> None:
        super().__init__(memory, pfns)
        self._flat = memory
        first = pfns[0] * PAGE_SIZE - memory.base
        self._view = memoryview(memory.ram)[first : first + self.size]
        self._words = self._view.cast("I")

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"[{offset}, {offset + length}) is outside {self.size} bytes")
        return self._view[offset : offset + length].tobytes()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        end = offset + len(data)
        if offset < 0 or end > self.size:
            raise IndexError(f"[{offset}, {end}) is outside {self.size} bytes")
        self._view[offset:end] = data
        self._flat.changed = True

    def load_u32(self, offset: int) -> int:
        if offset & 3 or offset < 0:
            raise IndexError(f"offset {offset} is not aligned")
        return self._words[offset >> 2]

    def store_u32(self, offset: int, value: int) -> None:
        if offset & 3 or offset < 0:
            raise IndexError(f"offset {offset} is not aligned")
        self._words[offset >> 2] = value
        self._flat.changed = True


class FlatMemory(FakeMemory):
    """A :class:`~vmbus.testing.fakes.FakeMemory` that is used again and again: see :meth:`clear`."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._zeros = bytes(size)
        self.changed = False
        """Whether it may hold something else than zeros."""

    def clear(self) -> None:
        """Be as at first: zeros."""
        if not self.changed:
            return
        self.changed = False
        self.ram[:] = self._zeros
        self.code_writes.clear()
        self.stored.clear()

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.changed = True
        super().write(gpa, data)

    def view(self, gpa: int, length: int) -> memoryview:
        self.changed = True
        return super().view(gpa, length)

    def pages(self, pfns: Sequence[int]) -> GuestPages:  # type: ignore[override]
        for pfn in pfns:
            if not self.is_ram(pfn * PAGE_SIZE, PAGE_SIZE):
                raise GuestAddressError(pfn * PAGE_SIZE, PAGE_SIZE)
        if pfns and list(pfns) == list(range(pfns[0], pfns[0] + len(pfns))):
            return FlatPages(self, pfns)
        return FakePages(self, pfns)
