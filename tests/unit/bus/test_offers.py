"""Offers, ids, hot add and remove, sub-channels.

Source: docs/protocol/messages.md#offers, docs/protocol/messages.md#rescind-and-release.
"""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from vmbus.bus import channel_list as offered_module
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.contact import DEFAULT_FEATURES
from vmbus.bus.offers import pipe_area, visible_flags
from vmbus.errors import DeviceError
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.header import MessageType
from vmbus.wire.messages import REQUESTOFFERS, HeaderOnly
from vmbus.wire.offer import OFFERCHANNEL, PIPE_AREA, OfferFlags, PipeMode
from vmbus.wire.version import ALL_FEATURES, Feature, Version


def numbers(guest: ScriptedGuest) -> list[MessageType]:
    return [answer.number for answer in guest.take()]


@pytest.mark.conformance(14)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_every_offer_then_the_end_mark_exactly_once(guest: ScriptedGuest, count: int) -> None:
    for number in range(count):
        guest.bus.offer(an_offer(f"d{number}"), RecordingEndpoint())
    guest.contact()
    guest.post(REQUESTOFFERS.build(HeaderOnly()))
    assert numbers(guest) == [MessageType.OFFERCHANNEL] * count + [MessageType.ALLOFFERS_DELIVERED]
    assert guest.ask(REQUESTOFFERS.build(HeaderOnly())) == []
    assert guest.bus.refusals.counts == {"offers-requested-twice": 1}


@pytest.mark.conformance(15)
def test_offer_fields(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer("a", mmio_megabytes=8, mmio_megabytes_optional=16), RecordingEndpoint())
    guest.bus.offer(
        an_offer("b", interface=2, flags=OfferFlags.REQUEST_MONITORED_NOTIFICATION), RecordingEndpoint()
    )
    plain, monitored = guest.connect()
    assert (plain.relid, plain.connection_id, plain.is_dedicated) == (1, 0x2001, 1)
    assert (plain.monitor_id, plain.monitor_allocated) == (0xFF, 0)
    assert (plain.mmio_megabytes, plain.mmio_megabytes_optional) == (8, 16)
    assert (monitored.relid, monitored.connection_id, monitored.is_dedicated) == (2, 0x2002, 1)
    assert (monitored.monitor_id, monitored.monitor_allocated) == (0, 1)
    assert all(len(answer.payload) == 196 for answer in guest.answers if answer.number == 1)


