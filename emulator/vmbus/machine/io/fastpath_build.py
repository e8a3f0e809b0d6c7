"""The fast path, compiled, with a header of layouts that is made from the declarations in ``wire``."""

from __future__ import annotations

from pathlib import Path

from vmbus.machine.native import FLAGS, NativeLibrary
from vmbus.wire import packet, scsi, storvsp
from vmbus.wire.gateway import offset_of
from vmbus.wire.packet import PacketType
from vmbus.wire.storvsp import Direction, Operation, SrbStatus

SOURCE = Path(__file__).parents[2] / "fastpath"

MAX_TARGETS = 2
MAX_LUNS = 64
"""Places that the table of units has; what is beyond takes the ordinary way."""


def layout() -> str:
    """``layout.h``."""
    values = {
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
        "MAX_TARGETS": MAX_TARGETS,
        "MAX_LUNS": MAX_LUNS,
    }
    for declaration, prefix in (
        (packet.DESCRIPTOR, "DESCRIPTOR"),
        (packet.GPA_DIRECT_HEADER, "GPA_DIRECT"),
        (packet.GPA_RANGE_HEADER, "GPA_RANGE"),
        (storvsp.ANSWER, "REQUEST"),
    ):
        for field in declaration.subcons:
            values[f"{prefix}_{field.name.upper()}"] = offset_of(declaration, field.name)
    lines = [f"#define {name} {int(value)}" for name, value in values.items()]
    return "\n".join(["/* Made from the declarations in emulator/vmbus/wire. */", *lines, ""])


LIBRARY = NativeLibrary(
    "vmbus-fastpath",
    "the fast path",
    SOURCE,
    flags=(*FLAGS, "-D_GNU_SOURCE"),
    libraries=("-lm",),
    generated={"layout.h": layout()},
)
