"""What the pure state machines need from the world, as protocols.

``hypervisor``, ``bus`` and ``device`` know nothing of QEMU. They are given objects of these shapes: the real
ones live in ``vmbus.machine``, fast fakes in ``vmbus.testing.fakes``. All calls are made from one thread (the
event loop's), none of them blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

PAGE_SIZE = 4096


class GuestPages(Protocol):
    """Some guest pages, in the order given, as one run of bytes (a ring, a message page).

    Offsets are bytes from the start of the first page. Offsets outside ``0 <= offset <= size - length`` raise
    ``IndexError``: callers bound guest-given offsets before they get here.
    """

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, length: int) -> bytes:
        """A private copy."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data``; no promise of atomicity or order beyond x86 program order."""

    def load_u32(self, offset: int) -> int:
        """One aligned 32-bit load (``offset`` is a multiple of 4)."""

    def store_u32(self, offset: int, value: int) -> None:
        """One aligned 32-bit store."""

    def address_u32(self, offset: int) -> int:
        """Where that word lies in this process, for compiled code to look at; 0 if it cannot."""


class WritableMemory(Protocol):
    """Guest RAM that input is stored into, by any thread, through ``views``; then :meth:`finish` is called.

    Until then nobody else knows of what was stored: the guest is told of it afterwards, and the machine is not saved
    in between.
    """

    @property
    def views(self) -> list[memoryview]:
        """The runs in order; one run may be several views. Empty once finished."""

    def finish(self, length: int) -> None:
        """The first ``length`` bytes, at most, were stored. In the event loop's thread, once; drops the views."""


