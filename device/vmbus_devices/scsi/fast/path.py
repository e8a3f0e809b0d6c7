"""The fast path, seen from Python: ordinary reads and writes of disks in compiled code, in the engine's thread.

    ring --> storage_take() --> io_uring, or a queue --> storage_complete() --> completion packets --> ring
                   |                                           |
                   +--- not eligible --> Python <--- failed, or only partly transferred

The compiled code does what :mod:`vmbus_devices.scsi` does for the same packets, and only where no condition is
special; what is refused, and why, is found there. The engine has the rings, calls the two functions, and marks what
they store into (docs/decisions/0006-native-data-path.md).

Where there is no compiler or no engine, beyond as many channels as it has, and with ``VMBUS_FASTPATH=off`` in the
environment, Python processes every packet.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vmbus.errors import InternalError, MissingRequirement
from vmbus.ports import (
    DataPath,
    DataPathChannel,
    FastLink,
    FastOwner,
    GivenChannel,
    NativeMemory,
    NativeServices,
    RecalledChannel,
)
from vmbus.wire.storvsp import MAX_LUNS, MAX_TARGETS

from vmbus_devices.scsi.fast.build import LIBRARY
from vmbus_devices.scsi.fast.shared import (
    BUCKET_BIAS,
    MAX_BUCKETS,
    MAX_REGIONS,
    MAX_UNITS,
    VERSION,
    Region,
    Shared,
    Unit,
    UnitFlag,
)

_logger = logging.getLogger(__name__)


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
        self.engine_take, self.engine_complete = (
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in (library.storage_take, library.storage_complete)
        )


WAYS = {"": "all compiled code", "nbd": "no queues to storage daemons", "off": "Python only"}
"""Values of VMBUS_FASTPATH in the environment."""


def requested_way() -> str:
    """Return the value of VMBUS_FASTPATH; one that is not known counts as none, with a warning in the log."""
    way = os.environ.get("VMBUS_FASTPATH", "")
    if way in WAYS:
        return way
    _logger.warning(
        "VMBUS_FASTPATH=%s has no effect: set %s, or unset it",
        way,
        " or ".join(f"{name} ({meaning})" for name, meaning in WAYS.items() if name),
    )
    return ""


class FastPath:
    """The compiled fast path of one machine, for all its disks (:class:`~vmbus.ports.NativeEngine`).

    Made by :meth:`open`. All methods are called in the event loop's thread.
    """

    def __init__(self, data_path: DataPath, memory: NativeMemory, library: _Library, address: int) -> None:
        self._data_path = data_path
        self._library = library
        self._address = address
        self._shared = shared = Shared.from_address(address)
        shared.ram, shared.ram_size = memory.address, memory.size
        shared.region_count = len(memory.regions)
        for index, (gpa, size, offset) in enumerate(memory.regions):
            shared.region[index] = Region(gpa, gpa + size, offset - gpa)
        self._channels: set[FastPathChannel] = set()
        self._counted: dict[int, _Counted] = {}
        """Unit → its counters as of the last :meth:`counts`."""
        self._buckets: dict[int, list[int]] = {}
        """The same for its latencies."""
        self._contexts: dict[int, ctypes.Array[ctypes.c_uint64]] = {}
        """Contexts of channels that the engine may have, by the address of their units."""
        self._free_units = list(range(MAX_UNITS))[::-1]

    @classmethod
    def open(cls, services: NativeServices) -> FastPath | None:
        """Return the fast path of a machine, or ``None`` where there cannot be one, with the reason in the log.

        Compiles the library if the cache has none of this version. Raises :class:`~vmbus.errors.InternalError` for a
        library that does not fit this module.
        """
        if requested_way() == "off":
            return None
        memory = services.memory.native()
        if len(memory.regions) > MAX_REGIONS or (data_path := services.data_path) is None:
            return None
        try:
            library = _Library(str(LIBRARY.build()))
        except (MissingRequirement, InternalError, OSError) as error:
            _logger.warning("no fast path, so disks are slower: %s", error)
            return None
        address = library.open()
        if not address:
            _logger.warning("no fast path, so disks are slower: %s", os.strerror(ctypes.get_errno()))
            return None
        shared = Shared.from_address(address)
        if shared.version != VERSION or library.size() != ctypes.sizeof(Shared):
            found = f"version {shared.version} with {library.size()} shared bytes"
            library.close(address)
            raise InternalError(
                f"the library of the fast path is {found}; {VERSION} with {ctypes.sizeof(Shared)} was expected"
            )
        return cls(data_path, memory, library, address)

    @property
    def in_flight(self) -> int:
        return sum([each.outstanding for each in self._channels])

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

    def open_channel(self, owner: FastOwner, units: array[int]) -> FastPathChannel | None:
        """Return the fast path of a channel that opened; ``None`` if the engine has no room for one more.

        ``units``: target * MAX_LUNS + LUN → number of a unit, or -1; signed 16-bit integers.
        """
        if len(units) != MAX_TARGETS * MAX_LUNS or units.itemsize != 2:
            raise InternalError(f"a table of {len(units)} units of {units.itemsize} bytes each")
        channel = FastPathChannel(self, owner)
        data = self._data_path.open_channel(channel, self.for_engine(units))
        if data is None:
            return None
        channel.data = data
        self._channels.add(channel)
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

    def forget(self, channel: FastPathChannel) -> None:
        """Drop a channel that is closed and has no request under way."""
        self._channels.discard(channel)

    def close(self) -> None:
        if self.in_flight:
            # The kernel may still read what the library keeps of the requests.
            _logger.warning("the fast path is left open: %d transfers are under way", self.in_flight)
        elif self._address:
            address, self._address = self._address, 0
            del self._shared
            self._library.close(address)


class FastPathChannel:
    """The fast path of one open channel (:class:`~vmbus.ports.FastChannel`), and its owner for the engine."""

    data: DataPathChannel
    """The channel in the machine's engine."""

    def __init__(self, path: FastPath, owner: FastOwner) -> None:
        self._path = path
        self._owner = owner
        self._closed = False

    @property
    def outstanding(self) -> int:
        return self.data.outstanding

    def give(self, channel: GivenChannel) -> bool:
        return self.data.give(channel)

    def recall(self) -> RecalledChannel:
        return self.data.recall()

    def look(self) -> None:
        self.data.look()

    @property
    def link(self) -> FastLink | None:
        return self.data.link

    def recorded(self) -> None:
        self.data.recorded()

    def close(self) -> None:
        self._closed = True
        self.data.close()
        self._forget_if_ended()

    # --- called by the engine: a DataPathOwner ---

    def engine_left(self) -> None:
        self._owner.fast_left(self)

    def engine_answered(self, answer: bytes) -> None:
        self._owner.fast_answered(self, answer)
        self._forget_if_ended()

    def engine_returned(self, packet: bytes) -> None:
        self._owner.fast_returned(self, packet)
        self._forget_if_ended()

    def engine_ended(self) -> None:
        self._owner.fast_ended(self)
        self._forget_if_ended()

    def engine_failed(self, error: Exception) -> None:
        self._owner.fast_failed(self, error)
        self._forget_if_ended()

    def _forget_if_ended(self) -> None:
        if self._closed and not self.outstanding:
            self._path.forget(self)
