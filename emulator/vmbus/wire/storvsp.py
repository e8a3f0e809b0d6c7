"""Packets of the storage device (StorVSP).

Source: docs/protocol/devices.md#storage-packet, docs/protocol/devices.md#storage-results. Every packet of either
direction is a header and a union, together 64 bytes. In protocol version 4.2 (Windows 7) and below, the last 16 bytes
of the request block are missing. There is no pipe header. An answer is a completion with the transaction id of the
request; it has the length of the request, at most 64 bytes.

    | Off | Size | Field                               |
    |   0 |    4 | operation (:class:`Operation`)      |
    |   4 |    4 | flags: 1 = completion requested     |
    |   8 |    4 | status (:class:`Status`)            |
    |  12 |   52 | union: :data:`SRB`, and others      |

In an answer the sense data is in the place of the CDB.
"""

from __future__ import annotations

import enum
import struct
import uuid
from dataclasses import dataclass
from typing import NamedTuple

import construct as c

from vmbus.wire.codec import Record, derive_struct

SCSI_INTERFACE = uuid.UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
IDE_INTERFACE = uuid.UUID("32412632-86cb-44a2-9b5c-50d1417354f5")

PACKET_SIZE = 64
"""Bytes of the longest packet, and of the longest answer that a guest accepts."""
SHORT_PACKET_SIZE = 48
"""Bytes of a packet in protocol versions below 5.1."""
HEADER_SIZE = 12
CDB_SIZE = 16
SENSE_SIZE = 20
MAX_TARGETS = 2
MAX_LUNS = 64
"""Addresses of a controller, as Linux scans them: targets 0 and 1, LUNs 0 to 63 of each."""


class Operation(enum.IntEnum):
    """Operation of a packet (``enum vstor_packet_operation`` in Linux)."""

    COMPLETE_IO = 1
    REMOVE_DEVICE = 2
    EXECUTE_SRB = 3
    RESET_LUN = 4
    RESET_ADAPTER = 5
    RESET_BUS = 6
    BEGIN_INITIALIZATION = 7
    END_INITIALIZATION = 8
    QUERY_PROTOCOL_VERSION = 9
    QUERY_PROPERTIES = 10
    ENUMERATE_BUS = 11
    FCHBA_DATA = 12
    CREATE_SUB_CHANNELS = 13
    EVENT_NOTIFICATION = 14


class Status(enum.IntEnum):
    """NTSTATUS in an answer."""

    SUCCESS = 0
    BUFFER_OVERFLOW = 0x80000005
    UNSUCCESSFUL = 0xC0000001
    INVALID_PARAMETER = 0xC000000D
    INVALID_DEVICE_REQUEST = 0xC0000010
    REVISION_MISMATCH = 0xC0000059
    DEVICE_NOT_CONNECTED = 0xC000009D
    IO_TIMEOUT = 0xC00000B5
    DEVICE_DOES_NOT_EXIST = 0xC00000C0
    CANCELLED = 0xC0000120
    INVALID_DEVICE_STATE = 0xC0000184
    IO_DEVICE_ERROR = 0xC0000185


class ProtocolVersion(enum.IntEnum):
    """Protocol version: bits 15:8 major, bits 7:0 minor number."""

    WIN6 = 0x0200
    WIN7 = 0x0402
    WIN8 = 0x0501
    WIN8_1 = 0x0600
    WIN10 = 0x0602

    def __str__(self) -> str:
        return f"{self >> 8}.{self & 0xFF}"


class SrbStatus(enum.IntEnum):
    """SRB status of a request; :data:`AUTOSENSE_VALID` is added if sense data is valid."""

    SUCCESS = 0x01
    ABORTED = 0x02
    ERROR = 0x04
    BUSY = 0x05
    INVALID_REQUEST = 0x06
    NO_DEVICE = 0x08
    DATA_OVERRUN = 0x12
    INVALID_LUN = 0x20
    INVALID_TARGET_ID = 0x21


AUTOSENSE_VALID = 0x80
"""Bit 7 of an SRB status."""


_NT_STATUS = {
    SrbStatus.SUCCESS: Status.SUCCESS,
    SrbStatus.ABORTED: Status.CANCELLED,
    SrbStatus.DATA_OVERRUN: Status.BUFFER_OVERFLOW,
    SrbStatus.NO_DEVICE: Status.DEVICE_DOES_NOT_EXIST,
    SrbStatus.INVALID_LUN: Status.DEVICE_DOES_NOT_EXIST,
    SrbStatus.INVALID_TARGET_ID: Status.DEVICE_DOES_NOT_EXIST,
}


def nt_status(srb_status: int) -> Status:
    """Return the NTSTATUS for the answer to a request with this SRB status."""
    return _NT_STATUS.get(SrbStatus(srb_status & 0x3F), Status.IO_DEVICE_ERROR)


class Direction(enum.IntEnum):
    """Direction of the data of a request, as seen by the guest."""

    OUT = 0
    IN = 1
    NONE = 2


HEADER = c.Struct("operation" / c.Int32ul, "flags" / c.Int32ul, "status" / c.Int32ul)
"""The first 12 bytes of every packet."""

