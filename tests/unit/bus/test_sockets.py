"""Socket channels: who connects, who is refused (docs/protocol/messages.md#sockets)."""

from __future__ import annotations

import uuid

import pytest
from vmbus.bus.offers import socket_offer
from vmbus.bus.sockets import SocketRequest
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest
from vmbus.wire.header import STATUS_CONNECTION_REFUSED, MessageType
from vmbus.wire.messages import (
    TL_CONNECT_REQUEST,
    TL_CONNECT_REQUEST_SILO,
    HeaderOnly,
    TlConnectRequest,
    TlConnectRequestSilo,
    TlConnectResult,
)
from vmbus.wire.offer import SOCKET_AREA
from vmbus.wire.version import Version

ENDPOINT, SERVICE, SILO = uuid.uuid4(), uuid.UUID("000004d2-facb-11e6-bd58-64006a7986d3"), uuid.uuid4()
SHORT = TL_CONNECT_REQUEST.build(TlConnectRequest(ENDPOINT, SERVICE))
LONG = TL_CONNECT_REQUEST_SILO.build(TlConnectRequestSilo(ENDPOINT, SERVICE, SILO))
REFUSED = TlConnectResult(ENDPOINT, SERVICE, STATUS_CONNECTION_REFUSED)


class Listener:
    """Takes all requests, and offers nothing by itself."""

    def __init__(self) -> None:
        self.requests: list[SocketRequest] = []
        self.fail = False

    def connect(self, request: SocketRequest) -> bool:
        self.requests.append(request)
        if self.fail:
            raise RuntimeError("a bug")
        return True


@pytest.fixture
def listener(guest: ScriptedGuest) -> Listener:
    listener = Listener()
    guest.bus.listener = listener
    return listener


@pytest.mark.conformance(40)
def test_accepted_request_becomes_an_offer_that_can_be_opened(
    guest: ScriptedGuest, listener: Listener
) -> None:
    guest.connect(Version.WIN10)
    assert guest.ask(SHORT) == []
    assert listener.requests == [SocketRequest(ENDPOINT, SERVICE)]
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(socket_offer(SERVICE, ENDPOINT, for_guest_accept=False), endpoint)
    (answer,) = guest.take()
    offer = answer.message
    assert (offer.interface_id, offer.instance_id, offer.flags) == (SERVICE, ENDPOINT, 0x2011)
    assert answer.payload[8:24] == bytes.fromhex("d2040000cbfae611bd5864006a7986d3")
    assert offer.user_defined[:10] == bytes((0, 0, 0, 0, 0, 0, 1, 0, 0, 0))
    assert SOCKET_AREA.parse(offer.user_defined).version == 1
    guest.open_channel(offer.relid)
    assert endpoint.is_open
    guest.bus.revoke(channel)
    assert [each.number for each in guest.take()] == [MessageType.RESCIND_CHANNELOFFER]
    guest.release(offer.relid)
    assert guest.bus.channels == ()


def test_host_connects_with_the_accept_byte_set(guest: ScriptedGuest) -> None:
    guest.connect()
    guest.bus.offer(socket_offer(SERVICE, uuid.uuid4(), for_guest_accept=True), RecordingEndpoint())
    assert guest.take()[0].payload[64] == 1


@pytest.mark.conformance(41)
@pytest.mark.parametrize("version", [Version.WIN10, Version.WIN10_RS3_0, Version.IRON])
def test_refusal_is_answered_from_4_1(guest: ScriptedGuest, version: Version) -> None:
    guest.connect(version)
    assert guest.ask(SHORT) == ([REFUSED] if version >= Version.WIN10_RS3_0 else [])
    assert guest.bus.refusals.counts == {}


def test_request_does_not_exist_below_4_0(guest: ScriptedGuest, listener: Listener) -> None:
    guest.connect(Version.WIN8_1)
    assert guest.ask(SHORT) == []
    assert listener.requests == []


def test_listener_may_refuse_later_or_fail(guest: ScriptedGuest, listener: Listener) -> None:
    guest.connect()
    assert guest.ask(SHORT) == []
    guest.bus.refuse_socket(listener.requests[0])
    assert [answer.message for answer in guest.take()] == [REFUSED]
    listener.fail = True
    assert guest.ask(SHORT) == [REFUSED]
    guest.unload()
    guest.bus.refuse_socket(listener.requests[0])
    assert guest.take() == [], "no connection is left to answer on"


@pytest.mark.conformance(42)
def test_long_and_short_form_are_accepted_from_5_2(guest: ScriptedGuest, listener: Listener) -> None:
    guest.connect(Version.WIN10_RS5)
    guest.ask(LONG)
    guest.ask(SHORT)
    guest.connect(Version.WIN10_RS4)
    guest.ask(LONG)
    assert [request.silo_id for request in listener.requests] == [SILO, None, None]


def test_sockets_end_with_the_connection(guest: ScriptedGuest) -> None:
    guest.connect()
    guest.bus.offer(socket_offer(SERVICE, ENDPOINT, for_guest_accept=False), RecordingEndpoint())
    guest.take()
    guest.open_channel(1)
    assert guest.unload() == [HeaderOnly()]
    assert guest.connect() == []
