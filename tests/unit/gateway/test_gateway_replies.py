"""A gateway inside a QEMU that was taken over can neither occupy the emulator's descriptors nor keep it waiting."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmbus.errors import GatewayError
from vmbus.machine.gateway import client
from vmbus.machine.gateway.client import Gateway
from vmbus.wire import gateway as wire

from tests.unit.gateway.test_gateway_geometry import ATTACHED, answer

OK = wire.REPLY.build(wire.Reply(wire.MESSAGE_MAGIC, wire.MessageType.CLOCK, wire.Status.OK, wire.VERSION, 0))


@pytest.fixture
def attached() -> Iterator[tuple[Gateway, socket.socket]]:
    """A gateway and the other end of its connection; what is written there is its answer to the next requests."""
    gateway = answer(ATTACHED)
    here, there = socket.socketpair()
    gateway._connection.close()
    gateway._connection = here
    with there:
        yield gateway, there
    gateway.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_that_nobody_asked_for_are_closed(attached: tuple[Gateway, socket.socket]) -> None:
    gateway, there = attached
    with Path(os.devnull).open() as null:
        before = descriptors()
        for _ in range(10):
            socket.send_fds(there, [OK], [null.fileno(), null.fileno()])
            gateway.refresh_clock()
        assert descriptors() == before


def test_a_frequency_that_is_never_measured_ends_the_attempt(
    attached: tuple[Gateway, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "TIMEOUT", 0.1)
    gateway, there = attached
    struct.pack_into("<I", gateway._region, wire.offset_of(wire.CONTROL, "tsc_known"), 1)
    there.sendall(OK * 1000)
    with pytest.raises(GatewayError, match="frequency"):
        gateway.activate()