SHORT_SRB = c.Struct(
    "length" / c.Int16ul,
    "srb_status" / c.Int8ul,
    "scsi_status" / c.Int8ul,
    "port" / c.Int8ul,
    "path" / c.Int8ul,
    "target" / c.Int8ul,
    "lun" / c.Int8ul,
    "cdb_length" / c.Int8ul,
    "sense_length" / c.Int8ul,
    "direction" / c.Int8ul,
    "properties" / c.Int8ul,
    "transfer_length" / c.Int32ul,
    "cdb" / c.Bytes(SENSE_SIZE),
)
"""The request block of protocol versions below 5.1, 36 bytes.

``cdb``: the first 16 bytes are the CDB; in an answer the 20 bytes are sense data.
"""

SRB = c.Struct(
    *SHORT_SRB.subcons,
    "reserved" / c.Int16ul,
    "queue_tag" / c.Int8ul,
    "queue_action" / c.Int8ul,
    "srb_flags" / c.Int32ul,
    "timeout" / c.Int32ul,
    "sort_key" / c.Int32ul,
)
"""The request block from protocol version 5.1 on, 52 bytes."""

REQUEST = c.Struct(*HEADER.subcons, *SHORT_SRB.subcons)
"""The part of EXECUTE_SRB that both forms have, 48 bytes: the host reads nothing else."""

ANSWER = c.Struct(*HEADER.subcons, *SRB.subcons)
"""An answer to EXECUTE_SRB, 64 bytes; the short form is its first 48 bytes."""

_HEADER = derive_struct(HEADER)
_REQUEST = derive_struct(REQUEST)
_ANSWER = derive_struct(ANSWER)
SHORT_SRB_SIZE = derive_struct(SHORT_SRB).size
SRB_SIZE = derive_struct(SRB).size


class ScsiRequest(NamedTuple):
    """A parsed EXECUTE_SRB, with the fields of :data:`REQUEST`; a named tuple, because it is on the hot path."""

    operation: int
    flags: int
    status: int
    length: int
    srb_status: int
    scsi_status: int
    port: int
    path: int
    target: int
    lun: int
    cdb_length: int
    sense_length: int
    direction: int
    properties: int
    transfer_length: int
    cdb: bytes


_make = ScsiRequest._make
_unpack_request = _REQUEST.unpack_from
_pack_answer = _ANSWER.pack
_operation = struct.Struct("<I").unpack_from


def parse_operation(payload: bytes) -> int:
    """Return the operation of a packet of at least :data:`HEADER_SIZE` bytes."""
    found: int = _operation(payload)[0]
    return found


def parse_request(payload: bytes) -> ScsiRequest:
    """Parse EXECUTE_SRB; ``payload`` must have at least :data:`SHORT_PACKET_SIZE` bytes."""
    return _make(_unpack_request(payload))


def answer_size(payload_size: int) -> int:
    """Return the size in bytes of the answer to a packet of ``payload_size`` bytes."""
    return payload_size if payload_size < PACKET_SIZE else PACKET_SIZE


def build_answer(
    request: ScsiRequest,
    status: int,
    srb_status: int,
    scsi_status: int,
    transferred: int,
    sense: bytes,
    size: int,
) -> bytes:
    """Return the answer to an EXECUTE_SRB, ``size`` bytes long, with the addresses of the request."""
    answer = _pack_answer(
        1,
        0,
        status,
        SRB_SIZE,
        srb_status,
        scsi_status,
        request.port,
        request.path,
        request.target,
        request.lun,
        request.cdb_length,
        len(sense),
        request.direction,
        request.properties,
        transferred,
        sense,
        0,
        0,
        0,
        0,
        0,
        0,
    )
    return answer if size == PACKET_SIZE else answer[:size]


def build_packet(operation: int, status: int, union: bytes = b"", size: int = PACKET_SIZE) -> bytes:
    """Return any other packet, ``size`` bytes long; ``union`` is padded with zeros or truncated."""
    return (_HEADER.pack(operation, 0, status) + union).ljust(size, b"\0")[:size]


@dataclass(frozen=True, slots=True)
class VersionQuery:
    """QUERY_PROTOCOL_VERSION and its answer, 4 bytes; ``version``: a :class:`ProtocolVersion` or an unknown one."""

    version: int
    revision: int


VERSION_QUERY = Record(VersionQuery, "version" / c.Int16ul, "revision" / c.Int16ul)

MULTI_CHANNEL = 1
"""Flag of the channel properties: sub-channels are supported."""


@dataclass(frozen=True, slots=True)
class ChannelProperties:
    """The answer to QUERY_PROPERTIES, 24 bytes; ``max_transfer``: bytes that one request may transfer."""

    max_subchannels: int
    flags: int
    max_transfer: int


CHANNEL_PROPERTIES = Record(
    ChannelProperties,
    c.Padding(4),
    "max_subchannels" / c.Int16ul,
    c.Padding(2),
    "flags" / c.Int32ul,
    "max_transfer" / c.Int32ul,
    c.Padding(8),
)


@dataclass(frozen=True, slots=True)
class SubchannelRequest:
    """CREATE_SUB_CHANNELS, 2 bytes."""

    count: int


SUBCHANNEL_REQUEST = Record(SubchannelRequest, "count" / c.Int16ul)
