"""The tables of the shared memory, from which the gateway answers by itself; under one sequence lock."""

from __future__ import annotations

import mmap
import threading

from vmbus.errors import InternalError
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import offset_of

_SEQUENCE = offset_of(wire.CONTROL, "table_sequence") // 4
_TABLES = {
    "cpuid": ("cpuid_count", wire.CPUID_ENTRY.sizeof(), wire.CPUID_LEAVES),
    "rules": ("rule_count", wire.DOORBELL_RULE.size, wire.RULES),
    "gone": ("gone_count", wire.GONE_ENTRY.sizeof(), wire.GONE),
    "msrs": ("msr_count", wire.MSR_ENTRY.size, wire.MSRS),
    "posts": ("post_count", wire.POST_RULE.size, wire.POST_RULES),
    "ram": ("ram_count", wire.RAM_RANGE.size, wire.RAM_RANGES),
}
"""Name -> the word that counts its entries, the bytes of one, and how many it holds."""


class Tables:
    """``region``: the shared memory; ``words``: the same as 32-bit words; ``fence`` is not held."""

    def __init__(self, region: mmap.mmap, words: memoryview, fence: threading.Lock) -> None:
        self._region = region
        self._words = words
        self._fence = fence

    def write(self, name: str, entries: bytes) -> None:
        """Replace the entries of the table ``name``."""
        count_word, size, limit = _TABLES[name]
        count = len(entries) // size
        if count > limit:
            raise InternalError(f"{count} entries in the gateway's table {name}, which holds {limit}")
        words = self._words
        sequence = (words[_SEQUENCE] | 1) & 0xFFFFFFFF  # stays odd if an emulator ended here
        words[_SEQUENCE] = sequence
        with self._fence:
            words[offset_of(wire.CONTROL, count_word) // 4] = count
            at = offset_of(wire.CONTROL, name)
            self._region[at : at + len(entries)] = entries
        words[_SEQUENCE] = (sequence + 1) & 0xFFFFFFFF
