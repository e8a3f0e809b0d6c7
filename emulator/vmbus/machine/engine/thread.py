"""The engine's thread, seen from Python (``engine.h``; docs/decisions/0006-native-data-path.md).

    give() ──→ the engine owns the rings ──┬── recall() ─────────────────────────→ Python owns them
                                           └── a packet that is not plain: left() ──→ recall() as soon as possible

All methods but those for queues are called in the event loop's thread. :meth:`Engine.dispatch` passes on what the
engine reports; call it when :meth:`Engine.fileno` is readable. A command waits for the engine, which is never busy
for longer than one pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_int, c_uint8, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, fields
from typing import Any, Protocol

from vmbus.errors import InternalError
from vmbus.machine.engine.adopted import AdoptedSlots
from vmbus.machine.engine.layout import (
    LINES_AHEAD,
    MAX_CHANNELS,
    MAX_RING_PAGES,
    ChannelCounts,
    ChannelSetup,
    EngineCounts,
    EngineSetup,
    Event,
    EventKind,
    Mirror,
    Policy,
    QueueSetup,
    QueueState,
    QueueTrouble,
    Range,
    Recalled,
)

_logger = logging.getLogger(__name__)

_US = 1000

BUSY_WAITS = {
    "spin_in_flight": 200 * _US,
    "spin_idle": 300 * _US,
    "submit_after": 15 * _US,
    "gather": 60 * _US,
    "hold": 300 * _US,
    "wait_for_halt": 40 * _US,
    "gap": 200 * _US,
    "batch": 8,
    "at_once": 3,
}
"""The policy where the host has a processor to spare."""

NO_WAITS = BUSY_WAITS | {
    "spin_in_flight": 0,
    "spin_idle": 0,
    "submit_after": 0,
    "hold": 0,
    "wait_for_halt": 0,
    "batch": 64,
}
"""The policy where it has none."""


class EngineOwner(Protocol):
    """Whose channel it is that the engine has."""

    def engine_left(self) -> None:
        """Recall the channel: its next packet is not plain, or its ring is damaged."""

    def engine_answered(self, answer: bytes) -> None:
        """Send a completion packet, without its trailer: the channel was recalled before the guest got it."""

    def engine_returned(self, packet: bytes) -> None:
        """Process a packet, without trailer, that the engine took and could not complete."""

    def engine_ended(self) -> None:
        """A request of an earlier opening has ended; nobody waits for its answer."""

    def engine_failed(self, error: Exception) -> None:
        """Fail the channel: the host failed at one of its requests, which is still reported as ended."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a channel interrupts: an event flag, a vCPU and a vector."""

    flag_offset: int
    """Of the flag's word in the file of guest RAM, in bytes."""
    flag_bit: int
    """The bit's value in that word."""
    vector: int
    line: bytes
    """The qtest command that raises the interrupt through QEMU."""
    words: tuple[int, int, int]
    """Addresses of the vCPU's words ``idle``, ``pending`` and ``missed``."""


@dataclass(frozen=True, slots=True)
class Functions:
    """A device's compiled code: addresses of ``take``, ``complete`` and their context (``struct engine_device``)."""

    take: int
    complete: int
    context: int


