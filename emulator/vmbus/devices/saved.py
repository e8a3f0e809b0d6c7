"""What a device keeps over a migration or a snapshot: one small record with a version before it.

    | Off | Size | What                                        |
    |   0 |    2 | version of the record, from 1               |
    |   2 |    n | the record, as its declaration says         |

A record only grows at its end, with a new version. A newer version than this code knows, or a length that does
not fit, is refused with the reason: guessing would corrupt a guest later.
"""

from __future__ import annotations

import struct
from typing import Generic, TypeVar

from vmbus.errors import DeviceError, MalformedError
from vmbus.wire.codec import Record

T = TypeVar("T")

_VERSION = struct.Struct("<H")


class SavedState(Generic[T]):
    """The codec of what one kind of device saves."""

    def __init__(self, record: Record[T], version: int = 1) -> None:
        self.record = record
        self.version = version
        record.compiled  # noqa: B018 - made now, not while a guest stands still

    @property
    def size(self) -> int:
        """Bytes that :meth:`save` gives."""
        return _VERSION.size + self.record.size

    def save(self, value: T) -> bytes:
        """The bytes for ``Device.save``."""
        return _VERSION.pack(self.version) + self.record.build(value)

    def load(self, state: bytes, name: str) -> T:
        """From what ``Device.restore`` was given. Raises :class:`~vmbus.errors.DeviceError`."""
        if len(state) < _VERSION.size:
            raise DeviceError(f"{name}: {len(state)} bytes are no saved state")
        (version,) = _VERSION.unpack_from(state)
        if version != self.version:
            raise DeviceError(
                f"{name}: saved state has version {version}, this emulator knows {self.version}"
            )
        body = state[_VERSION.size :]
        if len(body) != self.record.size:
            raise DeviceError(f"{name}: saved state of {len(body)} bytes, {self.record.size} expected")
        try:
            return self.record.parse(body)
        except MalformedError as error:
            raise DeviceError(f"{name}: saved state is damaged: {error}") from error
