"""The storage controller: StorVSP, the host's end of Linux's hv_storvsc and Windows's storvsc.

Source: docs/protocol/devices.md#storage-identity. A controller has units at (target, LUN), a primary channel over
which driver and host negotiate (:mod:`vmbus_devices.scsi.handshake`), and sub-channels. Commands come over any of
them, and are answered there.

    | packet                  | before READY         | READY                                                       |
    |  3 execute SRB          | INVALID_DEVICE_STATE | to the unit; answered when it has ended                     |
    |  4, 5, 6 reset          | INVALID_DEVICE_STATE | waiting commands are aborted; answered when none is left    |
    |  7, 8, 9, 10, 13        | handshake            | handshake                                                   |
    | 12 FC HBA data          | INVALID_DEVICE_STATE | INVALID_DEVICE_REQUEST                                      |
    | anything else           | the channel stops    | the channel stops                                           |

Packets of a sub-channel that come before the primary channel is READY stay in its ring until then, and so do packets
beyond ``MAX_DEPTH`` commands of a channel. A channel that the guest closes while its commands are under way is
released when the last of them has ended.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.bus.io.state import IoState, PacketState
from vmbus.bus.offers import Offer
from vmbus.devices.parts import Part
from vmbus.errors import DeviceError, GuestError, ProtocolError
from vmbus.wire.offer import OfferFlags
from vmbus.wire.packet import Packet
from vmbus.wire.scsi import Opcode, ScsiStatus, Sense
from vmbus.wire.storvsp import (
    CDB_SIZE,
    HEADER_SIZE,
    PACKET_SIZE,
    SCSI_INTERFACE,
    SHORT_PACKET_SIZE,
    Operation,
    ProtocolVersion,
    SrbStatus,
    Status,
    answer_size,
    build_answer,
    build_packet,
    nt_status,
    parse_operation,
    parse_request,
)

from vmbus_devices.scsi.fast.build import LIBRARY
from vmbus_devices.scsi.handover import hand_over
from vmbus_devices.scsi.handshake import OPERATIONS, Handshake
from vmbus_devices.scsi.outstanding import OutstandingRequests
from vmbus_devices.scsi.places import execute_without_unit, part_name, place_of
from vmbus_devices.scsi.request import CheckCondition, Request, shorten
from vmbus_devices.scsi.resets import Resets
from vmbus_devices.scsi.restored import RestoredCommands
from vmbus_devices.scsi.saved import (
    SavedController,
    build_packet_state,
    build_state,
    check_controller,
    parse_packet_state,
    parse_state,
    restore_unit,
    save_unit,
)
from vmbus_devices.scsi.scan import ScanRequests, ScanWatch
from vmbus_devices.scsi.unit import LogicalUnit
from vmbus_devices.scsi.unit_table import Place, UnitTable

_logger = logging.getLogger(__name__)

NAMESPACE = uuid.UUID("5f5f8f0e-0d3c-4b57-b0a6-3f2f7a9c6a41")
"""Instance GUIDs of controllers are derived from their names, so that they stay the same."""

MAX_QUEUES = 8
MAX_DEPTH = 512
"""Commands of one channel that may be under way. Linux has at most 332 on a controller with one channel, so that a
reset behind them is seen."""
BUFFER_HEADROOM = 1 << 20
"""Bytes of a packet's buffer that are kept beyond ``max_transfer``: the longest list of parameters is shorter."""

_EXECUTE = int(Operation.EXECUTE_SRB)
_RESETS = (Operation.RESET_LUN, Operation.RESET_ADAPTER, Operation.RESET_BUS)
_SUCCESS = int(SrbStatus.SUCCESS)


