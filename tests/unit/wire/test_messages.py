"""Channel messages: sizes, offsets, and that built messages are parsed to the same values.

Source: docs/protocol/messages.md#message-table.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError, MalformedError
from vmbus.wire.codec import Record
from vmbus.wire.gpadl import GpaRange, build_ranges, pages_of_range, parse_ranges, split_gpadl
from vmbus.wire.header import MAX_MESSAGE, MessageType, message_number
from vmbus.wire.messages import MESSAGES, Sender
from vmbus.wire.monitor import (
    LATENCY_OFFSET,
    MONITOR_COUNT,
    MONITOR_PAGE,
    MONITOR_PARAMETER,
    PARAMETER_OFFSET,
    TRIGGER_GROUPS_OFFSET,
)
from vmbus.wire.version import Version

SIZES = {
    1: (196,), 2: (12,), 3: (8,), 4: (8,), 5: (148, 156), 6: (20,), 7: (12,), 8: (20,), 9: (16,), 10: (20,),
    11: (16,), 12: (12,), 13: (12,), 14: (40, 56), 15: (16, 20, 40), 16: (8,), 17: (8,), 18: (28,), 19: (20,),
    20: (12,), 21: (40, 56), 22: (16,), 23: (44,), 24: (16,), 25: (24,), 26: (9,), 27: (8,), 28: (8,), 29: (8,),
}  # fmt: skip
FROM_GUEST = {3, 5, 7, 8, 9, 11, 13, 14, 16, 18, 19, 21, 22, 25, 27, 29}

FORMS = [
    pytest.param(number, record, id=f"{number.name}-{record.size}")
    for number, rule in MESSAGES.items()
    for record in dict.fromkeys((rule.record, *(record for _, record in rule.longer)))
]


def test_every_number_has_the_sizes_of_the_specification() -> None:
    found = {
        int(number): tuple(sorted({rule.record.size, *(record.size for _, record in rule.longer)}))
        for number, rule in MESSAGES.items()
    }
    assert found == SIZES


def test_every_number_has_its_sender() -> None:
    assert {int(number) for number, rule in MESSAGES.items() if rule.sender is Sender.GUEST} == FROM_GUEST


@pytest.mark.parametrize(("number", "record"), FORMS)
def test_message_survives_parsing_and_building(number: MessageType, record: Record[Any]) -> None:
    body = bytes(range(1, record.size - 7))
    message = record.parse(bytes(8) + body)
    built = record.build(message)
    assert len(built) == record.size
    assert message_number(built) == number
    assert built[4:8] == bytes(4)
    assert record.parse(built) == message
    assert record.parse(built + b"surplus") == message
    if record.size > 8:
        with pytest.raises(MalformedError):
            record.parse(built[:-1])


def test_value_that_does_not_fit_is_our_bug() -> None:
    record = MESSAGES[MessageType.RESCIND_CHANNELOFFER].record
    with pytest.raises(InternalError):
        record.build(record.cls(1 << 32))


def test_versions_are_named_as_people_say_them() -> None:
    assert [str(version) for version in Version] == [
        "0.13", "1.1", "2.4", "3.0", "4.0", "4.1", "5.0", "5.1", "5.2", "5.3", "6.0",
    ]  # fmt: skip


def test_arrays_of_the_monitor_page_have_the_specified_offsets() -> None:
    page = bytearray(4096)
    page[TRIGGER_GROUPS_OFFSET] = 1
    page[LATENCY_OFFSET] = 2
    page[PARAMETER_OFFSET] = 3
    parsed = MONITOR_PAGE.parse(bytes(page))
    assert (parsed.trigger_groups[0], parsed.latency[0], parsed.parameters[0]) == (1, 2, 3)
    assert (TRIGGER_GROUPS_OFFSET, LATENCY_OFFSET, PARAMETER_OFFSET) == (0x8, 0x240, 0x440)
    assert PARAMETER_OFFSET + MONITOR_COUNT * MONITOR_PARAMETER.size == 0x840
    assert MONITOR_PAGE.build(parsed) == bytes(page)


def test_gpadl_header_is_as_in_the_trace() -> None:
    """Compare with step 8 of docs/protocol/messages.md#example-trace."""
    (message,) = split_gpadl(1, 0xE1E10, [GpaRange(0x8000, 0, list(range(8)))])
    assert message[:28] == bytes.fromhex(
        "08000000000000000100000010 1e0e00480001000080000000000000".replace(" ", "")
    )
    assert len(message) == 92


ranges = st.lists(
    st.builds(
        lambda count, offset, first: GpaRange(
            count, offset, list(range(first, first + pages_of_range(count, offset)))
        ),
        st.integers(1, 40_000),
        st.integers(0, 4095),
        st.integers(0, (1 << 52) - 100),
    ),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(ranges, st.sampled_from([120, 200, 239, MAX_MESSAGE]))
def test_ranges_survive_splitting(wanted: list[GpaRange], max_message: int) -> None:
    messages = split_gpadl(1, 2, wanted, max_message=max_message)
    assert all(len(message) <= max_message for message in messages)
    data = messages[0][20:] + b"".join(message[16:] for message in messages[1:])
    assert data == build_ranges(wanted)
    parsed = parse_ranges(data, len(wanted))
    assert [(each.byte_count, each.byte_offset, list(each.pfns)) for each in parsed] == [
        (each.byte_count, each.byte_offset, list(each.pfns)) for each in wanted
    ]


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(0, 0xFFFF))
def test_random_range_data_is_refused_or_bounded(data: bytes, count: int) -> None:
    try:
        found = parse_ranges(data, count)
    except MalformedError:
        return
    assert sum(8 + 8 * len(each.pfns) for each in found) <= len(data)
