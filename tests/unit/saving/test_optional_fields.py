"""States of a later release: what it added and may be left out is left out, anything else is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import construct as c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.api import OptionalField, SavedState
from vmbus.errors import DeviceError, InternalError, MalformedError, TooNewError
from vmbus.saving import Reason, StateRefused, read_machine
from vmbus.saving.chunks import MAX_IGNORED, Position, read_chunks
from vmbus.wire.chunk import CHUNK_HEADER, HEADER_SIZE, ChunkKind, build_chunk
from vmbus.wire.codec import Record
from vmbus.wire.optional import build_fields
from vmbus.wire.plain import Nested, Text
from vmbus.wire.saved import (
    SAVED_CHANNEL,
    SAVED_CHANNEL_RECORDS,
    SAVED_DEVICE,
    SAVED_END,
    SAVED_SECTION,
    SavedChannel,
    SavedChannelRecords,
    SavedDevice,
    SavedEnd,
    SavedSection,
    parse_record,
)

from tests.unit.machine.test_host_state import host
from tests.unit.saving.model_channel import identity

MAY_BE_IGNORED = bytes([9 << 1, 3]) + b"new"
MUST_NOT = bytes([9 << 1 | 1, 3]) + b"new"


@dataclass(frozen=True, slots=True)
class LaterChannel(SavedChannel):
    """The header of a channel as a later release has it."""

    numa_node: int = 0
    name: str = ""


LATER_CHANNEL = Record(
    LaterChannel,
    *SAVED_CHANNEL.struct.subcons,
    optional=(OptionalField(4, "name", Text, required=True), OptionalField(2, "numa_node", c.Int32ul)),
)


def header(numa_node: int = 0, name: str = "") -> LaterChannel:
    return LaterChannel(identity(1), SAVED_CHANNEL.parse(bytes(200)).axes, numa_node=numa_node, name=name)


def test_a_field_without_a_value_leaves_the_bytes_as_they_were() -> None:
    later = header()
    before = SavedChannel(later.identity, later.axes)
    assert LATER_CHANNEL.build(later) == SAVED_CHANNEL.build(before)
    assert parse_record(SAVED_CHANNEL, LATER_CHANNEL.build(later)) == before
    assert parse_record(LATER_CHANNEL, SAVED_CHANNEL.build(before)) == later


def test_a_field_is_known_to_its_own_release_and_ignored_by_this_one() -> None:
    data = LATER_CHANNEL.build(header(numa_node=3))
    assert LATER_CHANNEL.parse_all(data) == (header(numa_node=3), ())
    assert SAVED_CHANNEL.parse_all(data) == (SavedChannel(identity(1), header().axes), (2,))


def test_a_required_field_is_refused_only_where_it_has_a_value() -> None:
    data = LATER_CHANNEL.build(header(numa_node=3, name="disk"))
    assert LATER_CHANNEL.parse_all(data) == (header(numa_node=3, name="disk"), ())
    with pytest.raises(TooNewError, match="field 4 is not known"):
        SAVED_CHANNEL.parse_all(data)


@pytest.mark.parametrize(
    "more",
    [
        b"\0",
        b"\0\0",  # number 0
        b"\4",  # no length
        b"\4\2x",  # cut off
        b"\4\0\4\0",  # twice
        b"\6\0\4\0",  # descending
        b"\x84\0\0",  # a varint with a needless byte
        b"\4\4\0\0\0\0",  # the default, of a field that this release knows
        b"\5\4\1\0\0\0",  # known, and not required
        b"\4\3\1\0\0",  # known, and too short
    ],
)
def test_fields_have_one_form(more: bytes) -> None:
    data = LATER_CHANNEL.build(header()) + more
    with pytest.raises(MalformedError):
        LATER_CHANNEL.parse_all(data)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_behind_a_record_are_refused_or_counted(more: bytes) -> None:
    built = SAVED_CHANNEL.build(SavedChannel(identity(1), header().axes))
    try:
        found, ignored = SAVED_CHANNEL.parse_all(built + more)
    except MalformedError:
        return
    assert SAVED_CHANNEL.build(found) == built
    assert bool(ignored) == bool(more)


def test_declarations_that_could_not_be_read_are_refused() -> None:
    @dataclass(frozen=True, slots=True)
    class First:
        later: int = 0
        base: int = 0

    @dataclass(frozen=True, slots=True)
    class NoDefault:
        base: int
        later: int

    for cls in (First, NoDefault):
        with pytest.raises(InternalError):
            Record(cls, "base" / c.Int8ul, optional=(OptionalField(1, "later", c.Int8ul),))
    with pytest.raises(InternalError, match="no length"):
        Nested(LATER_CHANNEL)


# --- devices ---


@dataclass(frozen=True, slots=True)
class Small:
    sum: int


@dataclass(frozen=True, slots=True)
class Larger(Small):
    carry: int = 0
    sign: int = 0


SMALL = SavedState(Record(Small, "sum" / c.Int64sl))
LARGER = SavedState(
    Record(
        Larger,
        "sum" / c.Int64sl,
        optional=(OptionalField(1, "carry", c.Int8ul), OptionalField(2, "sign", c.Int8ul, required=True)),
    )
)


def test_a_device_can_go_back_to_the_release_before(caplog: pytest.LogCaptureFixture) -> None:
    assert LARGER.save(Larger(7)) == SMALL.save(Small(7))
    assert LARGER.load(SMALL.save(Small(7)), "adder") == Larger(7)
    assert LARGER.load(LARGER.save(Larger(7, 1, 1)), "adder") == Larger(7, 1, 1)
    with caplog.at_level(logging.WARNING):
        assert SMALL.load(LARGER.save(Larger(7, carry=1)), "adder") == Small(7)
    assert "adder: the saved state has fields of a later release, which are ignored: 1" in caplog.text
    with pytest.raises(DeviceError, match="of a later release, upgrade this emulator"):
        SMALL.load(LARGER.save(Larger(7, sign=1)), "adder")


# --- a whole machine ---


def split(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The kinds and records of chunks."""
    at = 0
    while at < len(data):
        found = CHUNK_HEADER.parse(data[at : at + HEADER_SIZE])
        yield found.kind, data[at + HEADER_SIZE : at + HEADER_SIZE + found.length]
        at += HEADER_SIZE + found.length


