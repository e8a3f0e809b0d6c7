"""Framing, negotiation and refusals that all integration components share.

Source: docs/protocol/devices.md#integration-component-framing,
docs/protocol/devices.md#integration-component-negotiation.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import InternalError
from vmbus.wire.ic import IcVersion
from vmbus_devices.heartbeat import Heartbeat
from vmbus_devices.ic import IcState, IntegrationComponent
from vmbus_devices.shutdown import Shutdown
from vmbus_devices.timesync import TimeSync

from tests.unit.device.ic_guest import REQUEST, RESPONSE, TRANSACTION, IcGuest, IcPacket

COMPONENTS = [Heartbeat, Shutdown, TimeSync]


@pytest.fixture
def guest() -> IcGuest:
    guest = IcGuest(Heartbeat())
    guest.open()
    return guest


def component(guest: IcGuest) -> IntegrationComponent:
    assert isinstance(guest.device, IntegrationComponent)
    return guest.device


def linux_picks(wanted: list[tuple[int, int]], offered: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The guest's own highest version that is in the host's list."""
    return next((version for version in wanted if version in offered), None)


def lists_of(offer: IcPacket) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    frameworks, messages, reserved = struct.unpack_from("<HHI", offer.body)
    assert reserved == 0
    words = struct.unpack_from(f"<{2 * (frameworks + messages)}H", offer.body, 8)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    return pairs[:frameworks], pairs[frameworks:]


def test_first_packet_byte_by_byte(guest: IcGuest) -> None:
    [packet] = guest.receive()
    assert packet.payload == bytes.fromhex(
        "01000000 2c000000"  # pipe: data, 44 bytes follow
        "00000000 0000 00000000"  # framework version, type 0, message version
        "1800 00000000 00 03 0000"  # 24 bytes of body, status, transaction 0, flags: transaction and request
        "0200 0200 00000000"  # two framework and two message versions
        "01000000 03000000 01000000 03000000"
        "00000000"  # the ring's padding
    )
    assert (packet.kind, packet.flags, packet.transaction_id) == (6, 0, 0)


@pytest.mark.conformance(80)
@pytest.mark.parametrize("make", COMPONENTS)
def test_highest_common_version_of_each_list_is_agreed_on(make: type[IntegrationComponent]) -> None:
    linux = {
        Heartbeat: [(3, 0), (1, 0)],
        Shutdown: [(3, 2), (3, 1), (3, 0), (1, 0)],
        TimeSync: [(4, 0), (3, 0), (1, 0)],
    }[make]
    for known in range(1, len(linux) + 1):
        guest = IcGuest(make())
        guest.open()
        offer = guest.take()
        frameworks, messages = lists_of(offer)
        assert len(offer.body) == 8 + 4 * (len(frameworks) + len(messages))
        framework = linux_picks([(3, 0), (1, 0)], frameworks)
        message = linux_picks(linux[-known:], messages)
        assert framework == (3, 0)
        assert message == linux[-known]
        guest.answer_negotiation(offer, framework, message)
        assert component(guest).state is IcState.READY
        assert component(guest).framework == IcVersion(*framework)
        assert component(guest).version == IcVersion(*message)


@pytest.mark.conformance(80)
def test_agreed_versions_and_counted_transactions_are_in_every_request() -> None:
    guest = IcGuest(Heartbeat(interval=0))
    guest.open()
    guest.negotiate(framework=(1, 0), version=(1, 0))
    for number in range(1, 600):
        request = guest.take()
        assert (request.framework, request.version) == ((1, 0), (1, 0))
        assert (request.transaction, request.flags) == (number % 256, TRANSACTION | REQUEST)
        guest.answer(request)


