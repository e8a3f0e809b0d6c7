"""The saved state of a device: one small record with a version before it.

    | Off | Size | What                                        |
    |   0 |    2 | version of the record, from 1               |
    |   2 |    n | the record, as its declaration says         |

Behind the record there may be optional fields (:mod:`vmbus.wire.optional`): a field that is added there, with a
default, is ignored by releases that do not know it, and not written while it has its default. What must not be
ignored is ``required``, or a new version. A newer version than this code knows, or other bytes behind the record,
are refused with the reason: guessing would corrupt a guest later.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import Generic, TypeVar

from vmbus.errors import DeviceError, MalformedError, TooNewError
from vmbus.wire.codec import Record
from vmbus.wire.optional import parse_fields

_logger = logging.getLogger(__name__)

_SHOWN = 16
"""Numbers of ignored fields that are shown."""

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
        """Bytes that :meth:`save` returns, without optional fields."""
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
            upgrade = "; upgrade this emulator to the release that wrote it" if version > self.version else ""
            raise DeviceError(
                f"{name}: saved state has version {version}, but this emulator only loads {self.version}{upgrade}"
            )
        body = state[_VERSION.size :]
        if len(body) < self.record.size:
            raise DeviceError(f"{name}: saved state has {len(body)} bytes, expected {self.record.size}")
        try:
            found, ignored = self.record.parse_all(body)
        except MalformedError as error:
            raise refused(name, error) from error
        report_ignored(name, ignored)
        return found


def skip_optional(data: bytes, name: str) -> None:
    """Check that ``data``, behind a record that has no optional fields itself, are fields that may be ignored.

    Raises :class:`~vmbus.errors.DeviceError`.
    """
    try:
        report_ignored(name, parse_fields((), data, {})[1])
    except MalformedError as error:
        raise refused(name, error) from error


def refused(name: str, error: MalformedError) -> DeviceError:
    """Return the refusal of a state of the device ``name``."""
    if isinstance(error, TooNewError):
        return DeviceError(
            f"{name}: saved state is of a later release, upgrade this emulator: {error.detail}"
        )
    return DeviceError(f"{name}: saved state is damaged: {error}")


def report_ignored(name: str, numbers: Sequence[int]) -> None:
    """Log that fields of a later release are ignored."""
    if numbers:
        _logger.warning(
            "%s: the saved state has fields of a later release, which are ignored: %s",
            name,
            ", ".join(map(str, numbers[:_SHOWN])),
        )