def joined(records: list[tuple[int, bytes, int]]) -> bytes:
    """The bytes of chunks of these kinds, records and flags, of one save run."""
    return b"".join(
        build_chunk(kind, record, save_id=1, index=index, flags=flags | (index + 1 == len(records)))
        for index, (kind, record, flags) in enumerate(records)
    )


def later(data: bytes, **more: bytes) -> bytes:
    """``data`` as a later release would have written it, with ``more`` behind records, by their kinds.

    ``more["chunk"]``: its flags; an additional chunk in each channel and in the machine's state.
    """
    extra = [(0x42, b"of a later release", more["chunk"][0])] if "chunk" in more else []
    parts: list[tuple[int, bytes, int]] = []
    for kind, record in split(data):
        if kind in (ChunkKind.HYPERVISOR, ChunkKind.BUS) and "section" in more:
            section = parse_record(SAVED_SECTION, record)
            record = SAVED_SECTION.build(
                SavedSection(section.name, section.version, section.state + more["section"])
            )
        if kind == ChunkKind.CHANNEL_RECORDS:
            channel = parse_record(SAVED_CHANNEL_RECORDS, record)
            inner: list[tuple[int, bytes, int]] = []
            for which, content in split(b"".join(channel.records)):
                if which == ChunkKind.CHANNEL:
                    content += more.get("channel", b"")
                if which == ChunkKind.DEVICE:
                    content = SAVED_DEVICE.build(
                        SavedDevice(parse_record(SAVED_DEVICE, content).state + more.get("device", b""))
                    )
                inner.append((which, content, 0))
            built = joined([*inner, *extra])
            record = SAVED_CHANNEL_RECORDS.build(SavedChannelRecords(channel.identity, (built,)))
        if kind != ChunkKind.END:
            parts.append((kind, record, 0))
    parts += extra
    size = sum(HEADER_SIZE + len(record) for _, record, _ in parts)
    return joined([*parts, (ChunkKind.END, SAVED_END.build(SavedEnd(len(parts), size)), 0)])


DEVICES = ("echo", "heartbeat", "shutdown", "timesync", "scsi,format=memory,size=8M")


def state(folder: Path) -> bytes:
    folder.mkdir()
    with host(folder, *DEVICES) as here:
        here.migration.state.pause()
        return here.migration.state.save(1 << 16, memory_stays=False, pages=(), limit=1 << 20).data


@pytest.mark.parametrize("part", ["channel", "device", "section", "chunk", "all"])
async def test_a_host_takes_a_state_of_a_later_release_and_says_what_it_ignored(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = state(tmp_path / "source")
    parts = {"channel": MAY_BE_IGNORED, "device": MAY_BE_IGNORED, "section": MAY_BE_IGNORED, "chunk": b"\2"}
    data = later(data, **({part: parts[part]} if part in parts else parts))
    with host(tmp_path, *DEVICES) as here, caplog.at_level(logging.WARNING):
        here.migration.expect()
        here.migration.load(data)
        here.migration.state.resume()
    said = {
        "channel": "field 9 of chunk 0 (CHANNEL)",
        "device": "echo: the saved state has fields",
        "chunk": "0x42",
    }
    said |= {"section": "the bus section has fields of a later release, which are ignored: 9"}
    for each in said if part == "all" else [part]:
        assert said[each] in caplog.text


@pytest.mark.parametrize("part", ["channel", "device", "section", "chunk"])
async def test_what_must_not_be_ignored_is_refused_before_anything_changes(tmp_path: Path, part: str) -> None:
    data = later(state(tmp_path / "source"), **{part: b"\0" if part == "chunk" else MUST_NOT})
    with host(tmp_path, *DEVICES) as here:
        here.migration.expect()
        with pytest.raises(StateRefused, match="upgrade this emulator") as caught:
            here.migration.load(data)
        assert not caught.value.changed


def test_the_refusal_names_the_release_that_wrote_the_state(tmp_path: Path) -> None:
    first = build_chunk(ChunkKind.MACHINE, bytes([19]) + b"vmbus-emulator 99.0", save_id=1, index=0)
    newer = build_chunk(ChunkKind.BUS, b"", save_id=1, index=1, version=7)
    with pytest.raises(
        StateRefused, match=r"written by 'vmbus-emulator 99\.0', this is .* upgrade"
    ) as caught:
        read_machine(first + newer)
    assert caught.value.reason == Reason.TOO_NEW


def test_what_is_said_about_ignored_parts_is_bounded() -> None:
    many = build_fields(
        [OptionalField(number, "x", c.Int8ul) for number in range(1, 5000)], type("", (), {"x": 1}), {"x": 0}
    )
    record = SAVED_CHANNEL.build(SavedChannel(identity(1), header().axes)) + many
    chunk = build_chunk(ChunkKind.CHANNEL, record, save_id=1, index=0)
    chunks, position = read_chunks(chunk, Position())
    assert len(chunks[0].ignored) == 4999
    assert len(position.ignored) == MAX_IGNORED
