"""What the pure state machines need of the machine, as protocols.

``hypervisor``, ``bus`` and devices do not depend on QEMU. They get objects of these types: :mod:`vmbus.machine` has
the real ones, :mod:`vmbus.testing.fakes` fast fakes. All calls are made from one thread (the event loop's), and none
of them blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

PAGE_SIZE = 4096


class GuestPages(Protocol):
    """Some guest pages, in the order given, as one run of bytes (a ring, a message page).

    Offsets are bytes from the start of the first page. Offsets outside ``0 <= offset <= size - length`` raise
    ``IndexError``: callers bound guest-given offsets before they get here.
    """

    @property
    def size(self) -> int:
        """Bytes of all pages."""

    def read(self, offset: int, length: int) -> bytes:
        """Return a private copy."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data``; no promise of atomicity or order beyond x86 program order."""

    def load_u32(self, offset: int) -> int:
        """Make one aligned 32-bit load (``offset`` is a multiple of 4)."""

    def store_u32(self, offset: int, value: int) -> None:
        """Make one aligned 32-bit store."""

    def set_bits_u32(self, offset: int, bits: int) -> int:
        """Set ``bits`` of an aligned 32-bit word and return the word from before, in one atomic step.

        The guest may clear other bits of it at the same time. This is a full fence, as :meth:`GuestMemory.fence`.
        """

    def address_u32(self, offset: int) -> int:
        """Return the address of that word in this process, for compiled code; 0 if it has none."""


class WritableMemory(Protocol):
    """Guest RAM that input is stored into, by any thread, through ``views``; then :meth:`finish` is called.

    Until then the stores are not logged: report the input to the guest only afterwards, and do not save the machine
    in between.
    """

    @property
    def views(self) -> list[memoryview]:
        """The runs in order; one run may have several views. Empty after :meth:`finish`."""

    def finish(self, length: int) -> None:
        """Log that at most the first ``length`` bytes were stored, and drop the views.

        Called once, in the event loop's thread.
        """


