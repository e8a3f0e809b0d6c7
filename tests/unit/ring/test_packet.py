"""Packets: the declaration, the parser derived from it, and everything a descriptor can get wrong."""

from __future__ import annotations

import struct

import construct
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import MalformedError, RingError
from vmbus.testing.loopback import gpa_direct_extension, guest_packet
from vmbus.wire import packet as wire
from vmbus.wire.packet import (
    MAX_PFNS,
    MAX_RANGES,
    PACKET,
    GpaRange,
    Packet,
    PacketType,
    TransferPages,
    TransferRange,
    build_gpa_direct,
    build_packet,
    build_trailer,
    build_transfer_pages,
    parse_packet,
)


def dwords(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def parse(data: bytes, available: int | None = None) -> Packet:
    packet = parse_packet(data, 0, len(data) if available is None else available)
    assert packet is not None
    return packet


IN_BAND = dwords(
    "06000200 05000100 88776655 44332211 00010203 04050607 08090a0b 0c0d0e0f 10111213 00000000 00000000 40000000"
)
COMPLETION = dwords(
    "0b000200 04000000 88776655 44332211 00010203 04050607 08090a0b 0c0d0e0f 00000000 80000000"
)
GPA_DIRECT = dwords(
    "09000600 07000100 07000000 00000000 00000000 01000000 00120000 00080000"
    "45230100 00000000 56340200 00000000 00000000 00000000 00000000 00000000"
)


def test_the_annotated_in_band_packet_is_parsed_and_built() -> None:
    packet = parse(IN_BAND)
    assert packet.kind is PacketType.IN_BAND
    assert packet.completion_requested
    assert packet.transaction_id == 0x1122334455667788
    assert packet.payload == bytes(range(20)) + bytes(4)
    assert packet.size == 48
    built = build_packet(
        PacketType.IN_BAND, bytes(range(20)), transaction_id=0x1122334455667788, completion_requested=True
    )
    assert built + build_trailer(0, 0x40) == IN_BAND


def test_the_annotated_completion_is_parsed_and_built() -> None:
    packet = parse(COMPLETION)
    assert (packet.kind, packet.flags, packet.payload) == (PacketType.COMPLETION, 0, bytes(range(16)))
    assert not packet.completion_requested
    built = build_packet(PacketType.COMPLETION, bytes(range(16)), transaction_id=0x1122334455667788)
    assert built + build_trailer(0, 0x80) == COMPLETION


def test_the_annotated_gpa_direct_packet_is_parsed_and_built() -> None:
    packet = parse(GPA_DIRECT)
    ranges = (GpaRange(0x1200, 0x800, (0x12345, 0x23456)),)
    assert (packet.kind, packet.transaction_id, packet.payload) == (PacketType.GPA_DIRECT, 7, bytes(8))
    assert (packet.ranges, packet.error) == (ranges, None)
    built = build_packet(
        PacketType.GPA_DIRECT,
        bytes(8),
        transaction_id=7,
        completion_requested=True,
        extension=build_gpa_direct(ranges),
    )
    assert built + build_trailer(0, 0) == GPA_DIRECT


def test_a_transfer_page_packet_is_parsed_as_it_was_built() -> None:
    ranges = (TransferRange(1514, 0), TransferRange(60, 2048))
    built = build_packet(
        PacketType.TRANSFER_PAGES, b"12345678", extension=build_transfer_pages(0xCAFE, ranges)
    )
    packet = parse(built + bytes(8))
    assert packet.transfer_pages == TransferPages(0xCAFE, ranges)
    assert packet.payload == b"12345678"


def test_many_ranges_are_kept_in_their_order() -> None:
    ranges = [(100 + i, 4000 - i, [i, i + 1] if i + 100 + 4000 - i > 4096 else [i]) for i in range(32)]
    packet = parse(guest_packet(b"x", kind=9, extension=gpa_direct_extension(ranges)) + bytes(8))
    assert packet.ranges == tuple(GpaRange(a, b, tuple(c)) for a, b, c in ranges)


def test_reserved_garbage_in_extensions_is_ignored() -> None:
    extension = bytearray(gpa_direct_extension([(1, 0, [5])]))
    extension[0:4] = b"junk"
    assert parse(guest_packet(kind=9, extension=bytes(extension)) + bytes(8)).ranges == (
        GpaRange(1, 0, (5,)),
    )
    extension = bytearray(build_transfer_pages(3, [TransferRange(8, 16)]))
    extension[2:4] = b"no"
    packet = parse(guest_packet(kind=7, extension=bytes(extension)) + bytes(8))
    assert packet.transfer_pages == TransferPages(3, (TransferRange(8, 16),))


def test_what_follows_the_ranges_of_an_extension_is_cut_off() -> None:
    extension = gpa_direct_extension([(16, 0, [5])]) + b"surplus!"
    packet = parse(guest_packet(b"payload.", kind=9, extension=extension) + bytes(8))
    assert packet.error is None
    assert (packet.ranges, packet.payload) == ((GpaRange(16, 0, (5,)),), b"payload.")


def test_an_extension_of_an_in_band_packet_is_skipped() -> None:
    assert parse(guest_packet(b"payload.", extension=b"whatever") + bytes(8)).payload == b"payload."


def test_a_copy_that_ends_inside_a_packet_is_no_error() -> None:
    for cut in range(16, len(GPA_DIRECT)):
        assert parse_packet(GPA_DIRECT[:cut], 0, len(GPA_DIRECT)) is None
    for cut in range(16, len(IN_BAND)):
        assert parse_packet(IN_BAND[:cut], 0, len(IN_BAND)) is None


# --- descriptors that stop a channel ---


def descriptor(kind: int = 6, offset: int = 2, length: int = 2, flags: int = 0) -> bytes:
    return struct.pack("<HHHHQ", kind, offset, length, flags, 0).ljust(4096, b"\0")


@pytest.mark.parametrize(
    ("kind", "offset", "length"),
    [
        pytest.param(6, 3, 2, id="length-below-data-offset"),
        pytest.param(6, 0, 2, id="data-offset-0"),
        pytest.param(6, 1, 2, id="data-offset-1"),
        pytest.param(11, 1, 2, id="completion-data-offset-1"),
        pytest.param(6, 2, 513, id="longer-than-available"),
        pytest.param(6, 2, 512, id="no-room-for-the-trailer"),
        pytest.param(6, 0xFFFF, 0xFFFF, id="largest"),
        pytest.param(9, 2, 5, id="gpa-direct-without-header"),
        pytest.param(7, 2, 5, id="transfer-pages-without-header"),
    ],
)
@pytest.mark.conformance(58)
def test_impossible_lengths_are_refused(kind: int, offset: int, length: int) -> None:
    with pytest.raises(RingError) as caught:
        parse_packet(descriptor(kind, offset, length), 0, 4096)
    assert caught.value.reason == "invalid-descriptor-lengths"


@pytest.mark.parametrize("flags", [2, 3, 0x8000, 0xFFFF])
def test_unknown_flags_are_refused(flags: int) -> None:
    with pytest.raises(RingError) as caught:
        parse_packet(descriptor(flags=flags), 0, 4096)
    assert caught.value.reason == "invalid-descriptor-flags"


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 8, 0xA, 0xC, 0xD, 0x106, 0xFFFF])
def test_types_that_no_guest_sends_are_refused(kind: int) -> None:
    with pytest.raises(RingError) as caught:
        parse_packet(descriptor(kind, 3, 5), 0, 4096)
    assert caught.value.reason == "invalid-descriptor-type"


