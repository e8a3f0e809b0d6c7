"""The fast path, seen from Python: ordinary reads and writes of disks in compiled code.

    ring --private copy--> take() --> io_uring --> reap() --> completion packets --> ring
                             |                       |
                             +--- not eligible --> Python <--- failed, or only partly transferred

The compiled code does what :mod:`vmbus_devices.scsi` does for the same packets, and only where no condition is
special; what is refused, and why, is found there. The kernel stores into guest memory, so the compiled code marks the
pages as dirty, and pages from which code was translated are written once more through QEMU
(:class:`~vmbus.ports.NativeGuestMemory`).

A disk that a server has (:attr:`FastUnit.queue`) is the engine's alone.

Where there is no compiler or no io_uring, and with ``VMBUS_FASTPATH=off`` in the environment, :meth:`FastPath.open`
returns ``None``, and Python processes every packet.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vmbus.errors import InternalError, MissingRequirement
from vmbus.ports import DataPathChannel, FastOwner, GivenChannel, NativeServices, RecalledChannel
from vmbus.wire.storvsp import MAX_LUNS, MAX_TARGETS

from vmbus_devices.scsi.fast.build import LIBRARY
from vmbus_devices.scsi.fast.shared import (
    BUCKET_BIAS,
    EVENT,
    MAX_BUCKETS,
    MAX_EVENTS,
    MAX_REGIONS,
    MAX_UNITS,
    VERSION,
    EventKind,
    Region,
    Shared,
    Unit,
    UnitFlag,
)

_logger = logging.getLogger(__name__)

SPIN_NS = 150_000
"""Longest busy wait, in ns, for a transfer that usually ends within that time, before the host sleeps."""
IDLE_SPIN_NS = 30_000
"""Longest busy wait, in ns, for a guest's next packet; then the event loop serves its other callers."""

_ANSWER = int(EventKind.ANSWER)


@dataclass(slots=True)
class FastUnit:
    """A disk whose ordinary reads and writes compiled code may do."""

    fd: int
    """Of a file whose bytes at an offset are those of the disk; -1: no data moves (measurements)."""
    block_size: int
    blocks: int
    max_transfer: int
    """Bytes of one request."""
    alignment: int
    """Of addresses and lengths in memory, in bytes."""
    fua_flags: int
    """Of pwritev2(2), for a write with FUA."""
    readable: bool = False
    writable: bool = False
    queue: int = 0
    """Number of a queue of the engine to the server that has the disk, in place of the file; 0: none."""
    leaves_fua: bool = False
    """Whether writes with FUA are left to Python."""


class _Counted(NamedTuple):
    reads: int
    writes: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class FastCounts:
    """What compiled code did for a unit since the last call of :meth:`FastPath.counts`. Latencies in seconds.

    Depth, least and greatest latency are those since the unit was added.
    """

    reads: int
    writes: int
    bytes_read: int
    bytes_written: int
    max_depth: int
    min_latency: float
    max_latency: float
    latencies: Mapping[int, int]
    """Bucket of :class:`vmbus.devices.histogram.Histogram` → number of requests."""


