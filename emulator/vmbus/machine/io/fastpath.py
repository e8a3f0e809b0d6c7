"""The fast path: plain reads and writes of disks in compiled code (``emulator/vmbus/fastpath``), seen from Python.

    ring --private copy--> take() --> io_uring --> reap() --> completion packets --> ring
                             |                       |
                             +--- not plain ---> the ordinary way <--- failed, or a part only

It does what :mod:`vmbus_devices.scsi` does for the same packets, and only where nothing is special; whoever wants
to know what is refused and why reads that. Guest memory is written by the kernel, for which :class:`MappedMemory`
answers: pages are marked, and pages with code that was translated are written once more through QEMU.

Where there is no compiler or no io_uring, :meth:`CompiledFastPath.open` gives ``None``, and everything takes the
ordinary way. So it does with ``VMBUS_FASTPATH=off`` in the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import struct
from array import array
from collections.abc import Callable

from vmbus.errors import InternalError, MissingRequirement
from vmbus.machine.io.fastpath_build import LIBRARY, MAX_LUNS, MAX_TARGETS
from vmbus.machine.memory import MappedMemory
from vmbus.ports import FastCounts, FastOwner, FastUnit

_logger = logging.getLogger(__name__)

_VERSION = 2
_MAX_REGIONS = 8
_MAX_UNITS = 256
_MAX_EVENTS = 512
_MAX_NOTED = 4096
_ANSWER_STRIDE = 96
_BUCKETS = 256
_BUCKET_BIAS = 128
_READS, _WRITES, _NULL = 1, 2, 4
_ANSWER = 0

SPIN_NS = 150_000
"""Longest look, in ns, for a transfer that usually ends within that time, before the host sleeps."""
IDLE_SPIN_NS = 30_000
"""The same for a guest's next packet; then everybody else has a turn."""

_EVENT = struct.Struct("<4I")


class _Region(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("delta", ctypes.c_int64)]


class _Unit(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("blocks", ctypes.c_uint64),
        ("block_shift", ctypes.c_uint32),
        ("max_transfer", ctypes.c_uint32),
        ("alignment_mask", ctypes.c_uint32),
        ("through_flags", ctypes.c_uint32),
        ("reads", ctypes.c_uint64),
        ("writes", ctypes.c_uint64),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("depth", ctypes.c_uint32),
        ("most_depth", ctypes.c_uint32),
        ("least_ns", ctypes.c_uint64),
        ("greatest_ns", ctypes.c_uint64),
        ("buckets", ctypes.c_uint32 * _BUCKETS),
    ]


