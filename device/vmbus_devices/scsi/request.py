"""One command of a guest on its way through a unit, and the errors with which it can end.

    packet --Request--> LogicalUnit.execute --+--> succeed(), check(), finish()                    at once
                                              +--> (threads, timers) --> succeed(), check(), ...   later

Exactly one of these methods is called, once. The data buffer is guest memory that the packet names; it is accessed
through this class only, and only up to the guest's transfer length.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmbus.bus.io.guest_buffer import gpa_runs
from vmbus.errors import GuestError
from vmbus.ports import GuestMemory
from vmbus.wire.packet import GpaRange, Packet
from vmbus.wire.scsi import ScsiStatus, Sense, sense_data
from vmbus.wire.storvsp import AUTOSENSE_VALID, PACKET_SIZE, Direction, ScsiRequest, SrbStatus

from vmbus_devices.scsi.statistics import UnitStatistics

if TYPE_CHECKING:
    from vmbus.bus.io.channel_io import ChannelIo

_logger = logging.getLogger(__name__)

Finished = Callable[["Request", int, int, int, bytes], None]
"""Called with SRB status, SCSI status, bytes transferred, sense data."""

_CHECKED = SrbStatus.ERROR | AUTOSENSE_VALID


class ReservationConflict(Exception):
    """The command ends with the status RESERVATION CONFLICT, which has no sense data."""


class CheckCondition(Exception):
    """The command is refused or has failed with CHECK CONDITION; the guest gets ``sense``.

    Raised by units, caught by the controller. ``information``: the first LBA that failed.
    """

    def __init__(self, sense: Sense, information: int | None = None) -> None:
        super().__init__(sense.name)
        self.sense = sense
        self.information = information

    def data(self) -> bytes:
        """Return 18 bytes of sense data."""
        return sense_data(self.sense, self.information)


def shorten(packet: Packet, length: int) -> Packet:
    """Return ``packet`` with the bytes of a request only, and with the first ``length`` bytes of its buffer at most.

    What is cut off has no effect: an answer has at most ``PACKET_SIZE`` bytes, and no command transfers more.
    """
    ranges: list[GpaRange] = []
    for byte_count, byte_offset, pfns in packet.ranges:
        step = min(byte_count, length)
        ranges.append(GpaRange(step, byte_offset, pfns[: (byte_offset + step + 4095) >> 12]))
        length -= step
        if not length:
            break
    return packet._replace(payload=packet.payload[:PACKET_SIZE], ranges=tuple(ranges))


class Request:
    """A command, its buffer, and how to answer it. Times in seconds."""

    __slots__ = ("_finished", "begun", "cancel", "cdb", "held", "io", "packet", "srb", "statistics", "wanted")

    def __init__(
        self, io: ChannelIo, packet: Packet, srb: ScsiRequest, begun: float, finished: Finished
    ) -> None:
        self.io = io
        self.packet = packet
        self.srb = srb
        self.begun = begun
        self.statistics: UnitStatistics | None = None
        """Of the unit that executes the command; ``None`` for a unit that does not exist."""
        self.cancel: Callable[[], None] | None = None
        """Set while the command only waits: ends that, without an answer."""
        self._finished = finished
        self.held = 0
        """Bytes of private copies that count against the guest's budget of memory."""
        self.cdb = srb.cdb
        """16 bytes; behind the end of a shorter CDB they may be anything."""
        self.wanted = srb.transfer_length
        """Bytes that the guest lets the command transfer."""

    @property
    def memory(self) -> GuestMemory:
        """Guest memory."""
        return self.io.memory

    def runs(self, length: int) -> list[tuple[int, int]]:
        """Return ``(address, bytes)`` of the first ``length`` bytes of the buffer.

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
        """Return a copy of ``length`` bytes that the guest sends (a parameter list)."""
        read = self.memory.read
        return b"".join([read(gpa, step) for gpa, step in self.output_runs(length)])

    def input_runs(self, length: int) -> list[tuple[int, int]]:
        """Return where ``length`` bytes for the guest go."""
        if self.srb.direction == Direction.OUT:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return self.runs(length)

    def output_runs(self, length: int) -> list[tuple[int, int]]:
        """Return where ``length`` bytes of the guest are."""
        if self.srb.direction == Direction.IN:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return self.runs(length)

    def hold(self, size: int) -> None:
        """Count ``size`` bytes of private copies of data, until the request ends. Call it before they are made.

        A request that is executed again, or only later, counts once.
        """
        if size > self.held:
            self.io.budget.charge(size - self.held)
            self.held = size

    def release(self) -> None:
        """Undo :meth:`hold`: the request has ended."""
        held, self.held = self.held, 0
        if held:
            self.io.budget.refund(held)

    # --- results: one of these, once ---

    def succeed(self, transferred: int = 0) -> None:
        """End with GOOD, after ``transferred`` bytes."""
        self._finished(self, SrbStatus.SUCCESS, ScsiStatus.GOOD, transferred, b"")

    def give(self, data: bytes, allocation: int) -> None:
        """End with GOOD and ``data``, cut to the CDB's allocation length and the guest's buffer."""
        length = min(len(data), allocation, self.wanted)
        if length:
            done = 0
            for gpa, step in self.input_runs(length):
                self.memory.write(gpa, data[done : done + step])
                done += step
        self.succeed(length)

    def check(self, condition: CheckCondition) -> None:
        """End with CHECK CONDITION and sense data."""
        self._finished(self, _CHECKED, ScsiStatus.CHECK_CONDITION, 0, condition.data())

    def conflict(self) -> None:
        """End with RESERVATION CONFLICT.

        It has no sense data. The SRB status says that sense data is valid all the same: otherwise Linux does not
        evaluate the SCSI status, and treats the failure as one of the host (storvsc_handle_error).
        """
        self._finished(self, _CHECKED, ScsiStatus.RESERVATION_CONFLICT, 0, b"")

    def finish(self, srb_status: int) -> None:
        """End with an SRB status and no SCSI status: no such unit, aborted, malformed."""
        self._finished(self, srb_status, ScsiStatus.GOOD, 0, b"")

    def carry_on(self, step: Callable[[], None]) -> None:
        """Call ``step``, and end with what it raises.

        An error of the host's ends the command as well, and is raised again: a command that never ends would keep its
        channel from closing, and its unit from being removed.
        """
        try:
            step()
        except CheckCondition as condition:
            self.check(condition)
        except ReservationConflict:
            self.conflict()
        except GuestError as error:
            self.refuse(error)
        except Exception:
            self.check(CheckCondition(Sense.TARGET_FAILURE))
            raise

    def guarded(self, done: Callable[[Exception | None], None]) -> Callable[[Exception | None], None]:
        """Return ``done`` for the end of work: called by the machine, which has no channel to charge an error to.

        What it raises ends the command (:meth:`carry_on`), and an error of the host's fails the command's channel.
        """

        def ended(error: Exception | None) -> None:
            try:
                self.carry_on(lambda: done(error))
            except Exception as problem:
                _logger.exception("the end of a command failed")
                self.io.fail("device-error", repr(problem))

        return ended

    def refuse(self, error: GuestError) -> None:
        """End a request that is itself wrong (memory that is not RAM); counted under the error's reason."""
        self.io.refusals.refuse(error.reason, error.detail)
        self.finish(SrbStatus.INVALID_REQUEST)
