"""Guest memory that the emulator's state carries: pages whose last writes are not in QEMU's dirty log.

The source reads them while its guest stands still (which pages: :mod:`vmbus.machine.migration.dirty_pages`), and the
target writes them in ``Load()``, when QEMU has received all its part of memory, before anything else of the state is
applied.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmbus.machine.memory import VIDEO_MEMORY, MappedMemory
from vmbus.ports import PAGE_SIZE
from vmbus.saving.pages import collect, whole
from vmbus.wire.saved import SavedPages


def read(memory: MappedMemory, gpas: Sequence[int]) -> list[SavedPages]:
    """Return the contents of the pages at ``gpas``, at most as many as a state may carry; the guest is stopped."""
    return collect([gpa // PAGE_SIZE for gpa in gpas], lambda pfn: memory.read(pfn * PAGE_SIZE, PAGE_SIZE))


class CarriedPages:
    """:class:`~vmbus.saving.pages.PagesTarget`: the memory of a guest that has not run here yet."""

    def __init__(self, memory: MappedMemory) -> None:
        self._memory = memory

    def check_pages(self, pages: Sequence[SavedPages]) -> str | None:
        for each in pages:
            for pfn in each.pfns:
                gpa = pfn * PAGE_SIZE
                if not self._memory.is_ram(gpa, PAGE_SIZE) or gpa in VIDEO_MEMORY:
                    return f"page {pfn:#x} is not RAM of this machine"
        return None

    def apply_pages(self, pages: Sequence[SavedPages]) -> None:
        for each in pages:
            for pfn, content in zip(each.pfns, each.contents, strict=True):
                self._memory.put_page(pfn, whole(content))
