"""Messages of the integration components: heartbeat, shutdown, time synchronisation.

Source: docs/protocol/devices.md#integration-component-framing,
docs/protocol/devices.md#integration-component-negotiation. On the ring each message is an in-band packet with the
payload

    | Off | Size | Field                                      |
    |   0 |    8 | pipe header (:mod:`vmbus.wire.pipe`)       |
    |   8 |   20 | :class:`IcHeader`                          |
    |  28 |    n | body, which depends on the message type    |

Negotiation (message type 0) has one body in each direction: the host's lists of versions, and the guest's answer,
which names one version of each list or none.
"""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass
from typing import Any

import construct as c

from vmbus.wire.codec import Record, derive_struct
from vmbus.wire.pipe import PIPE_HEADER, PipeHeader, PipeType

HEARTBEAT_INTERFACE = uuid.UUID("57164f39-9115-4e78-ab55-382f3bd5422d")
HEARTBEAT_INSTANCE = uuid.UUID("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0")
SHUTDOWN_INTERFACE = uuid.UUID("0e0b6031-5213-4934-818b-38d90ced39db")
SHUTDOWN_INSTANCE = uuid.UUID("b6650ff7-33bc-4840-8048-e0676786f393")
TIMESYNC_INTERFACE = uuid.UUID("9527e630-d0ae-497b-adce-e80ab0175caf")
TIMESYNC_INSTANCE = uuid.UUID("2dd1ce17-079e-403c-b352-a1921ee207ee")

UNIX_EPOCH = 116_444_736_000_000_000
"""1970-01-01 UTC as a time of time synchronisation: units of 100 ns since 1601-01-01 UTC."""


class IcMessageType(enum.IntEnum):
    """Component that a message belongs to; 0 is the negotiation of every component."""

    NEGOTIATE = 0
    HEARTBEAT = 1
    KVP = 2
    SHUTDOWN = 3
    TIMESYNC = 4
    VSS = 5
    REMOTE_DESKTOP = 6
    FILE_COPY = 7
    VM_SESSION = 8


class IcFlags(enum.IntFlag):
    """A host's request is ``TRANSACTION | REQUEST``, a guest's answer ``TRANSACTION | RESPONSE``."""

    TRANSACTION = 1
    REQUEST = 2
    RESPONSE = 4


class IcStatus(enum.IntEnum):
    """HRESULT in an answer of the guest; other values are possible."""

    OK = 0
    FAILURE = 0x80004005
    NOT_FOUND = 0x80041002
    NOT_SUPPORTED = 0x80070032
    ALREADY_EXISTS = 0x80070050
    BAD_ARGUMENT = 0x80070057
    DISK_FULL = 0x80070070
    NO_MORE_ITEMS = 0x80070103
    NOT_CONNECTED = 0x8007048F
    MACHINE_LOCKED = 0x800704F7


@dataclass(frozen=True, slots=True, order=True)
class IcVersion:
    """A framework or message version; versions are ordered, and formatted as ``3.2``."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class _VersionAdapter(c.Adapter):  # type: ignore[misc]
    """Two 16-bit numbers as an :class:`IcVersion`."""

    def _decode(self, obj: Any, context: Any, path: str) -> IcVersion:
        return IcVersion(int(obj.major), int(obj.minor))

    def _encode(self, obj: IcVersion, context: Any, path: str) -> dict[str, int]:
        return {"major": obj.major, "minor": obj.minor}


_Version = _VersionAdapter(c.Struct("major" / c.Int16ul, "minor" / c.Int16ul))


def _versions(count: Any) -> Any:
    return c.ExprAdapter(c.Array(count, _Version), lambda obj, _: tuple(obj), lambda obj, _: list(obj))


FRAMEWORK_VERSIONS = (IcVersion(1, 0), IcVersion(3, 0))
"""Framework versions that a host offers for every component; a guest chooses the highest that it supports."""


@dataclass(frozen=True, slots=True)
class IcHeader:
    """Header of every message, 20 bytes; ``size``: length of the body in bytes."""

    framework: IcVersion
    message_type: int
    message_version: IcVersion
    size: int
    status: int
    transaction_id: int
    flags: int


IC_MESSAGE = c.Struct(
    "pipe_type" / c.Int32ul,
    "pipe_length" / c.Int32ul,
    "framework_major" / c.Int16ul,
    "framework_minor" / c.Int16ul,
    "message_type" / c.Int16ul,
    "message_version_major" / c.Int16ul,
    "message_version_minor" / c.Int16ul,
    "size" / c.Int16ul,
    "status" / c.Int32ul,
    "transaction_id" / c.Int8ul,
    "flags" / c.Int8ul,
    c.Padding(2),
)
"""Pipe header and IC header, 28 bytes: everything before the body."""

_MESSAGE = derive_struct(IC_MESSAGE)

BODY_OFFSET = _MESSAGE.size
"""Offset of the body in the packet's payload: 28."""
IC_HEADER_SIZE = BODY_OFFSET - PIPE_HEADER.size


def parse_message(payload: bytes) -> tuple[PipeHeader, IcHeader]:
    """Parse the two headers of a payload of at least ``BODY_OFFSET`` bytes; the lengths in them are not checked."""
    (
        pipe_type,
        pipe_length,
        framework_major,
        framework_minor,
        message_type,
        version_major,
        version_minor,
        *rest,
    ) = _MESSAGE.unpack_from(payload)
    return PipeHeader(pipe_type, pipe_length), IcHeader(
        IcVersion(framework_major, framework_minor),
        message_type,
        IcVersion(version_major, version_minor),
        *rest,
    )


