"""The control page of a ring buffer, the first page of each ring; the data pages follow it.

Source: docs/protocol/rings.md#control-page. Indices are byte offsets into the data area, multiples of 8.

    | Off  | Size | Field             | Written by |
    |    0 |    4 | write index       | writer     |
    |    4 |    4 | read index        | reader     |
    |    8 |    4 | interrupt mask    | reader     |
    |   12 |    4 | pending send size | writer     |
    |   64 |    4 | feature bits      | writer     |
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record

RING_PAGE = 4096
"""Bytes of the control page, and the granularity of the data area."""

RESERVED_BYTES = 8
"""Bytes of a ring that always stay unused, because equal indices mean an empty ring."""

FEATURE_PENDING_SEND_SIZE = 1
"""Feature bit 0: the reader is to read the pending send size."""


@dataclass(frozen=True, slots=True)
class RingControl:
    """The words of a control page, 68 bytes; indices and sizes in bytes."""

    write_index: int
    read_index: int
    interrupt_mask: int
    pending_send_size: int
    feature_bits: int


RING_CONTROL = Record(
    RingControl,
    "write_index" / c.Int32ul,
    "read_index" / c.Int32ul,
    "interrupt_mask" / c.Int32ul,
    "pending_send_size" / c.Int32ul,
    c.Padding(48),
    "feature_bits" / c.Int32ul,
)


def _offset_of(field: str) -> int:
    offset = 0
    for subcon in RING_CONTROL.struct.subcons:
        if subcon.name == field:
            return offset
        offset += subcon.sizeof()
    raise KeyError(field)


WRITE_INDEX = _offset_of("write_index")
READ_INDEX = _offset_of("read_index")
INTERRUPT_MASK = _offset_of("interrupt_mask")
PENDING_SEND_SIZE = _offset_of("pending_send_size")
FEATURE_BITS = _offset_of("feature_bits")
