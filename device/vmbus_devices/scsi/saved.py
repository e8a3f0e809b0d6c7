"""What a storage controller keeps over a migration or a snapshot.

Work in threads has ended before a device is saved, so the commands that are left only wait: for the delay of a fault,
or for the end of a reset. Each is saved with its channel, as the packet in which it came, and executed again where
the guest continues; releases before that saved them with the controller, which is still read. Images are not
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
from vmbus.wire.packet import Packet
from vmbus.wire.scsi import Sense
from vmbus.wire.storvsp import ProtocolVersion

from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.handshake import Stage
from vmbus_devices.scsi.reservations import TYPES, Reservations
from vmbus_devices.scsi.saved_commands import build_command, build_commands, parse_command, parse_commands
from vmbus_devices.scsi.unit import LogicalUnit

VERSION = 1
_NOTHING = 0xFFFF
_MAX_UNITS = 256

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

CONTROLLER = c.Struct(
    "version" / c.Int16ul,
    "stage" / c.Int8ul,
    "protocol" / c.Int16ul,
    "subchannels" / c.Int16ul,
    "max_transfer" / c.Int32ul,
    "units" / c.PrefixedArray(c.Int16ul, UNIT),
    "rest" / c.GreedyBytes,
)
"""``rest``: commands (:mod:`vmbus_devices.scsi.saved_commands`), then :data:`OPTIONAL`, and fields of later releases
(:mod:`vmbus.wire.optional`)."""

OPTIONAL = (OptionalField(1, "enumeration_due", c.Flag),)
_DEFAULTS = {"enumeration_due": False}

PACKET_VERSION = 1

_PACKET_VERSION = PACKET_VERSION.to_bytes(2, "little")
"""Begins the state of one command, as ``Device.save_packets`` returns it; the command, and optional fields follow."""

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
    }
    try:
        rest = build_commands(saved.packets) + build_fields(OPTIONAL, saved, _DEFAULTS)
        return bytes(CONTROLLER.build({**state, "rest": rest}))
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


def build_packet_state(name: str, packet: Packet) -> bytes:
    """Return the saved state of a command of controller ``name``. Raises :class:`~vmbus.errors.InternalError`."""
    try:
        return _PACKET_VERSION + build_command(0, packet)
    except ValueError as error:
        raise InternalError(f"{name} cannot be saved: {error}") from error


def parse_packet_state(name: str, state: bytes) -> Packet:
    """Return the command in a saved state. Raises :class:`~vmbus.errors.DeviceError`."""
    version = int.from_bytes(state[:2], "little")
    if len(state) >= 2 and version > PACKET_VERSION:
        raise DeviceError(
            f"{name}: a saved command has version {version}; this emulator reads version {PACKET_VERSION} only"
        )
    try:
        if not state.startswith(_PACKET_VERSION):
            raise ValueError(f"version {version}")
        (channel, packet), end = parse_command(state, len(_PACKET_VERSION))
        if channel:  # it is that of the packet
            raise ValueError(f"channel {channel}")
    except ValueError as error:
        raise DeviceError(f"{name}: a saved command is damaged: {error}") from error
    if end < len(state):
        skip_optional(state[end:], name)
    return packet


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
    packets, end = parse_commands(saved.rest)
    found = SavedController(
        Stage(saved.stage),
        ProtocolVersion(saved.protocol) if saved.protocol else None,
        None if saved.subchannels == _NOTHING else saved.subchannels,
        saved.max_transfer,
        tuple(_unit(each) for each in saved.units),
        tuple(packets),
    )
    fields, ignored = parse_fields(OPTIONAL, saved.rest[end:], _DEFAULTS)
    return replace(found, **fields), ignored


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