def build_message(header: IcHeader, body: bytes) -> bytes:
    """Return the payload: pipe header, ``header``, ``body``."""
    head = _MESSAGE.pack(
        PipeType.DATA,
        IC_HEADER_SIZE + len(body),
        header.framework.major,
        header.framework.minor,
        header.message_type,
        header.message_version.major,
        header.message_version.minor,
        header.size,
        header.status,
        header.transaction_id,
        header.flags,
    )
    return head + body


@dataclass(frozen=True, slots=True)
class NegotiateOffer:
    """Body of the host's negotiation message, 8 + 4 * n bytes: lists of versions, the lowest first."""

    frameworks: tuple[IcVersion, ...]
    messages: tuple[IcVersion, ...]


NEGOTIATE_OFFER = Record(
    NegotiateOffer,
    "_framework_count" / c.Rebuild(c.Int16ul, c.len_(c.this.frameworks)),
    "_message_count" / c.Rebuild(c.Int16ul, c.len_(c.this.messages)),
    "_reserved" / c.Padding(4),
    "frameworks" / _versions(c.this._framework_count),
    "messages" / _versions(c.this._message_count),
)


@dataclass(frozen=True, slots=True)
class NegotiateAnswer:
    """Body of the guest's negotiation answer, 16 bytes; with counts of 0 it supports none of the versions."""

    framework_count: int
    message_count: int
    framework: IcVersion
    message: IcVersion


NEGOTIATE_ANSWER = Record(
    NegotiateAnswer,
    "framework_count" / c.Int16ul,
    "message_count" / c.Int16ul,
    "_reserved" / c.Padding(4),
    "framework" / _Version,
    "message" / _Version,
)


class ApplicationState(enum.IntEnum):
    """State that a guest reports in its heartbeat; Linux always reports UNKNOWN."""

    UNKNOWN = 0
    HEALTHY = 1
    CRITICAL = 2
    STOPPED = 3


@dataclass(frozen=True, slots=True)
class HeartbeatBody:
    """Body of a heartbeat message, 40 bytes; the guest returns ``sequence`` + 1."""

    sequence: int
    application_state: int = ApplicationState.UNKNOWN


HEARTBEAT_BODY = Record(
    HeartbeatBody,
    "sequence" / c.Int64ul,
    "application_state" / c.Int32ul,
    "_reserved" / c.Padding(28),
)

_HEARTBEAT = derive_struct(HEARTBEAT_BODY.struct)

HEARTBEAT_MIN_BODY = 8
"""Bytes of body that an answer must have: the sequence. A guest may leave out the rest of the 40."""


def parse_heartbeat(body: bytes) -> HeartbeatBody:
    """Parse a body of at least ``HEARTBEAT_MIN_BODY`` bytes; missing bytes are read as zeros."""
    return HeartbeatBody(*_HEARTBEAT.unpack(body[: _HEARTBEAT.size].ljust(_HEARTBEAT.size, b"\0")))


def build_heartbeat(body: HeartbeatBody) -> bytes:
    """Return the 40 bytes of a heartbeat body."""
    return _HEARTBEAT.pack(body.sequence, body.application_state)


class ShutdownFlags(enum.IntFlag):
    """Flags of a shutdown request; without a flag the guest is asked for an orderly power-off."""

    FORCE = 1
    RESTART = 2
    HIBERNATE = 4


SHUTDOWN_REASON_PLANNED = 0x8000_0000
SHUTDOWN_MESSAGE_BYTES = 2048


@dataclass(frozen=True, slots=True)
class ShutdownBody:
    """Body of a shutdown request, 2060 bytes; ``timeout`` in seconds, ``message`` in UTF-16, padded with zeros."""

    reason: int
    timeout: int
    flags: int
    message: bytes


SHUTDOWN_BODY = Record(
    ShutdownBody,
    "reason" / c.Int32ul,
    "timeout" / c.Int32ul,
    "flags" / c.Int32ul,
    "message" / c.Bytes(SHUTDOWN_MESSAGE_BYTES),
)


class TimeSyncFlags(enum.IntFlag):
    """``SYNC``: set the clock now. ``SAMPLE``: a sample for gradual adjustment of the clock."""

    SYNC = 1
    SAMPLE = 2


@dataclass(frozen=True, slots=True)
class TimeSyncBody:
    """Time body of message versions 1.0 and 3.0, 28 bytes.

    Times in units of 100 ns since 1601-01-01 UTC, ``round_trip`` in units of 100 ns.
    """

    host_time: int
    guest_time: int
    round_trip: int
    flags: int


TIMESYNC_BODY = Record(
    TimeSyncBody,
    "host_time" / c.Int64ul,
    "guest_time" / c.Int64ul,
    "round_trip" / c.Int64ul,
    "flags" / c.Int8ul,
    "_padding" / c.Padding(3),
)


@dataclass(frozen=True, slots=True)
class TimeSyncReferenceBody:
    """Time body of message version 4.0, 24 bytes; ``reference_time``: reference time at ``host_time``.

    Both in units of 100 ns; ``host_time`` since 1601-01-01 UTC.
    """

    host_time: int
    reference_time: int
    flags: int
    leap: int = 0
    stratum: int = 0


TIMESYNC_REFERENCE_BODY = Record(
    TimeSyncReferenceBody,
    "host_time" / c.Int64ul,
    "reference_time" / c.Int64ul,
    "flags" / c.Int8ul,
    "leap" / c.Int8ul,
    "stratum" / c.Int8ul,
    "_padding" / c.Padding(5),
)
