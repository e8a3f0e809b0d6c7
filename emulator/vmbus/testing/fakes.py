"""Fakes of :mod:`vmbus.ports` for fast tests of this project and of device authors.

All fakes are deterministic: memory is a ``bytearray``, time advances only by ``advance``, interrupts are recorded.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from vmbus.bus.io.environment import InlineWorkers
from vmbus.errors import GuestAddressError
from vmbus.ports import PAGE_SIZE, SignalTarget


class FakePages:
    """:class:`~vmbus.ports.GuestPages` over a :class:`FakeMemory`."""

    def __init__(self, memory: FakeMemory, pfns: Sequence[int]) -> None:
        self._memory = memory
        self._pfns = tuple(pfns)
        self.size = len(self._pfns) * PAGE_SIZE
        first = self._pfns[0] if self._pfns else 0
        in_order = self._pfns == tuple(range(first, first + len(self._pfns)))
        self._start = first * PAGE_SIZE if in_order else None
        """The address of the first page, if the others follow it."""

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"[{offset}, {offset + length}) is outside {self.size} bytes")
        if self._start is not None:
            return [(self._start + offset, length)] if length else []
        pieces = []
        while length:
            page, inside = divmod(offset, PAGE_SIZE)
            step = min(length, PAGE_SIZE - inside)
            pieces.append((self._pfns[page] * PAGE_SIZE + inside, step))
            offset += step
            length -= step
        return pieces

    def read(self, offset: int, length: int) -> bytes:
        pieces = self._pieces(offset, length)
        if len(pieces) == 1:
            return self._memory.read(*pieces[0])
        return b"".join([self._memory.read(gpa, step) for gpa, step in pieces])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        pieces = self._pieces(offset, len(data))
        if len(pieces) == 1:
            return self._memory.write(pieces[0][0], data)
        done = 0
        for gpa, step in pieces:
            self._memory.write(gpa, data[done : done + step])
            done += step
        return None

    def load_u32(self, offset: int) -> int:
        if offset % 4:
            raise IndexError(f"offset {offset} is not aligned")
        return int.from_bytes(self.read(offset, 4), "little")

    def store_u32(self, offset: int, value: int) -> None:
        if offset % 4:
            raise IndexError(f"offset {offset} is not aligned")
        self.write(offset, value.to_bytes(4, "little"))

    def set_bits_u32(self, offset: int, bits: int) -> int:
        self._memory.fence()
        before = self.load_u32(offset)
        if before | bits != before:
            self.store_u32(offset, before | bits)
        return before

    def address_u32(self, offset: int) -> int:
        return 0


class FakeViews:
    """:class:`~vmbus.ports.WritableMemory` of a :class:`FakeMemory`."""

    def __init__(self, memory: FakeMemory, runs: Sequence[tuple[int, int]]) -> None:
        self._memory = memory
        self._runs = list(runs)
        self.views = [memory.view(gpa, length) for gpa, length in runs]

    def finish(self, length: int) -> None:
        runs, self._runs, self.views = self._runs, [], []
        for gpa, step in runs:
            if length > 0:
                self._memory.stored.append((gpa, min(step, length)))
            length -= step


class FakeMemory:
    """:class:`~vmbus.ports.GuestMemory`: ``size`` bytes of RAM at the guest physical address ``base``.

    ``ram``: the content. ``code_writes``: ``(gpa, data)`` of each ``write_code``. ``stored``: ``(gpa, length)`` of
    the runs that were stored through ``writable``.
    """

    def __init__(self, size: int = 16 << 20, base: int = 0) -> None:
        self.base = base
        self.ram = bytearray(size)
        self.code_writes: list[tuple[int, bytes]] = []
        self.stored: list[tuple[int, int]] = []

    def is_ram(self, gpa: int, length: int) -> bool:
        return self.base <= gpa and length >= 0 and gpa + length <= self.base + len(self.ram)

    def read(self, gpa: int, length: int) -> bytes:
        if not self.is_ram(gpa, length):
            raise GuestAddressError(gpa, length)
        return bytes(self.ram[gpa - self.base : gpa - self.base + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        if not self.is_ram(gpa, len(data)):
            raise GuestAddressError(gpa, len(data))
        self.ram[gpa - self.base : gpa - self.base + len(data)] = data

    def view(self, gpa: int, length: int) -> memoryview:
        """Return a view of ``length`` bytes at ``gpa``. Raises :class:`~vmbus.errors.GuestAddressError`."""
        if not self.is_ram(gpa, length):
            raise GuestAddressError(gpa, length)
        return memoryview(self.ram)[gpa - self.base : gpa - self.base + length]

    def readable(self, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        return [self.view(gpa, length).toreadonly() for gpa, length in runs]

    def writable(self, runs: Sequence[tuple[int, int]]) -> FakeViews:
        return FakeViews(self, runs)

    def write_code(self, gpa: int, data: bytes) -> None:
        self.write(gpa, data)
        self.code_writes.append((gpa, bytes(data)))

    def pages(self, pfns: Sequence[int]) -> FakePages:
        for pfn in pfns:
            if not self.is_ram(pfn * PAGE_SIZE, PAGE_SIZE):
                raise GuestAddressError(pfn * PAGE_SIZE, PAGE_SIZE)
        return FakePages(self, pfns)

    def fence(self) -> None:
        with threading.Lock():
            pass


@dataclass
class FakeInterrupts:
    """:class:`~vmbus.ports.Interrupts` that records ``(vp, vector, auto_eoi)``."""

    requests: list[tuple[int, int, bool]] = field(default_factory=list)

    def request(self, vp: int, vector: int, *, auto_eoi: bool = False) -> None:
        self.requests.append((vp, vector, auto_eoi))


class FakeTimer:
    """A call of :class:`FakeTimers`; ``when`` in seconds."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeTimers:
    """:class:`~vmbus.ports.Timers` and :class:`~vmbus.ports.ReferenceClock`: time moves by ``advance``."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, FakeTimer]] = []

    def now(self) -> int:
        return round(self.seconds * 10_000_000)

    def call_later(self, delay: float, callback: Callable[[], None], /) -> FakeTimer:
        timer = FakeTimer(self.seconds + max(delay, 0.0), callback)
        heapq.heappush(self._queue, (timer.when, next(self._order), timer))
        return timer

    def call_soon(self, callback: Callable[[], None], /) -> FakeTimer:
        return self.call_later(0.0, callback)

    def advance(self, seconds: float) -> None:
        """Advance time by ``seconds``, making the calls that fall due, in order."""
        end = self.seconds + seconds
        while self._queue and self._queue[0][0] <= end:
            when, _, timer = heapq.heappop(self._queue)
            self.seconds = max(self.seconds, when)
            if not timer.cancelled:
                timer.callback()
        self.seconds = end


class FakeWorkers(InlineWorkers):
    """:class:`~vmbus.ports.Workers` without threads: ``run`` does the work, ``timers`` report its end.

    While ``paused`` is true, work waits for :meth:`release`.
    """

    def __init__(self, timers: FakeTimers) -> None:
        self._timers = timers
        self.paused = False
        self.waiting: deque[tuple[Callable[[], None], Callable[[Exception | None], None]]] = deque()

    def run(self, work: Callable[[], None], done: Callable[[Exception | None], None], /) -> None:
        self.waiting.append((work, done))
        if not self.paused:
            self.release()

    def release(self, count: int | None = None) -> None:
        """Do the waiting work, or the first ``count`` pieces of it."""
        while self.waiting and (count is None or count > 0):
            work, done = self.waiting.popleft()
            error: Exception | None = None
            try:
                work()
            except Exception as found:  # noqa: BLE001 - passed to done
                error = found
            self._timers.call_soon(partial(done, error))
            count = None if count is None else count - 1


class FakeSynic:
    """:class:`~vmbus.ports.Synic` that records ``messages`` and ``events``, and holds event ``ports``.

    ``messages``: (VP, SINT, payload). ``events``: (VP, SINT, flag). ``ports``: connection id -> callback.
    """

    def __init__(self, vp_count: int = 1) -> None:
        self.vp_count = vp_count
        self.messages: deque[tuple[int, int, bytes]] = deque()
        self.events: list[tuple[int, int, int]] = []
        self.ports: dict[int, Callable[[], None]] = {}

    def post_message(self, vp: int, sint: int, payload: bytes) -> None:
        self.messages.append((vp, sint, bytes(payload)))

    def queued_messages(self, vp: int, sint: int) -> int:
        return sum(1 for message in self.messages if message[:2] == (vp, sint))

    def discard_messages(self) -> None:
        self.messages.clear()

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        self.events.append((vp, sint, flag))

    def event_target(self, vp: int, sint: int, flag: int) -> SignalTarget | None:
        return None

    def connect_event_port(self, connection_id: int, signalled: Callable[[], None]) -> None:
        self.ports[connection_id] = signalled

    def disconnect_event_port(self, connection_id: int) -> None:
        self.ports.pop(connection_id, None)