def test_a_gpa_direct_packet_without_any_range_is_refused() -> None:
    with pytest.raises(RingError) as caught:
        parse(guest_packet(b"x", kind=9, extension=struct.pack("<II", 0, 0)) + bytes(8))
    assert caught.value.reason == "invalid-gpa-direct-range-count"


# --- ranges that cost one packet ---


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        pytest.param(struct.pack("<IIIIQ", 0, 1, 0, 0, 1), "gpa-range-empty", id="empty"),
        pytest.param(struct.pack("<IIII", 0, 1, 0, 0), "gpa-range-empty", id="empty-at-the-end"),
        pytest.param(
            gpa_direct_extension([(8, 0, [1]), (0, 0, [])]), "gpa-range-empty", id="second-one-empty"
        ),
        pytest.param(struct.pack("<IIIIQ", 0, 1, 1, 4096, 1), "gpa-range-offset", id="offset-of-a-page"),
        pytest.param(
            struct.pack("<IIIIQ", 0, 1, 1, 0xFFFFFFFF, 1), "gpa-range-offset", id="offset-overflows"
        ),
        pytest.param(struct.pack("<II", 0, 1), "gpa-range-overrun", id="no-range-at-all"),
        pytest.param(struct.pack("<IIII", 0, 1, 4096, 0), "gpa-range-overrun", id="no-page-number"),
        pytest.param(struct.pack("<IIIIQ", 0, 1, 4096, 1, 1), "gpa-range-overrun", id="one-page-short"),
        pytest.param(struct.pack("<IIIIQ", 0, 2, 4096, 0, 1), "gpa-range-overrun", id="one-range-short"),
        pytest.param(struct.pack("<IIIIQ", 0, 0xFFFFFFFF, 8, 0, 1), "too-many-gpa-ranges", id="count"),
        pytest.param(struct.pack("<IIII", 0, 1, 0xFFFFFFFF, 4095), "too-many-gpa-pages", id="bytes"),
    ],
)
@pytest.mark.conformance(58)
@pytest.mark.conformance(59)
def test_malformed_gpa_ranges_cost_that_packet_only(extension: bytes, reason: str) -> None:
    data = guest_packet(b"the next thing, never read as a page number", kind=9, extension=extension)
    packet = parse(data + bytes(8))
    assert isinstance(packet.error, MalformedError)
    assert packet.error.reason == reason
    assert (packet.ranges, packet.payload[:8]) == ((), b"the next")
    assert packet.size == len(data) + 8


