"""Addresses of migrations, as a user names them."""

from __future__ import annotations

import os
import socket

import pytest
from vmbus.errors import UsageError
from vmbus.machine.migration.addresses import check_port, descriptor_number, structured, two_way


def test_addresses_as_qemu_takes_them_in_channels() -> None:
    assert structured("unix:/a/b:c") == {"transport": "socket", "type": "unix", "path": "/a/b:c"}
    assert structured("tcp:host:44") == {
        "transport": "socket",
        "type": "inet",
        "host": "host",
        "port": "44",
    }
    assert structured("tcp:[::1]:44")["host"] == "::1"
    assert structured("vsock:3:44") == {"transport": "socket", "type": "vsock", "cid": "3", "port": "44"}
    assert structured("fd:name") == {"transport": "socket", "type": "fd", "str": "name"}


@pytest.mark.parametrize("uri", ["", "unix:", "tcp:host", "tcp:host:http", "exec:cat", "somewhere"])
def test_what_is_no_address_of_a_channel(uri: str) -> None:
    with pytest.raises(UsageError, match="not the address of a migration channel"):
        structured(uri)


def test_descriptors_are_named_by_number() -> None:
    assert descriptor_number("fd:7") == 7
    assert descriptor_number("file:7") is None
    with pytest.raises(UsageError, match="give the number"):
        descriptor_number("fd:name")


def test_only_over_a_socket_can_a_target_answer() -> None:
    assert two_way("tcp:host:1")
    assert two_way("unix:/a")
    assert not two_way("exec:cat")
    assert not two_way("file:/a")
    one, other = socket.socketpair()
    reading, writing = os.pipe()
    with one, other, os.fdopen(reading), os.fdopen(writing, "wb"):
        assert two_way("fd:7", one.fileno())
        assert not two_way("fd:7", writing)


@pytest.mark.parametrize("uri", ["tcp:0:65536", "tcp:[::1]:99999", "tcp:host:100000,ipv4=on"])
def test_a_port_that_does_not_exist(uri: str) -> None:
    with pytest.raises(UsageError, match="there is no port"):
        check_port(uri)


@pytest.mark.parametrize(
    "uri",
    ["tcp:0:65535", "tcp:host:http", "tcp:host", "unix:/a:99999", "exec:nc tcp:h:99999", "vsock:3:99999"],
)
def test_what_has_no_wrong_port(uri: str) -> None:
    check_port(uri)