class _Noted(ctypes.Structure):
    _fields_ = [("gpa", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _Shared(ctypes.Structure):
    """The start of ``struct fastpath`` in ``fastpath.h``."""

    _fields_ = [
        ("version", ctypes.c_uint32),
        ("in_flight", ctypes.c_uint32),
        ("events", ctypes.c_uint32),
        ("noted_ranges", ctypes.c_uint32),
        ("region_count", ctypes.c_uint32),
        ("event_fd", ctypes.c_int32),
        ("ram", ctypes.c_void_p),
        ("ram_size", ctypes.c_uint64),
        ("dirty", ctypes.c_void_p),
        ("notes", ctypes.c_void_p),
        ("note_pages", ctypes.c_uint64),
        ("spin_ns", ctypes.c_uint64),
        ("idle_spin_ns", ctypes.c_uint64),
        ("region", _Region * _MAX_REGIONS),
        ("unit", _Unit * _MAX_UNITS),
        ("event", ctypes.c_uint8 * (_EVENT.size * _MAX_EVENTS)),
        ("noted", _Noted * _MAX_NOTED),
        ("output", ctypes.c_uint8 * (_ANSWER_STRIDE * _MAX_EVENTS)),
    ]


class _Library:
    """The functions of the shared library."""

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
        self.arm = library.fastpath_arm
        self.arm.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
        self.arm.restype = ctypes.c_uint32


class CompiledFastPath:
    """:class:`~vmbus.ports.FastPath` on an event loop. Made by :meth:`open`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        memory: MappedMemory,
        library: _Library,
        place: int,
        ended: Callable[[], None],
        spins: bool,
    ) -> None:
        self._loop = loop
        self._memory = memory
        self._library = library
        self._place = place
        self._ended = ended
        self._shared = shared = _Shared.from_address(place)
        native = memory.native()
        shared.ram, shared.ram_size = native.address, native.size
        shared.dirty = native.dirty
        shared.notes, shared.note_pages = native.notes or None, native.note_pages
        self._note_pages = native.note_pages
        self._tells_ranges = False
        if spins:
            shared.spin_ns, shared.idle_spin_ns = SPIN_NS, IDLE_SPIN_NS
        shared.region_count = len(memory.regions)
        for index, region in enumerate(memory.regions):
            shared.region[index] = _Region(region.gpa, region.end, region.offset - region.gpa)
        self._events = memoryview(shared.event).cast("B")
        self._output = memoryview(shared.output).cast("B")
        self._channels: dict[int, CompiledFastChannel] = {}
        self._next_channel = 0
        self._free_units = list(range(_MAX_UNITS))[::-1]
        self._armed = True
        self._retry = False
        #: Taken so far.
        self.requests = 0
        loop.add_reader(shared.event_fd, self._woken)

    @classmethod
    def open(
        cls,
        loop: asyncio.AbstractEventLoop,
        memory: MappedMemory,
        ended: Callable[[], None],
        *,
        spins: bool = True,
    ) -> CompiledFastPath | None:
        """``None`` where there cannot be one. ``ended``: called when requests have ended.

        ``spins``: there is a processor to spare for looking at what is about to end.
        """
        if os.environ.get("VMBUS_FASTPATH") == "off":
            return None
        if len(memory.regions) > _MAX_REGIONS:
            return None
        try:
            library = _Library(str(LIBRARY.build()))
        except (MissingRequirement, InternalError, OSError) as error:
            _logger.warning("disks are slower than they could be: %s", error)
            return None
        place = library.open()
        if not place:
            _logger.info("no io_uring (%s): no fast path", os.strerror(ctypes.get_errno()))
            return None
        shared = _Shared.from_address(place)
        if shared.version != _VERSION or library.size() != ctypes.sizeof(_Shared):
            library.close(place)
            raise InternalError(
                f"the fast path has version {shared.version} and {library.size()} shared bytes; "
                f"{_VERSION} and {ctypes.sizeof(_Shared)} were expected"
            )
        return cls(loop, memory, library, place, ended, spins)

    @property
    def in_flight(self) -> int:
        """Requests that have not ended, of all channels."""
        return int(self._shared.in_flight)

    def tell_ranges(self, on: bool) -> None:
        """Whether memory is told of every range that the kernel stored, before its guest is."""
        self._tells_ranges = on
        # No page is known to be without code, so each one is noted.
        self._shared.note_pages = 0 if on else self._note_pages

    # --- units -----------------------------------------------------------------------------------------------

    def add_unit(self, unit: FastUnit) -> int | None:
        if not self._free_units:
            return None
        number = self._free_units.pop()
        ctypes.memset(ctypes.addressof(self._shared.unit[number]), 0, ctypes.sizeof(_Unit))
        self.change_unit(number, unit)
        return number

    def change_unit(self, number: int, unit: FastUnit) -> None:
        there = self._shared.unit[number]
        flags = (_READS if unit.readable else 0) | (_WRITES if unit.writable else 0)
        there.fd = unit.fd
        there.flags = flags | (_NULL if unit.fd < 0 else 0)
        there.blocks = unit.blocks
        there.block_shift = unit.block_size.bit_length() - 1
        there.max_transfer = unit.max_transfer
        there.alignment_mask = unit.alignment - 1
        there.through_flags = unit.through_flags

    def remove_unit(self, number: int) -> None:
        if self._shared.unit[number].depth:
            raise InternalError(f"unit {number} of the fast path has requests under way")
        self._shared.unit[number].flags = 0
        self._free_units.append(number)

    def depth(self, number: int) -> int:
        return int(self._shared.unit[number].depth)

    def counts(self, number: int) -> FastCounts:
        unit = self._shared.unit[number]
        latencies = {at - _BUCKET_BIAS: count for at, count in enumerate(unit.buckets) if count}
        found = FastCounts(
            unit.reads,
            unit.writes,
            unit.bytes_read,
            unit.bytes_written,
            unit.most_depth,
            unit.least_ns / 1e9,
            unit.greatest_ns / 1e9,
            latencies,
        )
        unit.reads = unit.writes = unit.bytes_read = unit.bytes_written = 0
        unit.most_depth = unit.depth
        unit.least_ns = unit.greatest_ns = 0
        ctypes.memset(ctypes.addressof(unit.buckets), 0, ctypes.sizeof(unit.buckets))
        return found

    # --- channels ----------------------------------------------------------------------------------------------

    def open_channel(self, owner: FastOwner, units: array[int]) -> CompiledFastChannel:
        """See :meth:`vmbus.ports.FastPath.open_channel`."""
        if len(units) != MAX_TARGETS * MAX_LUNS or units.itemsize != 2:
            raise InternalError(f"{len(units)} units of {units.itemsize} bytes")
        number = self._next_channel
        self._next_channel = (number + 1) & 0xFFFFFFFF
        channel = CompiledFastChannel(self, number, owner, units)
        self._channels[number] = channel
        return channel

    def forget(self, number: int) -> None:
        """A channel is closed, and nothing of it is under way."""
        self._channels.pop(number, None)

    # --- transfers -----------------------------------------------------------------------------------------------

    def submit(self) -> None:
        """Hand what was taken to the kernel."""
        left = self._library.submit(self._place)
        if left < 0:
            raise InternalError(f"io_uring_enter: {os.strerror(-left)}")
        if left and not self._retry:
            self._retry = True
            self._loop.call_later(0.001, self._submit_again)

    def _submit_again(self) -> None:
        self._retry = False
        if self._place:
            self.submit()

    def look(self, watched: tuple[int, int] | None = None) -> int:
        """Hand over what has ended; how many requests that were.

        ``watched``: look for a while, also for a 32-bit word at that address to be another than that value.
        """
        if self._armed:
            self._armed = False
            self._library.arm(self._place, 0)
        library, place = self._library, self._place
        count = library.reap(place) if watched is None else library.wait(place, *watched)
        total = count
        while count:
            self._hand_over(count)
            if count < _MAX_EVENTS and not self._shared.noted_ranges:
                break
            count = library.reap(place)
            total += count
        return int(total)

    def sleeps(self) -> bool:
        """The event loop is told of what ends from now on. True: something has ended already."""
        if self._armed or not self._place:
            return False
        self._armed = True
        return bool(self._library.arm(self._place, 1))

    def wake_later(self) -> None:
        """Who looked is gone: the event loop looks from now on."""
        if self.sleeps():
            self._loop.call_soon(self._woken)

    def _woken(self) -> None:
        if not self._place:
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._shared.event_fd)
        while True:
            self.look()
            if not self.sleeps():
                return

    def _hand_over(self, count: int) -> None:
        shared = self._shared
        if noted := shared.noted_ranges:
            ranges = [(each.gpa, each.length) for each in shared.noted[:noted]]
            if self._tells_ranges:
                self._memory.filled_by_kernel(ranges)
            else:
                for gpa, length in ranges:
                    self._memory.write_through(gpa, length)
        answers: dict[int, list[bytes]] = {}
        returned: list[tuple[int, bytes]] = []
        output = self._output
        for channel, kind, offset, length in _EVENT.iter_unpack(self._events[: count * _EVENT.size]):
            if kind == _ANSWER:
                packet = bytes(output[offset : offset + length])
                if channel in answers:
                    answers[channel].append(packet)
                else:
                    answers[channel] = [packet]
            else:
                place = self._library.packet(self._place, offset)
                returned.append((channel, ctypes.string_at(place, length)))
        for number, packets in answers.items():
            self._channels[number].answered(packets)
        for number, packet in returned:
            self._channels[number].returned(packet)
        self._ended()

    def close(self) -> None:
        """Let go. Nothing may be under way: the kernel would write to memory that is somebody else's by then."""
        if not self._place:
            return
        self._loop.remove_reader(self._shared.event_fd)
        if self.in_flight:
            _logger.warning("%d transfers are under way; the fast path is left open", self.in_flight)
            return
        self._events.release()
        self._output.release()
        place, self._place = self._place, 0
        del self._shared
        self._library.close(place)


class CompiledFastChannel:
    """:class:`~vmbus.ports.FastChannel`."""

    def __init__(self, path: CompiledFastPath, number: int, owner: FastOwner, units: array[int]) -> None:
        self._path = path
        self._number = number
        self._owner = owner
        self._closed = False
        self._units = units
        self._table = units.buffer_info()[0]
        self._consumed = ctypes.c_uint64()
        self._consumed_at = ctypes.addressof(self._consumed)
        self._take = path._library.take
        self._place = path._place
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def take(self, buffer: bytes, at: int, known: int, limit: int) -> tuple[int, int]:
        count = self._take(
            self._place,
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
        self._path.look()

    def wait(self, watched: tuple[int, int]) -> bool:
        return bool(self._path.look(watched))

    def sleeps(self) -> bool:
        return self._path.sleeps()

    def answered(self, packets: list[bytes]) -> None:
        """From the fast path."""
        self._in_flight -= len(packets)
        self._owner.fast_answers(self, packets)
        self._forget_if_over()

    def returned(self, packet: bytes) -> None:
        """From the fast path."""
        self._in_flight -= 1
        self._owner.fast_returned(self, packet)
        self._forget_if_over()

    def close(self) -> None:
        self._closed = True
        self._path.wake_later()
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        if self._closed and not self._in_flight:
            self._path.forget(self._number)
