"""The saved state of a device: one small record with a version before it.

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
    """The codec of the state that one kind of device saves."""

    def __init__(self, record: Record[T], version: int = 1) -> None:
        self.record = record
        self.version = version
        record.compiled  # noqa: B018 - compiled now, and not while a guest is paused

    @property
    def size(self) -> int:
        """Bytes that :meth:`save` returns."""
        return _VERSION.size + self.record.size

    def save(self, value: T) -> bytes:
        """Return the bytes for ``Device.save``."""
        return _VERSION.pack(self.version) + self.record.build(value)

    def load(self, state: bytes, name: str) -> T:
        """Return the record in the bytes that ``Device.restore`` was given; ``name`` is that of the device.

        Raises :class:`~vmbus.errors.DeviceError` if they are not such a state.
        """
        if len(state) < _VERSION.size:
            raise DeviceError(f"{name}: {len(state)} bytes are too few for a saved state")
        (version,) = _VERSION.unpack_from(state)
        if version != self.version:
            raise DeviceError(
                f"{name}: saved state has version {version}, but this emulator only loads {self.version}"
            )
        body = state[_VERSION.size :]
        if len(body) != self.record.size:
            raise DeviceError(f"{name}: saved state has {len(body)} bytes, expected {self.record.size}")
        try:
            return self.record.parse(body)
        except MalformedError as error:
            raise DeviceError(f"{name}: saved state is damaged: {error}") from error
