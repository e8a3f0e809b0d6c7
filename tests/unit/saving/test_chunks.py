"""The chunk's codec, and reading chunks from a buffer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import MalformedError
from vmbus.saving.chunks import Position, encode, read_chunks
from vmbus.saving.status import Reason, StateRefused
from vmbus.wire.chunk import CHUNK_HEADER, HEADER_SIZE, ChunkKind, build_chunk, chunk_crc
from vmbus.wire.saved import RECORDS, SAVED_MACHINE, SavedTaken, parse_record, version_of

from tests.unit.saving.records import kinds_and_records


@settings(deadline=None)
@given(kinds_and_records)
def test_every_record_comes_back_as_it_was(pair: tuple[ChunkKind, Any]) -> None:
    kind, record = pair
    codec = RECORDS[kind][version_of(kind, record)]
    assert parse_record(codec, codec.build(record)) == record


@settings(deadline=None)
@given(st.lists(kinds_and_records, min_size=1, max_size=6), st.integers(0, (1 << 64) - 1), st.integers(0, 6))
def test_chunks_come_back_however_they_are_cut(
    pairs: list[tuple[ChunkKind, Any]], save_id: int, cut: int
) -> None:
    built = [
        encode(kind, record, save_id=save_id, index=index, last=index + 1 == len(pairs))
        for index, (kind, record) in enumerate(pairs)
    ]
    first, position = read_chunks(b"".join(built[:cut]), Position())
    rest, position = read_chunks(b"".join(built[cut:]), position)
    assert [(chunk.kind, chunk.record) for chunk in first + rest] == pairs
    packets = [record.packet if isinstance(record, SavedTaken) else record for _, record in pairs]
    named = sum(len(each.pfns) for packet in packets for each in getattr(packet, "ranges", ()))
    assert position == Position(save_id, len(pairs), True, named)


@settings(deadline=None)
@given(kinds_and_records, st.data())
def test_a_damaged_byte_is_found(pair: tuple[ChunkKind, Any], data: st.DataObject) -> None:
    chunk = bytearray(encode(*pair, save_id=1, index=0, last=True))
    at = data.draw(st.integers(0, len(chunk) - 1))
    chunk[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StateRefused):
        read_chunks(chunk, Position())


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(ChunkKind)), st.binary(max_size=120))
def test_any_record_bytes_are_refused_or_the_one_form_of_a_record(kind: ChunkKind, record: bytes) -> None:
    chunk = build_chunk(kind, record, save_id=1, index=0)
    try:
        (found,), _ = read_chunks(chunk, Position())
    except StateRefused as error:
        assert error.reason in (Reason.DAMAGED, Reason.TOO_NEW)
    else:
        built = RECORDS[kind][version_of(kind, found.record)].build(found.record)
        assert record.startswith(built)
        assert (record == built) == (not found.ignored)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    if data:
        with pytest.raises(StateRefused):
            read_chunks(data, Position())


def test_declaration_and_derived_layout_agree() -> None:
    chunk = build_chunk(
        0xABCD, b"record", save_id=0x1122334455667788, index=0x01020304, flags=0x05060708, version=9
    )
    header = CHUNK_HEADER.parse(chunk)
    assert CHUNK_HEADER.build(header) == chunk[:HEADER_SIZE]
    assert (header.kind, header.version, header.save_id) == (0xABCD, 9, 0x1122334455667788)
    assert (header.index, header.flags, header.length) == (0x01020304, 0x05060708, 6)
    assert header.crc == chunk_crc(chunk)


def test_nothing_is_no_chunk() -> None:
    assert read_chunks(b"", Position()) == ([], Position())


@pytest.mark.parametrize("data", [b"", b"\x05abc", b"\x01\xff", b"\x81\x00a", b"\x01ab"])
def test_text_that_is_none_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_record(SAVED_MACHINE, data)


def test_every_kind_has_a_version_1_for_ever() -> None:
    assert all(1 in RECORDS[kind] for kind in ChunkKind)
