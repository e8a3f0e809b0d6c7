"""Building blocks of plain declarations, in which no field depends on another field.

A declaration of plain fields only can be compiled (:mod:`vmbus.wire.compiled`). Saved records are plain: they have
many small fields, and a guest is paused while they are written and read. The blocks that construct lacks, or has in
another form:

=============  ====================================================================
``Counted``    a count, then that many elements
``VarUint``    an unsigned number, 7 bits per byte
``Blob``       bytes, preceded by their number
``Text``       UTF-8 text, preceded by its number of bytes
``Nested``     a record within a record
``Nullable``   a field that may be ``None``
``VarTuple``   a tuple of any length
``FixedTuple`` a tuple of fixed length
``Guid``       a GUID in its wire form
=============  ====================================================================
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any

import construct as c

from vmbus.errors import InternalError

_VARINT_BYTES = 10
_ONE_BYTE = tuple(bytes((value,)) for value in range(0x80))


class PlainAdapter(c.Adapter):  # type: ignore[misc]
    """An adapter that depends only on the value itself; its context is None when it is called by compiled code."""


class CustomField(c.Construct):  # type: ignore[misc]
    """A field with its own parser and builder, ``decode`` and ``encode``, which compiled code calls directly."""

    longest = 0
    """Bytes that one value can have at most."""

    def decode(self, data: bytes, at: int) -> tuple[Any, int]:
        """Return the value at offset ``at`` and the offset behind it.

        Raises ``IndexError`` if the data end within the value, ``construct.ValidationError`` for an invalid form.
        """
        raise NotImplementedError

    def encode(self, value: Any) -> bytes:
        """Return the bytes of ``value``. Raises ``construct.IntegerError`` for a value that has no form."""
        raise NotImplementedError

    def _parse(self, stream: Any, context: Any, path: str) -> Any:
        start = c.stream_tell(stream, path)
        data = stream.read(self.longest)
        try:
            value, used = self.decode(data, 0)
        except IndexError as error:
            raise c.StreamError("the data end within the field", path) from error
        c.stream_seek(stream, start + used, 0, path)
        return value

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        encoded = self.encode(obj)
        c.stream_write(stream, encoded, len(encoded), path)
        return obj


def decode_varint(data: bytes, at: int) -> tuple[int, int]:
    """Parse a varint: ``VarUint.decode`` as a function."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64 or (shift and not byte):
                raise c.ValidationError("a varint of more than 64 bits, or with a needless last byte")
            return value, at
        shift += 7
        if shift == 7 * _VARINT_BYTES:
            raise c.ValidationError("a varint of more than 10 bytes")


def append_varint(encoded: bytearray, value: int) -> None:
    """Append ``value`` (0 to 2**64 - 1) as a varint; the range is not checked."""
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)


def encode_varint(value: int) -> bytes:
    """Build a varint: ``VarUint.encode`` as a function."""
    if not isinstance(value, int) or value < 0 or value >> 64:
        raise c.IntegerError(f"{value!r} is not an unsigned 64-bit number")
    if value < 0x80:  # most of them: of a record with a hundred requests, all but one or two of each
        return _ONE_BYTE[value]
    encoded = bytearray()
    append_varint(encoded, value)
    return bytes(encoded)


class _VarUint(CustomField):
    """An unsigned number below 2**64 (base 128): least significant 7 bits first, bit 7 set if more bytes follow."""

    longest = _VARINT_BYTES

    def decode(self, data: bytes, at: int) -> tuple[int, int]:
        return decode_varint(data, at)

    def encode(self, value: int) -> bytes:
        return encode_varint(value)


VarUint = _VarUint()


class Counted(c.Subconstruct):  # type: ignore[misc]
    """The number of elements, then the elements: construct's ``PrefixedArray`` for plain fields.

    ``most``: more elements are refused, by reader and writer, before the first of them is parsed or built. Set it
    where many elements take few bytes.
    """

    def __init__(self, countfield: Any, subcon: Any, most: int | None = None) -> None:
        super().__init__(subcon)
        self.countfield = countfield
        self.most = most

    def check(self, count: int, path: str = "") -> None:
        """Raise ``construct.ValidationError`` for more than ``most`` elements."""
        if self.most is not None and count > self.most:
            raise c.ValidationError(f"{count} elements, at most {self.most}", path)

    def _parse(self, stream: Any, context: Any, path: str) -> list[Any]:
        count = self.countfield._parse(stream, context, path)
        self.check(count, path)
        parse = self.subcon._parsereport
        return [parse(stream, context, path) for _ in range(count)]

    def _build(self, obj: Any, stream: Any, context: Any, path: str) -> Any:
        self.check(len(obj), path)
        self.countfield._build(len(obj), stream, context, path)
        for each in obj:
            self.subcon._build(each, stream, context, path)
        return obj


class Nested(PlainAdapter):
    """A record within a record; its value is the dataclass of the inner record."""

    def __init__(self, record: Any) -> None:
        if record.optional:
            raise InternalError(
                f"{record.cls.__name__} has optional fields, and no length within another record"
            )
        super().__init__(record.struct)
        self.record = record
        self._names = tuple(sub.name for sub in record.struct.subcons if sub.name)

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        return self.record.cls(**{name: obj[name] for name in self._names})

    def _encode(self, obj: Any, context: Any, path: str) -> dict[str, Any]:
        return {name: getattr(obj, name) for name in self._names}


class Nullable(PlainAdapter):
    """A field that may be ``None``: a byte (0 or 1), then the field if the byte is 1."""

    def __init__(self, subcon: Any) -> None:
        super().__init__(Counted(c.Int8ul, subcon))
        self.inner = subcon

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        if len(obj) > 1:
            raise c.ValidationError(f"{len(obj)} elements, at most 1", path)
        return obj[0] if obj else None

    def _encode(self, obj: Any, context: Any, path: str) -> list[Any]:
        return [] if obj is None else [obj]


class FixedTuple(PlainAdapter):
    """The elements of construct's array ``subcon``, as a tuple."""

    def _decode(self, obj: Any, context: Any, path: str) -> tuple[Any, ...]:
        return tuple(obj)

    def _encode(self, obj: Any, context: Any, path: str) -> Any:
        return obj


class VarTuple(FixedTuple):
    """The number of elements as a varint, then the elements; the value is a tuple."""

    def __init__(self, subcon: Any, most: int | None = None) -> None:
        super().__init__(Counted(VarUint, subcon, most))


Blob = c.Prefixed(VarUint, c.GreedyBytes)
"""Bytes, preceded by their number as a varint."""
Text = c.Prefixed(VarUint, c.GreedyString("utf8"))
"""UTF-8 text, preceded by its number of bytes as a varint."""


_same_guid: Callable[[bytes], uuid.UUID] = functools.lru_cache(maxsize=4096)(
    lambda raw: uuid.UUID(bytes_le=raw)
)
_same_bytes: Callable[[uuid.UUID], bytes] = functools.lru_cache(maxsize=4096)(lambda guid: guid.bytes_le)


class _GuidAdapter(PlainAdapter):
    """A GUID in its wire form, 16 bytes: the first three groups are little-endian.

    Conversions are cached, because there are few GUIDs and each one is parsed often.
    """

    def _decode(self, obj: bytes, context: Any, path: str) -> uuid.UUID:
        return _same_guid(bytes(obj))

    def _encode(self, obj: uuid.UUID, context: Any, path: str) -> bytes:
        return _same_bytes(obj)


Guid = _GuidAdapter(c.Bytes(16))