def test_tail_of_an_offer_is_as_in_the_trace(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    offer = next(answer for answer in guest.answers if answer.number is MessageType.OFFERCHANNEL)
    assert offer.payload[0xB4:] == bytes.fromhex("0000000001000000ff00010001200000")


@pytest.mark.conformance(16)
def test_ids_follow_interface_then_order_then_instance(guest: ScriptedGuest) -> None:
    wanted = [
        an_offer("absolute 1", interface=9, instance=90, order=1, absolute_order=True),
        an_offer("absolute 2", interface=1, instance=91, order=2, absolute_order=True),
        an_offer("ordered 1", interface=1, instance=12, order=1),
        an_offer("ordered 2", interface=1, instance=11, order=2),
        an_offer("plain, low instance", interface=1, instance=13),
        an_offer("plain, high instance", interface=1, instance=14),
        an_offer("next interface", interface=2, instance=1, order=0),
    ]
    for offer in (wanted[4], wanted[6], wanted[1], wanted[5], wanted[3], wanted[0], wanted[2]):
        guest.bus.offer(offer, RecordingEndpoint())
    offers = guest.connect()
    assert [each.relid for each in offers] == list(range(1, 8))
    assert [each.instance_id for each in offers] == [each.instance_id for each in wanted]


@pytest.mark.conformance(17)
def test_pipe_offer_carries_its_mode_in_the_user_defined_bytes(guest: ScriptedGuest) -> None:
    flags = OfferFlags.ENUMERATE_DEVICE_INTERFACE | OfferFlags.NAMED_PIPE_MODE
    area = pipe_area(PipeMode.MESSAGE, b"user", pipe_flags=1)
    guest.bus.offer(an_offer(flags=flags, user_defined=area), RecordingEndpoint())
    (offer,) = guest.connect()
    assert offer.flags == 0x11
    parsed = PIPE_AREA.parse(offer.user_defined)
    assert (parsed.mode, parsed.user_data[:5], parsed.pipe_flags) == (4, b"user\0", 1)
    assert guest.answers[1].payload[60:64] == b"\x04\0\0\0"


@pytest.mark.conformance(18)
def test_hot_add_before_during_and_after_the_offer_phase(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer("before"), RecordingEndpoint())
    guest.contact()
    guest.bus.offer(an_offer("during", interface=2), RecordingEndpoint())
    assert numbers(guest) == []
    assert [offer.relid for offer in guest.request_offers()] == [1, 2]
    guest.bus.offer(an_offer("after", interface=0), RecordingEndpoint())
    (answer,) = guest.take()
    assert (answer.number, answer.message.relid) == (MessageType.OFFERCHANNEL, 3)
    guest.unload()
    assert [offer.relid for offer in guest.connect()] == [1, 2, 3], "sorted anew"


@pytest.mark.conformance(19)
def test_id_is_reused_only_after_it_was_released(guest: ScriptedGuest) -> None:
    first, second = (guest.bus.offer(an_offer(name), RecordingEndpoint()) for name in ("first", "second"))
    guest.connect()
    assert (first.relid, second.relid) == (1, 2)
    guest.bus.revoke(first)
    (answer,) = guest.take()
    assert (answer.number, answer.message.relid) == (MessageType.RESCIND_CHANNELOFFER, 1)
    assert guest.bus.offer(an_offer("third"), RecordingEndpoint()).relid == 3
    assert numbers(guest) == [MessageType.OFFERCHANNEL]
    assert guest.release(1) == []
    assert guest.bus.offer(an_offer("fourth"), RecordingEndpoint()).relid == 1
    guest.bus.revoke(first)
    assert numbers(guest) == [MessageType.OFFERCHANNEL], "a revoked channel is gone for good"


@pytest.mark.conformance(19)
def test_subchannels_are_rescinded_before_their_primary(guest: ScriptedGuest) -> None:
    endpoints = [RecordingEndpoint() for _ in range(3)]
    primary = guest.bus.offer(an_offer(), endpoints[0])
    guest.connect()
    guest.open_channel(1)
    for index in (1, 2):
        sub = guest.bus.offer(an_offer(subchannel_index=index), endpoints[index])
        guest.take()
        guest.open_channel(index + 1)
        assert guest.bus.channels[index] is sub
    guest.bus.revoke(primary)
    rescinded = [answer.message.relid for answer in guest.take()]
    assert rescinded == [2, 3, 1]
    assert not any(endpoint.is_open for endpoint in endpoints)


def test_primary_is_rescinded_only_when_a_slow_subchannel_has_been(guest: ScriptedGuest) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    primary = guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    sub = guest.bus.offer(an_offer(subchannel_index=1), slow)
    guest.take()
    guest.open_channel(2)
    guest.bus.revoke(primary)
    assert guest.take() == []
    sub.finish_close()
    assert [answer.message.relid for answer in guest.take()] == [2, 1]


def test_closing_the_primary_rescinds_its_subchannels(guest: ScriptedGuest) -> None:
    primary_end, sub_end = RecordingEndpoint(), RecordingEndpoint()
    guest.bus.offer(an_offer(), primary_end)
    guest.connect()
    gpadl_id = guest.open_channel(1)
    guest.bus.offer(an_offer(subchannel_index=1), sub_end)
    (offered,) = guest.take()
    assert (offered.message.relid, offered.message.subchannel_index) == (2, 1)
    guest.open_channel(2)
    (rescind,) = guest.close(1)
    assert rescind.relid == 2
    assert sub_end.calls[-1].startswith("gpadl_torn_down")
    guest.release(2)
    guest.teardown(1, gpadl_id)
    guest.open_channel(1)
    guest.bus.offer(an_offer(subchannel_index=1), sub_end)
    assert guest.take()[-1].message.relid == 2


def test_subchannels_end_with_the_connection(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    guest.open_channel(1)
    guest.bus.offer(an_offer(subchannel_index=1), RecordingEndpoint())
    guest.take()
    assert guest.unload() == [HeaderOnly()]
    assert len(guest.connect()) == 1
    assert len(guest.bus.channels) == 1


def test_offers_that_contradict_each_other_are_the_devices_fault(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer("a"), RecordingEndpoint())
    contradictions: list[dict[str, Any]] = [
        {"name": "a"},
        {"name": "a", "interface": 2},
        {"name": "b", "subchannel_index": 1},
    ]
    for more in contradictions:
        with pytest.raises(DeviceError):
            guest.bus.offer(an_offer(**more), RecordingEndpoint())
    with pytest.raises(DeviceError):
        an_offer("c", user_defined=bytes(121))
    assert len(guest.bus.channels) == 1


def test_revoke_before_any_contact_needs_no_rescind(guest: ScriptedGuest) -> None:
    channel = guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.bus.revoke(channel)
    guest.contact()
    guest.bus.revoke(channel)
    assert guest.request_offers() == []


@pytest.mark.parametrize("opened", [False, True])
def test_device_that_comes_back_before_the_release_gets_its_id_again(
    guest: ScriptedGuest, opened: bool
) -> None:
    old = guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    if opened:
        guest.open_channel(1)
    guest.bus.revoke(old)
    endpoint = RecordingEndpoint()
    new = guest.bus.offer(an_offer(), endpoint)
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert new.state is ChannelState.REOFFERED
    gpadl_id = guest.share(1)
    assert guest.open(1, gpadl_id) == []
    assert guest.close(1) == []
    (again,) = guest.release(1)
    assert again.relid == 1
    assert endpoint.calls == []
    guest.open_channel(1)
    assert endpoint.is_open


def test_device_that_comes_back_while_its_old_channel_still_closes(guest: ScriptedGuest) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    old = guest.bus.offer(an_offer(), slow)
    guest.connect()
    guest.open_channel(1)
    guest.bus.revoke(old)
    new = guest.bus.offer(an_offer(), RecordingEndpoint())
    assert numbers(guest) == []
    old.finish_close()
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert new.state is ChannelState.REOFFERED
    assert [offer.relid for offer in guest.release(1)] == [1]


def test_reoffered_device_that_goes_again_is_revoked(guest: ScriptedGuest) -> None:
    old = guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    guest.bus.revoke(old)
    new = guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.bus.revoke(new)
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert guest.release(1) == []
    assert guest.bus.channels == ()


def test_offer_that_the_guest_gives_up_comes_again_only_on_the_next_connection(guest: ScriptedGuest) -> None:
    channel = guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.connect()
    guest.share(1)
    assert guest.release(1) == []
    assert channel.state is ChannelState.RELEASED
    assert guest.bus.gpadl_assembler.quota.gpadls == 0
    guest.bus.offer(an_offer("other"), RecordingEndpoint())
    assert [answer.message.relid for answer in guest.take()] == [1]
    assert guest.release(2) == []
    assert [offer.relid for offer in guest.connect()] == [1, 2]


@pytest.mark.conformance(20)
def test_rapid_offers_and_rescinds_keep_ids_unique(guest: ScriptedGuest) -> None:
    guest.connect()
    held: set[int] = set()
    for number in range(300):
        channel = guest.bus.offer(an_offer("storm", instance=number % 3 + 1), RecordingEndpoint())
        guest.bus.revoke(channel)
        for answer in guest.take():
            if answer.number is MessageType.OFFERCHANNEL:
                assert answer.message.relid not in held
                held.add(answer.message.relid)
            elif number % 7 == 0:
                for again in guest.release(answer.message.relid):
                    assert again.relid == answer.message.relid
                held.discard(answer.message.relid)
    for relid in sorted(held):
        guest.release(relid)
    assert guest.bus.channels == ()


def test_offer_without_a_free_id_waits_for_one(guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered_module, "MAX_RELID", 2)
    channels = [guest.bus.offer(an_offer(f"d{number}"), RecordingEndpoint()) for number in range(3)]
    assert [offer.relid for offer in guest.connect()] == [1, 2]
    assert guest.bus.refusals.counts == {"no-channel-id": 1}
    guest.bus.revoke(channels[0])
    guest.take()
    (offer,) = guest.release(1)
    assert (offer.relid, offer.instance_id) == (1, channels[2].offer.instance_id)


@pytest.mark.conformance(21)
@pytest.mark.parametrize(
    ("features", "trusted", "seen"),
    [
        (Feature(0), False, 0x1),
        (Feature(0), True, 0x1),
        (Feature.CONFIDENTIAL_CHANNELS, False, 0x1),
        (Feature.CONFIDENTIAL_CHANNELS, True, 0x7),
    ],
)
def test_confidential_flags_are_hidden_from_others(features: Feature, trusted: bool, seen: int) -> None:
    guest = ScriptedGuest.on_fakes(supported_flags=ALL_FEATURES)
    guest.bus.offer(an_offer(flags=OfferFlags(0x7)), RecordingEndpoint())
    guest.contact(Version.COPPER, features=features, trusted=trusted)
    guest.ask(REQUESTOFFERS.build(HeaderOnly()), trusted=trusted)
    assert guest.answers[1].message.flags == seen


@pytest.mark.conformance(23)
@pytest.mark.parametrize("negotiated", [False, True])
def test_pinning_is_required_only_when_negotiated(negotiated: bool) -> None:
    guest = ScriptedGuest.on_fakes(supported_flags=DEFAULT_FEATURES | Feature.GPA_PINNING)
    guest.bus.offer(an_offer(flags=OfferFlags(0x9)), RecordingEndpoint())
    (offer,) = guest.connect(
        Version.COPPER, features=Feature.GPA_PINNING if negotiated else Feature.PAUSE_RESUME
    )
    assert offer.flags == (0x9 if negotiated else 0x1)


def test_visible_flags_keep_all_others() -> None:
    every = OfferFlags(0x271F | 0x400)
    assert visible_flags(every, Feature(0), trusted=True) == every & ~OfferFlags(0xE)


def test_offer_is_the_same_in_bytes_on_every_connection(guest: ScriptedGuest) -> None:
    guest.bus.offer(an_offer(user_defined=b"hello"), RecordingEndpoint())
    guest.connect()
    guest.unload()
    guest.connect()
    offers = [answer.payload for answer in guest.answers if answer.number is MessageType.OFFERCHANNEL]
    assert offers[0] == offers[1]
    assert OFFERCHANNEL.parse(offers[0]).interface_id == uuid.UUID(int=1)
