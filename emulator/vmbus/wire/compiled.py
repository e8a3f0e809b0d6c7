"""Python functions compiled from a plain declaration: they parse and build about ten times faster than construct.

    compile_record(Point, Struct("x" / Int32ul, "name" / Text))     makes, in short:

    def decode(data, at):                         def encode(value, write):
        (v1,) = unpack1(data, at)                     write(pack1(value.x))
        at += 4                                       v1 = value.name.encode()
        v2 = data[at]                                 write(encode_varint(len(v1)))
        ...                                           write(v1)
        return Point(v1, v3), at

Adjacent fields of fixed size, also those of nested records, share one ``struct.Struct``. Adapters are called. A
declaration that is not plain (one with a field that depends on another field) is not compiled.

The functions have no error messages of their own: they raise any exception of ``REFUSED_DATA`` or ``REFUSED_VALUES``,
and the caller repeats the call with construct, which raises the error with a message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import Any

import construct as c

from vmbus.wire.plain import (
    Blob,
    Counted,
    CustomField,
    FixedTuple,
    Guid,
    Nested,
    Nullable,
    PlainAdapter,
    Text,
    VarTuple,
    VarUint,
    decode_varint,
    encode_varint,
)

Decode = Callable[[bytes, int], tuple[Any, int]]
"""``decode(data, at)`` returns the value at offset ``at`` and the offset behind it."""
Encode = Callable[[Any, Callable[[bytes], object]], None]
"""``encode(value, write)`` calls ``write`` with the bytes of ``value``, piece by piece."""

REFUSED_DATA = (c.ConstructError, struct.error, IndexError, ValueError, OverflowError)
"""Exceptions of ``decode`` for data that the declaration does not accept."""
REFUSED_VALUES = (*REFUSED_DATA, TypeError, AttributeError)
"""Exceptions of ``encode`` for a value that the declaration does not accept."""

_INTEGER_CODES = {
    "Int8ul": "B",
    "Int16ul": "H",
    "Int32ul": "I",
    "Int64ul": "Q",
    "Int8sl": "b",
    "Int16sl": "h",
    "Int32sl": "i",
    "Int64sl": "q",
}
"""construct's little-endian integers and their ``struct`` codes."""
_LETTERS = {getattr(c, name).fmtstr: letter for name, letter in _INTEGER_CODES.items()}


class NotPlainError(Exception):
    """A declaration that cannot be compiled."""


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """The two functions of a declaration; ``size`` in bytes, None if it varies."""

    decode: Decode
    encode: Encode
    size: int | None


def compile_record(cls: type, declaration: c.Struct) -> Compiled | None:
    """Compile the declaration of a dataclass (see :class:`~vmbus.wire.codec.Record`); ``None`` if it is not plain."""
    writer = _Writer()
    try:
        decoder = _Decoder(writer).record(cls, declaration)
        encoder = _Encoder(writer).record(cls, declaration)
    except NotPlainError:
        return None
    source = "\n".join([*decoder, *encoder])
    exec(compile(source, f"<{cls.__name__}>", "exec"), writer.names)
    size = writer.size if writer.fixed else None
    return Compiled(writer.names["decode"], writer.names["encode"], size)


def integer_letter(subcon: Any) -> str | None:
    """Return the ``struct`` code of a little-endian integer; ``None`` for any other field."""
    return _LETTERS.get(subcon.fmtstr) if isinstance(subcon, c.FormatField) else None


def unwrapped(subcon: Any) -> Any:
    """Return the declaration of a field without its name."""
    while isinstance(subcon, c.Renamed):
        subcon = subcon.subcon
    return subcon


