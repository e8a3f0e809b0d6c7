"""What a storage controller keeps over a migration or a snapshot.

Work in threads has ended before a device is saved, so the commands that are left only wait: for the delay of a fault,
or for the end of a reset. Each is saved with its channel, as the packet in which it came, and executed again where
the guest continues; releases before that saved them in ``CONTROLLER.packets``, which is still read. Images are not
part of the state: both sides must have the same ones, and only one side may use them at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import construct as c
from vmbus.devices.saved import refused, report_ignored, skip_optional
from vmbus.errors import DeviceError, InternalError, MalformedError
from vmbus.wire.optional import OptionalField, build_fields, parse_fields
from vmbus.wire.packet import MAX_PFNS, MAX_RANGES, GpaRange, Packet, PacketType
from vmbus.wire.scsi import Sense
from vmbus.wire.storvsp import PACKET_SIZE, ProtocolVersion

from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.handshake import Stage
from vmbus_devices.scsi.reservations import TYPES, Reservations
from vmbus_devices.scsi.unit import LogicalUnit

VERSION = 1
_NOTHING = 0xFFFF
_MAX_UNITS = 256
_MAX_PACKETS = 65536
MAX_PAYLOAD = 4 * PACKET_SIZE
"""Bytes of a saved packet's payload: the controller keeps ``PACKET_SIZE``."""

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
"""``flags``: of a CD-ROM drive, 1: a disc is loaded, 2: it is locked; of a disk, 4: APTPL.
``attentions``: key, code, qualifier each."""

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
    "optional" / c.GreedyBytes,
)
"""``optional``: :data:`OPTIONAL`, and fields of later releases (:mod:`vmbus.wire.optional`)."""

OPTIONAL = (OptionalField(1, "enumeration_due", c.Flag),)
_DEFAULTS = {"enumeration_due": False}

PACKET_VERSION = 1

ONE_PACKET = c.Struct(
    "version" / c.Const(PACKET_VERSION, c.Int16ul), "packet" / PACKET, "optional" / c.GreedyBytes
)
"""The state of one command, as ``Device.save_packets`` returns it."""

_SENSES = {bytes(sense.value): sense for sense in Sense}


@dataclass(frozen=True, slots=True)
class SavedUnit:
    """One unit of a saved controller."""

    place: tuple[int, int]
    """Target and LUN."""
    type: int
    flags: int
    block_size: int
    blocks: int
    serial: str
    attentions: tuple[Sense, ...]
    reservations: Reservations


@dataclass(frozen=True, slots=True)
class SavedController:
    """The values of a saved controller."""

    stage: Stage
    version: ProtocolVersion | None
    subchannels: int | None
    max_transfer: int
    """Bytes."""
    units: tuple[SavedUnit, ...]
    packets: tuple[tuple[int, Packet], ...]
    """Channel and packet of each command without an answer, oldest first; from releases that saved them here."""
    enumeration_due: bool = False
    """Whether the guest is still to be notified of units that were added or removed: it does not read its ring."""


def save_unit(place: tuple[int, int], unit: LogicalUnit) -> SavedUnit:
    """Return the values of a unit."""
    return SavedUnit(
        place,
        unit.device_type,
        _flags(unit),
        unit.block_size,
        unit.blocks,
        unit.identity.serial,
        tuple(unit.attentions),
        unit.reservations if isinstance(unit, Disk) else Reservations(),
    )


def _flags(unit: LogicalUnit) -> int:
    if isinstance(unit, CdRom):
        return unit.loaded | unit.locked << 1
    return unit.reservations.through_power_loss << 2 if isinstance(unit, Disk) else 0