class _Library:
    """The functions of the shared library (``fastpath.h``)."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path, use_errno=True)
        self.open = library.fastpath_open
        self.open.restype = ctypes.c_void_p
        self.close = library.fastpath_close
        self.close.argtypes = (ctypes.c_void_p,)
        self.close.restype = None
        self.size = library.fastpath_size
        self.size.restype = ctypes.c_uint64
        self.take = library.fastpath_take
        self.take.argtypes = (
            ctypes.c_void_p,
            ctypes.c_uint32,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint64,
            ctypes.c_uint32,
            ctypes.c_void_p,
        )
        self.take.restype = ctypes.c_uint32
        self.packet = library.fastpath_packet
        self.packet.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self.packet.restype = ctypes.c_void_p
        self.submit = library.fastpath_submit
        self.submit.argtypes = (ctypes.c_void_p,)
        self.submit.restype = ctypes.c_int
        self.reap = library.fastpath_reap
        self.reap.argtypes = (ctypes.c_void_p,)
        self.reap.restype = ctypes.c_uint32
        self.wait = library.fastpath_wait
        self.wait.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
        self.wait.restype = ctypes.c_uint32
        self.engine_take, self.engine_complete = (
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (library.storage_take, library.storage_complete)
        )
        self.arm = library.fastpath_arm
        self.arm.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self.arm.restype = ctypes.c_uint32


class FastPath:
    """The compiled fast path of one machine, for all its disks (:class:`~vmbus.ports.NativeEngine`).

    Made by :meth:`open`. All methods are called in the event loop's thread.
    """

    def __init__(self, services: NativeServices, library: _Library, address: int) -> None:
        self._loop = services.loop
        self._memory = services.memory
        self._services = services
        self._library = library
        self._address = address
        self._shared = shared = Shared.from_address(address)
        native = self._memory.native()
        shared.ram, shared.ram_size = native.address, native.size
        shared.dirty = native.dirty
        shared.notes, shared.note_pages = native.notes or None, native.note_pages
        self._note_pages = native.note_pages
        self._reports_ranges = False
        if services.spare_processor:
            shared.spin_ns, shared.idle_spin_ns = SPIN_NS, IDLE_SPIN_NS
        shared.region_count = len(native.regions)
        for index, (gpa, size, offset) in enumerate(native.regions):
            shared.region[index] = Region(gpa, gpa + size, offset - gpa)
        self._events = memoryview(shared.event).cast("B")
        self._output = memoryview(shared.output).cast("B")
        self._channels: dict[int, FastPathChannel] = {}
        self._next_channel = 0
        self._counted: dict[int, _Counted] = {}
        """Unit → its counters as of the last :meth:`counts`."""
        self._buckets: dict[int, list[int]] = {}
        """The same for its latencies."""
        self._contexts: dict[int, ctypes.Array[ctypes.c_uint64]] = {}
        """Contexts of channels that the engine may have, by the address of their units."""
        self._free_units = list(range(MAX_UNITS))[::-1]
        self._in_turns = os.environ.get("VMBUS_FASTPATH") == "turns"
        self._armed = True
        self._retry = False
        self.requests = 0
        """Requests taken so far."""
        self._loop.add_reader(shared.event_fd, self._woken)

    @classmethod
    def open(cls, services: NativeServices) -> FastPath | None:
        """Return the fast path of a machine, or ``None`` where there cannot be one, with the reason in the log.

        Compiles the library if the cache has none of this version. Raises :class:`~vmbus.errors.InternalError` for a
        library that does not fit this module.
        """
        if os.environ.get("VMBUS_FASTPATH") == "off":
            return None
        if len(services.memory.native().regions) > MAX_REGIONS:
            return None
        try:
            library = _Library(str(LIBRARY.build()))
        except (MissingRequirement, InternalError, OSError) as error:
            _logger.warning("no fast path, so disks are slower: %s", error)
            return None
        address = library.open()
        if not address:
            _logger.info("no fast path: no io_uring (%s)", os.strerror(ctypes.get_errno()))
            return None
        shared = Shared.from_address(address)
        if shared.version != VERSION or library.size() != ctypes.sizeof(Shared):
            found = f"version {shared.version} with {library.size()} shared bytes"
            library.close(address)
            raise InternalError(
                f"the library of the fast path is {found}; {VERSION} with {ctypes.sizeof(Shared)} was expected"
            )
        return cls(services, library, address)

    @property
    def in_flight(self) -> int:
        return sum([each.outstanding for each in self._channels.values()])

    def report_ranges(self, on: bool) -> None:
        self._reports_ranges = on
        # With no page known to be free of code, the library notes each one.
        self._shared.note_pages = 0 if on else self._note_pages

    # --- units ---

    def add_unit(self, unit: FastUnit) -> int | None:
        """Return a number for ``unit``, or ``None`` if all numbers are in use."""
        if not self._free_units:
            return None
        number = self._free_units.pop()
        ctypes.memset(ctypes.addressof(self._shared.unit[number]), 0, ctypes.sizeof(Unit))
        self._counted[number] = _Counted(0, 0, 0, 0)
        self._buckets[number] = [0] * MAX_BUCKETS
        self.change_unit(number, unit)
        return number

    def change_unit(self, number: int, unit: FastUnit) -> None:
        """Replace a unit's description; requests already taken continue with the old one."""
        flags = UnitFlag(0)
        if unit.readable:
            flags |= UnitFlag.READS
        if unit.writable:
            flags |= UnitFlag.WRITES
        if unit.fd < 0 and not unit.queue:
            flags |= UnitFlag.NULL
        if unit.leaves_fua:
            flags |= UnitFlag.LEAVES_FUA
        shared = self._shared.unit[number]
        shared.fd = unit.fd
        shared.flags = flags
        shared.blocks = unit.blocks
        shared.block_shift = unit.block_size.bit_length() - 1
        shared.max_transfer = unit.max_transfer
        shared.alignment_mask = unit.alignment - 1
        shared.fua_flags = unit.fua_flags
        shared.queue = unit.queue

    def remove_unit(self, number: int) -> None:
        """Free a number. Raises :class:`~vmbus.errors.InternalError` while the unit has requests under way."""
        if self._shared.unit[number].depth:
            raise InternalError(f"unit {number} of the fast path has requests under way")
        self._shared.unit[number].flags = 0
        self._free_units.append(number)

    def depth(self, number: int) -> int:
        """Return the number of a unit's requests that are under way."""
        return int(self._shared.unit[number].depth)

    def counts(self, number: int) -> FastCounts:
        """Return what was done for a unit since the last call.

        The counters themselves only grow: another thread may add to them.
        """
        unit = self._shared.unit[number]
        now = _Counted(unit.reads, unit.writes, unit.bytes_read, unit.bytes_written)
        before, self._counted[number] = self._counted[number], now
        buckets = list(unit.buckets)
        known, self._buckets[number] = self._buckets[number], buckets
        new = [(count - old) & 0xFFFFFFFF for count, old in zip(buckets, known, strict=True)]
        return FastCounts(
            now.reads - before.reads,
            now.writes - before.writes,
            now.bytes_read - before.bytes_read,
            now.bytes_written - before.bytes_written,
            unit.max_depth,
            unit.min_ns / 1e9,
            unit.max_ns / 1e9,
            {at - BUCKET_BIAS: count for at, count in enumerate(new) if count},
        )

    # --- channels ---

    def open_channel(self, owner: FastOwner, units: array[int]) -> FastPathChannel:
        """Return the fast path of a channel that opened.

        ``units``: target * MAX_LUNS + LUN → number of a unit, or -1; signed 16-bit integers, read at each packet.
        """
        if len(units) != MAX_TARGETS * MAX_LUNS or units.itemsize != 2:
            raise InternalError(f"a table of {len(units)} units of {units.itemsize} bytes each")
        number = self._next_channel
        self._next_channel = (number + 1) & 0xFFFFFFFF
        channel = FastPathChannel(self, number, owner, units)
        self._channels[number] = channel
        data_path = None if self._in_turns else self._services.data_path
        if data_path is not None:
            channel.data = data_path.open_channel(channel, self.for_engine(units))
        return channel

    def for_engine(self, units: array[int]) -> tuple[int, int, int]:
        """Return what the engine needs for a channel: addresses of two functions and their context.

        ``units``: as in :meth:`open_channel`; it is read in the engine's thread, as are the units, so neither may
        change while a channel is given to the engine. The context is valid as long as this object and ``units`` are.
        """
        table = units.buffer_info()[0]
        context = self._contexts.get(table)
        if context is None:
            context = self._contexts[table] = (ctypes.c_uint64 * 2)(self._address, table)
        return self._library.engine_take, self._library.engine_complete, ctypes.addressof(context)

    def forget(self, number: int) -> None:
        """Drop a channel that is closed and has no request under way."""
        self._channels.pop(number, None)

    # --- transfers ---

    def submit(self) -> None:
        """Pass what was taken to the kernel."""
        left = self._library.submit(self._address)
        if left < 0:
            raise InternalError(f"io_uring_enter: {os.strerror(-left)}")
        if left and not self._retry:
            self._retry = True
            self._loop.call_later(0.001, self._submit_again)

    def _submit_again(self) -> None:
        self._retry = False
        if self._address:
            self.submit()

    def poll(self, watched: tuple[int, int] | None = None) -> int:
        """Pass on the results of requests that have ended, and return their number.

        ``watched``: wait a moment for one to end, or for the 32-bit word at that address to differ from that value.
        """
        if self._armed:
            self._armed = False
            self._library.arm(self._address, 0)
        library, address = self._library, self._address
        count = library.reap(address) if watched is None else library.wait(address, *watched)
        total = count
        while count:
            self._hand_over(count)
            if count < MAX_EVENTS and not self._shared.noted_ranges:
                break
            count = library.reap(address)
            total += count
        return int(total)

    def sleeps(self) -> bool:
        """Have the event loop woken by what ends from now on. Return True if something has ended already."""
        if self._armed or not self._address:
            return False
        self._armed = True
        return bool(self._library.arm(self._address, 1))

    def wake_later(self) -> None:
        """Have the event loop pass on results from now on, in place of a channel that did."""
        if self.sleeps():
            self._loop.call_soon(self._woken)

    def _woken(self) -> None:
        if not self._address:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._shared.event_fd)
        while True:
            self.poll()
            if not self.sleeps():
                return

    def _hand_over(self, count: int) -> None:
        problem: Exception | None = None
        try:
            self._report_noted()
        except Exception as error:  # noqa: BLE001 - it fails the channels whose requests it may belong to
            problem = error
        answers: dict[int, list[bytes]] = {}
        returned: list[tuple[int, bytes]] = []
        output = self._output
        for channel, kind, offset, length in EVENT.iter_unpack(self._events[: count * EVENT.size]):
            if kind == _ANSWER:
                packet = bytes(output[offset : offset + length])
                if channel in answers:
                    answers[channel].append(packet)
                else:
                    answers[channel] = [packet]
            else:
                place = self._library.packet(self._address, offset)
                returned.append((channel, ctypes.string_at(place, length)))
        if problem is not None:
            for number in {*answers, *(number for number, _ in returned)}:
                self._channels[number].failed(problem)
        for number, packets in answers.items():
            self._channels[number].answered(packets)
        for number, packet in returned:
            self._channels[number].returned(packet)
        self._services.transfers_ended()

    def _report_noted(self) -> None:
        shared = self._shared
        if noted := shared.noted_ranges:
            ranges = [(each.gpa, each.length) for each in shared.noted[:noted]]
            if self._reports_ranges:
                self._memory.filled_by_kernel(ranges)
            else:
                for gpa, length in ranges:
                    self._memory.write_through(gpa, length)

    def close(self) -> None:
        if not self._address:
            return
        self._loop.remove_reader(self._shared.event_fd)
        if self._shared.in_flight:
            # The kernel may still store into guest memory, and read what the library keeps of the requests.
            _logger.warning("the fast path is left open: %d transfers are under way", self._shared.in_flight)
            return
        self._events.release()
        self._output.release()
        address, self._address = self._address, 0
        del self._shared
        self._library.close(address)


