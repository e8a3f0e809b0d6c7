"""The parts of the memory that outlives an emulator.

    | from the beginning                       | at the end: :data:`MIRROR_AREA` bytes, whole pages                |
    | the journal: halves, transactions        | the mirror: what compiled code has (:mod:`vmbus.machine.engine`)  |

A memory that would be more than half mirror has none.
"""

from __future__ import annotations

import ctypes
import mmap

from vmbus.machine.engine.layout import Mirror
from vmbus.wire.journal import PAGE

MIRROR_AREA = -(-ctypes.sizeof(Mirror) // PAGE) * PAGE


def areas(memory: mmap.mmap | memoryview) -> tuple[memoryview, memoryview | None]:
    """Return the journal's part, and the mirror's if there is one. Release both before the memory is closed."""
    whole = memoryview(memory).cast("B")
    journal = len(whole) - MIRROR_AREA
    if journal < MIRROR_AREA:
        return whole, None
    return whole[:journal], whole[journal:]