class GuestMemory(Protocol):
    """Guest RAM; no other code may access it. Addresses are guest physical (GPA), lengths in bytes."""

    def is_ram(self, gpa: int, length: int) -> bool:
        """Return whether all of ``[gpa, gpa + length)`` is RAM."""

    def read(self, gpa: int, length: int) -> bytes:
        """Return a private copy. Raises :class:`~vmbus.errors.GuestAddressError`."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store ``data``. Raises :class:`~vmbus.errors.GuestAddressError`."""

    def write_code(self, gpa: int, data: bytes) -> None:
        """Store instructions, always through QEMU, which then drops stale translations."""

    def readable(self, runs: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return views of guest RAM at the ``(address, bytes)`` runs, in order, for output without a copy.

        The guest may change the contents at any time, so nothing in them may be checked and then used. Drop the views
        before the machine is closed. Raises :class:`~vmbus.errors.GuestAddressError`.
        """

    def writable(self, runs: Sequence[tuple[int, int]]) -> WritableMemory:
        """Return views of guest RAM for input without a copy: see :class:`WritableMemory`.

        Raises :class:`~vmbus.errors.GuestAddressError`, before anything can be stored.
        """

    def pages(self, pfns: Sequence[int]) -> GuestPages:
        """Return the pages with these page frame numbers, in this order.

        Raises :class:`~vmbus.errors.GuestAddressError` if one of them is not RAM.
        """

    def fence(self) -> None:
        """Make a full memory fence: earlier stores are visible before later loads are made."""


class Interrupts(Protocol):
    """Raises interrupts in the guest."""

    def request(self, vp: int, vector: int, *, auto_eoi: bool = False) -> None:
        """Raise the edge-triggered fixed interrupt ``vector`` on virtual processor ``vp``; return at once.

        ``auto_eoi``: the guest will not write EOI, so the local APIC must clear the interrupt in service itself.
        """


class ReferenceClock(Protocol):
    """Reference time of the partition (TLFS 12.5), in units of 100 ns since its creation."""

    def now(self) -> int:
        """Return the counter, which never goes backwards."""


class TimerHandle(Protocol):
    """A timer that can be cancelled."""

    def cancel(self) -> None:
        """Cancel the timer; no effect if it has fired."""


class Timers(Protocol):
    """One-shot timers; an asyncio event loop is one."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> TimerHandle:
        """Call ``callback`` after ``delay`` seconds."""

    def call_soon(self, callback: Callable[[], None], /) -> object:
        """Call ``callback`` in the next turn of the loop."""


class Workers(Protocol):
    """Threads for work that blocks: files, sockets, name look-up."""

    def run(self, work: Callable[[], None], done: Callable[[Exception | None], None], /) -> None:
        """Call ``work`` in another thread, then ``done`` in the event loop's, with the exception of ``work`` or None.

        ``work`` stores its result for ``done``. Any number may be submitted: they wait for a free thread in order,
        and those that end at about the same time are reported together. Where the host has no thread at all, ``done``
        gets an ``OSError``, and ``work`` is not called. What ``done`` raises is logged.
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
        """Read or write a file without a thread; return False, and do nothing, where that is not possible.

        ``done`` gets the number of bytes transferred, or a negative errno; ``flags`` are those of preadv2(2). The
        file must stay open and the views valid until then.
        """

    def watch(self, fd: int, readable: Callable[[], None], /) -> Callable[[], None] | None:
        """Call ``readable`` in the event loop's thread whenever socket ``fd`` is readable.

        Return a function that ends this, to be called before the socket is closed; ``None`` where there is no event
        loop. Both may be called from any thread.
        """

    def expect(
        self, done: Callable[[Exception | None], None], /
    ) -> Callable[[Exception | None], None] | None:
        """Announce work in threads of the device's own; return a function to call when it ends, from any thread.

        ``done`` is then called in the event loop's thread. ``None`` where there is no event loop: wait for the work.
        """

    def submit(self) -> None:
        """Begin the submitted transfers at once, instead of in the next turn of the event loop."""


@dataclass(frozen=True, slots=True)
class SignalTarget:
    """Where a channel interrupts the guest."""

    vp: int
    address: int
    """Of the 32-bit word with the event flag, in this process."""
    bit: int
    """The flag's value in that word."""
    vector: int


@dataclass(frozen=True, slots=True)
class GivenRing:
    """A ring that compiled code takes over."""

    pages: tuple[int, ...]
    """Addresses in this process of the ring's pages, the control page first."""
    index: int
    """The host's own index: read index of the ring from the guest, write index of the other one."""


@dataclass(frozen=True, slots=True)
class GivenChannel:
    """An open channel whose rings compiled code takes over. The guest's signals are masked."""

    incoming: GivenRing
    outgoing: GivenRing
    relid: int
    """Its connection id is the one that belongs to this number."""
    target: SignalTarget


@dataclass(frozen=True, slots=True)
class RecalledChannel:
    """What became of a given channel. Its answers that the guest has not got are passed on afterwards."""

    read_index: int
    write_index: int
    was_left: bool
    """Whether the next packet is one for Python, or the ring is damaged."""
    packets_in: int
    """This and the following: since it was given."""
    bytes_in: int
    packets_out: int
    bytes_out: int
    signals: int
    doorbells: int
    ring_full: int


class FastLink(NamedTuple):
    """How a successor finds what compiled code had of a channel: what the journal says of the channel has this."""

    epoch: int
    """Of the thread."""
    channel: int
    """The thread's number for it."""
    opening: int
    gives: int
    """How often the number was given."""
    given: bool
    """Whether it is now: the thread knows the positions in the rings."""
    adopted: tuple[int, ...]
    """Numbers of the requests that the thread may still have, and that are the journal's."""


class FastOwner(Protocol):
    """The receiver of what a :class:`FastChannel` produces. Each but ``fast_left`` says that a request has ended."""

    def fast_answered(self, channel: FastChannel, answer: bytes) -> None:
        """Send a completion packet, complete but for its trailer, which the guest has not got."""

    def fast_returned(self, channel: FastChannel, packet: bytes) -> None:
        """Process a packet, given without trailer, that was taken but has to be done in Python after all."""

    def fast_ended(self, channel: FastChannel) -> None:
        """Note that a request of a channel that was closed meanwhile has ended."""

    def fast_left(self, channel: FastChannel) -> None:
        """Recall a given channel soon: its next packet is one for Python, or the ring is damaged."""

    def fast_failed(self, channel: FastChannel, error: Exception) -> None:
        """Fail the channel: the host failed at one of its requests, which is still reported as ended."""


class FastChannel(Protocol):
    """Compiled code that processes some packets of one open channel: a thread has the rings from give to recall."""

    def give(self, channel: GivenChannel) -> bool:
        """Let the thread have both rings; False, and nothing is done, if it cannot."""

    def recall(self) -> RecalledChannel:
        """Take them back: when this returns, the thread does not touch them."""

    def look(self) -> None:
        """Pass on what has ended. After :meth:`recall` that includes the answers that the guest has not got."""

    @property
    def outstanding(self) -> int:
        """Requests taken that have not ended: of a given channel about, of a recalled one exactly."""

    def close(self) -> None:
        """Take nothing more; the ends of what is under way are still reported."""

    @property
    def link(self) -> FastLink | None:
        """What a journal has to say of the channel as it is now; ``None`` if the thread keeps nothing for one."""

    def recorded(self) -> None:
        """Forget what was passed on: a journal has it, and :attr:`link`."""


@dataclass(frozen=True, slots=True)
class NativeMemory:
    """Guest RAM and its logs for compiled code: addresses in this process, 0 for what does not exist."""

    address: int
    size: int
    """Bytes of the file of guest RAM, which is mapped at ``address``."""
    dirty: int
    """A byte for each page of the file; set to 1 after a store."""
    notes: int
    """A byte for each guest page, not 0 where code was translated from it (:mod:`vmbus.machine.memory`)."""
    note_pages: int
    """Guest pages that have a note."""
    regions: tuple[tuple[int, int, int], ...]
    """``(guest physical address, bytes, offset in the file)`` of each range of RAM."""
    fd: int = -1
    """The file; -1 for memory without one."""


class NativeGuestMemory(Protocol):
    """Guest memory that compiled code or the kernel stores into by itself.

    After such a store the code marks the pages in ``dirty``, and after a fence checks and clears the notes of the
    pages; where a note was set, it calls :meth:`write_through`.
    """

    def native(self) -> NativeMemory:
        """Return where the memory is."""

    def filled_by_kernel(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Check the notes of ``(gpa, length)``, each within a page, and mark them for a migration under way."""

    def write_through(self, gpa: int, length: int) -> None:
        """Have QEMU drop translations of ``[gpa, gpa + length)``, whose note was found and cleared."""


class DataPathOwner(Protocol):
    """Whose channel it is in a :class:`DataPath`."""

    def engine_left(self) -> None:
        """Recall the channel soon."""

    def engine_answered(self, answer: bytes) -> None:
        """Send a completion packet, without its trailer."""

    def engine_returned(self, packet: bytes) -> None:
        """Process a packet, without its trailer."""

    def engine_ended(self) -> None:
        """A request has ended that belonged to an earlier opening."""

    def engine_failed(self, error: Exception) -> None:
        """Fail the channel: the host failed at one of its requests, which is still reported as ended."""


class DataPathChannel(Protocol):
    """One opening of a channel in a :class:`DataPath`."""

    @property
    def outstanding(self) -> int:
        """Requests taken that have not ended: of a given channel about, of a recalled one exactly."""

    def give(self, channel: GivenChannel) -> bool:
        """As :meth:`FastChannel.give`."""

    def recall(self) -> RecalledChannel:
        """As :meth:`FastChannel.recall`."""

    def look(self) -> None:
        """As :meth:`FastChannel.look`."""

    def close(self) -> None:
        """End the opening of a channel that is not given; what is outstanding is reported as ended."""

    @property
    def link(self) -> FastLink | None:
        """As :attr:`FastChannel.link`."""

    def recorded(self) -> None:
        """As :meth:`FastChannel.recorded`."""


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file that a server maps: ``size`` bytes of descriptor ``fd``, which it sees from ``address`` on."""

    fd: int
    size: int
    address: int


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """What a server has to know of a queue (VIRTIO 1.2, split virtqueue); addresses are in :class:`SharedFile`."""

    files: tuple[SharedFile, ...]
    """The file of guest RAM, where the data is, and the queue's own."""
    entries: int
    descriptors: int
    available: int
    used: int
    kick_fd: int
    """Eventfd that the server reads."""
    call_fd: int
    """Eventfd that the server writes."""


class DataPathQueue(Protocol):
    """A virtqueue by which compiled code has a server do reads and writes. All methods: in any thread."""

    @property
    def layout(self) -> QueueLayout:
        """What the server is told, before :meth:`open`."""

    def open(self, broken: Callable[[str], None]) -> int:
        """Use the queue, which the server has accepted; return its number for compiled code.

        The number is 0 where there are too many queues, or no descriptors left.

        ``broken`` is called in the event loop's thread, with the reason, when the server has broken a rule: end the
        server, and close the queue.
        """

    def activity(self) -> tuple[int, int]:
        """Return how many requests were answered so far, and how many are under way."""

    def oldest(self) -> float | None:
        """Return when (``time.monotonic``) the oldest request without an answer was taken; ``None`` if all have."""

    def overtaken(self) -> float | None:
        """Return since when (``time.monotonic``) the server answers others in place of one request, if it does."""

    def close(self) -> None:
        """Release the queue after its server has ended: requests under way go back to the device's Python."""


class DataPath(Protocol):
    """A thread that moves packets between the rings of channels and files, with the compiled code of a device."""

    def make_queue(self) -> DataPathQueue | None:
        """Return a queue to a server, to be closed in any case; ``None`` for memory without a file. In any thread.

        Raises ``OSError`` where there are no descriptors, or no memory, left.
        """

    def open_channel(self, owner: DataPathOwner, functions: tuple[int, int, int]) -> DataPathChannel | None:
        """Return an opening of a channel; ``None`` if there are too many.

        ``functions``: addresses of a device's two functions and their context (``engine_device.h``).
        """


class EventLoop(Timers, Protocol):
    """Timers and file descriptors; an asyncio event loop is one."""

    def add_reader(self, fd: int, callback: Callable[[], None], /) -> object:
        """Call ``callback`` whenever ``fd`` is readable."""

    def remove_reader(self, fd: int, /) -> object:
        """End that."""


class NativeEngine(Protocol):
    """Compiled code of a device that moves data between guest memory and files; one for each machine."""

    @property
    def in_flight(self) -> int:
        """Transfers of all channels that have not ended."""

    def close(self) -> None:
        """Release all resources. While transfers are under way nothing is: the kernel still stores into memory."""


EngineT = TypeVar("EngineT", bound=NativeEngine)


class NativeServices(Protocol):
    """What a device with compiled code gets of the machine (``DeviceEnvironment.native``)."""

    @property
    def memory(self) -> NativeGuestMemory:
        """Guest memory."""

    @property
    def data_path(self) -> DataPath | None:
        """The thread for rings of fast channels, started if need be; ``None`` where there can be none."""

    def engine(self, open_engine: Callable[[NativeServices], EngineT | None], /) -> EngineT | None:
        """Return the machine's engine that ``open_engine`` makes: the first call opens it, later ones return it.

        ``None`` where ``open_engine`` returned that. The machine closes engines after all devices were stopped.
        """


class Synic(Protocol):
    """The host's side of the guest's synthetic interrupt controllers and connection ids."""

    @property
    def vp_count(self) -> int:
        """Virtual processors of the partition; they are numbered from 0."""

    def post_message(self, vp: int, sint: int, payload: bytes) -> None:
        """Queue a channel message (type 1, at most 240 bytes) for slot ``sint`` of ``vp``; order is kept."""

    def queued_messages(self, vp: int, sint: int) -> int:
        """Return how many messages wait for that slot."""

    def discard_messages(self) -> None:
        """Drop every queued channel message that is not in a slot yet."""

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        """Set event flag ``flag`` (0..2047) and interrupt; dropped when the SynIC of ``vp`` is not set up."""

    def event_target(self, vp: int, sint: int, flag: int) -> SignalTarget | None:
        """Return how compiled code does the same, until a register of ``vp`` changes; ``None`` if it cannot."""

    def connect_event_port(self, connection_id: int, signalled: Callable[[], None]) -> None:
        """Call ``signalled`` for every HvSignalEvent on ``connection_id``."""

    def disconnect_event_port(self, connection_id: int) -> None:
        """Make the id unknown again."""
