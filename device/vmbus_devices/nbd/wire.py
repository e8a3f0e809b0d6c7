"""The NBD protocol's layouts: fixed newstyle negotiation, simple and structured replies. All big-endian.

Source: the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md).

    server                                   client
    Greeting ─────────────────────────────▶
             ◀───────────────────────────── client flags
             ◀───────────────────────────── OptionRequest + data        (GO is the last)
    OptionReply + data ───────────────────▶
             ◀───────────────────────────── CommandRequest [+ data]
    SimpleReply [+ data], or Chunk + data ▶
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import construct as c
from vmbus.wire.codec import Record

GREETING_MAGIC = 0x4E42444D41474943  # NBDMAGIC
OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

BASE_ALLOCATION = b"base:allocation"
ALLOCATION_HOLE = 1
"""Flag of a descriptor of ``base:allocation``: the range is not allocated."""

DEFAULT_MAXIMUM = 32 << 20
"""Bytes of one request with data, for a server that does not announce its own limit."""
MAX_STRING = 4096
"""Bytes of names and messages."""


class HandshakeFlag(enum.IntFlag):
    """Of the greeting, and of the client's answer to it."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """An option of the negotiation."""

    ABORT = 2
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class OptionAnswer(enum.IntEnum):
    """How the server answers an option; errors have the highest bit."""

    ACK = 1
    INFO = 3
    META_CONTEXT = 4
    UNSUPPORTED = 0x80000001
    POLICY = 0x80000002
    INVALID = 0x80000003
    PLATFORM = 0x80000004
    TLS_REQUIRED = 0x80000005
    UNKNOWN = 0x80000006
    SHUTDOWN = 0x80000007
    BLOCK_SIZE_REQUIRED = 0x80000008
    TOO_BIG = 0x80000009


OPTION_ERROR = 0x80000000


class Info(enum.IntEnum):
    """The subject of an answer INFO."""

    EXPORT = 0
    BLOCK_SIZE = 3


class ExportFlag(enum.IntFlag):
    """The abilities of an export ("transmission flags")."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    ROTATIONAL = 16
    TRIM = 32
    WRITE_ZEROES = 64
    DONT_FRAGMENT = 128
    MULTI_CONNECTION = 256


class Command(enum.IntEnum):
    """A request of the client."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    FUA = 1
    NO_HOLE = 2
    DONT_FRAGMENT = 4


class ChunkType(enum.IntEnum):
    """The content of a chunk of a structured reply; errors have bit 15."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_ERROR = 0x8000
CHUNK_DONE = 1
"""Flag of the last chunk."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first message of a server."""

    magic: int
    option_magic: int
    flags: int


GREETING = Record(Greeting, "magic" / c.Int64ub, "option_magic" / c.Int64ub, "flags" / c.Int16ub)


@dataclass(frozen=True, slots=True)
class OptionRequest:
    """``length`` bytes of data follow."""

    magic: int
    option: int
    length: int


OPTION_REQUEST = Record(OptionRequest, "magic" / c.Int64ub, "option" / c.Int32ub, "length" / c.Int32ub)


@dataclass(frozen=True, slots=True)
class OptionReply:
    """``length`` bytes of data follow."""

    magic: int
    option: int
    answer: int
    length: int


OPTION_REPLY = Record(
    OptionReply, "magic" / c.Int64ub, "option" / c.Int32ub, "answer" / c.Int32ub, "length" / c.Int32ub
)


@dataclass(frozen=True, slots=True)
class GoRequest:
    """The data of GO: the export, and the information that the client requests about it."""

    export: bytes
    wanted: tuple[int, ...]


GO_REQUEST = Record(
    GoRequest,
    "export" / c.Prefixed(c.Int32ub, c.GreedyBytes),
    "wanted" / c.PrefixedArray(c.Int16ub, c.Int16ub),
)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """The data of INFO with :attr:`Info.EXPORT`; ``size`` in bytes."""

    kind: int
    size: int
    flags: int


EXPORT_INFO = Record(ExportInfo, "kind" / c.Int16ub, "size" / c.Int64ub, "flags" / c.Int16ub)


@dataclass(frozen=True, slots=True)
class BlockSizeInfo:
    """The data of INFO with :attr:`Info.BLOCK_SIZE`, in bytes."""

    kind: int
    minimum: int
    preferred: int
    maximum: int


BLOCK_SIZE_INFO = Record(
    BlockSizeInfo,
    "kind" / c.Int16ub,
    "minimum" / c.Int32ub,
    "preferred" / c.Int32ub,
    "maximum" / c.Int32ub,
)


@dataclass(frozen=True, slots=True)
class MetaContextRequest:
    """The data of SET_META_CONTEXT."""

    export: bytes
    queries: tuple[bytes, ...]


META_CONTEXT_REQUEST = Record(
    MetaContextRequest,
    "export" / c.Prefixed(c.Int32ub, c.GreedyBytes),
    "queries" / c.PrefixedArray(c.Int32ub, c.Prefixed(c.Int32ub, c.GreedyBytes)),
)


@dataclass(frozen=True, slots=True)
class MetaContext:
    """The data of the answer META_CONTEXT."""

    context: int
    name: bytes


META_CONTEXT = Record(MetaContext, "context" / c.Int32ub, "name" / c.GreedyBytes)


@dataclass(frozen=True, slots=True)
class CommandRequest:
    """A request. ``cookie`` comes back with the reply; ``offset`` and ``length`` in bytes."""

    magic: int
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


COMMAND_REQUEST = Record(
    CommandRequest,
    "magic" / c.Int32ub,
    "flags" / c.Int16ub,
    "command" / c.Int16ub,
    "cookie" / c.Int64ub,
    "offset" / c.Int64ub,
    "length" / c.Int32ub,
)
REQUEST_STRUCT = struct.Struct(">IHHQQI")
"""The layout of :data:`COMMAND_REQUEST`, for the hot path."""


@dataclass(frozen=True, slots=True)
class SimpleReply:
    """A reply; data follows one to READ without error."""

    magic: int
    error: int
    cookie: int


SIMPLE_REPLY = Record(SimpleReply, "magic" / c.Int32ub, "error" / c.Int32ub, "cookie" / c.Int64ub)
SIMPLE_REPLY_STRUCT = struct.Struct(">IIQ")
"""The layout of :data:`SIMPLE_REPLY`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a structured reply; ``length`` bytes follow. Its first 16 bytes are as long as a simple reply."""

    magic: int
    flags: int
    type: int
    cookie: int
    length: int


CHUNK = Record(
    Chunk,
    "magic" / c.Int32ub,
    "flags" / c.Int16ub,
    "type" / c.Int16ub,
    "cookie" / c.Int64ub,
    "length" / c.Int32ub,
)
CHUNK_STRUCT = struct.Struct(">IHHQ")
"""The layout of :data:`CHUNK` without its length."""


@dataclass(frozen=True, slots=True)
class Hole:
    """The data of OFFSET_HOLE: these bytes are zeros."""

    offset: int
    length: int


HOLE = Record(Hole, "offset" / c.Int64ub, "length" / c.Int32ub)


@dataclass(frozen=True, slots=True)
class ChunkError:
    """The data of ERROR and ERROR_OFFSET, up to its message."""

    error: int
    message_length: int


CHUNK_ERROR_DATA = Record(ChunkError, "error" / c.Int32ub, "message_length" / c.Int16ub)


@dataclass(frozen=True, slots=True)
class Extent:
    """One descriptor of BLOCK_STATUS."""

    length: int
    flags: int


EXTENT = Record(Extent, "length" / c.Int32ub, "flags" / c.Int32ub)