@pytest.mark.parametrize(
    ("count", "there", "reason"),
    [
        (2, 1, "transfer-range-overrun"),
        (1, 0, "transfer-range-overrun"),
        (MAX_RANGES + 1, 2000, "too-many-transfer-ranges"),
        (0xFFFFFFFF, 1, "too-many-transfer-ranges"),
    ],
)
@pytest.mark.conformance(58)
def test_malformed_transfer_ranges_cost_that_packet_only(count: int, there: int, reason: str) -> None:
    extension = struct.pack("<HHI", 1, 0, count) + bytes(8 * there)
    packet = parse(guest_packet(b"payload", kind=7, extension=extension) + bytes(8))
    assert packet.error is not None
    assert (packet.error.reason, packet.transfer_pages) == (reason, None)


def test_as_many_ranges_and_pages_as_allowed_are_taken() -> None:
    ranges = [(1, 0, [i]) for i in range(MAX_RANGES)]
    assert (
        len(parse(guest_packet(kind=9, extension=gpa_direct_extension(ranges)) + bytes(8)).ranges)
        == MAX_RANGES
    )
    full = [(MAX_PFNS * 4096, 0, range(MAX_PFNS))]
    [only] = parse(guest_packet(kind=9, extension=gpa_direct_extension(full)) + bytes(8)).ranges
    assert only.pfns == tuple(range(MAX_PFNS))
    over = [(MAX_PFNS * 4096, 1, range(MAX_PFNS + 1))]
    refused = parse(guest_packet(kind=9, extension=gpa_direct_extension(over)) + bytes(8))
    assert refused.error is not None
    assert refused.error.reason == "too-many-gpa-pages"


