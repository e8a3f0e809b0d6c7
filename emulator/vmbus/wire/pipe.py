"""The pipe header: what stands in front of every payload on a channel that was offered in pipe mode.

Source: docs/protocol/rings.md#pipe-framing.

    | Off | Size | Field                          |
    |   0 |    4 | packet type                    |
    |   4 |    4 | length of what follows, bytes  |
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record


class PipeType(enum.IntEnum):
    """What a pipe packet is. Only data ever crosses the ring here."""

    DATA = 1
    PARTIAL = 2
    SETUP_GPA_DIRECT = 3
    TEARDOWN_GPA_DIRECT = 4


@dataclass(frozen=True, slots=True)
class PipeHeader:
    """``length`` counts the bytes behind these eight."""

    type: int
    length: int


PIPE_HEADER = Record(PipeHeader, "type" / c.Int32ul, "length" / c.Int32ul)
