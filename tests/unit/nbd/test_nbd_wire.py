"""The declarations against bytes from the protocol's document, and the fast layouts against the declarations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vmbus.errors import UsageError
from vmbus_devices.nbd.uri import Address, is_uri, parse_uri
from vmbus_devices.nbd.wire import (
    CHUNK,
    CHUNK_STRUCT,
    COMMAND_REQUEST,
    GO_REQUEST,
    REQUEST_STRUCT,
    SIMPLE_REPLY,
    SIMPLE_REPLY_STRUCT,
    CommandRequest,
    GoRequest,
)

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


@given(st.tuples(U32, U16, U16, U64, U64, U32))
def test_the_fast_request_is_the_declared_one(values: tuple[int, ...]) -> None:
    assert REQUEST_STRUCT.pack(*values) == COMMAND_REQUEST.build(CommandRequest(*values))


@given(st.binary(min_size=20, max_size=20))
def test_the_fast_replies_are_the_declared_ones(data: bytes) -> None:
    simple = SIMPLE_REPLY.parse(data)
    assert SIMPLE_REPLY_STRUCT.unpack(data[:16]) == (simple.magic, simple.error, simple.cookie)
    chunk = CHUNK.parse(data)
    assert CHUNK_STRUCT.unpack(data[:16]) == (chunk.magic, chunk.flags, chunk.type, chunk.cookie)
    assert chunk.length == int.from_bytes(data[16:], "big")


def test_go_as_it_is_on_the_wire() -> None:
    assert GO_REQUEST.build(GoRequest(b"disk", (3,))) == b"\0\0\0\4disk\0\1\0\3"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nbd://host/disk", Address("", "disk", host="host", port=10809)),
        ("nbd://host:99", Address("", "", host="host", port=99)),
        ("nbd://[::1]:99/a%2fb", Address("", "a/b", host="::1", port=99)),
        ("nbd+unix:///disk?socket=/run/n.sock", Address("", "disk", path="/run/n.sock")),
        ("nbd+unix:///?socket=a%20b", Address("", "", path="a b")),
    ],
)
def test_where_a_server_is(text: str, address: Address) -> None:
    assert is_uri(text)
    found = parse_uri(text)
    assert str(found) == text
    assert (found.export, found.host, found.port, found.path) == (
        address.export,
        address.host,
        address.port,
        address.path,
    )


@pytest.mark.parametrize(
    "text",
    [
        "nbd:host:99",
        "nbd://",
        "nbd:///x?socket=y",
        "nbd+unix:///x",
        "nbds://host/x",
        "nbd://h:x/",
        "nbd+vsock://1/",
    ],
)
def test_what_is_no_address(text: str) -> None:
    assert is_uri(text)
    with pytest.raises(UsageError, match=r"write nbd://HOST"):
        parse_uri(text)
