"""Protocol of the echo device, the emulator's own test and teaching device (docs/devices.md).

The guest asks, the host answers. Every packet's payload is a header of 24 bytes and ``length`` bytes of data:

    | Off | Size | Field                                                              |
    |   0 |    2 | operation                                                          |
    |   2 |    2 | status: 0 in a request, :class:`EchoStatus` in an answer           |
    |   4 |    4 | length of the data, bytes                                          |
    |   8 |    8 | sequence: the guest's choice, returned as it came                  |
    |  16 |    4 | CRC-32 (IEEE 802.3, as in zlib) of the data                        |
    |  20 |    4 | reserved                                                           |

A request that wants a completion is answered by one; any other by an in-band packet with the same transaction
id. Packets that the host sends by itself (``GENERATED``) have transaction id 0.

What the data is:

    | Operation  | Request                                           | Answer               |
    | ECHO       | anything                                          | the same             |
    | FILL       | [ranges,] then the bytes to write, repeated       | none                 |
    | CHECKSUM   | [ranges]                                          | EchoChecksum         |
    | GENERATE   | EchoGenerate                                      | none; packets follow |
    | GENERATED  | (host to guest only)                              | -                    |
    | STATISTICS | none                                              | EchoStatistics       |

Byte j of the data of generated packet s is (167 * (s mod 251 + j) + 13) mod 256.

``[ranges]`` is there in an in-band packet only: a count (u32), a reserved u32, then that many
:class:`EchoRange`. A GPA-direct packet names its ranges by itself.
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass

import construct as c

from vmbus.errors import MalformedError
from vmbus.wire.codec import Record, derive_struct

ECHO_INTERFACE = uuid.UUID("1db72679-86d6-4f61-b61a-d7c1e85d20ff")
ECHO_INSTANCE = uuid.UUID("361fb128-28d1-4c0f-baf6-f5d6f82b002b")

MAX_RANGES = 64
MAX_TRANSFER = 1 << 20
"""Bytes that one FILL or CHECKSUM may touch."""
MAX_GENERATE_COUNT = 1 << 24
MAX_GENERATE_SIZE = 16384
"""Bytes of data in a generated packet."""
GENERATED_PERIOD = 251
GENERATED_DATA = bytes((167 * n + 13) & 0xFF for n in range(GENERATED_PERIOD + MAX_GENERATE_SIZE))
"""The data of generated packet ``s`` is a slice from ``s % GENERATED_PERIOD`` on."""


class EchoOperation(enum.IntEnum):
    """What the guest asks for."""

    ECHO = 1
    FILL = 2
    CHECKSUM = 3
    GENERATE = 4
    GENERATED = 5
    STATISTICS = 6


class EchoStatus(enum.IntEnum):
    """How it went."""

    OK = 0
    UNKNOWN_OPERATION = 1
    MALFORMED = 2
    NOT_RAM = 3
    TOO_LARGE = 4
    BAD_CHECKSUM = 5
    BUSY = 6


@dataclass(frozen=True, slots=True)
class EchoHeader:
    """The first 24 bytes of every packet's payload, in both directions."""

    operation: int
    status: int
    length: int
    sequence: int
    checksum: int


ECHO_HEADER = Record(
    EchoHeader,
    "operation" / c.Int16ul,
    "status" / c.Int16ul,
    "length" / c.Int32ul,
    "sequence" / c.Int64ul,
    "checksum" / c.Int32ul,
    "_reserved" / c.Padding(4),
)


_HEADER = derive_struct(ECHO_HEADER.struct)


def parse_header(payload: bytes) -> EchoHeader:
    """``ECHO_HEADER.parse``, twenty times faster. Raises :class:`~vmbus.errors.MalformedError`."""
    if len(payload) < _HEADER.size:
        raise MalformedError("echo-short", f"{len(payload)} bytes hold no header")
    return EchoHeader(*_HEADER.unpack_from(payload))


def build_header(operation: int, status: int, length: int, sequence: int, checksum: int) -> bytes:
    """``ECHO_HEADER.build``, twenty times faster."""
    return _HEADER.pack(operation, status, length, sequence, checksum)


@dataclass(frozen=True, slots=True)
class EchoRangeCount:
    """How many :class:`EchoRange` follow."""

    count: int


ECHO_RANGE_COUNT = Record(EchoRangeCount, "count" / c.Int32ul, "_reserved" / c.Padding(4))


@dataclass(frozen=True, slots=True)
class EchoRange:
    """``gpadl`` 0: ``address`` is guest physical. Otherwise it is a byte offset into that GPADL of the channel."""

    address: int
    length: int
    gpadl: int = 0


ECHO_RANGE = Record(EchoRange, "address" / c.Int64ul, "length" / c.Int32ul, "gpadl" / c.Int32ul)


@dataclass(frozen=True, slots=True)
class EchoChecksum:
    """CRC-32 over the ranges in their order, and how many bytes they are."""

    checksum: int
    length: int


ECHO_CHECKSUM = Record(EchoChecksum, "checksum" / c.Int32ul, "length" / c.Int32ul)


@dataclass(frozen=True, slots=True)
class EchoGenerate:
    """``count`` packets with ``size`` bytes of data each, sequence 0 to ``count`` - 1.

    ``burst`` packets are put on the ring before the guest is interrupted; 0: as many as fit, and more as soon
    as the guest makes room.
    """

    count: int
    size: int
    burst: int = 0


ECHO_GENERATE = Record(
    EchoGenerate,
    "count" / c.Int32ul,
    "size" / c.Int32ul,
    "burst" / c.Int32ul,
    "_reserved" / c.Padding(4),
)


@dataclass(frozen=True, slots=True)
class EchoStatistics:
    """Counters since the device was made."""

    requests: int
    refused: int
    echoed_bytes: int
    filled_bytes: int
    summed_bytes: int
    generated: int


ECHO_STATISTICS = Record(
    EchoStatistics,
    "requests" / c.Int64ul,
    "refused" / c.Int64ul,
    "echoed_bytes" / c.Int64ul,
    "filled_bytes" / c.Int64ul,
    "summed_bytes" / c.Int64ul,
    "generated" / c.Int64ul,
)