def check_unit(name: str, saved: SavedUnit, unit: LogicalUnit | None) -> None:
    """Raise :class:`~vmbus.errors.DeviceError` if ``unit`` of controller ``name`` is not the one that was saved."""
    where = f"{name}: target {saved.place[0]} LUN {saved.place[1]}"
    if unit is None:
        raise DeviceError(f"{where} is missing here")
    blocks = unit.blocks
    if unit.backend.tail and saved.blocks == blocks - 1:  # saved by a release that left out the last block
        blocks = saved.blocks
    found = (unit.device_type, unit.block_size, blocks, unit.identity.serial)
    wanted = (saved.type, saved.block_size, saved.blocks, saved.serial)
    for what, here, there in zip(
        ("type", "block size", "number of blocks", "serial"), found, wanted, strict=True
    ):
        if here != there:
            raise DeviceError(f"{where} has another {what}: {here}, it was {there}")


def check_controller(
    name: str,
    saved: SavedController,
    max_version: ProtocolVersion,
    max_transfer: int,
    units: Mapping[tuple[int, int], LogicalUnit],
) -> None:
    """Raise :class:`~vmbus.errors.DeviceError` if a controller with these limits and units cannot take ``saved``."""
    if saved.version is not None and saved.version > max_version:
        raise DeviceError(
            f"{name}: the guest agreed to protocol {saved.version}, here version={max_version} is set"
        )
    if saved.max_transfer > max_transfer:
        transfer = saved.max_transfer >> 10
        raise DeviceError(f"{name}: the guest may send requests of {transfer} KiB; set transfer={transfer}")
    for each in saved.units:
        check_unit(name, each, units.get(each.place))


def restore_unit(saved: SavedUnit, unit: LogicalUnit) -> None:
    """Give a unit, which was checked, its saved state."""
    unit.attentions = list(saved.attentions)
    if saved.blocks != unit.blocks:
        unit.attention(Sense.CAPACITY_CHANGED)
    if isinstance(unit, CdRom):
        unit.loaded, unit.locked = bool(saved.flags & 1), bool(saved.flags & 2)
    if isinstance(unit, Disk):
        unit.reservations = replace(saved.reservations)  # commands of the guest change it


def build_state(name: str, saved: SavedController) -> bytes:
    """Return the saved state of controller ``name``. Raises :class:`~vmbus.errors.InternalError`."""
    state = {
        "version": VERSION,
        "stage": saved.stage.value,
        "protocol": saved.version or 0,
        "subchannels": _NOTHING if saved.subchannels is None else saved.subchannels,
        "max_transfer": saved.max_transfer,
        "units": [_built_unit(each) for each in saved.units],
        "packets": [_built_packet(channel, packet) for channel, packet in saved.packets],
        "optional": build_fields(OPTIONAL, saved, _DEFAULTS),
    }
    try:
        _check_packets(saved.packets)
        return bytes(CONTROLLER.build(state))
    except (c.ConstructError, ValueError) as error:
        raise InternalError(f"{name} cannot be saved: {error}") from error


def _built_unit(saved: SavedUnit) -> dict[str, Any]:
    return {
        "target": saved.place[0],
        "lun": saved.place[1],
        "type": saved.type,
        "flags": saved.flags,
        "block_size": saved.block_size,
        "blocks": saved.blocks,
        "serial": saved.serial,
        "attentions": [bytes(sense.value) for sense in saved.attentions],
        "reservation_key": saved.reservations.key,
        "reservation_type": saved.reservations.type,
        "reservation_generation": saved.reservations.generation,
    }


def _built_packet(channel: int, packet: Packet) -> dict[str, Any]:
    return {
        "channel": channel,
        "kind": packet.kind,
        "flags": packet.flags,
        "transaction_id": packet.transaction_id,
        "payload": packet.payload,
        "ranges": [each._asdict() for each in packet.ranges],
    }


def build_packet_state(name: str, packet: Packet) -> bytes:
    """Return the saved state of a command of controller ``name``. Raises :class:`~vmbus.errors.InternalError`."""
    try:
        _check_packets([(0, packet)])
        return bytes(
            ONE_PACKET.build({"version": PACKET_VERSION, "packet": _built_packet(0, packet), "optional": b""})
        )
    except (c.ConstructError, ValueError) as error:
        raise InternalError(f"{name} cannot be saved: {error}") from error


