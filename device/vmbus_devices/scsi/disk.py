"""A disk: the commands of SBC-3 on a back end."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

from vmbus.errors import MalformedError
from vmbus.wire.scsi import (
    BLOCK_CHARACTERISTICS,
    BLOCK_LIMITS,
    BYTCHK,
    CAPACITY_16,
    DPO_FUA,
    FUA,
    GET_LBA_STATUS,
    LBA_DEALLOCATED,
    LBA_MAPPED,
    PROVISIONED_UNMAP,
    PROVISIONED_WRITE_SAME_10,
    PROVISIONED_WRITE_SAME_16,
    PROVISIONING,
    PROVISIONING_ENABLED,
    READ_CAPACITY_16,
    RESERVATION_LIST,
    SAME_ANCHOR,
    SAME_NO_DATA,
    SAME_UNMAP,
    THIN,
    UNMAP_DESCRIPTOR,
    UNMAP_HEADER,
    WRITE_PROTECTED,
    BlockCharacteristics,
    BlockLimits,
    Capacity16,
    DeviceType,
    Opcode,
    Provisioning,
    Sense,
    VitalPage,
    cdb_allocation,
    lba_status,
)

from vmbus_devices.scsi.backend import Backend, NullBackend
from vmbus_devices.scsi.blocks import BlockUnit, Transfer
from vmbus_devices.scsi.fast.path import FastUnit
from vmbus_devices.scsi.faults import FaultPlan
from vmbus_devices.scsi.request import CheckCondition, Request
from vmbus_devices.scsi.reservations import Reservations

MAX_UNMAP_DESCRIPTORS = 256
MAX_UNMAP_BLOCKS = 0xFFFFFFFF
MAX_WRITE_SAME = 0x3FFFF
"""Blocks of one WRITE SAME."""

_VERIFYING = (Opcode.WRITE_VERIFY_10, Opcode.WRITE_VERIFY_12, Opcode.WRITE_VERIFY_16)
_CHUNK = 1 << 20


class Disk(BlockUnit):
    """A direct-access block device."""

    device_type = DeviceType.DISK
    product = "Virtual Disk"

    def __init__(
        self,
        backend: Backend,
        serial: str,
        *,
        block_size: int = 512,
        physical_block_size: int = 4096,
        max_transfer: int = 256 << 10,
        rotation: int = 1,
        faults: FaultPlan | None = None,
    ) -> None:
        super().__init__(
            backend,
            serial,
            block_size=block_size,
            max_transfer=max_transfer,
            faults=faults or FaultPlan(),
        )
        self.physical_block_size = max(physical_block_size, block_size)
        self.rotation = rotation
        self.reservations = Reservations()
        read_only = self.backend.read_only
        self._commands |= {
            Opcode.WRITE_6: self._write,
            Opcode.WRITE_10: self._write,
            Opcode.WRITE_12: self._write,
            Opcode.WRITE_16: self._write,
            Opcode.WRITE_VERIFY_10: self._write,
            Opcode.WRITE_VERIFY_12: self._write,
            Opcode.WRITE_VERIFY_16: self._write,
            Opcode.VERIFY_10: self._verify,
            Opcode.VERIFY_12: self._verify,
            Opcode.VERIFY_16: self._verify,
            Opcode.SYNCHRONIZE_CACHE_10: self._synchronize,
            Opcode.SYNCHRONIZE_CACHE_16: self._synchronize,
            Opcode.WRITE_SAME_10: self._write_same,
            Opcode.WRITE_SAME_16: self._write_same,
            Opcode.SERVICE_ACTION_IN_16: self._service_action,
            Opcode.PERSISTENT_RESERVE_IN: self._reserve_in,
            Opcode.PERSISTENT_RESERVE_OUT: self._reserve_out,
        }
        self.thin = backend.can_discard and not read_only
        """Whether the disk reports thin provisioning, so that the guest may unmap blocks."""
        if self.thin:
            self._commands[Opcode.UNMAP] = self._unmap

    @property
    def fast_path_eligible(self) -> bool:
        return self.has_image and not self.attentions and not self.faults.faults

    def fast_unit(self) -> FastUnit | None:
        backend = self.backend
        queue = backend.queue
        if backend.fd < 0 and not queue and not isinstance(backend, NullBackend):
            return None
        eligible = self.fast_path_eligible
        return FastUnit(
            fd=backend.fd,
            block_size=self.block_size,
            blocks=self.blocks,
            max_transfer=self.transfer_limit,
            alignment=backend.alignment,
            fua_flags=backend.fua_flags,
            readable=eligible,
            writable=eligible and not self.read_only,
            queue=queue,
            leaves_fua=backend.leaves_fua,
        )

    # --- identity and capacity ---

    def _vital_pages(self) -> Mapping[int, bytes]:
        size = self.block_size
        granularity = max(self.backend.discard_granularity // size, self.physical_block_size // size, 1)
        limits = BlockLimits(
            optimal_granularity=self.physical_block_size // size,
            max_transfer=self.max_transfer // size,
            optimal_transfer=0,
            max_unmap_blocks=MAX_UNMAP_BLOCKS if self.thin else 0,
            max_unmap_descriptors=MAX_UNMAP_DESCRIPTORS if self.thin else 0,
            unmap_granularity=granularity if self.thin else 0,
            max_write_same=MAX_WRITE_SAME,
        )
        flags = PROVISIONED_UNMAP | PROVISIONED_WRITE_SAME_10 | PROVISIONED_WRITE_SAME_16
        provisioning = Provisioning(flags, THIN) if self.thin else Provisioning(0, 0)
        return {
            **super()._vital_pages(),
            VitalPage.BLOCK_LIMITS: BLOCK_LIMITS.build(limits),
            VitalPage.BLOCK_CHARACTERISTICS: BLOCK_CHARACTERISTICS.build(BlockCharacteristics(self.rotation)),
            VitalPage.PROVISIONING: PROVISIONING.build(provisioning),
        }

    def _mode_parameter(self) -> int:
        return DPO_FUA | (WRITE_PROTECTED if self.read_only else 0)

    def _service_action(self, request: Request) -> None:
        action = request.cdb[1] & 0x1F
        if action == READ_CAPACITY_16:
            exponent = (self.physical_block_size // self.block_size).bit_length() - 1
            capacity = Capacity16(
                self._last(), self.block_size, exponent, PROVISIONING_ENABLED if self.thin else 0
            )
            request.give(CAPACITY_16.build(capacity), cdb_allocation(request.cdb))
        elif action == GET_LBA_STATUS:
            self._get_lba_status(request)
        else:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)

    def _get_lba_status(self, request: Request) -> None:
        lba = int.from_bytes(request.cdb[2:10], "big")
        if lba >= self.blocks:
            raise CheckCondition(Sense.LBA_OUT_OF_RANGE)
        size = self.block_size
        length = min(self.blocks - lba, 0xFFFFFFFF) * size
        found: list[tuple[int, int, int]] = []

        def work() -> None:
            at = lba
            for offset, step, there in self.backend.extents(lba * size, length):
                end = (offset + step) // size if not there else -(-(offset + step) // size)
                if end > at:
                    found.append((at, end - at, LBA_MAPPED if there else LBA_DEALLOCATED))
                    at = end

        def done(error: Exception | None) -> None:
            if error is not None:
                self.failed(request, error, write=False)
                return
            extents = lba_status(found or [(lba, length // size, LBA_MAPPED)])
            request.give(extents, cdb_allocation(request.cdb))

        request.input_runs(min(request.wanted, 8))
        self._submit(request, work, done)

    def _reserve_in(self, request: Request) -> None:
        request.give(self.reservations.report(request.cdb[1] & 0x1F), cdb_allocation(request.cdb))

    def _reserve_out(self, request: Request) -> None:
        length = int.from_bytes(request.cdb[5:9], "big")
        if length != RESERVATION_LIST.size:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH)
        self.reservations.change(request.cdb[1] & 0x1F, request.cdb[2], request.output(length))
        request.succeed(length)

    # --- writing ---

    def _check_writable(self) -> None:
        if self.read_only:
            raise CheckCondition(Sense.WRITE_PROTECTED)

    def _write(self, request: Request) -> None:
        flags, lba, blocks = self._transfer_range(request)
        self._check_writable()
        fua = bool(flags & FUA) or request.cdb[0] in _VERIFYING
        if not blocks:
            request.succeed()
            return
        runs = request.output_runs(blocks * self.block_size)
        self._begin(request, lba, blocks, runs, self._write_from, write=True, fua=fua)

    def _write_from(self, transfer: Transfer) -> None:
        request, lba, blocks, runs, copied, fua, bad = transfer
        if bad is not None:
            raise CheckCondition(Sense.WRITE_ERROR, bad)
        length = blocks * self.block_size
        offset = lba * self.block_size
        if copied:
            buffer = memoryview(mmap.mmap(-1, max(length, 1)))[:length]
            at = 0
            for view in request.memory.readable(runs):
                step = min(len(view), length - at)
                buffer[at : at + step] = view[:step]
                at += step
            views = [buffer]
        else:
            views = _clip(request.memory.readable(runs), length)

        def done(error: Exception | None) -> None:
            views.clear()
            if error is None:
                self.statistics.writes += 1
                self.statistics.bytes_written += length
                request.succeed(length)
            else:
                self.failed(request, error, write=True)

        self._move(request, offset, views, length, True, fua, done)

    def _change(self, request: Request, work: Callable[[], None], transferred: int = 0) -> None:
        """Run ``work``, which changes blocks without data of the guest, and end the request."""

        def done(error: Exception | None) -> None:
            if error is None:
                request.succeed(transferred)
            else:
                self.failed(request, error, write=True)

        self._submit(request, work, done, changes=True)

    def _synchronize(self, request: Request) -> None:
        self._range(request)
        self.statistics.flushes += 1
        if self.backend.flush_needed:
            self._change(request, self.backend.flush)
        else:
            request.succeed()

    def _unmap(self, request: Request) -> None:
        self._check_writable()
        length = int.from_bytes(request.cdb[7:9], "big")
        if request.cdb[1] & 1:  # anchored
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not length:
            request.succeed()
            return
        data = request.output(length)
        try:
            header = UNMAP_HEADER.parse(data)
        except MalformedError:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH) from None
        step = UNMAP_DESCRIPTOR.size
        count = header.descriptors_length // step
        if UNMAP_HEADER.size + count * step > length or header.descriptors_length > header.data_length:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH)
        if count > MAX_UNMAP_DESCRIPTORS:
            raise CheckCondition(Sense.INVALID_FIELD_IN_LIST)
        ranges = []
        for index in range(count):
            each = UNMAP_DESCRIPTOR.parse(data[UNMAP_HEADER.size + index * step :])
            if each.lba + each.blocks > self.blocks:
                raise CheckCondition(Sense.LBA_OUT_OF_RANGE)
            ranges.append((each.lba * self.block_size, each.blocks * self.block_size))

        def work() -> None:
            for offset, size in ranges:
                self.backend.discard(offset, size)

        self._change(request, work, length)

    def _write_same(self, request: Request) -> None:
        flags, lba, blocks = self._range(request)
        self._check_writable()
        if flags & SAME_ANCHOR or not 0 < blocks <= MAX_WRITE_SAME:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        unmap = bool(flags & SAME_UNMAP)
        if unmap and not self.thin:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        size = self.block_size
        transferred = 0
        data = bytes(size)
        if not (request.cdb[0] == Opcode.WRITE_SAME_16 and flags & SAME_NO_DATA):
            data = request.output(size)
            transferred = size
        bad = self.faults.bad_block(lba, blocks, write=True)
        if bad is not None:
            raise CheckCondition(Sense.WRITE_ERROR, bad)
        if not any(data):
            self._change(
                request,
                lambda: self.backend.write_zeroes(lba * size, blocks * size, unmap=unmap),
                transferred,
            )
            return

        request.hold(min(_CHUNK, blocks * size))

        def work() -> None:
            chunk = memoryview(mmap.mmap(-1, min(_CHUNK, blocks * size)))
            chunk[:] = data * (len(chunk) // size)
            offset, left = lba * size, blocks * size
            while left:
                step = min(left, len(chunk))
                self.backend.write(offset, [chunk[:step]])
                offset += step
                left -= step

        self._change(request, work, transferred)

    def _verify(self, request: Request) -> None:
        flags, lba, blocks = self._range(request)
        check = (flags & BYTCHK) >> 1
        if check == 0:
            bad = self.faults.bad_block(lba, blocks, write=False)
            if bad is not None:
                raise CheckCondition(Sense.READ_ERROR, bad)
            request.succeed()
            return
        size = self.block_size
        if check == 2 or blocks * size > self.transfer_limit:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not blocks:
            request.succeed()
            return
        request.hold(2 * blocks * size)
        wanted = request.output(size if check == 3 else blocks * size)
        found = memoryview(mmap.mmap(-1, blocks * size))

        def work() -> None:
            self.backend.read(lba * size, [found])

        def done(error: Exception | None) -> None:
            if error is not None:
                self.failed(request, error, write=False)
            elif found != (wanted * blocks if check == 3 else wanted):
                request.check(CheckCondition(Sense.MISCOMPARE))
            else:
                request.succeed(len(wanted))

        self._submit(request, work, done)


def _clip(views: list[memoryview], length: int) -> list[memoryview]:
    """Return the first ``length`` bytes of ``views``."""
    found = []
    for view in views:
        if length <= 0:
            break
        found.append(view if len(view) <= length else view[:length])
        length -= len(view)
    return found
