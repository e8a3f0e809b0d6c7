"""The shared memory and the socket messages of the trap gateway and the emulator.

Source: docs/gateway.md; the layouts are this project's own. ``emulator/vmbus/machine/gateway/plugin/shared.h``
declares them in C, with the writer of each word; a test compiles it and compares every offset. All words are
little-endian and naturally aligned, without implicit padding.

The shared region, in this order, each part aligned to a page::

    CONTROL | VCPU * vcpus_max | request sequences * vcpus_max | doorbell bytes | POST_RING | code page bytes
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum

import construct as c

from vmbus.wire.codec import Record, derive_struct

MAGIC = int.from_bytes(b"VMBusGW1", "little")
VERSION = 3
SLOTS = 8
"""Request slots of a vCPU."""
DOORBELLS = 8192
CPUID_LEAVES = 32
RULES = 32
GONE = 16
"""Hypercalls with a status for the time without an emulator."""
MSRS = 16
"""Synthetic MSRs that the gateway reads by itself."""
VECTORS = 256
"""Interrupt vectors of a local APIC."""
POSTS = 64
"""Posts that the ring holds."""
POST_RULES = 1
POST_PAYLOAD = 240
"""Bytes of a message at most."""
RAM_RANGES = 8
JOURNAL_SIZE = 32 << 20
"""Bytes of the memory that outlives emulators; only what was written takes room."""


class TrapKind(IntEnum):
    """The instruction that was trapped."""

    CPUID = 1
    RDMSR = 2
    WRMSR = 3
    VMCALL = 4


class Verdict(IntEnum):
    """How a trap ends: with a value, with a fault, or by executing the instruction again."""

    OK = 0
    FAULT = 1
    AGAIN = 2


class EmulatorState(IntEnum):
    """State of the emulator, as the gateway sees it."""

    NONE = 0
    ATTACHED = 1
    ACTIVE = 2


class GuestState(IntEnum):
    """State of the guest that an emulator leaves for the one that takes over; the gateway only stores it."""

    FREE = 0
    """The guest has not written GUEST_OS_ID since its last reset: any emulator may serve it."""
    ENGAGED = 1
    """The guest has written GUEST_OS_ID since its last reset: only its emulator has the state that it set up."""
    LEFT = 2
    """The guest was migrated and runs at the target."""


class IdleState(IntEnum):
    """What a vCPU does about the interrupts in ``pending``."""

    RUNNING = 0
    """It looks at them before its next HLT."""
    POLLING = 1
    """It raises them within nanoseconds, and in any case before it halts."""
    HALTED = 2
    """It does not look: only QEMU can wake it."""


SLOT_LONG_MODE = 1
"""Flag of a slot: the vCPU executes 64-bit code."""

SLOT = c.Struct(
    "kind" / c.Int32ul,
    "flags" / c.Int32ul,
    "tsc" / c.Int64ul,
    "pc" / c.Int64ul,
    "rax" / c.Int64ul,
    "rbx" / c.Int64ul,
    "rcx" / c.Int64ul,
    "rdx" / c.Int64ul,
    "rsi" / c.Int64ul,
    "rdi" / c.Int64ul,
    "r8" / c.Int64ul,
    "rsp" / c.Int64ul,
    "reserved" / c.Padding(40),
)
"""A trapped instruction and the registers before it, 128 bytes."""

ANSWER = c.Struct(
    "sequence" / c.Int64ul,
    "value" / c.Int64ul,
    "verdict" / c.Int32ul,
    "reserved0" / c.Padding(4),
    "reserved1" / c.Padding(8),
)
"""The emulator's answer to the request of the slot with the same index, 32 bytes."""