class Controller(Device):
    """A storage controller. ``max_transfer`` in bytes; ``clock`` in seconds.

    :class:`vmbus_devices.scsi.device.Scsi` makes one from the options of ``--device``.
    """

    native_libraries = (LIBRARY,)
    max_packet = 80  # the buffer of Linux: a descriptor and 64 bytes
    max_owed = MAX_DEPTH
    poll_window = 300e-6  # a guest takes about that long from an answer to its next request

    def __init__(
        self,
        *,
        controller: str,
        instance: uuid.UUID | None,
        queues: int,
        max_transfer: int,
        max_version: ProtocolVersion,
        clock: Callable[[], float],
    ) -> None:
        self.controller = controller
        self.name = controller
        self.instance = instance or uuid.uuid5(NAMESPACE, controller)
        self.max_version = max_version
        self.max_transfer = max_transfer
        self.queues = queues
        self._outstanding = OutstandingRequests()
        self._table = UnitTable(controller, line_of=self.line_of, changing=self._outstanding.recall)
        self.units = self._table.units
        """Target and LUN → unit."""
        self._unit_at = self.units.get
        self.clock = clock
        self.handshake = self.new_handshake()
        self.resets = Resets(
            lambda io, packet: self._outside_turns(io, partial(self._answer, io, packet, Status.SUCCESS))
        )
        self._primary: ChannelIo | None = None
        self._waiting_subchannels: list[ChannelIo] = []
        self._scans = ScanWatch()
        self._scan_requests = ScanRequests()
        self._restored = RestoredCommands(self._outstanding.open_channels, self._restart, self._abort)

    def new_handshake(self) -> Handshake:
        """Return the negotiation as it begins when a guest opens the primary channel."""
        possible = self._environment is not None and self._environment.offers is not None
        return Handshake(self.max_version, self.queues - 1 if possible else 0, self.max_transfer)

    # --- units ---

    def free_lun(self, target: int) -> int:
        """Return the first LUN without a unit. Raises :class:`~vmbus.errors.UsageError` if there is none."""
        return self._table.free_lun(target)

    def line_of(self, place: Place) -> str:
        """Return the text after ``--device`` for the unit at ``place``; empty for a unit made by code."""
        return ""

    def attach(self, unit: LogicalUnit, target: int = 0, lun: int | None = None) -> int:
        """Add a unit, at the next free LUN if none is given, and return the LUN. A running guest is notified.

        Raises :class:`~vmbus.errors.UsageError` if the place is taken, and does not close the unit then.
        """
        place = (target, self.free_lun(target) if lun is None else lun)
        self._table.add(unit, place)
        self._scans.added(place)
        if self._primary is not None:
            unit.attention(Sense.POWER_ON)
            self._enumerate()
        return place[1]

    def detach(self, target: int, lun: int) -> None:
        """Remove a unit and notify the guest. Its image is closed when its commands have ended."""
        self._table.remove((target, lun))
        self._scans.removed((target, lun), known=self.handshake.ready)
        self._enumerate()

    def resize(self, target: int, lun: int) -> bool:
        """Read the size of a unit's image again and notify the guest of a change; return whether it changed."""
        changed = self._table.at((target, lun)).resized()
        if changed:
            self._enumerate()
        return changed

    def outside_snapshots(self) -> Sequence[str]:
        return self._table.outside_snapshots(self.name)

    def snapshot_disks(self) -> Mapping[str, SnapshotDisk]:
        return self._table.snapshot_disks(self.name)

    def _enumerate(self) -> None:
        """Have the guest scan for units that were added or removed."""
        if self._primary is not None and self.handshake.ready:
            self._scan_requests.send(self._primary, self.handshake.version)

    def writable(self, io: ChannelIo) -> None:
        self._enumerate()

    # --- vmbus.devices.parts.HasParts: what `vmbus device` calls ---

    def parts(self) -> Mapping[str, Part]:
        return self._table.parts()

    def part_name(self, text: str) -> str | None:
        place = place_of(text)
        return part_name(place) if place in self.units else None

    def detach_part(self, name: str) -> None:
        self.detach(*place_of(name))

    async def resize_part(self, name: str, size: int | None) -> None:
        place = place_of(name)
        await self._table.set_size(place, size, f"{self.name}/{name}")
        self.resize(*place)

    def busy(self) -> bool:
        return self._outstanding.any_busy

    def removal_noticed(self) -> bool:
        return self._scans.over

    # --- calls from the bus ---

    def offer(self) -> Offer:
        return Offer(
            interface_id=SCSI_INTERFACE, instance_id=self.instance, flags=OfferFlags(0), name=self.name
        )

    def start(self, environment: DeviceEnvironment) -> None:
        super().start(environment)
        self._table.start(environment)

    def stop(self) -> None:
        self._outstanding.recall()
        self._outstanding.cancel_all()
        self.resets.stop()
        self._table.close()

    def wait_closed(self, timeout: float) -> bool:
        return self._table.wait_closed(timeout)

    def claim(self) -> None:
        self._table.claim(self.name)

    def guest_resumed(self) -> None:
        kept = self._table.take_kept()
        here = self._primary is not None and self._primary.state is IoState.RUNNING
        if not self._table.active and (kept or here):  # it released the images, and the guest stayed
            self._table.take_images()
        for unit, request in kept:
            self._outside_turns(request.io, partial(self._do, request, unit))

    def opened(self, io: ChannelIo) -> None:
        self._restored.forget(io, opened=True)  # of a restored channel that could not continue
        if io.subchannel_index:
            if not self.handshake.ready:
                io.pause_input()
                self._waiting_subchannels.append(io)
            self._outstanding.open(io)
            self._open_fast(io)
            return
        self._table.take_images()
        self._primary = io
        self._scans.opened()
        self._scan_requests.due = False  # the guest scans anew
        self._outstanding.open(io)
        self.handshake = self.new_handshake()
        for unit in self.units.values():
            unit.reset()
        self._open_fast(io)

    def _open_fast(self, io: ChannelIo) -> None:
        if self._table.fast is not None:
            io.fast = self._table.fast.open_channel(io)

    def fast_ready(self, io: ChannelIo) -> bool:
        if not self.handshake.ready or not self._table.refresh_fast():
            return False
        return not self._waits_for_end  # the engine does not tell of the end of requests that it answers

    @property
    def _waits_for_end(self) -> bool:
        """Whether something waits until requests have ended."""
        return bool(
            self._table.removed or self._outstanding.closing or self.resets.waiting or self._restored.waiting
        )

    def fast_ended(self, io: ChannelIo) -> None:
        self._ended(io)

    def settled(self, io: ChannelIo) -> bool:
        return self._outstanding.settled(io)

    def closed(self, io: ChannelIo) -> None:
        if io is self._primary:
            self._primary = None
            self._scans.opened()
            self.handshake = self.new_handshake()
        if io in self._waiting_subchannels:
            self._waiting_subchannels.remove(io)
        self.resets.forget(io)
        self._outstanding.cancel(io)
        self._restored.forget(io, opened=io in self._outstanding)
        self._outstanding.close(io)

    # --- packets ---

    def needed(self, packet: Packet) -> Packet:
        """Return the packet without what no command uses: bytes behind the request, pages behind the buffer."""
        return shorten(packet, self.max_transfer + BUFFER_HEADROOM)

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        payload = packet.payload
        if len(payload) > PACKET_SIZE:
            packet = self.needed(packet)
        if not packet.flags & 1:
            raise ProtocolError("storvsp-no-completion-wanted", f"transaction {packet.transaction_id:#x}")
        if len(payload) < HEADER_SIZE:
            raise ProtocolError("storvsp-short-packet", f"{len(payload)} bytes")
        operation = parse_operation(payload)
        if operation == _EXECUTE:
            if not self.handshake.ready:
                self._answer(io, packet, Status.INVALID_DEVICE_STATE)
            elif len(payload) < SHORT_PACKET_SIZE:
                raise ProtocolError("storvsp-short-request", f"{len(payload)} bytes")
            else:
                self._execute(io, packet)
        elif operation in OPERATIONS:
            self._initialise(io, packet, operation)
        elif operation in _RESETS:
            if self.handshake.ready:
                self._reset(io, packet)
            else:
                self._answer(io, packet, Status.INVALID_DEVICE_STATE)
        elif operation == Operation.FCHBA_DATA:
            state = Status.INVALID_DEVICE_REQUEST if self.handshake.ready else Status.INVALID_DEVICE_STATE
            self._answer(io, packet, state)
        else:
            raise ProtocolError("storvsp-unknown-operation", f"{operation:#x}")

    def batch_ended(self, io: ChannelIo) -> None:
        self.environment.workers.submit()

    def refused(self, io: ChannelIo, packet: Packet, error: GuestError) -> None:
        """Answer a packet with malformed ranges as an I/O request that is invalid."""
        if not packet.completion_requested or not io.owes(packet.transaction_id):
            return
        if len(packet.payload) < SHORT_PACKET_SIZE or parse_operation(packet.payload) != _EXECUTE:
            self._answer(io, packet, Status.INVALID_PARAMETER)
            return
        io.complete(
            packet.transaction_id,
            build_answer(
                parse_request(packet.payload),
                Status.INVALID_PARAMETER,
                SrbStatus.INVALID_REQUEST,
                ScsiStatus.GOOD,
                0,
                b"",
                answer_size(len(packet.payload)),
            ),
        )

    def _answer(self, io: ChannelIo, packet: Packet, status: Status, union: bytes = b"") -> None:
        size = answer_size(len(packet.payload))
        io.complete(packet.transaction_id, build_packet(Operation.COMPLETE_IO, status, union, size))

    def _initialise(self, io: ChannelIo, packet: Packet, operation: int) -> None:
        if io.subchannel_index:
            self._answer(io, packet, Status.INVALID_DEVICE_STATE)
            return
        handshake = self.handshake
        was_ready = handshake.ready
        before = handshake.subchannels
        status, union = handshake.take(operation, packet.payload[HEADER_SIZE:])
        self._answer(io, packet, status, union)
        if handshake.subchannels != before and handshake.subchannels:
            io.offer_subchannels(handshake.subchannels)
        if handshake.ready and not was_ready:
            waiting, self._waiting_subchannels = self._waiting_subchannels, []
            for each in waiting:
                each.resume_input()

    # --- commands ---

    def _execute(self, io: ChannelIo, packet: Packet) -> None:
        if not self._table.active:
            self._table.take_images()
        srb = parse_request(packet.payload)
        request = Request(io, packet, srb, self.clock(), self._finished)
        self._outstanding.add(request)
        unit = None if srb.path else self._unit_at((srb.target, srb.lun))
        if unit is not None and srb.cdb[0] != Opcode.REPORT_LUNS:
            request.statistics = unit.statistics
            unit.statistics.began()
            self._do(request, unit)
        else:
            if unit is None:
                self._scans.asked(srb, srb.cdb[0])
            self._do(request, None)

    def _do(self, request: Request, unit: LogicalUnit | None) -> None:
        def step() -> None:
            if unit is None:
                execute_without_unit(request, self.units)
            elif request.srb.cdb_length > CDB_SIZE:
                raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
            else:
                unit.execute(request)

        request.carry_on(step)

    def _finished(
        self, request: Request, srb_status: int, scsi_status: int, transferred: int, sense: bytes
    ) -> None:
        if not self._outstanding.remove(request):
            return  # an error of the host's has ended it before
        request.release()
        statistics = request.statistics
        if statistics is not None:
            statistics.ended(self.clock() - request.begun)
            if srb_status != _SUCCESS:
                statistics.error(srb_status, sense)
        status = Status.SUCCESS
        if srb_status != _SUCCESS:
            status = nt_status(srb_status)
        io = request.io
        packet = request.packet
        try:
            if io not in self._outstanding.closing:
                io.complete(
                    packet.transaction_id,
                    build_answer(
                        request.srb,
                        status,
                        srb_status,
                        scsi_status,
                        transferred,
                        sense,
                        answer_size(len(packet.payload)),
                    ),
                )
        finally:
            self._ended(io)

    def _ended(self, io: ChannelIo) -> None:
        """Continue what waits for the commands of a channel to end."""
        outstanding = self._outstanding
        if outstanding.closing:
            outstanding.finish_close(io)
        if self._table.removed:
            self._table.close_removed()
        self._restored.continue_soon(self.environment.timers)
        if self.resets.waiting and not outstanding.any_busy:
            self.resets.settled()

    def _reset(self, io: ChannelIo, packet: Packet) -> None:
        self._outstanding.recall()
        self._restored.run(aborted=True)
        for unit in self.units.values():
            unit.reset()
        self.resets.ask(io, packet, self.environment.timers)
        self._outstanding.cancel_all()
        if not self._outstanding.any_busy:
            self.resets.settled()

    # --- reports and saving ---

    def status(self) -> dict[str, Any]:
        handshake = self.handshake
        return {
            "stage": handshake.stage.name.lower(),
            "version": str(handshake.version) if handshake.version else None,
            "subchannels": handshake.subchannels or 0,
            "in_flight": self._outstanding.total,
            "resets": self.resets.count,
            "enumerations": self._scan_requests.count,
            "units": {f"{target}:{lun}": unit.status() for (target, lun), unit in sorted(self.units.items())},
        }

    def figures(self) -> dict[str, Any]:
        return {
            "resets": self.resets.count,
            "units": {part_name(place): unit.statistics.figures() for place, unit in self.units.items()},
        }

    def add_figures(self, figures: Mapping[str, Any]) -> None:
        self.resets.count += int(figures.get("resets", 0))
        for place, unit in self.units.items():
            unit.statistics.add_figures(figures.get("units", {}).get(part_name(place), {}))

    def bound_to_process(self) -> list[str]:
        return [
            f"{self.name}/{part_name(place)} ({self.line_of(place)})"
            for place, unit in sorted(self.units.items())
            if unit.backend.bound_to_process
        ]

    def lost_with_process(self) -> list[str]:
        return [
            f"{self.name}/{part_name(place)} ({self.line_of(place)})"
            for place, unit in sorted(self.units.items())
            if not unit.backend.outlives_process
        ]

    def save(self) -> bytes:
        hand_over([unit for unit in self.units.values() if unit.has_image and not unit.backend.read_only])
        return self.captured()

    def captured(self) -> bytes:
        handshake = self.handshake
        open_here = self._outstanding.indexes
        return build_state(
            self.name,
            SavedController(
                handshake.stage,
                handshake.version,
                handshake.subchannels,
                self.max_transfer,
                tuple(save_unit(place, unit) for place, unit in sorted(self.units.items())),
                tuple(self._restored.of_closed(open_here)),
                self._scan_requests.due,
            ),
        )

    def guest_saved(self) -> None:
        self._table.release_images()  # the emulator that continues the guest locks the images

    def check_restore(self, state: bytes) -> None:
        self._check_saved(parse_state(self.name, state))

    def _check_saved(self, saved: SavedController) -> None:
        check_controller(self.name, saved, self.max_version, self.max_transfer, self.units)

    def restore(self, state: bytes) -> None:
        saved = parse_state(self.name, state)
        self._check_saved(saved)
        for each in saved.units:
            restore_unit(each, self.units[each.place])
        self.handshake = self.new_handshake()
        self.handshake.stage, self.handshake.version = saved.stage, saved.version
        self.handshake.subchannels = saved.subchannels
        self._scan_requests.due = saved.enumeration_due
        self._restored.replace(saved.packets)

    def save_packets(self, io: ChannelIo) -> list[PacketState]:
        found = self._restored.of(io, opened=io in self._outstanding)
        found += self._outstanding.packets(io)
        found += [packet for at, packet in self.resets.waiting if at is io]
        return [PacketState(each.transaction_id, build_packet_state(self.name, each)) for each in found]

    def packet_state(self, packet: Packet) -> bytes:
        state = build_packet_state(self.name, self.needed(packet))
        parse_packet_state(self.name, state)
        return state

    def restore_packet(self, io: ChannelIo, packet: PacketState) -> None:
        command = parse_packet_state(self.name, packet.state)
        if command.transaction_id != packet.transaction_id or not packet.from_guest:
            raise DeviceError(f"{self.name}: a saved command is that of another packet")
        self._restored.add(io, command)

    def restored(self, io: ChannelIo) -> None:
        if io not in self._outstanding:
            self._outstanding.open(io)
        self._open_fast(io)
        index = io.subchannel_index
        if not index:
            self._primary = io
            if self._scan_requests.due:
                self._enumerate()
        elif self.handshake.ready:
            io.resume_input()
        else:
            self._waiting_subchannels.append(io)
        self._restored.open(io)

    def _outside_turns(self, io: ChannelIo, step: Callable[[], None]) -> None:
        """Call ``step`` for one of several packets: an error of the host's costs its channel, not the others."""
        try:
            step()
        except Exception as error:
            _logger.exception("%s: a packet failed", self.name)
            io.fail("device-error", repr(error))

    def _restart(self, io: ChannelIo, packet: Packet) -> None:
        """Execute a restored command."""

        def step() -> None:
            try:
                self.packet(io, packet)
            except ProtocolError as error:
                io.fail(error.reason, error.detail)
            except GuestError as error:
                self.refused(io, packet, error)

        self._outside_turns(io, step)

    def _abort(self, io: ChannelIo, packet: Packet) -> None:
        """Answer a restored command that a reset has aborted."""
        payload = packet.payload
        if len(payload) < SHORT_PACKET_SIZE or parse_operation(payload) != _EXECUTE:
            self._restart(io, packet)
            return
        request = Request(io, packet, parse_request(payload), self.clock(), self._finished)
        self._outstanding.add(request)
        request.finish(SrbStatus.ABORTED)