class _Library:
    """The functions of ``engine.c``."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path, use_errno=True)

        def function(name: str, result: Any, *arguments: Any) -> Callable[..., int]:
            found = library[f"engine_{name}"]
            found.restype = result
            found.argtypes = arguments
            return found

        self.setup_size = function("setup_size", c_uint64)
        self.start = function("start", c_void_p, POINTER(EngineSetup), c_int)
        self.stop = function("stop", c_uint32, c_void_p)
        self.give = function("give", c_uint32, c_void_p, POINTER(ChannelSetup))
        self.recall = function("recall", None, c_void_p, c_uint32, POINTER(Recalled))
        self.outstanding = function("outstanding", c_uint32, c_void_p, c_uint32)
        self.forget = function("forget", None, c_void_p, c_uint32)
        self.event = function("event", c_uint32, c_void_p, POINTER(Event))
        self.release = function("release", None, c_void_p, c_uint32, c_uint32)
        self.packet = function("packet", POINTER(c_uint8), c_void_p, c_uint32, POINTER(c_uint32))
        self.answer = function("answer", POINTER(c_uint8), c_void_p, c_uint32, POINTER(c_uint32))
        self.ranges = function(
            "ranges", POINTER(Range), c_void_p, c_uint32, POINTER(c_uint32), POINTER(c_uint32)
        )
        self.channel_of = function(
            "channel_of", c_uint32, c_void_p, c_uint32, POINTER(c_uint32), POINTER(c_uint32)
        )
        self.freed = function("freed", c_uint32, c_void_p)
        self.use_mirror = function("use_mirror", c_uint32, c_void_p, c_void_p, c_uint32)
        self.in_flight = function("in_flight", c_uint32, c_void_p)
        self.report_ranges = function("report_ranges", None, c_void_p, c_uint32)
        self.use_waiting = function("use_waiting", None, c_void_p, c_uint64)
        self.allow_lines = function("allow_lines", None, c_void_p, c_uint64)
        self.lines = function("lines", c_uint64, c_void_p)
        self.lock_lines = function("lock_lines", None, c_void_p, c_uint32)
        self.open_queue = function("open_queue", c_uint32, c_void_p, POINTER(QueueSetup))
        self.close_queue = function("close_queue", None, c_void_p, c_uint32)
        self.queue_state = function("queue_state", None, c_void_p, c_uint32, POINTER(QueueState))
        self.get_counts = function(
            "get_counts", None, c_void_p, c_uint32, POINTER(EngineCounts), POINTER(ChannelCounts)
        )


class Engine:
    """One engine of one machine. Made by :meth:`start`."""

    def __init__(self, library: _Library, setup: EngineSetup) -> None:
        self._library = library
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._setup = setup
        self._engine = library.start(byref(setup), self._event_fd)
        if not self._engine:
            error = ctypes.get_errno()
            os.close(self._event_fd)
            raise OSError(error, os.strerror(error))
        self._owners: dict[int, tuple[EngineOwner, int]] = {}
        """Channel → its owner, and its opening."""
        self._openings = [0] * MAX_CHANNELS
        self._given: set[int] = set()
        self._gives = [0] * MAX_CHANNELS
        """How often each channel was given."""
        self._adopted = AdoptedSlots(
            lambda slot: self._library.release(self._engine, slot, 0),
            lambda: self._library.freed(self._engine),
        )
        self._queues: dict[int, Callable[[QueueTrouble], None]] = {}
        """Number of a queue → what to call when its server has broken a rule."""
        self._ending = threading.Lock()
        """Queues are opened and closed in other threads, too, until the engine has ended."""
        self.noted: Callable[[Sequence[tuple[int, int]]], None] = lambda ranges: None
        """Called with ``(offset in the file of guest RAM, bytes)`` that have to be written through QEMU."""
        self.stored: Callable[[Sequence[tuple[int, int]]], None] = lambda ranges: None
        """Called in place of it while all ranges are reported: their notes are to be looked at, too."""
        self.lines_due: Callable[[], None] = lambda: None
        """Called when QEMU's answers to the engine's interrupts should be read; see :meth:`allow_lines`."""

    @classmethod
    def start(cls, path: str, setup: EngineSetup, *, busy_waits: bool) -> Engine:
        """Start an engine with the library at ``path``; the policy of ``setup`` is set here.

        Raises ``OSError`` where the kernel does not allow an io_uring, and :class:`~vmbus.errors.InternalError` for a
        library that does not fit this module.
        """
        library = _Library(path)
        expected = sum(
            ctypes.sizeof(each) for each in (EngineSetup, ChannelSetup, Mirror, QueueSetup, QueueState)
        )
        if library.setup_size() != expected:
            raise InternalError(
                f"the engine's library shares {library.setup_size()} bytes; {expected} were expected"
            )
        setup.policy = Policy(**(BUSY_WAITS if busy_waits else NO_WAITS))
        return cls(library, setup)

    def fileno(self) -> int:
        """Return a descriptor that is readable when :meth:`dispatch` has something to do."""
        return self._event_fd

    @property
    def in_flight(self) -> int:
        """Requests of all channels whose transfers have not ended."""
        return self._library.in_flight(self._engine)

    @property
    def lines(self) -> int:
        """Commands that the engine has written to the qtest socket so far; QEMU answers each."""
        return self._library.lines(self._engine)

    def allow_lines(self, unanswered: int) -> None:
        """Allow more commands to QEMU, of which ``unanswered`` have no answer that was read."""
        if unanswered < LINES_AHEAD:
            self._library.allow_lines(self._engine, self.lines + LINES_AHEAD - unanswered)

    def lock_lines(self) -> None:
        """Keep the engine from writing to the qtest socket: see :class:`~vmbus.machine.qemu.qtest.OtherWriter`."""
        self._library.lock_lines(self._engine, 1)

    def unlock_lines(self) -> None:
        """End that."""
        self._library.lock_lines(self._engine, 0)

    def counts(self, number: int = 0) -> tuple[dict[str, int], dict[str, int]]:
        """Return the counters of the thread, and those of channel ``number`` in its present opening."""
        found, of_channel = EngineCounts(), ChannelCounts()
        self._library.get_counts(self._engine, number, byref(found), byref(of_channel))
        return (
            {name: getattr(found, name) for name, *_ in EngineCounts._fields_},
            {name: getattr(of_channel, name) for name, *_ in ChannelCounts._fields_},
        )

    def use_doorbells(self, wake_fd: int, waiting: int) -> None:
        """Be woken by other doorbells: ``wake_fd`` and the address ``waiting`` as in the setup. No channel is given.

        The number of the descriptor stays that of the setup.
        """
        of_before = os.dup(self._setup.wake_fd)
        try:
            os.dup2(wake_fd, self._setup.wake_fd, inheritable=False)
            self._library.use_waiting(self._engine, waiting)
            os.eventfd_write(of_before, 1)  # it sleeps on the file of before
        finally:
            os.close(of_before)

    def use_waiting(self, waiting: int) -> None:
        """Say at the address ``waiting`` that it sleeps, and store nothing at the one of before when this returns.

        No channel is given: a doorbell that looks at the other word does not wake it.
        """
        self._library.use_waiting(self._engine, waiting)
        self.counts()  # the thread answers between two sleeps, and takes the address anew for each

    def report_ranges(self, on: bool) -> None:
        """Pass every range that is stored into to :attr:`stored`, before the guest gets the answer, or only code."""
        self._library.report_ranges(self._engine, int(on))

    def give(
        self,
        number: int,
        owner: EngineOwner,
        functions: Functions,
        target: Target,
        *,
        incoming: tuple[Sequence[int], int],
        outgoing: tuple[Sequence[int], int],
        doorbell: int,
    ) -> bool:
        """Give the rings of channel ``number`` to the engine; False if they are more than it can have.

        ``incoming``, ``outgoing``: offsets of the ring's pages in the file of guest RAM, and the host's own index.
        ``doorbell``: address of the channel's byte.
        """
        if len(incoming[0]) + len(outgoing[0]) > MAX_RING_PAGES:
            return False
        self.dispatch()  # so that no event of before is taken for one of now
        setup = ChannelSetup(
            number=number,
            in_pages=len(incoming[0]),
            out_pages=len(outgoing[0]),
            in_index=incoming[1],
            out_index=outgoing[1],
            flag_bit=target.flag_bit,
            flag_offset=target.flag_offset,
            vector=target.vector,
            line_length=len(target.line),
            line=target.line,
            gives=(self._gives[number] + 1) & 0xFFFFFFFF,
            doorbell=doorbell,
            **{field.name: getattr(functions, field.name) for field in fields(functions)},
        )
        setup.idle, setup.pending, setup.missed = target.words
        pages = [*incoming[0], *outgoing[0]]
        setup.page[: len(pages)] = pages
        if not self._library.give(self._engine, byref(setup)):
            raise InternalError(f"the engine refuses channel {number}")
        self._owners[number] = (owner, self._openings[number])
        self._given.add(number)
        self._gives[number] = setup.gives
        return True

    def outstanding(self, number: int) -> int:
        """Return how many requests of a channel were taken, and have not ended; of a given one, about how many."""
        return max(self._library.outstanding(self._engine, number) - self._adopted.held(number), 0)

    def recall(self, number: int) -> Recalled:
        """Take a channel back. The next :meth:`dispatch` passes on the answers that the guest does not have yet."""
        recalled = Recalled()
        self._library.recall(self._engine, number, byref(recalled))
        recalled.outstanding -= self._adopted.held(number)
        self._given.discard(number)
        return recalled

    def forget(self, number: int) -> None:
        """End the opening of a recalled channel: the answers of what is under way are not passed on."""
        self._adopted.forget(number)
        self._library.forget(self._engine, number)
        self._openings[number] = (self._openings[number] + 1) & 0xFFFFFFFF

    # --- for a journal ---

    def begin_mirror(self, address: int) -> None:
        """Write the mirror at ``address`` from now on, for a successor: no channel was given yet.

        From now on the requests that are passed on stay in it until :meth:`recorded`.
        """
        if not self._library.use_mirror(self._engine, address, 1):
            raise InternalError("the engine has requests that are in another mirror")
        self._adopted.keeps = True

    def switch_mirror(self, address: int) -> None:
        """Write another mirror when this returns, which may be one of before. No channel is given."""
        self._library.use_mirror(self._engine, address, 0)

    def link(self, number: int) -> tuple[int, int, bool, tuple[int, ...]]:
        """Return what a successor finds channel ``number`` in the mirror by.

        That is: the opening, how often it was given, whether it is, and the numbers of the requests that were passed
        on.
        """
        return (
            self._openings[number],
            self._gives[number],
            number in self._given,
            self._adopted.numbers(number),
        )

    def recorded(self, number: int) -> None:
        """Release what was passed on of a channel: the journal has it, together with :meth:`link`."""
        self._adopted.recorded(number)

    # --- queues: in any thread ---

    def open_queue(
        self, address: int, kick_fd: int, call_fd: int, broken: Callable[[QueueTrouble], None]
    ) -> int:
        """Use a queue that its server has accepted, and return its number; 0: too many, no descriptors, no engine.

        ``address``: of :data:`~vmbus.machine.engine.layout.QUEUE_SIZE` bytes of zeros, shared with the server.
        ``broken`` is called in the event loop's thread, and the queue is to be closed then, after its server.
        """
        with self._ending:
            if not self._engine:
                return 0
            setup = QueueSetup(memory=address, kick_fd=kick_fd, call_fd=call_fd)
            number = self._library.open_queue(self._engine, byref(setup))
            if number:
                self._queues[number] = broken
            return number

    def close_queue(self, number: int) -> None:
        """Forget a queue whose server has ended: what is under way there is returned to Python."""
        with self._ending:
            self._queues.pop(number, None)
            if self._engine:
                self._library.close_queue(self._engine, number)

    def queue_activity(self, number: int) -> tuple[int, int]:
        """Return how many requests a queue's server has answered, and how many are under way."""
        state = self._state(number)
        return state.answered, state.under_way

    def queue_times(self, number: int) -> tuple[int, int]:
        """Return when the oldest request of a queue was taken, and since when others are answered in place of it.

        In nanoseconds of ``time.monotonic_ns``; 0: there is none, or none was.
        """
        state = self._state(number)
        return state.oldest_ns, state.overtaken_ns

    def _state(self, number: int) -> QueueState:
        """Return the state of a queue; zeros if it is closed, and its place perhaps another's."""
        with self._ending:
            return self._look(number)

    def _look(self, number: int) -> QueueState:
        state = QueueState()
        if self._engine and number in self._queues:
            self._library.queue_state(self._engine, number, byref(state))
        return state

    # --- reports ---

    def dispatch(self) -> None:
        """Pass on what the engine has reported.

        What an owner raises fails its channel: the engine does not repeat an event, and others have theirs behind it.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        event = Event()
        while self._library.event(self._engine, byref(event)):
            if event.kind == EventKind.LINES:
                try:
                    self.lines_due()
                except Exception:
                    _logger.exception("QEMU's answers to interrupts could not be read")
            elif event.kind == EventKind.LEFT:
                if event.index in self._given:
                    owner = self._owners[event.index][0]
                    _guarded(owner, owner.engine_left)
            elif event.kind == EventKind.QUEUE:
                with self._ending:
                    broken, state = self._queues.get(event.index), self._look(event.index)
                if broken is not None:
                    broken(QueueTrouble(state.trouble))
            else:
                self._slot(EventKind(event.kind), event.index)

    def _slot(self, kind: EventKind, slot: int) -> None:
        library, engine = self._library, self._engine
        size, opening, taken = c_uint32(), c_uint32(), c_uint32()
        number = library.channel_of(engine, slot, byref(opening), byref(taken))
        owner, current = self._owners[number]
        if kind is not EventKind.ANSWERED:
            _guarded(owner, lambda: self._report(slot))
        if kind is EventKind.NOTED:
            self._adopted.count_release()
            library.release(engine, slot, 1)
            return
        read = library.answer if kind is EventKind.ANSWERED else library.packet
        data = ctypes.string_at(read(engine, slot, byref(size)), size.value)
        if opening.value != current or self._openings[number] != current:
            self._adopted.release(slot)
            _guarded(owner, owner.engine_ended)
            return
        self._adopted.take(number, slot, taken.value)
        if kind is EventKind.ANSWERED:
            _guarded(owner, lambda: owner.engine_answered(data))
        else:
            _guarded(owner, lambda: owner.engine_returned(data))

    def _report(self, slot: int) -> None:
        size, every = c_uint32(), c_uint32()
        found = self._library.ranges(self._engine, slot, byref(size), byref(every))
        if size.value:
            ranges = [(found[at].offset, found[at].length) for at in range(size.value)]  # type: ignore[index]
            (self.stored if every.value else self.noted)(ranges)

    def close(self) -> int:
        """End the thread; return how many transfers were under way, whose buffers the kernel may still write."""
        with self._ending:
            left = self._library.stop(self._engine)
            self._engine = 0
        os.close(self._event_fd)
        return left


def _guarded(owner: EngineOwner, call: Callable[[], None]) -> None:
    """Call ``call``; what it raises fails the channel of ``owner``."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the owner logs it
        try:
            owner.engine_failed(error)
        except Exception:
            _logger.exception("internal error at the end of a request; please report this")