def test_guest_that_knows_no_version_is_left_alone(guest: IcGuest) -> None:
    guest.answer_negotiation(guest.take(), (0, 0), (0, 0), counts=(0, 0))
    assert component(guest).state is IcState.UNSUPPORTED
    assert component(guest).status() == component(guest).status() | {"state": "unsupported"}
    guest.advance(600)
    assert guest.receive() == []
    guest.close()
    guest.open()
    guest.negotiate()
    assert component(guest).state is IcState.READY


@pytest.mark.parametrize(
    ("framework", "version", "counts"),
    [
        ((2, 0), (3, 0), (1, 1)),
        ((3, 0), (9, 9), (1, 1)),
        ((3, 0), (3, 0), (2, 2)),
        ((3, 0), (3, 0), (0, 1)),
        ((3, 0), (3, 0), (65535, 65535)),
    ],
)
def test_version_that_was_not_offered_is_refused(
    guest: IcGuest, framework: tuple[int, int], version: tuple[int, int], counts: tuple[int, int]
) -> None:
    guest.answer_negotiation(guest.take(), framework, version, counts)
    assert guest.refusals() == {"ic-bad-version": 1}
    assert component(guest).state is IcState.UNSUPPORTED
    guest.advance(10)
    assert guest.receive() == []


@pytest.mark.conformance(80)
def test_stale_answers_before_the_negotiations_are_dropped(guest: IcGuest) -> None:
    offer = guest.take()
    for kind in (1, 3, 4):
        guest.answer(offer, bytes(40), type=kind, transaction=9)
    assert guest.refusals() == {"ic-stale-answer": 3}
    assert component(guest).state is IcState.NEGOTIATING
    guest.answer_negotiation(offer, (3, 0), (3, 0))
    assert component(guest).state is IcState.READY


@pytest.mark.conformance(80)
def test_stale_answers_to_a_request_are_dropped(guest: IcGuest) -> None:
    guest.negotiate()
    beat = guest.take()
    for transaction in (beat.transaction - 1, beat.transaction + 1, 255):
        guest.answer(beat, transaction=transaction)
    guest.answer(beat, type=0, transaction=beat.transaction)
    assert guest.refusals() == {"ic-stale-answer": 4}
    assert component(guest).pending
    guest.answer(beat)
    assert not component(guest).pending
    guest.answer(beat)
    assert guest.refusals() == {"ic-stale-answer": 5}, "an answer counts once"


