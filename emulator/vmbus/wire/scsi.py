"""SCSI commands of disks and CD-ROMs: command descriptor blocks, sense data, and device data.

Source: docs/protocol/devices.md#storage-commands; SPC-4, SBC-3, MMC-6. All integers are big-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any

import construct as c

from vmbus.errors import InternalError
from vmbus.wire.codec import Record


class Opcode(enum.IntEnum):
    """Operation code, the first byte of a CDB."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    RESERVE_6 = 0x16
    RELEASE_6 = 0x17
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    WRITE_VERIFY_10 = 0x2E
    VERIFY_10 = 0x2F
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    READ_TOC = 0x43
    GET_CONFIGURATION = 0x46
    GET_EVENT_STATUS = 0x4A
    READ_DISC_INFORMATION = 0x51
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    PERSISTENT_RESERVE_IN = 0x5E
    PERSISTENT_RESERVE_OUT = 0x5F
    READ_16 = 0x88
    WRITE_16 = 0x8A
    WRITE_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    MAINTENANCE_IN = 0xA3
    READ_12 = 0xA8
    WRITE_12 = 0xAA
    WRITE_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF


READ_CAPACITY_16 = 0x10
GET_LBA_STATUS = 0x12
"""Service actions of SERVICE_ACTION_IN_16."""


class ScsiStatus(enum.IntEnum):
    """SCSI status byte (SAM-4)."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    RESERVATION_CONFLICT = 0x18


class SenseKey(enum.IntEnum):
    """Sense key (SPC-4)."""

    NO_SENSE = 0x0
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    ABORTED_COMMAND = 0xB
    MISCOMPARE = 0xE


class Sense(enum.Enum):
    """Sense key, additional sense code (ASC) and qualifier (ASCQ)."""

    NO_SENSE = (SenseKey.NO_SENSE, 0x00, 0x00)
    MEDIUM_NOT_PRESENT = (SenseKey.NOT_READY, 0x3A, 0x00)
    WRITE_ERROR = (SenseKey.MEDIUM_ERROR, 0x0C, 0x00)
    READ_ERROR = (SenseKey.MEDIUM_ERROR, 0x11, 0x00)
    TARGET_FAILURE = (SenseKey.HARDWARE_ERROR, 0x44, 0x00)
    PARAMETER_LIST_LENGTH = (SenseKey.ILLEGAL_REQUEST, 0x1A, 0x00)
    INVALID_OPCODE = (SenseKey.ILLEGAL_REQUEST, 0x20, 0x00)
    LBA_OUT_OF_RANGE = (SenseKey.ILLEGAL_REQUEST, 0x21, 0x00)
    INVALID_FIELD_IN_CDB = (SenseKey.ILLEGAL_REQUEST, 0x24, 0x00)
    LUN_NOT_SUPPORTED = (SenseKey.ILLEGAL_REQUEST, 0x25, 0x00)
    INVALID_FIELD_IN_LIST = (SenseKey.ILLEGAL_REQUEST, 0x26, 0x00)
    INVALID_RELEASE = (SenseKey.ILLEGAL_REQUEST, 0x26, 0x04)
    SAVING_NOT_SUPPORTED = (SenseKey.ILLEGAL_REQUEST, 0x39, 0x00)
    MEDIUM_REMOVAL_PREVENTED = (SenseKey.ILLEGAL_REQUEST, 0x53, 0x02)
    MEDIUM_CHANGED = (SenseKey.UNIT_ATTENTION, 0x28, 0x00)
    POWER_ON = (SenseKey.UNIT_ATTENTION, 0x29, 0x01)
    CAPACITY_CHANGED = (SenseKey.UNIT_ATTENTION, 0x2A, 0x09)
    WRITE_PROTECTED = (SenseKey.DATA_PROTECT, 0x27, 0x00)
    SPACE_ALLOCATION_FAILED = (SenseKey.DATA_PROTECT, 0x27, 0x07)
    MISCOMPARE = (SenseKey.MISCOMPARE, 0x1D, 0x00)


def sense_data(sense: Sense, information: int | None = None) -> bytes:
    """Return 18 bytes of fixed-format sense data.

    ``information``: the first LBA that failed; it is left out if it does not fit 32 bits.
    """
    key, code, qualifier = sense.value
    valid = information is not None and information <= 0xFFFFFFFF
    return struct.pack(
        ">BBBIB4xBB4x",
        0xF0 if valid else 0x70,
        0,
        key,
        information if valid and information is not None else 0,
        10,
        code,
        qualifier,
    )


# --- command descriptor blocks ---

CDB_6 = c.Struct(
    "opcode" / c.Int8ub, "lba_high" / c.Int8ub, "lba" / c.Int16ub, "length" / c.Int8ub, "control" / c.Int8ub
)
"""``lba_high``: the LBA has its low 5 bits. A ``length`` of 0 means 256 blocks in READ and WRITE."""

CDB_10 = c.Struct(
    "opcode" / c.Int8ub,
    "flags" / c.Int8ub,
    "lba" / c.Int32ub,
    "group" / c.Int8ub,
    "length" / c.Int16ub,
    "control" / c.Int8ub,
)
CDB_12 = c.Struct(
    "opcode" / c.Int8ub,
    "flags" / c.Int8ub,
    "lba" / c.Int32ub,
    "length" / c.Int32ub,
    "group" / c.Int8ub,
    "control" / c.Int8ub,
)
CDB_16 = c.Struct(
    "opcode" / c.Int8ub,
    "flags" / c.Int8ub,
    "lba" / c.Int64ub,
    "length" / c.Int32ub,
    "group" / c.Int8ub,
    "control" / c.Int8ub,
)

FUA = 0x08
"""Flag of READ and WRITE: force unit access."""
DPO = 0x10
"""Flag of READ and WRITE: disable page out; ignored."""
PROTECT = 0xE0
"""Flags of READ, WRITE, VERIFY, WRITE SAME: protection information, which is not supported."""
BYTCHK = 0x06
"""Flags of VERIFY: compare with the guest's data (01), or with one block of it (11)."""
SAME_UNMAP = 0x08
SAME_ANCHOR = 0x10
SAME_NO_DATA = 0x01
"""Flags of WRITE SAME."""


