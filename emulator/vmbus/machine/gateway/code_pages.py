"""Which guest pages code was translated from, as the gateway notes it (docs/gateway.md)."""

from __future__ import annotations

import mmap

from vmbus.machine.io.addresses import address_of


class CodePages:
    """Guest pages that code was translated from: one byte a page, set by the gateway, cleared here."""

    def __init__(self, region: mmap.mmap, offset: int, pages: int) -> None:
        self._region = region
        self._offset = offset
        self._pages = pages

    def test_and_clear(self, first_pfn: int, count: int) -> list[int]:
        """Of ``count`` pages from ``first_pfn`` those that were noted; their notes are cleared.

        Pages beyond what the gateway notes (its ``ram-limit``) are always returned.
        """
        region = self._region
        start = self._offset + first_pfn
        if first_pfn + count > self._pages:
            inside = max(0, self._pages - first_pfn)
            noted = self.test_and_clear(first_pfn, inside) if inside else []
            return noted + list(range(first_pfn + inside, first_pfn + count))
        if count == 1:
            if not region[start]:
                return []
            region[start] = 0
            return [first_pfn]
        notes = region[start : start + count]
        at = notes.find(1)
        found: list[int] = []
        while at >= 0:
            region[start + at] = 0
            found.append(first_pfn + at)
            at = notes.find(1, at + 1)
        return found

    def native(self) -> tuple[int, int]:
        """Address of the notes in this process, and of how many pages they are."""
        return address_of(self._region) + self._offset, self._pages
