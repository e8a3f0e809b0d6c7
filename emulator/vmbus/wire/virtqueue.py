"""A split virtqueue, and the requests of virtio-blk in it.

Source: Virtual I/O Device (VIRTIO) 1.2, sections 2.7 and 5.2. All little-endian. The driver writes the descriptors
and the available ring, the device writes the used ring:

    descriptor     address, length, flags, next        one for each request; INDIRECT: it names a table of descriptors
    available      flags, index, numbers               what the driver has made available, modulo the size
    used           flags, index, (number, length)      what the device is done with; length: bytes that it wrote

    a request of virtio-blk: header | data | status byte        each a descriptor, or several, of the table
"""

from __future__ import annotations

import enum

import construct as c

DESCRIPTOR = c.Struct("address" / c.Int64ul, "length" / c.Int32ul, "flags" / c.Int16ul, "next" / c.Int16ul)
RING_HEAD = c.Struct("flags" / c.Int16ul, "index" / c.Int16ul)
"""Of the available ring and of the used ring."""
AVAILABLE = c.Struct("number" / c.Int16ul)
USED = c.Struct("number" / c.Int32ul, "length" / c.Int32ul)
BLOCK_HEADER = c.Struct("type" / c.Int32ul, "reserved" / c.Int32ul, "sector" / c.Int64ul)

SECTOR_SHIFT = 9
"""Requests count in sectors of 512 bytes, whatever the block size is."""


class DescriptorFlag(enum.IntFlag):
    """What a descriptor is."""

    NEXT = 1
    """Another one follows."""
    WRITE = 2
    """The device writes there."""
    INDIRECT = 4
    """There is a table of descriptors."""


class RingFlag(enum.IntFlag):
    """What the writer of a ring does not need."""

    QUIET = 1
    """In the available ring: no interrupt. In the used ring: no notification."""


class BlockRequest(enum.IntEnum):
    """Types of requests."""

    READ = 0
    WRITE = 1


BLOCK_OK = 0
"""The status of a request that was done."""
