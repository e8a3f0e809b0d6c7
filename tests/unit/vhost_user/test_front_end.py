"""The negotiation with a server that does what it should, and with servers that do not."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from vmbus.ports import QueueLayout, SharedFile
from vmbus_devices.vhost_user import VhostUserError, offer_queue
from vmbus_devices.vhost_user.wire import Feature, Message, ProtocolFeature

from tests.unit.vhost_user.back_end import FEATURES, REPLY, Answer, Server, reply

TIMEOUT = 5.0


@pytest.fixture
def layout() -> Iterator[QueueLayout]:
    files = [os.memfd_create("ram"), os.memfd_create("queue")]
    eventfds = [os.eventfd(0), os.eventfd(0)]
    shared = (SharedFile(files[0], 8 << 20, 1 << 44), SharedFile(files[1], 1 << 20, 1 << 40))
    yield QueueLayout(shared, 1024, 1 << 40, (1 << 40) + 0x4000, (1 << 40) + 0x5000, *eventfds)
    for each in (*files, *eventfds):
        os.close(each)


def offer(layout: QueueLayout, answer: Answer, timeout: float = TIMEOUT) -> Server:
    here, there = socket.socketpair()
    server = Server(there, answer)
    with here:
        offer_queue(here, layout, timeout)
    server.join(TIMEOUT)
    return server


def test_the_server_gets_memory_and_queue_and_enables_it_last(layout: QueueLayout) -> None:
    heard = offer(layout, lambda message, flags: None).heard
    payloads = {message: payload for message, _, payload, _ in heard}
    assert {message: count for message, _, _, count in heard if count} == {5: 2, 12: 1, 13: 1}
    assert heard[-1][0] == Message.ENABLE_QUEUE
    (features,) = struct.unpack("<Q", payloads[2])
    assert features == FEATURES & ~(1 << 24)
    assert struct.unpack("<Q", payloads[16]) == (ProtocolFeature.REPLY_ACK,)
    assert struct.unpack("<II8Q", payloads[5]) == (
        *(2, 0),
        *(1 << 44, 8 << 20, 1 << 44, 0),
        *(1 << 40, 1 << 20, 1 << 40, 0),
    )
    assert struct.unpack("<II", payloads[8]) == (0, 1024)
    base = 1 << 40
    assert struct.unpack("<IIQQQQ", payloads[9]) == (0, 0, base, base + 0x5000, base + 0x4000, 0)
    assert all(flags & 3 == 1 for _, flags, _, _ in heard)


@pytest.mark.parametrize("missing", [Feature.VERSION_1, Feature.INDIRECT, Feature.PROTOCOL_FEATURES])
def test_a_server_without_what_is_needed_gets_nothing(layout: QueueLayout, missing: Feature) -> None:
    def answer(message: int, flags: int) -> bytes | None:
        return reply(1, FEATURES & ~missing) if message == 1 else None

    with pytest.raises(VhostUserError, match="lacks features"):
        offer(layout, answer)


def test_a_server_that_acknowledges_nothing_gets_nothing(layout: QueueLayout) -> None:
    with pytest.raises(VhostUserError, match="does not acknowledge"):
        offer(layout, lambda message, flags: reply(15, 1) if message == 15 else None)


@pytest.mark.parametrize("message", [Message.SET_MEMORY, Message.SET_QUEUE_ADDRESSES, Message.ENABLE_QUEUE])
def test_a_server_may_refuse(layout: QueueLayout, message: Message) -> None:
    with pytest.raises(VhostUserError, match=f"refuses {message.name}"):
        offer(layout, lambda number, flags: reply(number, 1) if number == message else None)


@pytest.mark.parametrize(
    "wrong",
    [
        reply(2, FEATURES),
        reply(1, FEATURES, flags=1),
        reply(1, FEATURES, flags=2 | REPLY),
        reply(1, FEATURES, size=4),
        reply(1, FEATURES, size=0xFFFFFFFF),
    ],
    ids=["another message", "no reply", "another version", "too short", "without end"],
)
def test_a_reply_that_cannot_be_is_refused(layout: QueueLayout, wrong: bytes) -> None:
    with pytest.raises(VhostUserError, match="breaks the protocol"):
        offer(layout, lambda message, flags: wrong if message == 1 else None)


@pytest.mark.parametrize("message", [Message.GET_FEATURES, Message.SET_MEMORY])
def test_a_server_may_end(layout: QueueLayout, message: Message) -> None:
    with pytest.raises(ConnectionError):
        offer(layout, lambda number, flags: b"" if number == message else None)


def test_a_server_that_says_nothing_is_not_waited_for(layout: QueueLayout) -> None:
    here, there = socket.socketpair()
    with here, there, pytest.raises(VhostUserError, match="does not answer GET_FEATURES"):
        offer_queue(here, layout, 0.05)
