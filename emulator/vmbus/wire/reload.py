"""Messages between the process that serves a guest and the one that takes its place.

Source: docs/restart.md#the-messages; the layout is this project's own. All integers are little-endian.

    ReloadHeader | JSON (UTF-8), an object | data

Descriptors may come with the header (``SCM_RIGHTS``), in the order that the message of that kind has.
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from vmbus.wire.codec import Record

FORMAT = 1
MAX_FIELDS = 1 << 20
"""Bytes of JSON in one message."""
MAX_DATA = 64 << 20
"""Bytes of data in one message; larger ones are refused."""
MAX_DESCRIPTORS = 8


@dataclass(frozen=True, slots=True)
class ReloadHeader:
    """Header of a message, 16 bytes. ``fields``, ``data``: bytes of its two parts."""

    format: int
    fields: int
    data: int


RELOAD_HEADER = Record(
    ReloadHeader,
    "_magic" / c.Const(b"VMBn"),
    "format" / c.Int32ul,
    "fields" / c.Int32ul,
    "data" / c.Int32ul,
)
