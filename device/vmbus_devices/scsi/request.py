"""One command of a guest on its way through a unit.

    packet --Request--> LogicalUnit.execute --+--> succeed(), check(), finish()                    at once
                                              +--> (threads, timers) --> succeed(), check(), ...   later

Exactly one of them is called, once. The data buffer is guest memory that the packet names; it is looked at by nobody
but through here, and only as far as the guest's transfer length says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.bus.io.guest_buffer import gpa_runs
from vmbus.errors import GuestError
from vmbus.ports import GuestMemory
from vmbus.wire.packet import Packet
from vmbus.wire.scsi import ScsiStatus, Sense
from vmbus.wire.storvsp import AUTOSENSE_VALID, Direction, ScsiRequest, SrbStatus

from vmbus_devices.scsi.sense import CheckCondition

if TYPE_CHECKING:
    from vmbus.bus.io.channel_io import ChannelIo

    from vmbus_devices.scsi.unit import LogicalUnit

Finished = Callable[["Request", int, int, int, bytes], None]
"""Called with SRB status, SCSI status, bytes transferred, sense data."""

_CHECKED = SrbStatus.ERROR | AUTOSENSE_VALID


class Request:
    """A command, its buffer, and how to answer it. Times in seconds."""

    __slots__ = ("_finished", "begun", "cancel", "cdb", "io", "packet", "srb", "unit", "wanted")

    def __init__(
        self, io: ChannelIo, packet: Packet, srb: ScsiRequest, begun: float, finished: Finished
    ) -> None:
        self.io = io
        self.packet = packet
        self.srb = srb
        self.begun = begun
        #: The unit that works on it; ``None`` for one that is not there.
        self.unit: LogicalUnit | None = None
        #: While it only waits: call this to have it given up (it does not answer).
        self.cancel: Callable[[], None] | None = None
        self._finished = finished
        #: 16 bytes; whatever a shorter CDB leaves over is the guest's business.
        self.cdb = srb.cdb
        #: Bytes that the guest lets the command transfer.
        self.wanted = srb.transfer_length

    @property
    def memory(self) -> GuestMemory:
        """Guest memory."""
        return self.io.memory

    def runs(self, length: int) -> list[tuple[int, int]]:
        """``(address, bytes)`` of the first ``length`` bytes of the buffer.

        Raises :class:`CheckCondition` when the guest's buffer is shorter.
        """
        if length > self.wanted:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        runs = gpa_runs(self.packet.ranges)
        total = sum([step for _, step in runs])
        if length > total:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        while total > length:
            gpa, step = runs.pop()
            total -= step
            if total < length:
                runs.append((gpa, length - total))
                break
        return runs

    def output(self, length: int) -> bytes:
        """A copy of ``length`` bytes that the guest sends along (a parameter list)."""
        read = self.memory.read
        return b"".join([read(gpa, step) for gpa, step in self.output_runs(length)])

    def input_runs(self, length: int) -> list[tuple[int, int]]:
        """Where ``length`` bytes for the guest go."""
        if self.srb.direction == Direction.OUT:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return self.runs(length)

    def output_runs(self, length: int) -> list[tuple[int, int]]:
        """Where ``length`` bytes of the guest are."""
        if self.srb.direction == Direction.IN:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return self.runs(length)

    # --- one of these, once ----------------------------------------------------------------------------------

    def succeed(self, transferred: int = 0) -> None:
        """GOOD, after ``transferred`` bytes."""
        self._finished(self, SrbStatus.SUCCESS, ScsiStatus.GOOD, transferred, b"")

    def give(self, data: bytes, allocation: int) -> None:
        """GOOD, with ``data`` about the device: as much as the CDB's allocation length and the buffer allow."""
        length = min(len(data), allocation, self.wanted)
        if length:
            done = 0
            for gpa, step in self.input_runs(length):
                self.memory.write(gpa, data[done : done + step])
                done += step
        self.succeed(length)

    def check(self, condition: CheckCondition) -> None:
        """CHECK CONDITION, with sense data."""
        self._finished(self, _CHECKED, ScsiStatus.CHECK_CONDITION, 0, condition.data())

    def conflict(self) -> None:
        """RESERVATION CONFLICT.

        There is no sense data with it; but where it is not marked as valid, Linux looks at no SCSI status either,
        and takes the failure for one of the host (storvsc_handle_error).
        """
        self._finished(self, _CHECKED, ScsiStatus.RESERVATION_CONFLICT, 0, b"")

    def finish(self, srb_status: int) -> None:
        """End without the unit's having a say: no such unit, aborted, malformed."""
        self._finished(self, srb_status, ScsiStatus.GOOD, 0, b"")

    def refuse(self, error: GuestError) -> None:
        """End because the request itself is wrong (memory that is not RAM); counted under its reason."""
        self.io.refusals.refuse(error.reason, error.detail)
        self.finish(SrbStatus.INVALID_REQUEST)
