"""Compiled codecs agree with construct."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import random
import struct
import uuid
from dataclasses import dataclass
from typing import Any

import construct as c
import pytest
import vmbus.wire
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError, MalformedError
from vmbus.wire.codec import Record
from vmbus.wire.compiled import REFUSED_DATA
from vmbus.wire.plain import Blob, Guid, Nested, Nullable, Text, VarTuple


def all_records() -> list[tuple[str, Record[Any]]]:
    found: dict[int, tuple[str, Record[Any]]] = {}
    modules = [f"vmbus.wire.{module.name}" for module in pkgutil.iter_modules(vmbus.wire.__path__)]
    for module in [
        *modules,
        "vmbus.bus.saved_state.layout",
        "vmbus.hypervisor.saved_state.layout",
        "vmbus.machine.migration.hypervisor_layout",
    ]:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, Record):
                found.setdefault(id(value), (f"{module.rpartition('.')[2]}.{name}", value))
    return sorted(found.values(), key=lambda entry: entry[0])


def fixed(record: Record[Any]) -> bool:
    return record.compiled is not None and record.compiled.size is not None


COMPILED = [pytest.param(record, id=name) for name, record in all_records() if record.compiled is not None]
FIXED = [pytest.param(record, id=name) for name, record in all_records() if fixed(record)]


def by_construct(record: Record[Any]) -> Record[Any]:
    slow = Record(record.cls, *record.struct.subcons)
    slow.__dict__["compiled"] = None
    return slow


@dataclass(frozen=True, slots=True)
class Mixed:
    guid: uuid.UUID
    name: bytes
    number: int


# The dataclass has another order of fields than the declaration.
MIXED = Record(
    Mixed,
    "_kind" / c.Default(c.Int16ul, 0xABCD),
    "number" / c.Int32ul,
    "_gap" / c.Padding(3),
    "name" / c.Bytes(5),
    "guid" / Guid,
)


def test_most_records_are_compiled() -> None:
    assert fixed(MIXED)
    assert len(FIXED) > 40
    assert len(COMPILED) > len(FIXED) + 20


@pytest.mark.parametrize("record", [*FIXED, pytest.param(MIXED, id="mixed")])
@given(seed=st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=20)
def test_what_is_compiled_agrees_with_construct(record: Record[Any], seed: int) -> None:
    raw = random.Random(seed).randbytes(record.size + seed % 9)
    slow = by_construct(record)
    assert record.size == slow.size
    try:
        expected = slow.parse(raw)
    except MalformedError:  # a wrong constant
        with pytest.raises(MalformedError):
            record.parse(raw)
        return
    value = record.parse(raw)
    assert value == expected
    assert record.build(value) == slow.build(value)
    for field in dataclasses.fields(value):
        assert type(getattr(value, field.name)) is type(getattr(expected, field.name))


@pytest.mark.parametrize("record", COMPILED)
@given(seed=st.integers(0, 1 << 32), few=st.booleans())
@settings(deadline=None, max_examples=40)
def test_any_bytes_are_taken_or_refused_as_construct_does_it(
    record: Record[Any], seed: int, few: bool
) -> None:
    chance = random.Random(seed)
    size = chance.randrange(400)
    # Small numbers are likely to be valid counts and choices.
    raw = bytes(chance.choices((0, 0, 0, 1, 2), k=size)) if few else chance.randbytes(size)
    slow = by_construct(record)
    assert record.compiled is not None
    try:
        expected = slow.parse(raw)
    except MalformedError:
        with pytest.raises(REFUSED_DATA):
            record.compiled.decode(raw, 0)
        return
    value, end = record.compiled.decode(raw, 0)
    assert value == expected
    pieces: list[bytes] = []
    record.compiled.encode(value, pieces.append)
    assert b"".join(pieces) == slow.build(value)
    assert end <= len(raw)


@pytest.mark.parametrize("record", FIXED)
def test_a_byte_too_few_is_malformed(record: Record[Any]) -> None:
    if record.size:
        with pytest.raises(MalformedError):
            record.parse(bytes(record.size - 1))


@pytest.mark.parametrize(
    "value",
    [
        Mixed(uuid.UUID(int=1), b"four", 1),
        Mixed(uuid.UUID(int=1), b"sixsix", 1),
        Mixed(uuid.UUID(int=1), b"five5", -1),
        Mixed(uuid.UUID(int=1), b"five5", 1 << 32),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_of_ours(value: Mixed) -> None:
    with pytest.raises(InternalError):
        MIXED.build(value)


def test_constants_and_padding_are_built_and_dropped() -> None:
    built = MIXED.build(Mixed(uuid.UUID(int=1), b"five5", 7))
    assert built == struct.pack("<HI3x5s", 0xABCD, 7, b"five5") + uuid.UUID(int=1).bytes_le
    assert MIXED.parse(b"\0\0" + built[2:]) == Mixed(uuid.UUID(int=1), b"five5", 7)


def test_what_is_not_plain_is_left_to_construct() -> None:
    @dataclass(frozen=True, slots=True)
    class Listed:
        items: list[int]

    record = Record(Listed, "items" / c.PrefixedArray(c.Int8ul, c.Int8ul))
    assert record.compiled is None
    assert record.parse(b"\2\5\6").items == [5, 6]


# --- saved records: many small fields ---


@dataclass(frozen=True, slots=True)
class Inner:
    first: int
    second: int


INNER = Record(Inner, "first" / c.Int16ul, "second" / c.Int64sl)


@dataclass(frozen=True, slots=True)
class Outer:
    head: int
    flag: int
    inner: Inner
    perhaps: int | None
    names: tuple[str, ...]
    blob: bytes
    tail: int
    guid: uuid.UUID
    wide: int


def outer_fields() -> list[Any]:
    return [
        "head" / c.Int32ul,
        "flag" / c.Int8ul,
        "inner" / Nested(INNER),
        "perhaps" / Nullable(c.Int16ul),
        "names" / VarTuple(Text),
        "blob" / Blob,
        "tail" / c.Int64ul,
        "guid" / Guid,
        "wide" / c.BytesInteger(16, signed=True, swapped=True),
    ]


OUTER = Record(Outer, *outer_fields())
DECLARED = c.Struct(*outer_fields())
"""The same declaration, interpreted by construct."""

outers = st.builds(
    Outer,
    head=st.integers(0, (1 << 32) - 1),
    flag=st.integers(0, 255),
    inner=st.builds(Inner, st.integers(0, 65535), st.integers(-(1 << 63), (1 << 63) - 1)),
    perhaps=st.none() | st.integers(0, 65535),
    names=st.lists(st.text(max_size=8), max_size=4).map(tuple),
    blob=st.binary(max_size=300),
    tail=st.integers(0, (1 << 64) - 1),
    guid=st.uuids(),
    wide=st.integers(-(1 << 127), (1 << 127) - 1),
)


@given(outers)
def test_many_fields_are_built_and_parsed_as_by_construct(value: Outer) -> None:
    assert OUTER.compiled is not None
    data = OUTER.build(value)
    assert data == DECLARED.build({name: getattr(value, name) for name in Outer.__slots__})
    assert OUTER.parse(data) == value
    found = DECLARED.parse(data)
    assert Outer(**{name: found[name] for name in Outer.__slots__}) == value


@given(outers, st.data())
def test_many_fields_that_end_early_are_malformed(value: Outer, draw: st.DataObject) -> None:
    data = OUTER.build(value)
    cut = data[: draw.draw(st.integers(0, len(data) - 1))]
    with pytest.raises(MalformedError):
        OUTER.parse(cut)
    with pytest.raises(c.ConstructError):
        DECLARED.parse(cut)


def test_many_fields_that_do_not_fit_are_our_own_mistake() -> None:
    value = Outer(1 << 32, 0, Inner(0, 0), None, (), b"", 0, uuid.UUID(int=0), 0)
    with pytest.raises(InternalError):
        OUTER.build(value)


def test_fields_that_look_at_others_are_left_to_construct() -> None:
    @dataclass(frozen=True, slots=True)
    class Sized:
        size: int
        data: bytes

    record = Record(Sized, "size" / c.Int8ul, "data" / c.Bytes(c.this.size))
    assert record.compiled is None
    assert record.parse(b"\x02ab") == Sized(2, b"ab")
