"""Pages of guest memory within a machine's state: those that the emulator wrote and QEMU did not track as dirty.

Source: docs/saved-state.md. They are written to guest memory of the target before any other part of the state is
applied. All chunks together name each page once, in ascending order, and at most ``MAX_CARRIED`` pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vmbus.saving.status import Reason, StateRefused
from vmbus.wire.saved import SAVED_PAGE_SIZE, SavedPages

MAX_CARRIED = 128
"""Pages of one state: 512 KiB, half of what dbus-vmstate carries. May be raised, never lowered."""

_PAGES_PER_CHUNK = 16
"""64 KiB at most, like the buffer that channels are saved into."""


class PagesTarget(Protocol):
    """Guest memory that the pages of a state are restored into."""

    def check_pages(self, pages: Sequence[SavedPages]) -> str | None:
        """Return why ``pages`` cannot be applied, or ``None``; change nothing."""

    def apply_pages(self, pages: Sequence[SavedPages]) -> None:
        """Write ``pages``. Must not fail for pages that :meth:`check_pages` accepted."""


def collect(pfns: Sequence[int], read: Callable[[int], bytes]) -> list[SavedPages]:
    """Return the records of the ``MAX_CARRIED`` lowest of ``pfns``; ``read`` returns the 4096 bytes of a page."""
    chosen = sorted(set(pfns))[:MAX_CARRIED]
    found = []
    for start in range(0, len(chosen), _PAGES_PER_CHUNK):
        some = chosen[start : start + _PAGES_PER_CHUNK]
        found.append(SavedPages(tuple(some), tuple(read(pfn).rstrip(b"\0") for pfn in some)))
    return found


def check_order(pages: Sequence[SavedPages]) -> None:
    """Raise :class:`StateRefused` if ``pages`` contradict each other or are too many."""
    last, count = -1, 0
    for each in pages:
        if not each.pfns or len(each.pfns) != len(each.contents):
            raise StateRefused(
                Reason.INCONSISTENT, f"{len(each.pfns)} page numbers for {len(each.contents)} pages"
            )
        for pfn in each.pfns:
            if pfn <= last:
                raise StateRefused(
                    Reason.INCONSISTENT, f"page {pfn:#x} after page {last:#x}, page numbers must ascend"
                )
            last = pfn
        count += len(each.pfns)
        if count > MAX_CARRIED:
            raise StateRefused(Reason.INCONSISTENT, f"{count} pages of guest memory, at most {MAX_CARRIED}")


def whole(content: bytes) -> bytes:
    """Return the 4096 bytes of a page whose zeros at the end were cut off."""
    return content.ljust(SAVED_PAGE_SIZE, b"\0")
