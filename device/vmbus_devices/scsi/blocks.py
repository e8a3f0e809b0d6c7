"""Units with blocks: data moves between a back end and guest memory without a copy.

    READ  --check--> views of the guest's pages --(thread) preadv--> pages are marked as written --> GOOD
    WRITE --check--> views of the guest's pages --(thread) pwritev--> GOOD

A back end that never blocks is called at once, in the event loop's thread. Where a back end needs aligned memory
(direct I/O) and the guest's is not, the data goes through a buffer.
"""

from __future__ import annotations

import enum
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from vmbus.wire.scsi import (
    CAPACITY_10,
    PROTECT,
    Capacity10,
    Opcode,
    Sense,
    cdb_allocation,
    parse_range,
)

from vmbus_devices.scsi.backend import MAX_VIEWS, Backend
from vmbus_devices.scsi.faults import FaultPlan
from vmbus_devices.scsi.request import CheckCondition, Request
from vmbus_devices.scsi.unit import LogicalUnit

_logger = logging.getLogger(__name__)


class WriteErrors(enum.Enum):
    """How a failed write is handled: report it to the guest, stop the guest, or stop it if no space is left."""

    REPORT = "report"
    STOP = "stop"
    NO_SPACE = "enospc"


class ReadErrors(enum.Enum):
    """How a failed read is handled: report it to the guest, or stop the guest."""

    REPORT = "report"
    STOP = "stop"


_WRITE_PROTECTED = (errno.EROFS, errno.EPERM, errno.EACCES, errno.EBADF)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


TRANSFER_HEADROOM = 64 << 10
"""Bytes that a command may move beyond the limit that the controller announces.

Drivers take that for advice: one counts pages, and adds one for a buffer that begins inside a page, another splits at
66 pages where 64 are announced.
"""

_READING = (
    Opcode.READ_6,
    Opcode.READ_10,
    Opcode.READ_12,
    Opcode.READ_16,
    Opcode.VERIFY_10,
    Opcode.VERIFY_12,
    Opcode.VERIFY_16,
)
_WRITING = (
    Opcode.WRITE_6,
    Opcode.WRITE_10,
    Opcode.WRITE_12,
    Opcode.WRITE_16,
    Opcode.WRITE_VERIFY_10,
    Opcode.WRITE_VERIFY_12,
    Opcode.WRITE_VERIFY_16,
    Opcode.SYNCHRONIZE_CACHE_10,
    Opcode.SYNCHRONIZE_CACHE_16,
    Opcode.WRITE_SAME_10,
    Opcode.WRITE_SAME_16,
    Opcode.UNMAP,
)
_NEED_IMAGE = frozenset((*_READING, *_WRITING))
_IMAGE_AGAIN = 0.1
"""Seconds after which a command that waits for its image tries again."""


class Transfer(NamedTuple):
    """A read or a write of ``blocks`` from ``lba``, whose data is at ``runs`` (address, bytes) of guest memory."""

    request: Request
    lba: int
    blocks: int
    runs: list[tuple[int, int]]
    copied: bool
    """Whether the data goes through a buffer."""
    fua: bool
    bad: int | None
    """The LBA that an injected fault makes fail."""


