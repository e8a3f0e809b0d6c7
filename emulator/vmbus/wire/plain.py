"""Declarations of which every field stands for itself: what saved state is made of.

A plain field is read and written without a look at any other field, so that a declaration of nothing else can be
compiled (:mod:`vmbus.wire.compiled`). Saved records are plain: they have many small fields, and a guest stands
still while they are written and read. Here are the pieces that construct has not, or not in that form:

=============  ====================================================================
``Counted``    a number, then so many elements
``VarUint``    an unsigned number in as few bytes as it needs
``Blob``       bytes, with their number before them
``Text``       text, in the same way
``Nested``     a record within a record
``Maybe``      a field that may be ``None``
``Members``    any number of the same thing
``Several``    a fixed number of it
``Guid``       a GUID in its wire form
=============  ====================================================================
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

import construct as c

_VARINT_BYTES = 10


class PlainAdapter(c.Adapter):  # type: ignore[misc]
    """An adapter that looks at nothing but the value itself: it is given no context."""


class OwnForm(c.Construct):  # type: ignore[misc]
    """A form that reads and writes itself: ``take`` and ``give`` are all that there is to it."""

    longest = 0
    """The most bytes that one value can have."""

    def take(self, data: bytes, at: int) -> tuple[Any, int]:
        """The value at ``at``, and where the next one begins.

        Raises ``IndexError`` when the data end before it, ``construct.ValidationError`` for a form that is none.
        """
        raise NotImplementedError

    def give(self, value: Any) -> bytes:
        """The bytes of ``value``. Raises ``construct.IntegerError`` for one that has none."""
        raise NotImplementedError

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        start = c.stream_tell(stream, path)
        data = stream.read(self.longest)
        try:
            value, used = self.take(data, 0)
        except IndexError as error:
            raise c.StreamError("the data end early", path) from error
        c.stream_seek(stream, start + used, 0, path)
        return value

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        encoded = self.give(obj)
        c.stream_write(stream, encoded, len(encoded), path)
        return obj


def take_varint(data: bytes, at: int) -> tuple[int, int]:
    """As ``VarUint.take``."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64 or (shift and not byte):
                raise c.ValidationError("a varint that is too large or too long")
            return value, at
        shift += 7
        if shift == 7 * _VARINT_BYTES:
            raise c.ValidationError("a varint of more than 10 bytes")


def append_varint(encoded: bytearray, value: int) -> None:
    """``value`` is not negative, and below 2**64."""
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)


def give_varint(value: int) -> bytes:
    """As ``VarUint.give``."""
    if not isinstance(value, int) or value < 0 or value >> 64:
        raise c.IntegerError(f"{value!r} is no unsigned 64-bit number")
    encoded = bytearray()
    append_varint(encoded, value)
    return bytes(encoded)


class _VarUint(OwnForm):
    """An unsigned number below 2**64, least significant 7 bits first; bit 7 says that more follow."""

    longest = _VARINT_BYTES

    def take(self, data: bytes, at: int) -> tuple[int, int]:
        return take_varint(data, at)

    def give(self, value: int) -> bytes:
        return give_varint(value)


VarUint = _VarUint()


class Counted(c.Subconstruct):  # type: ignore[misc]
    """construct's ``PrefixedArray``, for plain fields: the number of elements, then the elements."""

    def __init__(self, countfield: Any, subcon: Any) -> None:
        super().__init__(subcon)
        self.countfield = countfield

    def _parse(self, stream: Any, context: Any, path: str) -> list[Any]:
        count = self.countfield._parse(stream, context, path)
        parse = self.subcon._parsereport
        return [parse(stream, context, path) for _ in range(count)]

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        self.countfield._build(len(obj), stream, context, path)
        for each in obj:
            self.subcon._build(each, stream, context, path)
        return obj


class Nested(PlainAdapter):
    """A record within a record, as its dataclass."""

    def __init__(self, record: Any) -> None:
        super().__init__(record.struct)
        self.record = record
        self._names = tuple(sub.name for sub in record.struct.subcons if sub.name)

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        return self.record.cls(**{name: obj[name] for name in self._names})

    def _encode(self, obj: Any, context: Any, path: str) -> dict[str, Any]:
        return {name: getattr(obj, name) for name in self._names}


class Maybe(PlainAdapter):
    """A field that may be ``None``: one byte says whether it is there."""

    def __init__(self, subcon: Any) -> None:
        super().__init__(Counted(c.Int8ul, subcon))
        self.inner = subcon

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        if len(obj) > 1:
            raise c.ValidationError(f"{len(obj)} where there can be one", path)
        return obj[0] if obj else None

    def _encode(self, obj: Any, context: Any, path: str) -> list[Any]:
        return [] if obj is None else [obj]


class Several(PlainAdapter):
    """As many as construct's array ``subcon`` has, as a tuple."""

    def _decode(self, obj: Any, context: Any, path: str) -> tuple[Any, ...]:
        return tuple(obj)

    def _encode(self, obj: Any, context: Any, path: str) -> Any:
        return obj


class Members(Several):
    """Any number of the same thing, as a tuple."""

    def __init__(self, subcon: Any) -> None:
        super().__init__(Counted(VarUint, subcon))


Blob = c.Prefixed(VarUint, c.GreedyBytes)
"""Bytes with their number before them."""
Text = c.Prefixed(VarUint, c.GreedyString("utf8"))
"""Text, as its UTF-8."""


_same_guid: Callable[[bytes], uuid.UUID] = functools.lru_cache(maxsize=4096)(
    lambda raw: uuid.UUID(bytes_le=raw)
)
_same_bytes: Callable[[uuid.UUID], bytes] = functools.lru_cache(maxsize=4096)(lambda guid: guid.bytes_le)


class _GuidAdapter(PlainAdapter):
    """A GUID in its wire form: the first three groups little-endian. There are few, and each is met often."""

    def _decode(self, obj: bytes, context: Any, path: str) -> uuid.UUID:
        return _same_guid(bytes(obj))

    def _encode(self, obj: uuid.UUID, context: Any, path: str) -> bytes:
        return _same_bytes(obj)


Guid = _GuidAdapter(c.Bytes(16))
