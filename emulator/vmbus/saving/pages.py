"""Pages of guest memory within a machine's state: what the emulator wrote and QEMU does not know of.

Source: docs/saved-state.md. They are written to guest memory of the target before anything else of the state is
applied. All chunks of them together name each page once, in ascending order, and no more than ``MAX_CARRIED``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vmbus.saving.refusal import Reason, StateRefused
from vmbus.wire.saved import SAVED_PAGE_SIZE, SavedPages

MAX_CARRIED = 128
"""Pages of one state: 512 KiB at most, half of what the narrower carrier takes. May be raised, never lowered."""

_IN_CHUNK = 16
"""Pages of one chunk: 64 KiB at most, as the buffer that channels are saved into."""


class PagesTarget(Protocol):
    """Guest memory, as what takes the pages of a state."""

    def check_pages(self, pages: Sequence[SavedPages]) -> str | None:
        """Why ``pages`` cannot be applied, or ``None``; changes nothing."""

    def apply_pages(self, pages: Sequence[SavedPages]) -> None:
        """Write them. Does not fail on what :meth:`check_pages` accepted."""


def collect(pfns: Sequence[int], read: Callable[[int], bytes]) -> list[SavedPages]:
    """The records of ``pfns``, of the lowest ones if they are too many; ``read``: all bytes of a page."""
    chosen = sorted(set(pfns))[:MAX_CARRIED]
    found = []
    for start in range(0, len(chosen), _IN_CHUNK):
        some = chosen[start : start + _IN_CHUNK]
        found.append(SavedPages(tuple(some), tuple(read(pfn).rstrip(b"\0") for pfn in some)))
    return found


def check_order(pages: Sequence[SavedPages]) -> None:
    """Whether ``pages`` are sound in themselves. Raises :class:`StateRefused`."""
    last, count = -1, 0
    for each in pages:
        if not each.pfns or len(each.pfns) != len(each.contents):
            raise StateRefused(
                Reason.INCONSISTENT, f"{len(each.pfns)} page numbers, and {len(each.contents)} pages"
            )
        for pfn in each.pfns:
            if pfn <= last:
                raise StateRefused(Reason.INCONSISTENT, f"page {pfn:#x} follows page {last:#x}")
            last = pfn
        count += len(each.pfns)
        if count > MAX_CARRIED:
            raise StateRefused(Reason.INCONSISTENT, f"{count} pages of guest memory, at most {MAX_CARRIED}")


def whole(content: bytes) -> bytes:
    """A page, with the zeros at its end."""
    return content.ljust(SAVED_PAGE_SIZE, b"\0")