class BlockUnit(LogicalUnit):
    """A unit with ``blocks`` blocks of ``block_size`` bytes.

    ``max_transfer``: the largest command that is announced, in bytes; up to ``transfer_limit`` is executed.
    """

    def __init__(
        self, backend: Backend, serial: str, *, block_size: int, max_transfer: int, faults: FaultPlan
    ) -> None:
        super().__init__(backend, serial)
        self.block_size = block_size
        self.max_transfer = max_transfer
        self.transfer_limit = max_transfer + TRANSFER_HEADROOM
        self.faults = faults
        faults.changing = lambda: self.changing()
        backend.round_up(block_size)
        self.blocks = backend.size // block_size
        self.write_errors = WriteErrors.REPORT
        self.read_errors = ReadErrors.REPORT
        self._mask = backend.alignment - 1
        self._image_lost = False
        self._commands |= {
            Opcode.READ_CAPACITY_10: self._read_capacity_10,
            Opcode.READ_6: self._read,
            Opcode.READ_10: self._read,
            Opcode.READ_12: self._read,
            Opcode.READ_16: self._read,
        }

    @property
    def read_only(self) -> bool:
        """Whether writes fail with WRITE PROTECTED."""
        return self.backend.read_only

    def resized(self) -> bool:
        """Read the size of the back end; return whether it changed. A unit attention reports a change."""
        blocks = self.backend.refresh() // self.block_size
        if blocks == self.blocks:
            return False
        self.changing()
        self.blocks = blocks
        self.attention(Sense.CAPACITY_CHANGED)
        return True

    def execute(self, request: Request) -> None:
        if not self.has_image and request.cdb[0] in _NEED_IMAGE:
            self._with_image(request, self.backend.reconnect)
        else:
            super().execute(request)

    def _with_image(self, request: Request, seconds: float) -> None:
        """Execute a command as soon as the image is this guest's, or let it fail after ``seconds``.

        A migration releases the image although the guest may stay, and somebody else may take it then.
        """
        if self.take_image():
            self._image_lost = False
            super().execute(request)
        elif seconds > 0 and not self._image_lost:
            self._delay(request, _IMAGE_AGAIN, lambda: self._with_image(request, seconds - _IMAGE_AGAIN))
        else:
            self._image_lost = True  # commands that follow do not wait again
            error = OSError(errno.EBUSY, self.trouble)
            self.failed(request, error, write=request.cdb[0] in _WRITING)

    # --- work ---

    def _submit(
        self,
        request: Request,
        work: Callable[[], None],
        done: Callable[[Exception | None], None],
        *,
        changes: bool = False,
    ) -> None:
        """Run ``work`` where it may block; ``done`` follows in the event loop's thread.

        ``changes``: it changes a range of any length.
        """
        self._run(work, request.guarded(done), changes=changes)

    def _run(
        self, work: Callable[[], None], done: Callable[[Exception | None], None], *, changes: bool = False
    ) -> None:
        immediate = self.backend.immediate and (self.backend.immediate_changes or not changes)
        if immediate or self.environment is None:
            error: Exception | None = None
            try:
                work()
            except OSError as found:
                error = found
            done(error)
        elif (threads := self.backend.threads) is not None and (
            ended := self.environment.workers.expect(done)
        ) is not None:
            job = _Job(work, ended)
            try:
                threads.submit(job.run)
            except RuntimeError as problem:  # the host has no thread for it, or the back end is closed
                job.give_up(OSError(errno.EAGAIN, f"no thread for the command: {problem}"))
        else:
            self.environment.workers.run(work, done)

    def _move(
        self,
        request: Request,
        offset: int,
        views: list[memoryview],
        length: int,
        write: bool,
        fua: bool,
        done: Callable[[Exception | None], None],
    ) -> None:
        """Move the data of a command, without a thread where that is possible."""
        backend = self.backend
        done = request.guarded(done)

        def work() -> None:
            if write:
                backend.write(offset, views, fua=fua)
            else:
                backend.read(offset, views)

        def transferred(result: int) -> None:
            if result == length:
                done(None)
            elif result < 0 and result != -errno.EAGAIN:
                done(OSError(-result, os.strerror(-result)))
            elif self.environment is not None:
                self.environment.workers.run(work, done)  # only a part was transferred: repeat all of it

        if backend.fd >= 0 and self.environment is not None and len(views) <= MAX_VIEWS:
            flags = backend.fua_flags if fua else 0
            if self.environment.workers.transfer(backend.fd, offset, views, write, flags, transferred):
                return
        elif (
            backend.starts
            and self.environment is not None
            and (ended := self.environment.workers.expect(done)) is not None
        ):
            backend.start(offset, views, length, write, fua, ended)
            return
        self._run(work, done)

    def _delay(self, request: Request, seconds: float, proceed: Callable[[], None]) -> None:
        """Delay a request; it can be cancelled and saved meanwhile."""

        def due() -> None:
            request.cancel = None
            request.carry_on(proceed)

        request.cancel = request.io.call_later(seconds, due).cancel

    def _range(self, request: Request) -> tuple[int, int, int]:
        """Return ``(flags, lba, blocks)``, checked against the size of the unit."""
        flags, lba, blocks = parse_range(request.cdb)
        if flags & PROTECT:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if lba + blocks > self.blocks:
            raise CheckCondition(Sense.LBA_OUT_OF_RANGE, max(lba, self.blocks))
        return flags, lba, blocks

    def _transfer_range(self, request: Request) -> tuple[int, int, int]:
        flags, lba, blocks = self._range(request)
        if blocks * self.block_size > self.transfer_limit:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        return flags, lba, blocks

    def failed(self, request: Request, error: Exception, *, write: bool) -> None:
        """End ``request`` with sense data for an error of the back end, or keep it and stop the guest."""
        if isinstance(error, OSError) and self._stops_for(error, write=write):
            what = "a write" if write else "a read"
            self.keep(request, f"{what} failed: {error.strerror or error}")
            return
        sense = Sense.WRITE_ERROR if write else Sense.READ_ERROR
        if not isinstance(error, OSError):
            _logger.error("%s: the back end failed", self.identity.serial, exc_info=error)
            sense = Sense.TARGET_FAILURE
        elif error.errno in _NO_SPACE:
            sense = Sense.SPACE_ALLOCATION_FAILED
        elif write and error.errno in _WRITE_PROTECTED:
            sense = Sense.WRITE_PROTECTED
        request.check(CheckCondition(sense))

    def _stops_for(self, error: OSError, *, write: bool) -> bool:
        environment = self.environment
        if environment is None or environment.stop_guest is None:
            return False
        if not write:
            return self.read_errors is ReadErrors.STOP
        if self.write_errors is WriteErrors.NO_SPACE:
            return error.errno in _NO_SPACE
        return self.write_errors is WriteErrors.STOP

    # --- reading ---

    def _read(self, request: Request) -> None:
        _, lba, blocks = self._transfer_range(request)
        if not blocks:
            request.succeed()
            return
        runs = request.input_runs(blocks * self.block_size)
        self._begin(request, lba, blocks, runs, self._read_into)

    def _begin(
        self,
        request: Request,
        lba: int,
        blocks: int,
        runs: list[tuple[int, int]],
        move: Callable[[Transfer], None],
        *,
        write: bool = False,
        fua: bool = False,
    ) -> None:
        """Call ``move`` for the blocks of a read or a write; for fewer, or later, if a fault is injected there."""
        copied = self._copied(request, runs, blocks)
        bad = None
        if self.faults:
            faults = self.faults
            bad = faults.bad_block(lba, blocks, write=write)
            blocks = faults.blocks(lba, blocks, write=write)
            if (delay := faults.delay(lba, blocks, write=write)) > 0:
                transfer = Transfer(request, lba, blocks, runs, copied, fua, bad)
                self._delay(request, delay, lambda: move(transfer))
                return
        move(Transfer(request, lba, blocks, runs, copied, fua, bad))

    def _copied(self, request: Request, runs: list[tuple[int, int]], blocks: int) -> bool:
        """Return whether the data must go through a buffer, which counts against the guest's budget from now on."""
        mask = self._mask
        if not mask or not any((gpa | step) & mask for gpa, step in runs):
            return False
        request.hold(blocks * self.block_size)
        return True

    def _read_into(self, transfer: Transfer) -> None:
        request, lba, blocks, runs, copied, _, bad = transfer
        if bad is not None:
            raise CheckCondition(Sense.READ_ERROR, bad)
        length = blocks * self.block_size
        offset = lba * self.block_size
        target = request.memory.writable(_first(runs, length))
        bounce: memoryview | None = None
        if copied:
            bounce = memoryview(mmap.mmap(-1, length or 1))[:length]
        views = target.views if bounce is None else [bounce]

        def done(error: Exception | None) -> None:
            if bounce is not None and error is None:
                at = 0
                for view in target.views:
                    view[:] = bounce[at : at + len(view)]
                    at += len(view)
            views.clear()
            target.finish(length)  # part of the data may have been stored before an error
            if error is None:
                self.statistics.reads += 1
                self.statistics.bytes_read += length
                request.succeed(length)
            else:
                self.failed(request, error, write=False)

        self._move(request, offset, views, length, False, False, done)

    def _read_capacity_10(self, request: Request) -> None:
        request.give(
            CAPACITY_10.build(Capacity10(min(self._last(), 0xFFFFFFFF), self.block_size)),
            cdb_allocation(request.cdb),
        )

    def _last(self) -> int:
        """Return the last LBA; 0 for an empty unit."""
        return max(self.blocks - 1, 0)

    def status(self) -> dict[str, Any]:
        report = {
            "type": self.device_type.name.lower(),
            "serial": self.identity.serial,
            "size": self.blocks * self.block_size,
            "block_size": self.block_size,
            "read_only": self.read_only,
        }
        report |= self.backend.status()
        if self.trouble:
            report["trouble"] = self.trouble
        report |= self.statistics.status()
        if self.kept:
            report["kept"] = {"requests": len(self.kept), "because": self.kept_because}
        if self.faults.faults or any(self.faults.met.values()):
            report["faults_met"] = dict(self.faults.met)
        return report


class _Job:
    """Work for an executor, whose end is reported once.

    An executor that cannot start a thread raises, but keeps the work, and may do it later all the same.
    """

    def __init__(self, work: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        self._work = work
        self._ended = ended
        self._open = threading.Semaphore(1)

    def run(self) -> None:
        """Do the work, unless it was given up."""
        if not self._open.acquire(blocking=False):
            return
        error: Exception | None = None
        try:
            self._work()
        except Exception as found:  # noqa: BLE001 - it is handed on
            error = found
        self._ended(error)

    def give_up(self, error: Exception) -> None:
        """Report ``error`` unless the work has begun."""
        if self._open.acquire(blocking=False):
            self._ended(error)


def _first(runs: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Return the first ``length`` bytes of ``runs``."""
    found = []
    for gpa, step in runs:
        if length <= 0:
            break
        found.append((gpa, min(step, length)))
        length -= step
    return found
