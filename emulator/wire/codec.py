"""From a ``construct`` declaration to a frozen dataclass and back.

The declaration is the one source of a layout. ``Record`` binds it to a dataclass of the same field names, so
that nothing past the border of ``wire`` sees a construct container::

    @dataclass(frozen=True, slots=True)
    class Rescind:
        relid: int

    RESCIND = Record(Rescind, "relid" / Int32ul)
    RESCIND.parse(b"\\x01\\0\\0\\0")   # Rescind(relid=1)

Fields of the declaration whose name begins with ``_`` (padding, reserved) are not given to the dataclass and
are built as their declared default (construct's ``Padding`` and ``Default`` do that).

``derive_struct`` turns a declaration of fixed-size little-endian integers and byte strings into the
``struct.Struct`` with the same layout, for the hot paths. Measured (CPython 3.11): construct 11 us a packet
header, compiled 2.9 us, ``struct`` 0.09 us.
"""

from __future__ import annotations

import dataclasses
import struct
import uuid
from typing import Any, Generic, TypeVar

import construct as c

from emulator.errors import InternalError, MalformedError

T = TypeVar("T")


class _GuidAdapter(c.Adapter):  # type: ignore[misc]
    """A GUID in its wire form: the first three groups little-endian."""

    def _decode(self, obj: bytes, context: Any, path: str) -> uuid.UUID:
        return uuid.UUID(bytes_le=bytes(obj))

    def _encode(self, obj: uuid.UUID, context: Any, path: str) -> bytes:
        return obj.bytes_le


Guid = _GuidAdapter(c.Bytes(16))

_STRUCT_CODES = {
    "Int8ul": "B",
    "Int16ul": "H",
    "Int32ul": "I",
    "Int64ul": "Q",
    "Int8sl": "b",
    "Int16sl": "h",
    "Int32sl": "i",
    "Int64sl": "q",
}


class Record(Generic[T]):
    """The codec of one dataclass; ``size`` is the fixed (or least) length in bytes."""

    def __init__(self, cls: type[T], *fields: Any) -> None:
        self.cls = cls
        self.struct = c.Struct(*fields)
        self._names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        declared = {s.name for s in self.struct.subcons if s.name and not s.name.startswith("_")}
        if declared != set(self._names):
            raise InternalError(
                f"{cls.__name__}: declaration {sorted(declared)} is not {sorted(self._names)}"
            )

    @property
    def size(self) -> int:
        return int(self.struct.sizeof())

    def parse(self, data: bytes) -> T:
        """Parse the start of ``data``; what follows is ignored. Raises :class:`MalformedError`."""
        try:
            found = self.struct.parse(data)
        except (c.ConstructError, OverflowError) as error:
            raise MalformedError(
                "malformed", f"{len(data)} bytes are no {self.cls.__name__}: {error}"
            ) from error
        return self.cls(**{name: found[name] for name in self._names})

    def build(self, value: T) -> bytes:
        """The bytes of ``value``. Raises :class:`InternalError` for a value that does not fit."""
        try:
            return bytes(self.struct.build({name: getattr(value, name) for name in self._names}))
        except (c.ConstructError, struct.error, OverflowError) as error:
            raise InternalError(f"{value!r} does not fit its declaration: {error}") from error


def derive_struct(declaration: c.Struct) -> struct.Struct:
    """The ``struct.Struct`` of a declaration made of fixed-size integers and byte strings only."""
    code = "<"
    for subcon in declaration.subcons:
        inner: Any = subcon
        while isinstance(inner, (c.Renamed, c.Default)):
            if type(inner) is c.FormatField:
                break
            inner = inner.subcon
        if isinstance(inner, c.FormatField):
            for name, letter in _STRUCT_CODES.items():
                if getattr(c, name).fmtstr == inner.fmtstr:
                    code += letter
                    break
            else:
                raise InternalError(f"{subcon.name}: no little-endian integer")
        elif isinstance(inner, (c.Bytes, c.Padded)):
            code += f"{inner.sizeof()}{'x' if isinstance(inner, c.Padded) else 's'}"
        else:
            raise InternalError(f"{subcon.name}: {type(inner).__name__} has no struct code")
    derived = struct.Struct(code)
    if derived.size != declaration.sizeof():
        raise InternalError(f"{code}: {derived.size} bytes, declared {declaration.sizeof()}")
    return derived
