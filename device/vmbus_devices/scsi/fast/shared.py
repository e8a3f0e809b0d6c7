"""The structures and constants that the fast path's C and Python share, declared once.

The ``ctypes`` structures below are the declaration. :mod:`vmbus.native_layout` writes the same structures in C, with
a ``_Static_assert`` for each size and offset, so that a compiler which lays them out differently refuses to compile.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import c_int32, c_int64, c_uint32, c_uint64, c_void_p

from vmbus.devices.histogram import STEPS_PER_OCTAVE
from vmbus.ports import PAGE_SIZE

VERSION = 5
MAX_REGIONS = 8
"""Ranges of guest RAM."""
MAX_UNITS = 256
MAX_BUCKETS = 256
BUCKET_BIAS = 128
"""Bucket of a latency of one second."""


class UnitFlag(enum.IntFlag):
    """What compiled code may do for a unit."""

    READS = 1
    WRITES = 2
    NULL = 4
    """There is no file: no data moves."""
    LEAVES_FUA = 8
    """Writes with FUA are Python's."""


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


class Shared(ctypes.Structure):
    """What both sides read and write; the C side's private data follows it in ``struct fastpath``."""

    _fields_ = [
        ("version", c_uint32),
        ("region_count", c_uint32),
        ("ram", c_void_p),
        ("ram_size", c_uint64),
        ("region", Region * MAX_REGIONS),
        ("unit", Unit * MAX_UNITS),
    ]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (Region, Unit, Shared)
"""In the order in which C needs them."""

CONSTANTS = {
    "FASTPATH_VERSION": VERSION,
    "MAX_REGIONS": MAX_REGIONS,
    "MAX_UNITS": MAX_UNITS,
    "MAX_BUCKETS": MAX_BUCKETS,
    "BUCKET_BIAS": BUCKET_BIAS,
    "BUCKETS_PER_OCTAVE": STEPS_PER_OCTAVE,
    "PAGE_SHIFT": PAGE_SIZE.bit_length() - 1,
    **{f"UNIT_{flag.name}": int(flag) for flag in UnitFlag},
}
"""Name in C → value."""
