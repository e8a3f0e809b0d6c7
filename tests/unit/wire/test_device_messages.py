"""Declarations of device messages, compared with bytes written by hand and with the derived fast codecs."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmbus.errors import MalformedError
from vmbus.wire import echo, ic
from vmbus.wire.ic import IcHeader, IcVersion
from vmbus.wire.pipe import PIPE_HEADER, PipeHeader

U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
VERSIONS = st.builds(IcVersion, U16, U16)


def test_sizes_are_those_of_the_sheet() -> None:
    assert PIPE_HEADER.size == 8
    assert ic.BODY_OFFSET == 28
    assert ic.NEGOTIATE_ANSWER.size == 16
    assert ic.HEARTBEAT_BODY.size == 40
    assert ic.SHUTDOWN_BODY.size == 2060
    assert ic.TIMESYNC_BODY.size == 28
    assert ic.TIMESYNC_REFERENCE_BODY.size == 24
    assert echo.ECHO_HEADER.size == 24
    assert echo.ECHO_RANGE.size == 16


@given(
    header=st.builds(IcHeader, VERSIONS, U16, VERSIONS, U16, U32, U8, U8),
    body=st.binary(max_size=64),
)
def test_ic_message_is_as_declared(header: IcHeader, body: bytes) -> None:
    built = ic.build_message(header, body)
    assert ic.parse_message(built) == (PipeHeader(1, 20 + len(body)), header)
    declared = ic.IC_MESSAGE.parse(built)
    assert (declared.pipe_type, declared.pipe_length) == (1, 20 + len(body))
    assert (declared.framework_major, declared.framework_minor) == (
        header.framework.major,
        header.framework.minor,
    )
    assert (declared.message_version_major, declared.message_version_minor) == (
        header.message_version.major,
        header.message_version.minor,
    )
    for name in ("message_type", "size", "status", "transaction_id", "flags"):
        assert declared[name] == getattr(header, name)
    assert ic.IC_MESSAGE.build(declared) + body == built


@given(body=st.builds(ic.HeartbeatBody, U64, U32))
def test_heartbeat_is_as_declared(body: ic.HeartbeatBody) -> None:
    built = ic.build_heartbeat(body)
    assert built == ic.HEARTBEAT_BODY.build(body)
    assert ic.parse_heartbeat(built) == ic.HEARTBEAT_BODY.parse(built) == body
    assert ic.parse_heartbeat(built[:8]) == ic.HeartbeatBody(body.sequence, 0)


@given(header=st.builds(echo.EchoHeader, U16, U16, U32, U64, U32), data=st.binary(max_size=16))
def test_echo_header_is_as_declared(header: echo.EchoHeader, data: bytes) -> None:
    built = echo.ECHO_HEADER.build(header)
    fields = (header.operation, header.status, header.length, header.sequence, header.checksum)
    assert echo.build_header(*fields) == built
    assert echo.parse_header(built + data) == echo.ECHO_HEADER.parse(built + data) == header


@given(data=st.binary(max_size=23))
def test_short_echo_header_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        echo.parse_header(data)


@given(offer=st.builds(ic.NegotiateOffer, st.lists(VERSIONS).map(tuple), st.lists(VERSIONS).map(tuple)))
def test_negotiation_lists_come_back(offer: ic.NegotiateOffer) -> None:
    built = ic.NEGOTIATE_OFFER.build(offer)
    assert len(built) == 8 + 4 * (len(offer.frameworks) + len(offer.messages))
    assert struct.unpack_from("<HHI", built) == (len(offer.frameworks), len(offer.messages), 0)
    assert ic.NEGOTIATE_OFFER.parse(built) == offer


def test_generated_data_has_a_period() -> None:
    assert len(echo.GENERATED_DATA) == echo.MAX_GENERATE_SIZE + echo.GENERATED_PERIOD
    assert echo.GENERATED_DATA[:3] == bytes([13, 180, 91])
