"""What a storage controller keeps over a migration or a snapshot.

The work in threads has ended before a device is saved, so what is outstanding are commands that wait: for a fault
to let them go, for a reset to be answered. They are saved as the packets they came in, and done anew where the guest
goes on. Images are not part of it: both sides must have the same, and only one may use it at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import construct as c
from vmbus.errors import DeviceError, InternalError
from vmbus.wire.packet import MAX_PFNS, MAX_RANGES, GpaRange, Packet, PacketType
from vmbus.wire.scsi import Sense
from vmbus.wire.storvsp import PACKET_SIZE, ProtocolVersion

from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.handshake import Stage
from vmbus_devices.scsi.reservations import TYPES, Reservations

if TYPE_CHECKING:
    from vmbus_devices.scsi.controller import Controller

VERSION = 1
_NOTHING = 0xFFFF
_MAX_UNITS = 256
_MAX_PACKETS = 65536

UNIT = c.Struct(
    "target" / c.Int8ul,
    "lun" / c.Int8ul,
    "type" / c.Int8ul,
    "flags" / c.Int8ul,
    "block_size" / c.Int32ul,
    "blocks" / c.Int64ul,
    "serial" / c.PascalString(c.Int8ul, "ascii"),
    "attentions" / c.PrefixedArray(c.Int8ul, c.Bytes(3)),
    "reservation_key" / c.Int64ul,
    "reservation_type" / c.Int8ul,
    "reservation_generation" / c.Int64ul,
)
"""``flags``: of a CD-ROM, 1 there is a disc, 2 it must stay. ``attentions``: key, code, qualifier each."""

PACKET = c.Struct(
    "channel" / c.Int16ul,
    "kind" / c.Int16ul,
    "flags" / c.Int16ul,
    "transaction_id" / c.Int64ul,
    "payload" / c.Prefixed(c.Int16ul, c.GreedyBytes),
    "ranges"
    / c.PrefixedArray(
        c.Int16ul,
        c.Struct(
            "byte_count" / c.Int32ul,
            "byte_offset" / c.Int32ul,
            "pfns" / c.PrefixedArray(c.Int32ul, c.Int64ul),
        ),
    ),
)

CONTROLLER = c.Struct(
    "version" / c.Int16ul,
    "stage" / c.Int8ul,
    "protocol" / c.Int16ul,
    "subchannels" / c.Int16ul,
    "max_transfer" / c.Int32ul,
    "units" / c.PrefixedArray(c.Int16ul, UNIT),
    "packets" / c.PrefixedArray(c.Int32ul, PACKET),
    "end" / c.Terminated,
)

_SENSES = {bytes(sense.value): sense for sense in Sense}


@dataclass(frozen=True, slots=True)
class SavedUnit:
    """One unit of a saved controller."""

    place: tuple[int, int]
    type: int
    flags: int
    block_size: int
    blocks: int
    serial: str
    attentions: tuple[Sense, ...]
    reservations: Reservations


def save_controller(controller: Controller) -> bytes:
    """``Device.save``. Images are free for the next one who wants them afterwards."""
    handshake = controller.handshake
    units = [
        {
            "target": target,
            "lun": lun,
            "type": unit.device_type,
            "flags": unit.loaded | unit.locked << 1 if isinstance(unit, CdRom) else 0,
            "block_size": unit.block_size,
            "blocks": unit.blocks,
            "serial": unit.identity.serial,
            "attentions": [bytes(sense.value) for sense in unit.attentions],
            "reservation_key": held.key,
            "reservation_type": held.type,
            "reservation_generation": held.generation,
        }
        for (target, lun), unit in sorted(controller.units.items())
        for held in [unit.reservations if isinstance(unit, Disk) else Reservations()]
    ]
    state = {
        "version": VERSION,
        "stage": handshake.stage.value,
        "protocol": handshake.version or 0,
        "subchannels": _NOTHING if handshake.subchannels is None else handshake.subchannels,
        "max_transfer": controller.max_transfer,
        "units": units,
        "packets": [_built(channel, packet) for channel, packet in controller.outstanding()],
        "end": None,
    }
    try:
        return bytes(CONTROLLER.build(state))
    except c.ConstructError as error:
        raise InternalError(f"{controller.name} cannot be saved: {error}") from error


def _built(channel: int, packet: Packet) -> dict[str, Any]:
    return {
        "channel": channel,
        "kind": packet.kind,
        "flags": packet.flags,
        "transaction_id": packet.transaction_id,
        "payload": packet.payload,
        "ranges": [each._asdict() for each in packet.ranges],
    }


def restore_controller(controller: Controller, state: bytes) -> None:
    """``Device.restore``: everything is checked before anything changes."""
    name = controller.name
    if len(state) < 2:
        raise DeviceError(f"{name}: {len(state)} bytes are no saved state")
    version = int.from_bytes(state[:2], "little")
    if version != VERSION:
        raise DeviceError(f"{name}: saved state has version {version}, this emulator knows {VERSION}")
    try:
        saved = CONTROLLER.parse(state)
        stage = Stage(saved.stage)
        protocol = ProtocolVersion(saved.protocol) if saved.protocol else None
        units = [_unit(each) for each in saved.units]
        packets = [_packet(each) for each in saved.packets]
    except (c.ConstructError, UnicodeError, ValueError, KeyError) as error:
        raise DeviceError(f"{name}: saved state is damaged: {error}") from error
    if len(units) > _MAX_UNITS or len(packets) > _MAX_PACKETS:
        raise DeviceError(f"{name}: saved state is damaged: {len(units)} units, {len(packets)} packets")
    if protocol is not None and protocol > controller.max_version:
        raise DeviceError(
            f"{name}: the guest agreed to protocol {protocol}, version={controller.max_version} here"
        )
    if saved.max_transfer > controller.max_transfer:
        raise DeviceError(f"{name}: requests of {saved.max_transfer >> 10} KiB were promised; set transfer=")
    for each in units:
        _check(controller, each)
    for each in units:
        unit = controller.units[each.place]
        unit.attentions = list(each.attentions)
        if isinstance(unit, CdRom):
            unit.loaded, unit.locked = bool(each.flags & 1), bool(each.flags & 2)
        if isinstance(unit, Disk):
            unit.reservations = each.reservations
    handshake = controller.handshake = controller.new_handshake()
    handshake.stage, handshake.version = stage, protocol
    handshake.subchannels = None if saved.subchannels == _NOTHING else saved.subchannels
    controller.pending = packets


def _check(controller: Controller, saved: SavedUnit) -> None:
    unit = controller.units.get(saved.place)
    where = f"{controller.name}: target {saved.place[0]} LUN {saved.place[1]}"
    if unit is None:
        raise DeviceError(f"{where} is missing here")
    found = (unit.device_type, unit.block_size, unit.blocks, unit.identity.serial)
    wanted = (saved.type, saved.block_size, saved.blocks, saved.serial)
    for what, here, there in zip(
        ("type", "block size", "number of blocks", "serial"), found, wanted, strict=True
    ):
        if here != there:
            raise DeviceError(f"{where} has another {what}: {here}, it was {there}")


def _unit(saved: Any) -> SavedUnit:
    return SavedUnit(
        (saved.target, saved.lun),
        saved.type,
        saved.flags,
        saved.block_size,
        saved.blocks,
        saved.serial,
        tuple(_SENSES[each] for each in saved.attentions),
        _reservations(saved),
    )


def _reservations(saved: Any) -> Reservations:
    if saved.reservation_type and (saved.reservation_type not in TYPES or not saved.reservation_key):
        raise ValueError(f"a reservation of type {saved.reservation_type}")
    return Reservations(saved.reservation_key, saved.reservation_type, saved.reservation_generation)


def _packet(saved: Any) -> tuple[int, Packet]:
    ranges = []
    pages = 0
    for each in saved.ranges:
        pages += len(each.pfns)
        need = (each.byte_offset + each.byte_count + 4095) >> 12
        if each.byte_offset >= 4096 or not each.byte_count or need != len(each.pfns):
            raise ValueError("a range that no packet has")
        ranges.append(GpaRange(each.byte_count, each.byte_offset, tuple(each.pfns)))
    if len(ranges) > MAX_RANGES or pages > MAX_PFNS or len(saved.payload) > 4 * PACKET_SIZE:
        raise ValueError("a packet that is too large")
    packet = Packet(
        PacketType(saved.kind), saved.flags, saved.transaction_id, bytes(saved.payload), tuple(ranges)
    )
    return saved.channel, packet