def derive_big_endian(declaration: c.Struct) -> struct.Struct:
    """Return the ``struct.Struct`` of a declaration of big-endian unsigned integers only."""
    codes = {c.Int8ub.fmtstr: "B", c.Int16ub.fmtstr: "H", c.Int32ub.fmtstr: "I", c.Int64ub.fmtstr: "Q"}
    derived = struct.Struct(">" + "".join([codes[field.subcon.fmtstr] for field in declaration.subcons]))
    if derived.size != declaration.sizeof():
        raise InternalError(
            f"{derived.format} has {derived.size} bytes, the declaration {declaration.sizeof()}"
        )
    return derived


_CDB_6 = derive_big_endian(CDB_6).unpack_from
_CDB_10 = derive_big_endian(CDB_10).unpack_from
_CDB_12 = derive_big_endian(CDB_12).unpack_from
_CDB_16 = derive_big_endian(CDB_16).unpack_from


def parse_range(cdb: bytes) -> tuple[int, int, int]:
    """Return ``(flags, lba, blocks)`` of a CDB of 6, 10, 12 or 16 bytes for a range of blocks.

    The size follows from the group code in the opcode. ``cdb`` must have at least 16 bytes.
    """
    group = cdb[0] >> 5
    if group == 0:
        _, high, low, length, _ = _CDB_6(cdb)
        return 0, (high & 0x1F) << 16 | low, length or 256
    if group == 4:
        _, flags, lba, length, _, _ = _CDB_16(cdb)
    elif group == 5:
        _, flags, lba, length, _, _ = _CDB_12(cdb)
    else:
        _, flags, lba, _, length, _ = _CDB_10(cdb)
    return flags, lba, length


# --- device data ---


class DeviceType(enum.IntEnum):
    """Peripheral device type."""

    DISK = 0x00
    CDROM = 0x05


NO_DEVICE = 0x7F
"""First byte of INQUIRY data for a missing logical unit: qualifier 3, type 31."""

SPC_3 = 5
REMOVABLE = 0x80
COMMAND_QUEUEING = 0x02


@dataclass(frozen=True, slots=True)
class Inquiry:
    """Standard INQUIRY data, 36 bytes (SPC-4); texts are ASCII, padded with blanks."""

    device_type: int
    removable: int
    vendor: bytes
    product: bytes
    revision: bytes


