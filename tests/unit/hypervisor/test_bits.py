"""Bit fields: the derived codec agrees with construct."""

from __future__ import annotations

import construct as c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError
from vmbus.wire import msr
from vmbus.wire.bits import BitRecord
from vmbus.wire.cpuid import HOST_VERSION

RECORDS = [
    msr.HYPERCALL_PAGE,
    msr.PAGE_REGISTER,
    msr.SINT,
    msr.STIMER_CONFIG,
    msr.CRASH_CONTROL,
    msr.OPEN_SOURCE_OS_ID,
    msr.PROPRIETARY_OS_ID,
    HOST_VERSION,
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.cls.__name__)
@settings(deadline=None)
@given(data=st.data())
def test_derived_shifts_agree_with_construct(record: BitRecord[object], data: st.DataObject) -> None:
    value = data.draw(st.integers(0, (1 << record.width) - 1))
    parsed = record.parse(value)
    declared = record.struct.parse(value.to_bytes(record.width // 8, "little"))
    for name in record.cls.__slots__:  # type: ignore[attr-defined]
        assert getattr(parsed, name) == declared[name]
    assert record.parse(record.build(parsed)) == parsed


def test_reserved_fields_are_built_as_zero() -> None:
    sint = msr.SINT.parse((1 << 64) - 1)
    assert msr.SINT.build(sint) == 0x700FF


def test_field_that_does_not_fit_is_our_bug() -> None:
    with pytest.raises(InternalError):
        msr.PAGE_REGISTER.build(msr.PageRegister(True, 0, 1 << 52))


def test_declaration_must_fill_the_register_and_name_the_fields() -> None:
    with pytest.raises(InternalError):
        BitRecord(
            msr.PageRegister, "enable" / c.Flag, "reserved" / c.BitsInteger(11), "gpn" / c.BitsInteger(51)
        )
    with pytest.raises(InternalError):
        BitRecord(msr.PageRegister, "enable" / c.Flag, "spare" / c.BitsInteger(11), "gpn" / c.BitsInteger(52))