class _Writer:
    """State shared by the writers of both functions: variable names, and the objects that the source refers to."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.fixed = True
        self.size = 0
        self._count = 0

    def variable(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def refer(self, prefix: str, what: Any) -> str:
        """Return a name by which the source can refer to ``what``."""
        self._count += 1
        name = f"{prefix}{self._count}"
        self.names[name] = what
        return name


def _members(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _hidden(subcon: Any) -> bool:
    """Return whether a field is not part of the dataclass: padding, a constant, or a field with a default."""
    return not subcon.name or subcon.name.startswith("_")


def _constant(subcon: Any) -> tuple[str, Any, bool] | None:
    """Return code and value of a hidden field, and whether parsing requires the value; ``None`` for padding."""
    inner = unwrapped(subcon)
    if isinstance(inner, c.Padded) and inner.subcon is c.Pass:
        return None
    if isinstance(inner, c.Default) and type(inner.value) is int and (letter := integer_letter(inner.subcon)):
        return letter, inner.value, False
    if isinstance(inner, c.Const) and isinstance(inner.value, bytes) and isinstance(inner.subcon, c.Bytes):
        return f"{len(inner.value)}s", inner.value, True
    raise NotPlainError(subcon.name)


class _Function:
    """The source of one function. Fields of fixed size are collected, and written as one ``struct`` call."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._lines: list[str] = []
        self._indent = "    "
        self._code = ""

    def _line(self, text: str) -> None:
        self._lines.append(self._indent + text)

    def _flush(self) -> None:
        """Write the ``struct`` call of the fields that were collected."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _block(self, head: str) -> Iterator[None]:
        """Indent the lines that are written in the context below ``head``."""
        self._flush()
        self._line(head)
        before, self._indent = self._indent, self._indent + "    "
        yield
        self._flush()
        self._indent = before


class _Decoder(_Function):
    """Writer of ``decode``."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__(writer)
        self._targets: list[str] = []
        self._after: list[str] = []

    def record(self, cls: type, declaration: c.Struct) -> list[str]:
        value = self._record(cls, declaration)
        self._flush()
        return ["def decode(data, at):", *self._lines, f"    return {value}, at"]

    def _flush(self) -> None:
        if self._code:
            layout = struct.Struct("<" + self._code)
            self._writer.size += layout.size
            unpack = self._writer.refer("unpack", layout.unpack_from)
            if self._targets:
                self._line(f"{', '.join(self._targets)}, = {unpack}(data, at)")
            else:
                self._line(f"{unpack}(data, at)")
            self._line(f"at += {layout.size}")
        for text in self._after:
            self._line(text)
        self._code, self._targets, self._after = "", [], []

    def _varying(self) -> None:
        self._writer.fixed = False
        self._flush()

    def _fields(self, declaration: c.Struct) -> dict[str, str]:
        """Return the names of the variables that hold the fields, by field name."""
        found = {}
        for subcon in declaration.subcons:
            if not _hidden(subcon):
                found[subcon.name] = self.value(subcon)
            elif (constant := _constant(subcon)) is None:
                self._code += f"{unwrapped(subcon).sizeof()}x"
            else:
                letter, expected, strict = constant
                variable = self._fixed(letter)
                if strict:
                    self._after.append(f"if {variable} != {expected!r}: raise ValueError")
        return found

    def _record(self, cls: type, declaration: c.Struct) -> str:
        """Return the expression of a dataclass, valid after the next :meth:`_flush`."""
        fields = self._fields(declaration)
        members = _members(cls)[: len(fields)]  # optional fields are last, and not in the declaration
        if set(fields) != set(members):
            raise NotPlainError(cls.__name__)
        arguments = ", ".join(fields[name] for name in members)
        return f"{self._writer.refer('cls', cls)}({arguments})"

    def _fixed(self, code: str) -> str:
        variable = self._writer.variable()
        self._code += code
        self._targets.append(variable)
        return variable

    def _then(self, expression: str) -> str:
        """Return a variable with the value of ``expression``, which is evaluated after the next ``struct`` call."""
        variable = self._writer.variable()
        self._after.append(f"{variable} = {expression}")
        return variable

    def value(self, subcon: Any) -> str:
        """Return a variable with the value of ``subcon``, valid after the next :meth:`_flush`."""
        inner = unwrapped(subcon)
        if letter := integer_letter(inner):
            return self._fixed(letter)
        if inner is Guid:
            decode = self._writer.refer("guid", Guid._decode)
            return self._then(f"{decode}({self._fixed('16s')}, None, '')")
        if isinstance(inner, c.Bytes) and isinstance(inner.length, int):
            return self._fixed(f"{inner.length}s")
        if isinstance(inner, c.BytesInteger) and isinstance(inner.length, int) and inner.swapped is True:
            raw = self._fixed(f"{inner.length}s")
            return self._then(f"int.from_bytes({raw}, 'little', signed={bool(inner.signed)})")
        if isinstance(inner, Nested):
            return self._then(self._record(inner.record.cls, inner.record.struct))
        if isinstance(inner, Nullable):
            return self._nullable(inner)
        if isinstance(inner, VarTuple):
            return self._then(f"tuple({self._counted(inner.subcon)})")
        if isinstance(inner, FixedTuple):
            return self._then(f"tuple({self.value(inner.subcon)})")
        if isinstance(inner, PlainAdapter):
            decode = self._writer.refer("decode", inner._decode)
            return self._then(f"{decode}({self.value(inner.subcon)}, None, '')")
        if isinstance(inner, c.Array) and isinstance(inner.count, int):
            return self._then(f"[{', '.join([self.value(inner.subcon) for _ in range(inner.count)])}]")
        if isinstance(inner, c.Struct):
            fields = self._fields(inner)
            return self._then("{" + ", ".join(f"{name!r}: {var}" for name, var in fields.items()) + "}")
        if isinstance(inner, Counted):
            return self._counted(inner)
        return self._custom_field(inner)

    def _custom_field(self, inner: Any) -> str:
        self._varying()
        if inner in (Blob, Text):
            count = self._varint()
            raw = self._writer.variable()
            self._line(f"{raw} = data[at:at + {count}]")
            self._line(f"if len({raw}) != {count}: raise IndexError")
            self._line(f"at += {count}")
            return raw if inner is Blob else self._then(f"{raw}.decode()")
        if inner is VarUint:
            return self._varint()
        if isinstance(inner, CustomField):
            variable, decode = self._writer.variable(), self._writer.refer("decode", inner.decode)
            self._line(f"{variable}, at = {decode}(data, at)")
            return variable
        raise NotPlainError(str(inner))

    def _varint(self) -> str:
        variable, decode = self._writer.variable(), self._writer.refer("decode", decode_varint)
        self._line(f"{variable} = data[at]")
        self._line("at += 1")
        self._line(f"if {variable} >= 128: {variable}, at = {decode}(data, at - 1)")
        return variable

    def _element(self, head: str, subcon: Any, result: str) -> None:
        """Write ``head`` and, below it, code that parses ``subcon`` and then ``result``, formatted with the value."""
        with self._block(head):
            value = self.value(subcon)
            self._flush()
            self._line(result.format(value))

    def _nullable(self, nullable: Nullable) -> str:
        there = self.value(c.Int8ul)
        self._varying()
        found = self._writer.variable()
        self._line(f"{found} = None")
        self._element(f"if {there}:", nullable.inner, f"{found} = {{}}")
        self._line(f"if {there} > 1: raise ValueError")
        return found

    def _counted(self, counted: Counted) -> str:
        count = self.value(counted.countfield)
        self._varying()
        if counted.most is not None:
            self._line(f"if {count} > {counted.most}: {self._writer.refer('check', counted.check)}({count})")
        found = self._writer.variable()
        self._line(f"{found} = []")
        self._element(f"for _ in range({count}):", counted.subcon, f"{found}.append({{}})")
        return found