INQUIRY = Record(
    Inquiry,
    "device_type" / c.Int8ub,
    "removable" / c.Int8ub,
    "_version" / c.Const(SPC_3, c.Int8ub),
    "_format" / c.Const(2, c.Int8ub),
    "_additional_length" / c.Const(31, c.Int8ub),
    c.Padding(2),
    "_flags" / c.Const(COMMAND_QUEUEING, c.Int8ub),
    "vendor" / c.Bytes(8),
    "product" / c.Bytes(16),
    "revision" / c.Bytes(4),
)


class VitalPage(enum.IntEnum):
    """Codes of vital product data pages."""

    SUPPORTED = 0x00
    SERIAL_NUMBER = 0x80
    IDENTIFICATION = 0x83
    BLOCK_LIMITS = 0xB0
    BLOCK_CHARACTERISTICS = 0xB1
    PROVISIONING = 0xB2


def vital_page(device_type: int, page: int, data: bytes) -> bytes:
    """Return a vital product data page with its 4-byte header."""
    return struct.pack(">BBH", device_type, page, len(data)) + data


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """Vital product data page B0h (SBC-3), 60 bytes without header; lengths in blocks, 0: not reported."""

    optimal_granularity: int
    max_transfer: int
    optimal_transfer: int
    max_unmap_blocks: int
    max_unmap_descriptors: int
    unmap_granularity: int
    max_write_same: int


BLOCK_LIMITS = Record(
    BlockLimits,
    "_write_same_not_of_zero_blocks" / c.Const(1, c.Int8ub),
    c.Padding(1),
    "optimal_granularity" / c.Int16ub,
    "max_transfer" / c.Int32ub,
    "optimal_transfer" / c.Int32ub,
    c.Padding(4),
    "max_unmap_blocks" / c.Int32ub,
    "max_unmap_descriptors" / c.Int32ub,
    "unmap_granularity" / c.Int32ub,
    "_alignment" / c.Const(0x80000000, c.Int32ub),
    "max_write_same" / c.Int64ub,
    c.Padding(20),
)


@dataclass(frozen=True, slots=True)
class BlockCharacteristics:
    """Vital product data page B1h (SBC-3), 60 bytes without header; ``rotation``: per minute, 1: non-rotating."""

    rotation: int


BLOCK_CHARACTERISTICS = Record(BlockCharacteristics, "rotation" / c.Int16ub, c.Padding(58))

PROVISIONED_UNMAP = 0x80
PROVISIONED_WRITE_SAME_16 = 0x40
PROVISIONED_WRITE_SAME_10 = 0x20
PROVISIONED_READ_ZEROS = 0x04
THIN = 2


@dataclass(frozen=True, slots=True)
class Provisioning:
    """Vital product data page B2h (SBC-3), 4 bytes without header.

    ``flags``: how blocks can be unmapped; ``kind``: :data:`THIN`, or 0: not reported.
    """

    flags: int
    kind: int


PROVISIONING = Record(Provisioning, c.Padding(1), "flags" / c.Int8ub, "kind" / c.Int8ub, c.Padding(1))


@dataclass(frozen=True, slots=True)
class Capacity10:
    """Data of READ CAPACITY(10), 8 bytes; ``last_lba``: 0xFFFFFFFF if it does not fit; ``block_size`` in bytes."""

    last_lba: int
    block_size: int


CAPACITY_10 = Record(Capacity10, "last_lba" / c.Int32ub, "block_size" / c.Int32ub)

PROVISIONING_ENABLED = 0x8000
"""LBPME: blocks can be unmapped."""
READS_ZEROS = 0x4000
"""LBPRZ: unmapped blocks are read as zeros."""


@dataclass(frozen=True, slots=True)
class Capacity16:
    """Data of READ CAPACITY(16), 32 bytes; ``block_size`` in bytes.

    ``exponent``: log2 of the logical blocks per physical block; ``provisioning``: flags LBPME and LBPRZ.
    """

    last_lba: int
    block_size: int
    exponent: int
    provisioning: int


CAPACITY_16 = Record(
    Capacity16,
    "last_lba" / c.Int64ub,
    "block_size" / c.Int32ub,
    c.Padding(1),
    "exponent" / c.Int8ub,
    "provisioning" / c.Int16ub,
    c.Padding(16),
)


