"""What the engine's C code and Python both read: structures and constants, and the header made of them."""

from __future__ import annotations

from ctypes import Structure, c_char, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from enum import IntEnum

from vmbus.native_layout import constants, declarations
from vmbus.ports import PAGE_SIZE
from vmbus.wire import packet, ring, virtqueue
from vmbus.wire.gateway import offset_of

VERSION = 1
"""Of the mirror."""
MAGIC = int.from_bytes(b"VMBusDP1", "little")
MAX_CHANNELS = 256
MAX_RING_PAGES = 2 * 1025
"""Pages of both rings of a channel: up to 4 MiB of data each."""
MAX_SLOTS = 1024
MAX_EVENTS = 2048
"""More than slots and channels together, so an event always has a place."""
MAX_PACKET = 4352
MAX_ANSWER = 128
MAX_NOTED = 514
MAX_REGIONS = 16
LINE_SIZE = 48
LINES_AHEAD = 96
"""Commands to QEMU whose answers are not read, at most. QEMU's main loop waits for ever for room for an answer, and a
socket of Linux has room for some 270 short ones."""
MAX_QUEUES = 64
"""Queues to servers of disks at a time."""
MAX_QUEUE_PIECES = 513
"""Pieces of guest memory of one request in a queue: 2 MiB that begin within a page."""
QUEUE_RAM = 1 << 44
"""Address of the file of guest RAM, as the server of a queue sees it."""
QUEUE_MEMORY = 1 << 40
"""Address of the queue's own memory, likewise. It has the parts that follow, each from this offset on."""
QUEUE_AVAILABLE = MAX_SLOTS * virtqueue.DESCRIPTOR.sizeof()
QUEUE_USED = QUEUE_AVAILABLE + PAGE_SIZE
QUEUE_REQUESTS = QUEUE_USED + 3 * PAGE_SIZE
"""For each slot a header, and the status behind it."""
QUEUE_REQUEST_SIZE = 32
QUEUE_TABLES = QUEUE_REQUESTS + MAX_SLOTS * QUEUE_REQUEST_SIZE
"""For each slot a table of descriptors."""
QUEUE_TABLE_SIZE = (MAX_QUEUE_PIECES + 2) * virtqueue.DESCRIPTOR.sizeof()
QUEUE_SIZE = -(-(QUEUE_TABLES + MAX_SLOTS * QUEUE_TABLE_SIZE) // PAGE_SIZE) * PAGE_SIZE
RELEASE_ANSWER = 1 << 31
"""Flag of a slot that is released: the guest gets its answer now."""


class Owner(IntEnum):
    """Who may touch the rings of a channel."""

    PYTHON = 0
    ENGINE = 1
    LEFT = 2
    """Nobody: the engine has stopped, and Python has not recalled the channel yet."""


class CommandKind(IntEnum):
    """What Python asks the engine for; it is done when the call returns."""

    GIVE = 1
    RECALL = 2
    FORGET = 3
    """The opening of a recalled channel is over: what is under way for it belongs to nobody."""
    COUNTS = 4
    """Copy the counters."""
    MIRROR = 7
    """Write the mirror into other memory from now on: no channel is given."""
    OPEN_QUEUE = 5
    CLOSE_QUEUE = 6
    """The server has ended: what is under way in the queue has failed."""


class EventKind(IntEnum):
    """What the engine tells Python."""

    LEFT = 1
    """``index``: a channel. Its next packet is not plain, or its ring is damaged."""
    ANSWERED = 2
    """``index``: a slot of a channel that is not the engine's any more. Its answer is for Python to send."""
    RETURNED = 3
    """``index``: a slot. Python has to process its packet."""
    NOTED = 4
    """``index``: a slot. Its ranges have to be written through QEMU before the guest gets the answer."""
    LINES = 5
    """Answers of QEMU to the engine's interrupts are to be read."""
    QUEUE = 6
    """``index``: the number of a queue, which the engine uses no more: see :class:`QueueTrouble`."""


class QueueTrouble(IntEnum):
    """Why the engine uses a queue no more."""

    NONE = 0
    TOO_MANY = 1
    """The used ring has more entries than there are requests under way."""
    UNKNOWN = 2
    """An entry names a request that is not under way."""
    TOO_LONG = 3
    """An entry says that more was written than the request has room for."""
    NO_POLL = 4
    """This kernel cannot wait for the queue's eventfd."""


class Range(Structure):
    """Bytes of the file of guest RAM."""

    _fields_ = [("offset", c_uint64), ("length", c_uint64)]


class Region(Structure):
    """A range of guest RAM: its place in the file, and its guest physical address."""

    _fields_ = [("offset", c_uint64), ("size", c_uint64), ("gpa", c_uint64)]


class Event(Structure):
    """An :class:`EventKind`, and what it is about."""

    _fields_ = [("kind", c_uint32), ("index", c_uint32)]


class Policy(Structure):
    """Times in nanoseconds; docs/decisions/0006-native-data-path.md#policy."""

    _fields_ = [
        ("spin_in_flight", c_uint64),
        ("spin_idle", c_uint64),
        ("submit_after", c_uint64),
        ("gather", c_uint64),
        ("hold", c_uint64),
        ("wait_for_halt", c_uint64),
        ("gap", c_uint64),
        ("batch", c_uint32),
        ("at_once", c_uint32),  # answer at once if no more are outstanding
    ]


class EngineSetup(Structure):
    """Where everything is; valid as long as the engine runs."""

    _fields_ = [
        ("ram", c_void_p),
        ("ram_size", c_uint64),
        ("dirty", c_void_p),  # a byte for each page of the file
        ("notes", c_void_p),  # a byte for each guest page; NULL: code is not watched
        ("note_pages", c_uint64),  # pages beyond these always count as noted
        ("mirror", c_void_p),
        ("waiting", c_void_p),  # the gateway's word: wake the engine for its doorbells
        ("wake_fd", c_int32),  # eventfd that the gateway writes then
        ("qtest_fd", c_int32),
        ("report_ranges", c_uint32),  # pass every range that is stored into to Python, before the answer
        ("region_count", c_uint32),
        ("region", Region * MAX_REGIONS),
        ("policy", Policy),
    ]


class ChannelSetup(Structure):
    """One channel, for GIVE."""

    _fields_ = [
        ("number", c_uint32),
        ("in_pages", c_uint32),
        ("out_pages", c_uint32),
        ("in_index", c_uint32),
        ("out_index", c_uint32),
        ("flag_bit", c_uint32),
        ("flag_offset", c_uint64),  # of its word, in the file of guest RAM
        ("vector", c_uint32),
        ("line_length", c_uint32),
        ("gives", c_uint32),  # how often this channel number was given, with this time
        ("reserved", c_uint32),
        ("line", c_char * LINE_SIZE),
        ("idle", c_void_p),
        ("pending", c_void_p),
        ("missed", c_void_p),
        ("doorbell", c_void_p),
        ("take", c_void_p),
        ("complete", c_void_p),
        ("context", c_void_p),
        (
            "page",
            c_uint64 * MAX_RING_PAGES,
        ),  # offsets in the file of guest RAM: the incoming ring's, then the other's
    ]


class ChannelCounts(Structure):
    """Since the channel was given for the first time."""

    _fields_ = [
        ("packets_in", c_uint64),
        ("bytes_in", c_uint64),
        ("packets_out", c_uint64),
        ("bytes_out", c_uint64),
        ("signals", c_uint64),
        ("doorbells", c_uint64),
        ("ring_full", c_uint64),
    ]


class Recalled(Structure):
    """What RECALL returns of a channel."""

    _fields_ = [
        ("read_index", c_uint32),  # of the incoming ring
        ("write_index", c_uint32),  # of the outgoing ring
        ("interrupt_owed", c_uint32),  # the event flag is set, and nobody has interrupted the guest
        ("was_left", c_uint32),  # the next packet is not plain, or the ring is damaged
        ("outstanding", c_uint32),  # requests taken whose end Python has not been told yet
        ("reserved", c_uint32),
        ("counts", ChannelCounts),
    ]


class QueueSetup(Structure):
    """A queue, for OPEN_QUEUE."""

    _fields_ = [
        ("memory", c_void_p),  # QUEUE_SIZE bytes, zeros
        ("kick_fd", c_int32),  # eventfd that tells the server of requests
        ("call_fd", c_int32),  # eventfd that tells the engine of answers
        ("number", c_uint32),  # returned
        ("reserved", c_uint32),
    ]


class QueueState(Structure):
    """How a queue is; times are of CLOCK_MONOTONIC. See :class:`QueueTrouble`."""

    _fields_ = [
        ("answered", c_uint64),
        ("oldest_ns", c_uint64),  # when the oldest request without an answer was taken; 0: there is none
        ("overtaken_ns", c_uint64),  # since when others are answered in place of that one; 0: none was
        ("under_way", c_uint32),
        ("trouble", c_uint32),
    ]


class EngineCounts(Structure):
    """Of the thread."""

    _fields_ = [
        ("passes", c_uint64),
        ("submits", c_uint64),
        ("sleeps", c_uint64),
        ("gaps", c_uint64),
        ("left_to_vcpu", c_uint64),
        ("sent", c_uint64),
    ]


class MirrorHeader(Structure):
    """The first page of the mirror."""

    _fields_ = [
        ("magic", c_uint64),
        ("version", c_uint32),
        ("channels", c_uint32),
        ("slots", c_uint32),
        ("epoch", c_uint32),
        ("reserved", c_uint8 * (PAGE_SIZE - 24)),
    ]


class MirrorChannel(Structure):
    """A channel as a successor finds it. Two numbers in a word are stored together: an index, and what it covers."""

    _fields_ = [
        ("owner", c_uint32),
        ("opening", c_uint32),
        ("taken", c_uint64),  # read index; above it, the number of the last request taken
        ("answered", c_uint64),  # write index; above it, the number of the last answer in the ring
        ("gives", c_uint32),  # how often this number was given: `taken` and `answered` are of this time
        ("reserved", c_uint8 * 228),
    ]


class MirrorSlot(Structure):
    """A request as a successor finds it."""

    _fields_ = [
        ("state", c_uint32),
        ("channel", c_uint32),
        ("opening", c_uint32),
        ("taken_number", c_uint32),
        ("done_number", c_uint32),
        ("size", c_uint32),
        ("answer_size", c_uint32),
        ("reserved", c_uint32),
        ("answer", c_uint8 * MAX_ANSWER),
        ("packet", c_uint8 * MAX_PACKET),
    ]


class Mirror(Structure):
    """The memory that outlives the process."""

    _fields_ = [
        ("header", MirrorHeader),
        ("channel", MirrorChannel * MAX_CHANNELS),
        ("slot", MirrorSlot * MAX_SLOTS),
    ]


STRUCTURES: tuple[type[Structure], ...] = (
    Range,
    Region,
    Event,
    Policy,
    EngineSetup,
    ChannelSetup,
    ChannelCounts,
    Recalled,
    QueueSetup,
    QueueState,
    EngineCounts,
    MirrorHeader,
    MirrorChannel,
    MirrorSlot,
    Mirror,
)
"""In the order in which C needs them."""

CONSTANTS = {
    "MIRROR_VERSION": VERSION,
    "MAX_CHANNELS": MAX_CHANNELS,
    "MAX_RING_PAGES": MAX_RING_PAGES,
    "MAX_SLOTS": MAX_SLOTS,
    "MAX_EVENTS": MAX_EVENTS,
    "MAX_PACKET": MAX_PACKET,
    "MAX_ANSWER": MAX_ANSWER,
    "MAX_NOTED": MAX_NOTED,
    "MAX_REGIONS": MAX_REGIONS,
    "LINE_SIZE": LINE_SIZE,
    "LINES_AHEAD": LINES_AHEAD,
    "RELEASE_ANSWER": RELEASE_ANSWER,
    "MAX_QUEUES": MAX_QUEUES,
    "MAX_QUEUE_PIECES": MAX_QUEUE_PIECES,
    "QUEUE_AVAILABLE": QUEUE_AVAILABLE,
    "QUEUE_USED": QUEUE_USED,
    "QUEUE_REQUESTS": QUEUE_REQUESTS,
    "QUEUE_REQUEST_SIZE": QUEUE_REQUEST_SIZE,
    "QUEUE_TABLES": QUEUE_TABLES,
    "QUEUE_TABLE_SIZE": QUEUE_TABLE_SIZE,
    "DESCRIPTOR_NEXT": virtqueue.DescriptorFlag.NEXT,
    "DESCRIPTOR_WRITE": virtqueue.DescriptorFlag.WRITE,
    "DESCRIPTOR_INDIRECT": virtqueue.DescriptorFlag.INDIRECT,
    "RING_QUIET": virtqueue.RingFlag.QUIET,
    "BLOCK_READ": virtqueue.BlockRequest.READ,
    "BLOCK_WRITE": virtqueue.BlockRequest.WRITE,
    "BLOCK_OK": virtqueue.BLOCK_OK,
    "SECTOR_SHIFT": virtqueue.SECTOR_SHIFT,
    "VIRTQUEUE_DESCRIPTOR_SIZE": virtqueue.DESCRIPTOR.sizeof(),
    "VIRTQUEUE_USED_SIZE": virtqueue.USED.sizeof(),
    "BLOCK_HEADER_SIZE": virtqueue.BLOCK_HEADER.sizeof(),
    "PAGE_SHIFT": PAGE_SIZE.bit_length() - 1,
    "DESCRIPTOR_SIZE": packet.DESCRIPTOR_SIZE,
    "TRAILER_SIZE": packet.TRAILER_SIZE,
    "DESCRIPTOR_LENGTH8": offset_of(packet.DESCRIPTOR, "length8"),
    "RING_WRITE": ring.WRITE_INDEX,
    "RING_READ": ring.READ_INDEX,
    "RING_MASK": ring.INTERRUPT_MASK,
    "RING_PENDING": ring.PENDING_SEND_SIZE,
    "RING_FEATURES": ring.FEATURE_BITS,
    "RING_RESERVED": ring.RESERVED_BYTES,
    "FEATURE_PENDING_SEND_SIZE": ring.FEATURE_PENDING_SEND_SIZE,
    **{f"OWNER_{each.name}": int(each) for each in Owner},
    **{f"COMMAND_{each.name}": int(each) for each in CommandKind},
    **{f"EVENT_{each.name}": int(each) for each in EventKind},
    **{f"QUEUE_{each.name}": int(each) for each in QueueTrouble},
}
"""Name in C → value."""


def header() -> str:
    """Return the text of ``layout.h``."""
    return "\n".join(
        [
            "/* Generated from vmbus.machine.engine.layout. */",
            "#ifndef ENGINE_LAYOUT_H",
            "#define ENGINE_LAYOUT_H",
            "",
            "#include <stddef.h>",
            "#include <stdint.h>",
            "",
            f"#define MIRROR_MAGIC UINT64_C({MAGIC:#x})",
            f"#define QUEUE_RAM UINT64_C({QUEUE_RAM:#x})",
            f"#define QUEUE_MEMORY UINT64_C({QUEUE_MEMORY:#x})",
            constants(CONSTANTS),
            "",
            declarations(STRUCTURES),
            "#endif",
            "",
        ]
    )
