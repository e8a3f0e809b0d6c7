"""The fast path's C sources as a library, with a header made from the declarations of packets and structures."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vmbus.native import FLAGS, NativeLibrary
from vmbus.native_layout import DEVICE_HEADER, declarations
from vmbus.wire import packet, scsi, storvsp
from vmbus.wire.gateway import offset_of
from vmbus.wire.packet import PacketType
from vmbus.wire.scsi import Opcode
from vmbus.wire.storvsp import Direction, Operation, SrbStatus

from vmbus_devices.scsi.fast import shared

SOURCE = Path(__file__).parent

_OPCODES = (
    Opcode.READ_6,
    Opcode.READ_10,
    Opcode.READ_12,
    Opcode.READ_16,
    Opcode.WRITE_6,
    Opcode.WRITE_10,
    Opcode.WRITE_12,
    Opcode.WRITE_16,
)


def layout() -> str:
    """Return the text of ``layout.h``: constants, offsets of the packets' fields, and the shared structures."""
    values: dict[str, int] = {
        **shared.CONSTANTS,
        "DESCRIPTOR_SIZE": packet.DESCRIPTOR_SIZE,
        "TRAILER_SIZE": packet.TRAILER_SIZE,
        "GPA_DIRECT_HEADER_SIZE": packet.GPA_DIRECT_HEADER.sizeof(),
        "GPA_RANGE_HEADER_SIZE": packet.GPA_RANGE_HEADER.sizeof(),
        "TYPE_GPA_DIRECT": PacketType.GPA_DIRECT,
        "TYPE_COMPLETION": PacketType.COMPLETION,
        "SHORTEST_REQUEST": storvsp.SHORT_PACKET_SIZE,
        "LONGEST_ANSWER": storvsp.PACKET_SIZE,
        "SRB_SIZE": storvsp.SRB_SIZE,
        "CDB_SIZE": storvsp.CDB_SIZE,
        "OPERATION_EXECUTE_SRB": Operation.EXECUTE_SRB,
        "OPERATION_COMPLETE_IO": Operation.COMPLETE_IO,
        "SRB_STATUS_SUCCESS": SrbStatus.SUCCESS,
        "DIRECTION_OUT": Direction.OUT,
        "DIRECTION_IN": Direction.IN,
        "CDB_FUA": scsi.FUA,
        "CDB_PROTECT": scsi.PROTECT,
        "MAX_TARGETS": storvsp.MAX_TARGETS,
        "MAX_LUNS": storvsp.MAX_LUNS,
        **{f"OPCODE_{opcode.name}": opcode for opcode in _OPCODES},
    }
    for declaration, prefix in (
        (packet.DESCRIPTOR, "DESCRIPTOR"),
        (packet.GPA_DIRECT_HEADER, "GPA_DIRECT"),
        (packet.GPA_RANGE_HEADER, "GPA_RANGE"),
        (storvsp.ANSWER, "REQUEST"),
    ):
        for field in declaration.subcons:
            values[f"{prefix}_{field.name.upper()}"] = offset_of(declaration, field.name)
    return "\n".join(
        [
            "/* Generated from the declarations in vmbus.wire and vmbus_devices.scsi.fast.shared. */",
            "#ifndef LAYOUT_H",
            "#define LAYOUT_H",
            "",
            "#include <stddef.h>",
            "#include <stdint.h>",
            "",
            *[f"#define {name} {int(value)}" for name, value in values.items()],
            "",
            declarations(shared.STRUCTURES),
            "#endif",
            "",
        ]
    )


LIBRARY = NativeLibrary(
    "vmbus-fastpath",
    "the fast path",
    resources.files(__package__),
    flags=(*FLAGS, "-D_GNU_SOURCE"),
    libraries=("-lm",),
    generated={"layout.h": layout(), "engine_device.h": DEVICE_HEADER},
)