def lun_list(luns: list[int]) -> bytes:
    """Return the data of REPORT LUNS for ``luns`` (0 to 255)."""
    return struct.pack(">II", len(luns) * 8, 0) + b"".join([struct.pack(">H6x", lun) for lun in luns])


class ModePage(enum.IntEnum):
    """Codes of mode pages."""

    ERROR_RECOVERY = 0x01
    CACHING = 0x08
    CONTROL = 0x0A
    CD_CAPABILITIES = 0x2A
    ALL = 0x3F


WRITE_PROTECTED = 0x80
DPO_FUA = 0x10
"""Bits of the device-specific parameter in a mode header."""
WRITE_CACHE = 0x04
"""Bit of byte 2 of the caching page (WCE)."""


def caching_page(write_cache: bool) -> bytes:
    """Return mode page 08h, 20 bytes."""
    return bytes((ModePage.CACHING, 18, WRITE_CACHE if write_cache else 0)) + bytes(17)


def control_page() -> bytes:
    """Return mode page 0Ah, 12 bytes: commands may be reordered, tasks of other initiators are not aborted."""
    return bytes((ModePage.CONTROL, 10, 0x02, 0x10)) + bytes(8)


def mode_header_6(length: int, parameter: int) -> bytes:
    """Return the 4-byte header of ``length`` bytes of mode pages."""
    return bytes((min(3 + length, 255), 0, parameter, 0))


def mode_header_10(length: int, parameter: int) -> bytes:
    """Return the 8-byte header of ``length`` bytes of mode pages."""
    return struct.pack(">HBBHH", 6 + length, 0, parameter, 0, 0)


@dataclass(frozen=True, slots=True)
class UnmapHeader:
    """Header of an UNMAP parameter list, 8 bytes; lengths in bytes, without the length field itself."""

    data_length: int
    descriptors_length: int


UNMAP_HEADER = Record(UnmapHeader, "data_length" / c.Int16ub, "descriptors_length" / c.Int16ub, c.Padding(4))


@dataclass(frozen=True, slots=True)
class UnmapDescriptor:
    """One range of an UNMAP parameter list, 16 bytes."""

    lba: int
    blocks: int


UNMAP_DESCRIPTOR = Record(UnmapDescriptor, "lba" / c.Int64ub, "blocks" / c.Int32ub, c.Padding(4))


@dataclass(frozen=True, slots=True)
class ReservationList:
    """The parameter list of PERSISTENT RESERVE OUT, 24 bytes; ``action_key``: the key to register or to preempt."""

    key: int
    action_key: int
    flags: int


RESERVATION_LIST = Record(
    ReservationList,
    "key" / c.Int64ub,
    "action_key" / c.Int64ub,
    c.Padding(4),
    "flags" / c.Int8ub,
    c.Padding(3),
)

LBA_MAPPED = 0
LBA_DEALLOCATED = 1


def lba_status(extents: list[tuple[int, int, int]]) -> bytes:
    """Return the data of GET LBA STATUS for extents ``(lba, blocks, LBA_MAPPED or LBA_DEALLOCATED)``."""
    body = b"".join([struct.pack(">QIB3x", *extent) for extent in extents])
    return struct.pack(">I4x", 4 + len(body)) + body


def cdb_allocation(cdb: bytes) -> int:
    """Return the allocation length, in bytes, of a command that returns device data."""
    opcode = cdb[0]
    where: dict[int, Any] = {
        Opcode.INQUIRY: (">H", 3),
        Opcode.REQUEST_SENSE: (">B", 4),
        Opcode.MODE_SENSE_6: (">B", 4),
        Opcode.MODE_SENSE_10: (">H", 7),
        Opcode.REPORT_LUNS: (">I", 6),
        Opcode.SERVICE_ACTION_IN_16: (">I", 10),
        Opcode.READ_TOC: (">H", 7),
        Opcode.GET_CONFIGURATION: (">H", 7),
        Opcode.GET_EVENT_STATUS: (">H", 7),
        Opcode.READ_DISC_INFORMATION: (">H", 7),
        Opcode.PERSISTENT_RESERVE_IN: (">H", 7),
    }
    if opcode not in where:
        return 8  # READ CAPACITY(10) has no allocation length
    code, at = where[opcode]
    found: int = struct.unpack_from(code, cdb, at)[0]
    return found