def test_a_packet_that_no_descriptor_can_describe_is_not_built() -> None:
    assert len(build_packet(PacketType.IN_BAND, bytes(0xFFFF * 8 - 16))) == 0xFFFF * 8
    with pytest.raises(RingError) as caught:
        build_packet(PacketType.IN_BAND, bytes(0xFFFF * 8 - 15))
    assert caught.value.reason == "invalid-message-length"


# --- the declaration and the parser agree ---

GPA_RANGES = st.lists(
    st.integers(1, 3 * 4096).flatmap(
        lambda count: st.integers(0, 4095).flatmap(
            lambda offset: st.tuples(
                st.just(count),
                st.just(offset),
                st.lists(
                    st.integers(0, 2**64 - 1),
                    min_size=(offset + count + 4095) // 4096,
                    max_size=(offset + count + 4095) // 4096,
                ),
            )
        )
    ),
    min_size=1,
    max_size=5,
)
TRANSFER_RANGES = st.lists(
    st.builds(TransferRange, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=6
)


@given(
    payload=st.binary(max_size=100),
    transaction_id=st.integers(0, 2**64 - 1),
    completion_requested=st.booleans(),
    gpa=st.none() | GPA_RANGES,
    transfer=st.none() | st.tuples(st.integers(0, 0xFFFF), TRANSFER_RANGES),
    start=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_the_parser_agrees_with_the_declaration(
    payload: bytes,
    transaction_id: int,
    completion_requested: bool,
    gpa: list[tuple[int, int, list[int]]] | None,
    transfer: tuple[int, list[TransferRange]] | None,
    start: int,
) -> None:
    kind, extension = PacketType.IN_BAND, b""
    if gpa is not None:
        kind, extension = (
            PacketType.GPA_DIRECT,
            build_gpa_direct([GpaRange(a, b, tuple(c)) for a, b, c in gpa]),
        )
    elif transfer is not None:
        kind, extension = PacketType.TRANSFER_PAGES, build_transfer_pages(*transfer)
    data = build_packet(
        kind,
        payload,
        transaction_id=transaction_id,
        completion_requested=completion_requested,
        extension=extension,
    ) + build_trailer(0, start)
    declared = PACKET.parse(data)
    packet = parse(data)
    assert packet.error is None
    assert (packet.kind, packet.flags, packet.transaction_id) == (
        declared.descriptor.type,
        declared.descriptor.flags,
        declared.descriptor.transaction_id,
    )
    assert packet.payload == declared.payload == payload + bytes(-len(payload) % 8)
    assert packet.size == len(data) == declared.descriptor.length8 * 8 + 8
    assert (declared.trailer.zero, declared.trailer.start) == (0, start)
    if gpa is not None:
        found = declared.extension.ranges
        assert packet.ranges == tuple(
            GpaRange(each.header.byte_count, each.header.byte_offset, tuple(each.pfns)) for each in found
        )
        assert packet.ranges == tuple(GpaRange(a, b, tuple(c)) for a, b, c in gpa)
    elif transfer is not None:
        found = declared.extension
        assert packet.transfer_pages == TransferPages(
            found.header.set_id, tuple(TransferRange(r.byte_count, r.byte_offset) for r in found.ranges)
        )


@given(data=st.binary(min_size=24, max_size=200))
@settings(deadline=None)
def test_random_bytes_are_a_packet_for_both_or_refused(data: bytes) -> None:
    try:
        packet = parse_packet(data, 0, len(data))
    except RingError:
        return
    assert packet is not None
    assert packet.size <= len(data)
    if packet.error is None:
        assert PACKET.parse(data).payload == packet.payload


@pytest.mark.parametrize("declaration", [name for name in dir(wire) if name.isupper()])
def test_every_fixed_declaration_has_the_size_of_its_struct(declaration: str) -> None:
    found = getattr(wire, declaration)
    derived = getattr(wire, "_" + declaration, None)
    if isinstance(found, construct.Struct) and isinstance(derived, struct.Struct):
        assert found.sizeof() == derived.size