class FastPathChannel:
    """The fast path of one open channel (:class:`~vmbus.ports.FastChannel`)."""

    def __init__(self, path: FastPath, number: int, owner: FastOwner, units: array[int]) -> None:
        self._path = path
        self._number = number
        self._owner = owner
        self._closed = False
        self._units = units
        self._table = units.buffer_info()[0]
        self._consumed = ctypes.c_uint64()
        self._consumed_at = ctypes.addressof(self._consumed)
        self._take = path._library.take
        self._address = path._address
        self._in_flight = 0
        self.data: DataPathChannel | None = None
        """The channel in the machine's engine, if that has it."""

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def outstanding(self) -> int:
        return self._in_flight + (self.data.outstanding if self.data is not None else 0)

    @property
    def threaded(self) -> bool:
        return self.data is not None

    def give(self, channel: GivenChannel) -> bool:
        return self.data is not None and self.data.give(channel)

    def recall(self) -> RecalledChannel:
        if self.data is None:
            raise InternalError("a channel that the engine does not have cannot be recalled")
        return self.data.recall()

    def look(self) -> None:
        if self.data is not None:
            self.data.look()

    def take(self, buffer: bytes, at: int, known: int, limit: int) -> tuple[int, int]:
        count = self._take(
            self._address,
            self._number,
            self._table,
            buffer,
            len(buffer),
            at,
            known,
            limit,
            self._consumed_at,
        )
        if not count:
            return 0, 0
        self._in_flight += count
        self._path.requests += count
        return count, self._consumed.value

    def submit(self) -> None:
        self._path.submit()
        self._path.poll()

    def wait(self, watched: tuple[int, int]) -> bool:
        return bool(self._path.poll(watched))

    def sleeps(self) -> bool:
        return self._path.sleeps()

    def answered(self, packets: list[bytes]) -> None:
        """Pass completion packets on; that many requests have ended."""
        self._in_flight -= len(packets)
        self._guarded(lambda: self._owner.fast_answers(self, packets))
        self._forget_if_ended()

    def returned(self, packet: bytes) -> None:
        """Pass on a packet that Python has to process after all."""
        self._in_flight -= 1
        self._guarded(lambda: self._owner.fast_returned(self, packet))
        self._forget_if_ended()

    def failed(self, error: Exception) -> None:
        """Fail the channel; its requests are still reported as ended."""
        self._owner.fast_failed(self, error)

    def _guarded(self, call: Callable[[], None]) -> None:
        """Call ``call``; what it raises fails this channel, not the others that have results behind it."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the owner logs it
            self.failed(error)

    def close(self) -> None:
        self._closed = True
        if self.data is not None:
            self.data.close()
        self._path.wake_later()
        self._forget_if_ended()

    # --- called by the engine: a DataPathOwner ---

    def engine_left(self) -> None:
        self._owner.fast_left(self)

    def engine_answered(self, answer: bytes) -> None:
        self._owner.fast_answers(self, [answer])
        self._forget_if_ended()

    def engine_returned(self, packet: bytes) -> None:
        self._owner.fast_returned(self, packet)
        self._forget_if_ended()

    def engine_ended(self) -> None:
        self._owner.fast_answers(self, [])
        self._forget_if_ended()

    def engine_failed(self, error: Exception) -> None:
        self.failed(error)
        self._forget_if_ended()

    def _forget_if_ended(self) -> None:
        if self._closed and not self.outstanding:
            self._path.forget(self._number)