def parse_packet_state(name: str, state: bytes) -> Packet:
    """Return the command in a saved state. Raises :class:`~vmbus.errors.DeviceError`."""
    version = int.from_bytes(state[:2], "little")
    if len(state) >= 2 and version > PACKET_VERSION:
        raise DeviceError(
            f"{name}: a saved command has version {version}; this emulator reads version {PACKET_VERSION} only"
        )
    try:
        saved = ONE_PACKET.parse(state)
        found = _packet(saved.packet)
        _check_packets([found])
    except (c.ConstructError, ValueError) as error:
        raise DeviceError(f"{name}: a saved command is damaged: {error}") from error
    skip_optional(saved.optional, name)
    return found[1]


def parse_state(name: str, state: bytes) -> SavedController:
    """Return the values in a saved state of controller ``name``.

    Raises :class:`~vmbus.errors.DeviceError` for state that is damaged or has another version.
    """
    if len(state) < 2:
        raise DeviceError(f"{name}: saved state is damaged: it has {len(state)} bytes")
    version = int.from_bytes(state[:2], "little")
    if version != VERSION:
        raise DeviceError(
            f"{name}: saved state has version {version}; this emulator reads version {VERSION} only"
        )
    try:
        found, ignored = _parse(bytes(state))
    except MalformedError as error:
        raise refused(name, error) from error
    except (c.ConstructError, UnicodeError, ValueError, KeyError) as error:
        raise DeviceError(f"{name}: saved state is damaged: {error}") from error
    report_ignored(name, ignored)
    return found


@functools.lru_cache(maxsize=4)
def _parse(state: bytes) -> tuple[SavedController, Sequence[int]]:
    """Return the values and the numbers of ignored fields, once: a state is checked twice before it is restored."""
    saved = CONTROLLER.parse(state)
    if len(saved.units) > _MAX_UNITS:
        raise ValueError(f"{len(saved.units)} units, at most {_MAX_UNITS}")
    found = SavedController(
        Stage(saved.stage),
        ProtocolVersion(saved.protocol) if saved.protocol else None,
        None if saved.subchannels == _NOTHING else saved.subchannels,
        saved.max_transfer,
        tuple(_unit(each) for each in saved.units),
        tuple(_packet(each) for each in saved.packets),
    )
    _check_packets(found.packets)
    fields, ignored = parse_fields(OPTIONAL, saved.optional, _DEFAULTS)
    return replace(found, **fields), ignored


def _check_packets(packets: Sequence[tuple[int, Packet]]) -> None:
    """Raise ``ValueError`` for packets that cannot be restored: before they are saved, and when they are read."""
    if len(packets) > _MAX_PACKETS:
        raise ValueError(f"{len(packets)} packets, at most {_MAX_PACKETS}")
    for _, packet in packets:
        pages = 0
        for byte_count, byte_offset, pfns in packet.ranges:
            pages += len(pfns)
            need = (byte_offset + byte_count + 4095) >> 12
            if byte_offset >= 4096 or not byte_count or need != len(pfns):
                raise ValueError("a packet with an impossible range")
        if len(packet.ranges) > MAX_RANGES or pages > MAX_PFNS or len(packet.payload) > MAX_PAYLOAD:
            raise ValueError("a packet that is too large")


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
        raise ValueError(
            f"an impossible reservation: type {saved.reservation_type}, key {saved.reservation_key:#x}"
        )
    return Reservations(
        saved.reservation_key,
        saved.reservation_type,
        saved.reservation_generation,
        through_power_loss=bool(saved.reservation_key and saved.flags & 4),
    )


def _packet(saved: Any) -> tuple[int, Packet]:
    ranges = [GpaRange(each.byte_count, each.byte_offset, tuple(each.pfns)) for each in saved.ranges]
    packet = Packet(
        PacketType(saved.kind), saved.flags, saved.transaction_id, bytes(saved.payload), tuple(ranges)
    )
    return saved.channel, packet
