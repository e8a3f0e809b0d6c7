"""The structures and constants that the fast path's C and Python share, declared once.

The ``ctypes`` structures below are the declaration. :mod:`vmbus.native_layout` writes the same structures in C, with
a ``_Static_assert`` for each size and offset, so that a compiler which lays them out differently refuses to compile.
"""

from __future__ import annotations

import ctypes
import enum
import struct
from ctypes import c_int32, c_int64, c_uint8, c_uint32, c_uint64, c_void_p

from vmbus.devices.histogram import STEPS_PER_OCTAVE
from vmbus.ports import PAGE_SIZE

VERSION = 4
MAX_REGIONS = 8
"""Ranges of guest RAM."""
MAX_UNITS = 256
MAX_EVENTS = 512
"""Requests that one call of ``fastpath_reap`` reports."""
MAX_NOTED = 4096
"""Ranges that one call of ``fastpath_reap`` reports."""
MAX_BUCKETS = 256
BUCKET_BIAS = 128
"""Bucket of a latency of one second."""
ANSWER_STRIDE = 96
"""Bytes of the output that one completion packet may take: a descriptor, and the longest answer."""


class UnitFlag(enum.IntFlag):
    """What compiled code may do for a unit."""

    READS = 1
    WRITES = 2
    NULL = 4
    """There is no file: no data moves."""
    LEAVES_FUA = 8
    """Writes with FUA are Python's."""


class EventKind(enum.IntEnum):
    """What became of a request."""

    ANSWER = 0
    """``length`` bytes at ``offset`` of the output are its completion packet."""
    RETURNED = 1
    """It is left to Python; ``offset`` is the number of its slot, ``length`` the size of its packet."""


class Region(ctypes.Structure):
    """Guest RAM: ``[start, end)`` lies at ``start + delta`` of the file of guest RAM."""

    _fields_ = [("start", c_uint64), ("end", c_uint64), ("delta", c_int64)]


class Unit(ctypes.Structure):
    """A disk, and from ``reads`` on what happened to it: numbers that compiled code makes, and only it."""

    _fields_ = [
        ("fd", c_int32),
        ("flags", c_uint32),  # UnitFlag
        ("blocks", c_uint64),
        ("block_shift", c_uint32),  # log2 of the block size
        ("max_transfer", c_uint32),  # bytes
        ("alignment_mask", c_uint32),  # of addresses and lengths in memory
        ("fua_flags", c_uint32),  # of pwritev2(2)
        ("queue", c_uint32),  # of the engine, in place of the file; 0: none
        ("reserved", c_uint32),
        ("reads", c_uint64),
        ("writes", c_uint64),
        ("bytes_read", c_uint64),
        ("bytes_written", c_uint64),
        ("depth", c_uint32),
        ("max_depth", c_uint32),
        ("min_ns", c_uint64),
        ("max_ns", c_uint64),
        ("buckets", c_uint32 * MAX_BUCKETS),
    ]


class Event(ctypes.Structure):
    """One request that has ended; ``kind`` is an :class:`EventKind`."""

    _fields_ = [("channel", c_uint32), ("kind", c_uint32), ("offset", c_uint32), ("length", c_uint32)]


class Noted(ctypes.Structure):
    """A range within one guest page that was stored into, and from which code was translated (or may have been)."""

    _fields_ = [("gpa", c_uint64), ("length", c_uint64)]


class Shared(ctypes.Structure):
    """What both sides read and write; the C side's private data follows it in ``struct fastpath``."""

    _fields_ = [
        ("version", c_uint32),
        ("in_flight", c_uint32),
        ("events", c_uint32),
        ("noted_ranges", c_uint32),
        ("region_count", c_uint32),
        ("event_fd", c_int32),
        ("ram", c_void_p),
        ("ram_size", c_uint64),
        ("dirty", c_void_p),  # a byte for each page of the file
        ("notes", c_void_p),  # a byte for each guest page; NULL: code is not watched
        ("note_pages", c_uint64),
        ("spin_ns", c_uint64),  # longest wait for a completion
        ("idle_spin_ns", c_uint64),  # longest wait for a packet, with no transfer under way
        ("region", Region * MAX_REGIONS),
        ("unit", Unit * MAX_UNITS),
        ("event", Event * MAX_EVENTS),
        ("noted", Noted * MAX_NOTED),
        ("output", c_uint8 * (MAX_EVENTS * ANSWER_STRIDE)),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Region, Unit, Event, Noted, Shared)
"""In the order in which C needs them."""

EVENT = struct.Struct("=" + "".join([kind._type_ for _, kind in Event._fields_]))  # type: ignore[union-attr, misc]
"""The same layout as :class:`Event`, for reading many at once."""

CONSTANTS = {
    "FASTPATH_VERSION": VERSION,
    "MAX_REGIONS": MAX_REGIONS,
    "MAX_UNITS": MAX_UNITS,
    "MAX_EVENTS": MAX_EVENTS,
    "MAX_NOTED": MAX_NOTED,
    "MAX_BUCKETS": MAX_BUCKETS,
    "BUCKET_BIAS": BUCKET_BIAS,
    "BUCKETS_PER_OCTAVE": STEPS_PER_OCTAVE,
    "ANSWER_STRIDE": ANSWER_STRIDE,
    "PAGE_SHIFT": PAGE_SIZE.bit_length() - 1,
    **{f"UNIT_{flag.name}": int(flag) for flag in UnitFlag},
    **{f"EVENT_{kind.name}": int(kind) for kind in EventKind},
}
"""Name in C → value."""