class _Encoder(_Function):
    """Writer of ``encode``, the inverse of ``decode``."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__(writer)
        self._values: list[str] = []

    def record(self, cls: type, declaration: c.Struct) -> list[str]:
        self._fields(declaration, "value.{}")
        self._flush()
        return ["def encode(value, write):", *(self._lines or ["    pass"])]

    def _flush(self) -> None:
        if self._code:
            pack = self._writer.refer("pack", struct.Struct("<" + self._code).pack)
            self._line(f"write({pack}({', '.join(self._values)}))")
        self._code, self._values = "", []

    def _fixed(self, code: str, expression: str) -> None:
        self._code += code
        self._values.append(expression)

    def _named(self, expression: str) -> str:
        variable = self._writer.variable()
        self._line(f"{variable} = {expression}")
        return variable

    def _fields(self, declaration: c.Struct, member: str) -> None:
        for subcon in declaration.subcons:
            if not _hidden(subcon):
                self.value(subcon, member.format(subcon.name))
            elif (constant := _constant(subcon)) is None:
                self._code += f"{unwrapped(subcon).sizeof()}x"
            else:
                self._fixed(constant[0], repr(constant[1]))

    def value(self, subcon: Any, expression: str) -> None:
        """Write code that builds ``subcon`` from the value of ``expression``."""
        inner = unwrapped(subcon)
        if letter := integer_letter(inner):
            self._fixed(letter, expression)
        elif inner is Guid:
            encode = self._writer.refer("guid", Guid._encode)
            self._fixed("16s", f"{encode}({expression}, None, '')")
        elif isinstance(inner, c.Bytes) and isinstance(inner.length, int):
            raw = self._named(expression)
            self._line(f"if type({raw}) is not bytes or len({raw}) != {inner.length}: raise ValueError")
            self._fixed(f"{inner.length}s", raw)
        elif isinstance(inner, c.BytesInteger) and isinstance(inner.length, int) and inner.swapped is True:
            self._fixed(
                f"{inner.length}s",
                f"({expression}).to_bytes({inner.length}, 'little', signed={bool(inner.signed)})",
            )
        elif isinstance(inner, Nested):
            self._fields(inner.record.struct, self._named(expression) + ".{}")
        elif isinstance(inner, Nullable):
            self._nullable(inner, expression)
        elif isinstance(inner, VarTuple | FixedTuple):
            self.value(inner.subcon, expression)
        elif isinstance(inner, PlainAdapter):
            encode = self._writer.refer("encode", inner._encode)
            self.value(inner.subcon, self._named(f"{encode}({expression}, None, '')"))
        elif isinstance(inner, c.Array) and isinstance(inner.count, int):
            found = self._named(expression)
            self._line(f"if len({found}) != {inner.count}: raise ValueError")
            for number in range(inner.count):
                self.value(inner.subcon, f"{found}[{number}]")
        elif isinstance(inner, c.Struct):
            self._fields(inner, self._named(expression) + "['{}']")
        else:
            self._varying(inner, expression)

    def _varying(self, inner: Any, expression: str) -> None:
        if isinstance(inner, Counted):
            found = self._named(expression)
            if inner.most is not None:
                self._line(f"{self._writer.refer('check', inner.check)}(len({found}))")
            self.value(inner.countfield, f"len({found})")
            each = self._writer.variable()
            with self._block(f"for {each} in {found}:"):
                self.value(inner.subcon, each)
        elif inner in (Blob, Text):
            self._flush()
            raw = self._named(expression if inner is Blob else f"{expression}.encode()")
            self._line(f"if type({raw}) is not bytes: raise TypeError")
            self._varint(f"len({raw})")
            self._line(f"write({raw})")
        elif inner is VarUint:
            self._varint(expression)
        elif isinstance(inner, CustomField):
            self._flush()
            self._line(f"write({self._writer.refer('encode', inner.encode)}({expression}))")
        else:
            raise NotPlainError(str(inner))

    def _varint(self, expression: str) -> None:
        self._flush()
        self._line(f"write({self._writer.refer('encode', encode_varint)}({expression}))")

    def _nullable(self, nullable: Nullable, expression: str) -> None:
        found = self._named(expression)
        self._fixed("B", f"{found} is not None")
        with self._block(f"if {found} is not None:"):
            self.value(nullable.inner, found)
