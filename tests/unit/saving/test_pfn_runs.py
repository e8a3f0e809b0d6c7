"""Page lists, stored as runs."""

from __future__ import annotations

from itertools import pairwise

import construct as c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError, MalformedError
from vmbus.wire.codec import Record
from vmbus.wire.packet import GpaRange
from vmbus.wire.pfn_runs import MAX_PAGES, PFN_LIMIT, PfnRuns, RawRuns, Run, runs
from vmbus.wire.plain import VarUint
from vmbus.wire.saved import SAVED_PACKET, SavedPacket, parse_record

from tests.unit.saving.records import Pages


def record() -> Record[Pages]:
    return Record(Pages, "pfns" / PfnRuns)


PAGES = record()
pfn = st.integers(0, PFN_LIMIT - 1)
piece = st.builds(lambda first, count: range(first, min(first + count, PFN_LIMIT)), pfn, st.integers(1, 40))
page_lists = st.lists(st.one_of(piece, pfn.map(lambda one: range(one, one + 1))), max_size=20).map(
    lambda pieces: tuple(number for each in pieces for number in each)
)


@settings(deadline=None)
@given(page_lists)
def test_any_list_comes_back_as_it_was(pfns: tuple[int, ...]) -> None:
    assert parse_record(PAGES, PAGES.build(Pages(pfns))) == Pages(pfns)


@settings(deadline=None)
@given(page_lists)
def test_runs_are_as_long_as_they_can_be(pfns: tuple[int, ...]) -> None:
    found = list(runs(pfns))
    assert [number for first, count in found for number in range(first, first + count)] == list(pfns)
    assert all(a[0] + a[1] != b[0] for a, b in pairwise(found))


DECLARED = c.PrefixedArray(VarUint, c.Struct("step" / VarUint, "more" / VarUint))
number = st.integers(0, (1 << 64) - 1)


@settings(deadline=None)
@given(st.lists(st.tuples(number, number), max_size=20))
def test_runs_are_built_as_they_are_declared(raw: list[Run]) -> None:
    data = RawRuns.build(raw)
    assert data == DECLARED.build([{"step": step, "more": more} for step, more in raw])
    assert RawRuns.parse(data) == raw


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.lists(st.integers(0x7E, 0x82), max_size=60).map(bytes)))
def test_runs_are_parsed_as_they_are_declared(data: bytes) -> None:
    try:
        declared = [(each.step, each.more) for each in DECLARED.parse(data)]
    except c.ConstructError:
        with pytest.raises(c.ConstructError):
            RawRuns.parse(data)
    else:
        assert RawRuns.parse(data) == declared


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_have_two_meanings(data: bytes) -> None:
    try:
        found = parse_record(PAGES, data)
    except MalformedError:
        return
    assert PAGES.build(found) == data


def test_contiguous_network_buffer_takes_a_few_bytes() -> None:
    assert len(PAGES.build(Pages(tuple(range(0x8000, 0x8000 + 7936))))) <= 8


def test_scattered_list_takes_some_four_bytes_a_page() -> None:
    pages = tuple((number * 7919) % 262_144 for number in range(8000))
    assert len(PAGES.build(Pages(pages))) < 8000 * 5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\x01\x00",
        b"\x01\x01\x00",  # a page below 0
        b"\x01" + b"\xff" * 9 + b"\x01\x00",  # beyond 52 bits
        b"\x02\x02\x00\x00\x00",  # two runs that are one
        b"\x81\x00\x00\x00",  # a number in more bytes than it needs
        b"\x01\x00" + b"\xff" * 9 + b"\x7f",  # a number beyond 64 bits
        b"\x01\x00" + b"\x80" * 1000,
        b"\x01\x00\xff\xff\xff\x7f",  # more pages than allowed
        b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
)
def test_impossible_lists_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_record(PAGES, data)


@pytest.mark.parametrize("pfns", [(-1,), (PFN_LIMIT,), (0,) * (MAX_PAGES + 1)])
def test_impossible_lists_are_not_built(pfns: tuple[int, ...]) -> None:
    with pytest.raises(InternalError):
        PAGES.build(Pages(pfns))


def test_ranges_of_one_packet_share_the_limit() -> None:
    half = GpaRange(MAX_PAGES * 2048, 0, tuple(range(MAX_PAGES // 2)))
    one_more = GpaRange(1, 0, (5,))
    fits = SavedPacket(9, 1, 1, b"", (half, half))
    assert parse_record(SAVED_PACKET, SAVED_PACKET.build(fits)) == fits
    with pytest.raises(InternalError):
        SAVED_PACKET.build(SavedPacket(9, 1, 1, b"", (half, half, one_more)))