VCPU = c.Struct(
    "present" / c.Int32ul,
    "sleeping" / c.Int32ul,
    "requests" / c.Int64ul,
    "retries" / c.Int64ul,
    "doorbells" / c.Int64ul,
    "gone_results" / c.Int64ul,
    "faults" / c.Int64ul,
    "auto_eois" / c.Int64ul,
    "no_slot" / c.Int64ul,
    "auto_eoi_failures" / c.Int64ul,
    "halts" / c.Int64ul,
    "polls" / c.Int64ul,
    "polled_ns" / c.Int64ul,
    "raised" / c.Int64ul,
    "posts" / c.Int64ul,
    "posts_held" / c.Int64ul,
    "idle" / c.Int32ul,
    "poll_window_ns" / c.Int32ul,
    "retired" / c.Array(SLOTS, c.Int64ul),
    "auto_eoi" / c.Array(VECTORS // 64, c.Int64ul),
    "pending" / c.Array(VECTORS // 64, c.Int64ul),
    "msi_address" / c.Int64ul,
    "missed" / c.Int64ul,
    "passed" / c.Int64ul,
    "reserved1" / c.Padding(40),
    "answers" / c.Array(SLOTS, ANSWER),
    "slots" / c.Array(SLOTS, SLOT),
)
"""State of one vCPU, 1600 bytes."""

COUNTERS = (
    "requests",
    "retries",
    "doorbells",
    "gone_results",
    "faults",
    "auto_eois",
    "no_slot",
    "auto_eoi_failures",
    "halts",
    "polls",
    "polled_ns",
    "raised",
    "posts",
    "posts_held",
)
"""The counters of ``VCPU``, in the order in which they are stored, beginning at ``requests``."""

CPUID_ENTRY = c.Struct(
    "leaf" / c.Int32ul,
    "eax" / c.Int32ul,
    "ebx" / c.Int32ul,
    "ecx" / c.Int32ul,
    "edx" / c.Int32ul,
    "reserved" / c.Padding(4),
)
"""A CPUID leaf that the gateway answers, 24 bytes."""

GONE_ENTRY = c.Struct("code" / c.Int32ul, "status" / c.Int32ul)
"""A hypercall that the gateway ends with ``status`` while there is no emulator, 8 bytes."""


@dataclass(frozen=True, slots=True)
class DoorbellRule:
    """A hypercall that the gateway answers by itself and reports as a doorbell, 32 bytes.

    If the control word equals ``control`` and the first input is in ``base .. base + count - 1``, doorbell
    ``first + input - base`` is rung and the guest gets ``result``.
    """

    control: int
    base: int
    count: int
    first: int
    result: int = 0


DOORBELL_RULE = Record(
    DoorbellRule,
    "control" / c.Int64ul,
    "base" / c.Int64ul,
    "result" / c.Int64ul,
    "count" / c.Int32ul,
    "first" / c.Int32ul,
)

MSR_ADD_VCPU = 1
"""Flag of an MSR: the index of the vCPU is added to the value."""


@dataclass(frozen=True, slots=True)
class ConstantMsr:
    """An MSR whose value never changes, 16 bytes; with :data:`MSR_ADD_VCPU`, by the vCPU's index."""

    msr: int
    value: int
    flags: int = 0


MSR_ENTRY = Record(ConstantMsr, "msr" / c.Int32ul, "flags" / c.Int32ul, "value" / c.Int64ul)


@dataclass(frozen=True, slots=True)
class PostRule:
    """What the gateway may post, 24 bytes.

    WRMSR of ``msr`` (0: none); and HvPostMessage with the control word ``control``, to a connection in the bitmap
    ``connections``, of a message whose first word is in the bitmap ``messages``.
    """

    control: int
    messages: int
    connections: int
    msr: int


POST_RULE = Record(
    PostRule,
    "control" / c.Int64ul,
    "messages" / c.Int64ul,
    "connections" / c.Int32ul,
    "msr" / c.Int32ul,
)


@dataclass(frozen=True, slots=True)
class RamRange:
    """Guest physical addresses that are RAM, 16 bytes."""

    start: int
    size: int


RAM_RANGE = Record(RamRange, "start" / c.Int64ul, "size" / c.Int64ul)

POST = c.Struct(
    "kind" / c.Int32ul,
    "vcpu" / c.Int32ul,
    "connection" / c.Int32ul,
    "size" / c.Int32ul,
    "payload" / c.Bytes(POST_PAYLOAD),
)
"""A trap that was answered when it was posted, 256 bytes."""

POST_RING = c.Struct(
    "head" / c.Int64ul,
    "first" / c.Int64ul,
    "reserved0" / c.Padding(48),
    "tail" / c.Int64ul,
    "promise" / c.Int64ul,
    "reserved1" / c.Padding(48),
    "entries" / c.Array(POSTS, POST),
)
"""The ring of posts. ``promise``: ``owner``, and in the high half from which post on no message is promised."""

CONTROL = c.Struct(
    "magic" / c.Int64ul,
    "version" / c.Int32ul,
    "vcpus_max" / c.Int32ul,
    "region_size" / c.Int64ul,
    "vcpu_offset" / c.Int64ul,
    "request_offset" / c.Int64ul,
    "doorbell_offset" / c.Int64ul,
    "code_offset" / c.Int64ul,
    "code_pages" / c.Int64ul,
    "vcpus" / c.Int32ul,
    "emulator" / c.Int32ul,
    "owner" / c.Int32ul,
    "was_active" / c.Int32ul,
    "raise_failures" / c.Int32ul,
    "resets" / c.Int32ul,
    "post_offset" / c.Int64ul,
    "journal_size" / c.Int64ul,
    "reserved0" / c.Padding(24),
    "clock_sequence" / c.Int32ul,
    "tsc_known" / c.Int32ul,
    "arm_seen" / c.Int32ul,
    "samples" / c.Int32ul,
    "tsc_offset" / c.Int64ul,
    "pair_tsc" / c.Int64ul,
    "pair_ns" / c.Int64ul,
    "tsc_frequency" / c.Int64ul,
    "reserved1" / c.Padding(16),
    "waiting" / c.Int32ul,
    "engine_waiting" / c.Int32ul,
    "reserved2" / c.Padding(56),
    "arm" / c.Int32ul,
    "hold_timeout_ms" / c.Int32ul,
    "spin_ns" / c.Int32ul,
    "guest" / c.Int32ul,
    "poll_ns" / c.Int32ul,
    "reserved3" / c.Padding(44),
    "table_sequence" / c.Int32ul,
    "cpuid_count" / c.Int32ul,
    "rule_count" / c.Int32ul,
    "gone_count" / c.Int32ul,
    "msr_count" / c.Int32ul,
    "post_count" / c.Int32ul,
    "ram_count" / c.Int32ul,
    "reserved4" / c.Padding(36),
    "cpuid" / c.Array(CPUID_LEAVES, CPUID_ENTRY),
    "rules" / c.Array(RULES, DOORBELL_RULE.struct),
    "gone" / c.Array(GONE, GONE_ENTRY),
    "msrs" / c.Array(MSRS, MSR_ENTRY.struct),
    "posts" / c.Array(POST_RULES, POST_RULE.struct),
    "ram" / c.Array(RAM_RANGES, RAM_RANGE.struct),
)
"""The start of the shared region, 2712 bytes: geometry, states, clock, settings and tables."""

CONTROL_HEADER = c.Struct(
    *CONTROL.subcons[: [each.name for each in CONTROL.subcons].index("journal_size") + 1]
)
"""The part of it that is read at the attachment; the tables are written, and never read."""

CLOCK = c.Struct(
    "tsc_known" / c.Int32ul,
    "arm_seen" / c.Int32ul,
    "samples" / c.Int32ul,
    "tsc_offset" / c.Int64ul,
    "pair_tsc" / c.Int64ul,
    "pair_ns" / c.Int64ul,
    "tsc_frequency" / c.Int64ul,
)
"""The words of ``CONTROL`` behind ``clock_sequence``, 44 bytes, which are read together."""

SLOT_STRUCT = derive_struct(SLOT)
CLOCK_STRUCT = derive_struct(CLOCK)
POST_STRUCT = derive_struct(POST)

CONTROL_SIZE, CONTROL_HEADER_SIZE = CONTROL.sizeof(), CONTROL_HEADER.sizeof()
VCPU_SIZE, SLOT_SIZE, ANSWER_SIZE = VCPU.sizeof(), SLOT.sizeof(), ANSWER.sizeof()
POST_SIZE, POST_RING_SIZE = POST.sizeof(), POST_RING.sizeof()


@functools.cache
def offset_of(declaration: c.Struct, field: str) -> int:
    """Return the offset, in bytes, of ``field`` in a declaration of fixed size. Raises ``KeyError``."""
    offset = 0
    for subcon in declaration.subcons:
        if subcon.name == field:
            return offset
        offset += subcon.sizeof()
    raise KeyError(field)


# --- messages on the socket ---

MESSAGE_MAGIC = int.from_bytes(b"VbGW", "little")


class MessageType(IntEnum):
    """Request of the emulator; the gateway sends one reply to each."""

    HELLO = 1
    ACTIVATE = 2
    CLOCK = 3
    ENGINE = 4
    """The reply carries the eventfd for doorbells of the engine."""
    JOURNAL = 5
    """The reply carries the journal's memory, the same at every request."""


DOORBELL_RUNG = 1
"""Bit of a doorbell that the gateway sets."""
DOORBELL_ENGINE = 2
"""Bit of a doorbell that the emulator sets: its engine serves it, which has an eventfd of its own."""


class Status(IntEnum):
    """Result of a request."""

    OK = 0
    VERSION = 1
    BUSY = 2
    REFUSED = 3
    UNKNOWN = 4
    """The gateway does not know the request."""


HELLO_TAKEOVER = 1
"""Flag of HELLO: disconnect the emulator that is connected, and take its place."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of the emulator, 16 bytes."""

    type: int
    version: int = VERSION
    flags: int = 0
    magic: int = MESSAGE_MAGIC


MESSAGE = Record(Message, "magic" / c.Int32ul, "type" / c.Int32ul, "version" / c.Int32ul, "flags" / c.Int32ul)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of the gateway, 24 bytes.

    ``argument``: size of the region, or of the journal, in bytes; if the status is BUSY, the process id of the
    connected emulator; if there is no memory for a journal, the error number.
    """

    magic: int
    type: int
    status: int
    version: int
    argument: int


REPLY = Record(
    Reply,
    "magic" / c.Int32ul,
    "type" / c.Int32ul,
    "status" / c.Int32ul,
    "version" / c.Int32ul,
    "argument" / c.Int64ul,
)
