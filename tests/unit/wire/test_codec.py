"""What a record derives from its declaration agrees with the declaration."""

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
from hypothesis import given, settings
from hypothesis import strategies as st

import emulator.wire
from emulator.errors import InternalError, MalformedError
from emulator.wire.codec import Guid, Record


def all_records() -> list[tuple[str, Record[Any]]]:
    found: dict[int, tuple[str, Record[Any]]] = {}
    for module in pkgutil.iter_modules(emulator.wire.__path__):
        for name, value in vars(importlib.import_module(f"emulator.wire.{module.name}")).items():
            if isinstance(value, Record):
                found.setdefault(id(value), (f"{module.name}.{name}", value))
    return sorted(found.values(), key=lambda entry: entry[0])


DERIVED = [pytest.param(record, id=name) for name, record in all_records() if record._derived is not None]


def by_construct(record: Record[Any]) -> Record[Any]:
    slow = Record(record.cls, *record.struct.subcons)
    slow._derived = None
    return slow


@dataclass(frozen=True, slots=True)
class Mixed:
    guid: uuid.UUID
    name: bytes
    number: int


#: The dataclass's order is not the declaration's.
MIXED = Record(
    Mixed,
    "_kind" / c.Default(c.Int16ul, 0xABCD),
    "number" / c.Int32ul,
    "_gap" / c.Padding(3),
    "name" / c.Bytes(5),
    "guid" / Guid,
)


def test_most_records_are_derived() -> None:
    assert MIXED._derived is not None
    assert len(DERIVED) > 40


@pytest.mark.parametrize("record", [*DERIVED, pytest.param(MIXED, id="mixed")])
@given(seed=st.integers(0, 1 << 32))
@settings(deadline=None, max_examples=20)
def test_what_is_derived_agrees_with_construct(record: Record[Any], seed: int) -> None:
    raw = random.Random(seed).randbytes(record.size + seed % 9)
    slow = by_construct(record)
    assert record.size == slow.size
    value = record.parse(raw)
    assert value == slow.parse(raw)
    assert record.build(value) == slow.build(value)
    for field in dataclasses.fields(value):
        assert type(getattr(value, field.name)) is type(getattr(slow.parse(raw), field.name))


@pytest.mark.parametrize("record", DERIVED)
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


def test_what_has_no_fixed_shape_is_left_to_construct() -> None:
    @dataclass(frozen=True, slots=True)
    class Listed:
        items: list[int]

    record = Record(Listed, "items" / c.PrefixedArray(c.Int8ul, c.Int8ul))
    assert record._derived is None
    assert record.parse(b"\2\5\6").items == [5, 6]