class GuestMemory(Protocol):
    """The one way into guest RAM. Addresses are guest physical (GPA), lengths in bytes."""

    def is_ram(self, gpa: int, length: int) -> bool:
        """Whether all of ``[gpa, gpa + length)`` is RAM."""

    def read(self, gpa: int, length: int) -> bytes:
        """A private copy. Raises :class:`~vmbus.errors.GuestAddressError`."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data``. Raises :class:`~vmbus.errors.GuestAddressError`."""

    def write_code(self, gpa: int, data: bytes) -> None:
        """Store instructions: always through QEMU, so that no stale translation survives."""

    def readable(self, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Guest RAM in place: views of the ``(address, bytes)`` runs in order, for output without a copy.

        The guest may change what is in them at any time, so nothing in them may be checked and then used. Drop them
        before the machine goes. Raises :class:`~vmbus.errors.GuestAddressError`.
        """

    def writable(self, runs: Sequence[tuple[int, int]]) -> WritableMemory:
        """Guest RAM in place, for input without a copy: see :class:`WritableMemory`.

        Raises :class:`~vmbus.errors.GuestAddressError`, before anything can be stored.
        """

    def pages(self, pfns: Sequence[int]) -> GuestPages:
        """The pages with these page frame numbers, in this order.

        Raises :class:`~vmbus.errors.GuestAddressError` if one of them is not RAM.
        """

    def fence(self) -> None:
        """A full memory fence: earlier stores are visible before later loads are made."""


class Interrupts(Protocol):
    """Raises interrupts in the guest."""

    def request(self, vp: int, vector: int, *, auto_eoi: bool = False) -> None:
        """Edge-triggered fixed interrupt ``vector`` on virtual processor ``vp``; returns at once.

        ``auto_eoi``: the guest will not write EOI; the local APIC must forget the interrupt by itself.
        """


class ReferenceClock(Protocol):
    """Reference time of the partition (TLFS 12.5), in units of 100 ns since its creation."""

    def now(self) -> int:
        """The counter; never goes back."""


class TimerHandle(Protocol):
    """A timer that can be called off."""

    def cancel(self) -> None:
        """No effect if it has fired."""


class Timers(Protocol):
    """One-shot timers; an asyncio event loop is one."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> TimerHandle:
        """Call ``callback`` after ``delay`` seconds."""

    def call_soon(self, callback: Callable[[], None], /) -> object:
        """Call ``callback`` in the next turn of the loop."""


class Workers(Protocol):
    """Threads for work that blocks: files, sockets, name look-up."""

    def run(self, work: Callable[[], None], done: Callable[[Exception | None], None], /) -> None:
        """Call ``work`` in another thread, then ``done`` in the event loop's, with what ``work`` raised.

        ``work`` leaves its result where ``done`` finds it. Many may be asked for: they wait for a free thread in
        order, and those that end at about the same time are reported together.
        """

    def transfer(
        self,
        fd: int,
        offset: int,
        views: Sequence[memoryview],
        write: bool,
        flags: int,
        done: Callable[[int], None],
        /,
    ) -> bool:
        """Read or write a file without a thread, if that is possible: otherwise False, and nothing happens.

        ``done`` gets the bytes transferred, or minus an errno; ``flags`` are those of preadv2(2). The file stays
        open and the views stay valid until then.
        """

    def watch(self, fd: int, readable: Callable[[], None], /) -> Callable[[], None] | None:
        """Call ``readable`` in the event loop's thread whenever a socket has something to read.

        What to call to end that, before the socket is closed; both from any thread. ``None`` where there is no event
        loop.
        """

    def expect(
        self, done: Callable[[Exception | None], None], /
    ) -> Callable[[Exception | None], None] | None:
        """Work is done elsewhere, in threads of the device's own: what to call when it has ended, from any thread.

        ``done`` follows in the event loop's. ``None`` where there is no event loop: the work is to be waited for.
        """

    def submit(self) -> None:
        """Begin the transfers that were asked for; without it they begin in the next turn of the event loop."""


@dataclass(slots=True)
class FastUnit:
    """A disk whose plain reads and writes compiled code may do: those that are in no way special."""

    fd: int
    """Of a file whose bytes at an offset are those of the disk; -1: no data moves (measurements)."""
    block_size: int
    blocks: int
    max_transfer: int
    """Bytes of one request."""
    alignment: int
    """Of memory, in bytes."""
    through_flags: int
    """Of pwritev2(2), for a write with FUA."""
    readable: bool = False
    writable: bool = False


@dataclass(frozen=True, slots=True)
class FastCounts:
    """What compiled code did for a unit since it was last asked. Latencies in seconds."""

    reads: int
    writes: int
    bytes_read: int
    bytes_written: int
    most_depth: int
    least: float
    greatest: float
    latencies: Mapping[int, int]
    """Bucket of :class:`vmbus.devices.histogram.Histogram` → how many."""


class FastOwner(Protocol):
    """Who gets what comes out of a :class:`FastChannel`."""

    def fast_answers(self, channel: FastChannel, packets: list[bytes]) -> None:
        """Completion packets for the guest, whole but for their trailers; that many requests have ended."""

    def fast_returned(self, channel: FastChannel, packet: bytes) -> None:
        """A packet without trailer that was taken, and has to be done in the ordinary way after all."""


class FastChannel(Protocol):
    """Plain reads and writes of one open channel, done by compiled code."""

    @property
    def in_flight(self) -> int:
        """Requests taken that have not ended."""

    def take(self, buffer: bytes, at: int, known: int, limit: int) -> tuple[int, int]:
        """Take packets from ``buffer[at:]``, of which ``known`` bytes are committed: as many as are plain.

        ``buffer`` is a private copy of a ring's bytes. Returns how many, and their bytes with trailers. What is not
        plain, or damaged, stays for who parses it in the ordinary way.
        """

    def submit(self) -> None:
        """Begin what was taken, and hand over what has ended."""

    def wait(self, watched: tuple[int, int]) -> bool:
        """Look for a moment, and only where that is likely to help, for something that ends; whether it did.

        ``watched``: address in this process and value of a 32-bit word; when it changes that is an end, too. 0: none.
        """

    def sleeps(self) -> bool:
        """Nobody looks from now on: be told by the event loop. True: something has ended already."""

    def close(self) -> None:
        """Nothing more is taken; what is under way is handed over still."""


class FastPath(Protocol):
    """Compiled code between rings and files, where there is one (:mod:`vmbus.machine.io.fastpath`)."""

    def add_unit(self, unit: FastUnit) -> int | None:
        """A number for a unit; ``None`` when there are no more."""

    def change_unit(self, number: int, unit: FastUnit) -> None:
        """It is different now; what was taken goes on as it was."""

    def remove_unit(self, number: int) -> None:
        """Its number may be given to another one. None of its requests may be under way."""

    def depth(self, number: int) -> int:
        """Requests of a unit that are under way."""

    def counts(self, number: int) -> FastCounts:
        """What was done since this was last asked."""

    def open_channel(self, owner: FastOwner, units: array[int]) -> FastChannel:
        """For a channel that opened. ``units``: target * 64 + LUN → number or -1, 128 signed 16-bit integers."""


class Synic(Protocol):
    """The host side of the guest's synthetic interrupt controllers, and of its connection ids."""

    @property
    def vp_count(self) -> int:
        """Virtual processors of the partition; they are numbered from 0."""

    def post_message(self, vp: int, sint: int, payload: bytes) -> None:
        """Queue a channel message (type 1, at most 240 bytes) for slot ``sint`` of ``vp``; order is kept."""

    def queued_messages(self, vp: int, sint: int) -> int:
        """How many messages wait for that slot."""

    def discard_messages(self) -> None:
        """Forget every queued channel message that is not yet in a slot."""

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        """Set event flag ``flag`` (0..2047) and interrupt; dropped when the SynIC of ``vp`` is not set up."""

    def connect_event_port(self, connection_id: int, signalled: Callable[[], None]) -> None:
        """Let HvSignalEvent on ``connection_id`` call ``signalled``."""

    def disconnect_event_port(self, connection_id: int) -> None:
        """The id is unknown from now on."""
