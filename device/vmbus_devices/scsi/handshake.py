"""The negotiation between a guest's driver and the host, before the first command.

Source: docs/protocol/devices.md#storage-handshake.

    BEGIN --7--> VERSION --9--> PROPERTIES --10--> END --8--> READY
                  ^    | unknown version             | 13       | 13
                  '----'                             '-> END    '-> READY

    | packet                     | taken in       | otherwise answered       |
    |  7 begin                   | BEGIN          | INVALID_DEVICE_STATE     |
    |  9 query protocol version  | VERSION        | INVALID_DEVICE_STATE     |
    | 10 query properties        | PROPERTIES     | INVALID_DEVICE_STATE     |
    |  8 end                     | END            | INVALID_DEVICE_STATE     |
    | 13 create sub-channels     | END, READY     | INVALID_DEVICE_STATE; INVALID_PARAMETER for too many |

A driver proposes versions, the newest first, until the host accepts one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from vmbus.errors import MalformedError
from vmbus.wire.storvsp import (
    CHANNEL_PROPERTIES,
    MULTI_CHANNEL,
    SUBCHANNEL_REQUEST,
    VERSION_QUERY,
    ChannelProperties,
    Operation,
    ProtocolVersion,
    Status,
    VersionQuery,
)

OPERATIONS = (
    Operation.BEGIN_INITIALIZATION,
    Operation.END_INITIALIZATION,
    Operation.QUERY_PROTOCOL_VERSION,
    Operation.QUERY_PROPERTIES,
    Operation.CREATE_SUB_CHANNELS,
)
"""The packets of the table."""


class Stage(enum.Enum):
    """The next packet that the guest has to send."""

    BEGIN = 0
    VERSION = 1
    PROPERTIES = 2
    END = 3
    READY = 4


@dataclass(slots=True)
class Handshake:
    """One opening of the primary channel. ``max_transfer`` in bytes."""

    max_version: ProtocolVersion
    max_subchannels: int
    max_transfer: int
    stage: Stage = Stage.BEGIN
    version: ProtocolVersion | None = None
    subchannels: int | None = field(default=None)
    """How many the guest was granted; ``None`` before its request."""

    @property
    def ready(self) -> bool:
        """Whether commands are executed."""
        return self.stage is Stage.READY

    def take(self, operation: int, union: bytes) -> tuple[Status, bytes]:
        """Return the answer to an initialisation packet; ``union``: what follows its header."""
        if operation == Operation.BEGIN_INITIALIZATION and self.stage is Stage.BEGIN:
            self.stage = Stage.VERSION
            return Status.SUCCESS, b""
        if operation == Operation.QUERY_PROTOCOL_VERSION and self.stage is Stage.VERSION:
            return self._version(union)
        if operation == Operation.QUERY_PROPERTIES and self.stage is Stage.PROPERTIES:
            self.stage = Stage.END
            return Status.SUCCESS, self._properties()
        if operation == Operation.END_INITIALIZATION and self.stage is Stage.END:
            self.stage = Stage.READY
            return Status.SUCCESS, b""
        if operation == Operation.CREATE_SUB_CHANNELS and self.stage in (Stage.END, Stage.READY):
            return self._create(union), b""
        return Status.INVALID_DEVICE_STATE, b""

    def _version(self, union: bytes) -> tuple[Status, bytes]:
        try:
            query = VERSION_QUERY.parse(union)
        except MalformedError:
            return Status.INVALID_PARAMETER, b""
        answer = VERSION_QUERY.build(VersionQuery(query.version, 0))
        if query.version > self.max_version or query.version not in ProtocolVersion.__members__.values():
            return Status.REVISION_MISMATCH, answer
        self.version = ProtocolVersion(query.version)
        self.stage = Stage.PROPERTIES
        return Status.SUCCESS, answer

    def _allowed_subchannels(self) -> int:
        # Sub-channels exist since the protocol of Windows 8.
        return self.max_subchannels if (self.version or 0) >= ProtocolVersion.WIN8 else 0

    def _properties(self) -> bytes:
        allowed = self._allowed_subchannels()
        return CHANNEL_PROPERTIES.build(
            ChannelProperties(allowed, MULTI_CHANNEL if allowed else 0, self.max_transfer)
        )

    def _create(self, union: bytes) -> Status:
        try:
            count = SUBCHANNEL_REQUEST.parse(union).count
        except MalformedError:
            return Status.INVALID_PARAMETER
        if count > self._allowed_subchannels():
            return Status.INVALID_PARAMETER
        if self.subchannels is not None:
            return Status.INVALID_DEVICE_STATE
        self.subchannels = count
        return Status.SUCCESS
