"""The pipe header, which precedes every payload on a channel that was offered in pipe mode.

Source: docs/protocol/rings.md#pipe-framing.

    | Off | Size | Field                          |
    |   0 |    4 | type (:class:`PipeType`)       |
    |   4 |    4 | length of the data, bytes      |
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record


class PipeType(enum.IntEnum):
    """Type of a pipe packet; only DATA is used by the devices of this project."""

    DATA = 1
    PARTIAL = 2
    SETUP_GPA_DIRECT = 3
    TEARDOWN_GPA_DIRECT = 4


@dataclass(frozen=True, slots=True)
class PipeHeader:
    """The header, 8 bytes; ``length``: bytes behind it."""

    type: int
    length: int


PIPE_HEADER = Record(PipeHeader, "type" / c.Int32ul, "length" / c.Int32ul)