@pytest.mark.conformance(80)
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (0, "ic-not-a-transaction"),
        (RESPONSE, "ic-not-a-transaction"),
        (REQUEST, "ic-not-a-transaction"),
        (TRANSACTION, "ic-not-an-answer"),
        (TRANSACTION | REQUEST, "ic-not-an-answer"),
        (TRANSACTION | REQUEST | RESPONSE, "ic-not-an-answer"),
    ],
)
def test_answer_without_the_right_flags_is_refused(guest: IcGuest, flags: int, reason: str) -> None:
    offer = guest.take()
    guest.answer(offer, flags=flags)
    assert guest.refusals() == {reason: 1}
    assert component(guest).state is IcState.NEGOTIATING
    guest.answer_negotiation(offer, (3, 0), (3, 0))
    beat = guest.take()
    guest.answer(beat, flags=flags)
    assert guest.refusals() == {reason: 2}
    assert component(guest).pending
    guest.answer(beat)
    assert not component(guest).pending


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "ic-short"),
        (bytes(24), "ic-short"),
        (struct.pack("<II", 1, 19) + bytes(24), "ic-short"),
        (struct.pack("<II", 1, 25) + bytes(24), "ic-short"),
        (struct.pack("<II", 1, 0xFFFFFFFF) + bytes(24), "ic-short"),
        (struct.pack("<II", 2, 20) + bytes(24), "ic-pipe-type"),
        (struct.pack("<II10xH", 1, 24, 5) + bytes(16), "ic-short"),
        (struct.pack("<II10xH", 1, 24, 65535) + bytes(16), "ic-short"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(guest: IcGuest, payload: bytes, reason: str) -> None:
    offer = guest.take()
    guest.send(payload)
    assert guest.refusals() == {reason: 1}
    guest.answer_negotiation(offer, (3, 0), (3, 0))
    assert component(guest).state is IcState.READY, "the channel still works"


def test_short_negotiation_is_refused(guest: IcGuest) -> None:
    offer = guest.take()
    guest.answer(offer, offer.body[:12])
    assert guest.refusals() == {"ic-short-body": 1}
    guest.answer_negotiation(offer, (3, 0), (3, 0))
    assert component(guest).state is IcState.READY


def test_answer_of_another_component_is_refused(guest: IcGuest) -> None:
    guest.negotiate()
    guest.answer(guest.take(), type=3)
    assert guest.refusals() == {"ic-wrong-type": 1}
    assert not component(guest).pending


def test_packets_that_are_not_in_band_are_refused(guest: IcGuest) -> None:
    guest.send(bytes(64), ranges=[(8, 0, [1])])
    assert guest.refusals() == {"ic-unexpected-packet": 1}


def test_completion_is_given_to_whoever_asks_for_one(guest: IcGuest) -> None:
    guest.answer(guest.take(), flags=0, transaction_id=5, completion_requested=True)
    assert [(packet.kind, packet.transaction_id) for packet in guest.receive()] == [(11, 5)]
    guest.close()
    guest.open()
    offer = guest.take()
    chosen = struct.pack("<HHIHHHH", 1, 1, 0, 3, 0, 3, 0)
    guest.answer(offer, chosen, transaction_id=6, completion_requested=True)
    assert [(packet.kind, packet.transaction_id) for packet in guest.receive()] == [(6, 0), (11, 6)]


@pytest.mark.parametrize("make", COMPONENTS)
def test_reopened_channel_starts_from_zero(make: type[IntegrationComponent]) -> None:
    guest = IcGuest(make())
    for _ in range(3):
        guest.open()
        guest.negotiate()
        assert component(guest).version == IcVersion(3, 0)
        guest.close()
        assert (component(guest).state, component(guest).version) == (IcState.CLOSED, None)
    assert guest.refusals() == {}


def test_slow_guest_is_waited_for(guest: IcGuest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    offer = guest.take()
    guest.advance(3600)
    assert [record.message for record in caplog.records] == [
        "heartbeat: the guest has not answered the offer of versions yet"
    ]
    assert guest.receive() == [], "the offer lies in the ring; a second one would be answered too"
    guest.answer_negotiation(offer, (3, 0), (3, 0))
    assert component(guest).state is IcState.READY


def test_second_request_while_one_is_pending_is_our_own_bug(guest: IcGuest) -> None:
    with pytest.raises(InternalError):
        component(guest).request(b"")
    guest.negotiate()
    with pytest.raises(InternalError):
        component(guest).request(b"")


@settings(deadline=None, max_examples=200)
@given(
    make=st.sampled_from(COMPONENTS),
    negotiated=st.booleans(),
    payloads=st.lists(st.binary(max_size=120), max_size=8),
    fields=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 3, 4, 9]),
            st.integers(0, 255),
            st.integers(0, 3),
            st.binary(max_size=48),
        ),
        max_size=8,
    ),
)
def test_nothing_a_guest_sends_stops_the_channel(
    make: type[IntegrationComponent],
    negotiated: bool,
    payloads: list[bytes],
    fields: list[tuple[int, int, int, bytes]],
) -> None:
    guest = IcGuest(make())
    guest.open()
    if negotiated:
        guest.negotiate()
    for payload in payloads:
        guest.send(payload)
    for kind, flags, transaction, body in fields:
        guest.send(
            struct.pack("<IIIHIHIBBH", 1, 20 + len(body), 3, kind, 3, len(body), 0, transaction, flags, 0)
            + body
        )
    assert guest.io.status()["state"] == "running"
    guest.close()
    guest.open()
    guest.reader.read()
    assert component(guest).state is IcState.NEGOTIATING
