"""Saving and restoring the bus: channels whose devices came, went or changed, and reserved ones."""

from __future__ import annotations

import pytest
from vmbus.bus.channel.state import ChannelState
from vmbus.bus.offers import Offer, OfferKey
from vmbus.errors import DeviceError
from vmbus.testing.scripted import ForgetfulEndpoint, RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.gpadl import GpadlTorndown
from vmbus.wire.header import MessageType
from vmbus.wire.messages import (
    ChannelOnly,
)
from vmbus.wire.offer import OfferFlags

from tests.unit.bus.moving import Move, messages, numbers, offer


@pytest.mark.conformance(50)
@pytest.mark.parametrize("early", [False, True])
def test_device_added_while_restoring_gets_exactly_one_offer(
    guest: ScriptedGuest, move: Move, early: bool
) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    move(RecordingEndpoint(), RecordingEndpoint(), early=early)
    (answer,) = guest.take()
    assert (answer.number, answer.message.relid) == (MessageType.OFFERCHANNEL, 2)
    guest.open_channel(2)


def test_restoring_asks_for_each_channel_once_however_many_there_are(
    guest: ScriptedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"device {number}" for number in range(100)]
    for name in names:
        guest.bus.offer(an_offer(name, instance=1 + names.index(name)), RecordingEndpoint())
    guest.connect()
    state = guest.save()
    bus = guest.another_bus()
    channels = [
        bus.offer(an_offer(name, instance=1 + names.index(name)), RecordingEndpoint()) for name in names
    ]
    asked = 0
    key = Offer.key

    def counted(offer: Offer) -> OfferKey:
        nonlocal asked
        asked += 1
        return key.fget(offer)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(Offer, "key", property(counted))
    bus.restore(state)
    assert {channel.offer.name: channel.relid for channel in channels} == {
        channel.offer.name: channel.relid for channel in guest.bus.channels
    }
    assert asked <= 2 * len(names)


def test_device_that_is_gone_is_rescinded(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint(), RecordingEndpoint())
    guest.connect()
    guest.open_channel(2)
    move(RecordingEndpoint())
    (answer,) = guest.take()
    assert (answer.number, answer.message) == (MessageType.RESCIND_CHANNELOFFER, ChannelOnly(2))
    assert guest.release(2) == []
    assert len(guest.bus.channels) == 1
    assert guest.bus.gpadl_assembler.quota.gpadls == 0


def test_endpoint_of_an_open_channel_continues_in_place(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer(), endpoint)
    [offer] = guest.connect()
    channel.continue_endpoint()
    assert endpoint.calls == []
    guest.open_channel(offer.relid)
    endpoint.calls.clear()
    guest.take()
    channel.continue_endpoint()
    assert endpoint.calls == ["restored", "signalled"]
    assert (channel.state, channel.is_open, guest.take()) == (ChannelState.OPEN, True, [])
    endpoint.fail_everywhere = DeviceError("its state is lost")
    channel.continue_endpoint()
    [answer] = guest.take()
    assert (answer.number, channel.state) == (MessageType.RESCIND_CHANNELOFFER, ChannelState.REOFFERED)
    endpoint.fail_everywhere = None
    [again] = guest.release(offer.relid)
    assert (again.relid, channel.state) == (offer.relid, ChannelState.CLOSED)


@pytest.mark.parametrize("fails", [False, True])
def test_channel_that_cannot_be_restored_is_rescinded_and_offered_anew(
    guest: ScriptedGuest, move: Move, fails: bool
) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    ring = guest.open_channel(1)
    endpoint = RecordingEndpoint() if fails else ForgetfulEndpoint()
    endpoint.fail_everywhere = DeviceError("no") if fails else None
    (channel,) = move(endpoint)
    endpoint.fail_everywhere = None
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert guest.close(1) == []
    assert guest.teardown(1, ring) == [GpadlTorndown(ring)]
    assert [each.relid for each in guest.release(1)] == [1]
    guest.open_channel(1)
    assert endpoint.is_open
    assert channel.state is ChannelState.OPEN


@pytest.mark.parametrize("is_open", [False, True])
def test_channel_whose_offer_forces_a_new_one_is_rescinded_and_offered_anew(
    guest: ScriptedGuest, is_open: bool
) -> None:
    forced = an_offer("a", flags=OfferFlags.FORCE_NEW_CHANNEL)
    guest.bus.offer(forced, RecordingEndpoint())
    guest.connect()
    if is_open:
        guest.open_channel(1)
    state = guest.save()
    guest.bus = guest.another_bus()
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(forced, endpoint)
    guest.bus.restore(state)
    assert guest.take() == []
    guest.bus.resume()
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert "restored" not in endpoint.calls
    assert channel.refusals.total == 0
    guest.close(1)
    [again] = guest.release(1)
    assert (again.relid, again.flags) == (1, OfferFlags.FORCE_NEW_CHANNEL)
    guest.open_channel(1)
    assert channel.state is ChannelState.OPEN


def test_state_restored_in_place_forces_a_new_channel_too(guest: ScriptedGuest) -> None:
    endpoint = RecordingEndpoint()
    channel = guest.bus.offer(an_offer("a", flags=OfferFlags.FORCE_NEW_CHANNEL), endpoint)
    guest.connect()
    guest.open_channel(1)
    channel.continue_endpoint()
    assert numbers(guest) == [MessageType.RESCIND_CHANNELOFFER]
    assert endpoint.calls[-1] == "closed"


def test_pages_mapped_for_reading_refuse_writes(guest: ScriptedGuest) -> None:
    channel = guest.bus.offer(an_offer("a"), RecordingEndpoint())
    guest.connect()
    gpadl = guest.share(1, 2)
    pages = channel.gpadl_pages(gpadl)
    pages.write(8, b"contents")
    mapped = channel.gpadl_pages(gpadl, read_only=True)
    assert (mapped.size, mapped.read(8, 8), mapped.address_u32(0)) == (pages.size, b"contents", 0)
    assert mapped.load_u32(8) == int.from_bytes(b"cont", "little")
    with pytest.raises(DeviceError, match="mapped these pages with read_only=True"):
        mapped.write(8, b"other...")
    with pytest.raises(DeviceError, match="mapped these pages with read_only=True"):
        mapped.store_u32(8, 1)
    assert pages.read(8, 8) == b"contents"


def test_offer_that_the_guest_gave_up_stays_given_up(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint(), RecordingEndpoint())
    guest.connect()
    guest.release(1)
    move(RecordingEndpoint(), RecordingEndpoint())
    assert guest.take() == []
    assert [each.relid for each in guest.connect()] == [1, 2]


@pytest.mark.parametrize("back", [False, True])
def test_revoked_channel_stays_revoked_until_released(guest: ScriptedGuest, move: Move, back: bool) -> None:
    (channel,) = offer(guest, RecordingEndpoint())
    guest.connect()
    guest.bus.revoke(channel)
    guest.take()
    endpoints = [RecordingEndpoint()] if back else []
    move(*endpoints)
    assert guest.take() == []
    assert [each.relid for each in guest.release(1)] == ([1] if back else [])
    assert len(guest.bus.channels) == back


def test_channel_that_was_released_before_it_was_rescinded_is_released_again(
    guest: ScriptedGuest, move: Move
) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    (channel,) = offer(guest, slow)
    guest.connect()
    guest.open_channel(1)
    guest.bus.revoke(channel)
    guest.release(1)  # too early: the device has not closed yet
    channel.finish_close()
    assert channel.state is ChannelState.REVOKED
    guest.take()
    move()
    guest.release(1)
    assert guest.bus.channels == ()


def test_reoffered_channel_of_a_device_that_is_gone_is_revoked(guest: ScriptedGuest, move: Move) -> None:
    (channel,) = offer(guest, RecordingEndpoint())
    guest.connect()
    guest.bus.revoke(channel)
    offer(guest, RecordingEndpoint())
    guest.take()
    move()
    assert guest.take() == []
    assert guest.release(1) == []
    assert guest.bus.channels == ()


@pytest.mark.conformance(53)
def test_reserved_channel_survives_disconnected(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    guest.open_reserved(1, guest.share(1), vp=1)
    guest.unload()
    endpoint = RecordingEndpoint()
    move(endpoint)
    assert endpoint.is_open
    assert guest.close_reserved(1, vp=3, sint=7) == [ChannelOnly(1)]
    assert not endpoint.is_open
    assert [each.relid for each in guest.connect()] == [1]
    guest.open_channel(1)


def test_a_primary_that_cannot_be_restored_comes_again_once_its_sub_channels_have_left(
    guest: ScriptedGuest,
) -> None:
    guest.bus.offer(an_offer(), RecordingEndpoint())
    guest.bus.offer(an_offer(subchannel_index=1), RecordingEndpoint())
    guest.connect()
    for relid in (1, 2):
        guest.open_channel(relid)
    state = guest.save()
    guest.bus = guest.another_bus()
    guest.bus.offer(an_offer(), ForgetfulEndpoint())  # which has no sub-channel before it is opened
    guest.bus.restore(state)
    guest.bus.resume()
    assert messages(guest) == [ChannelOnly(2), ChannelOnly(1)]
    primary = guest.bus.channels[0]
    assert primary.state is ChannelState.REOFFERED
    assert guest.release(2) == []
    assert [each.relid for each in guest.release(1)] == [1]
    guest.open_channel(1)


def test_reserved_channel_that_cannot_be_restored_is_released(guest: ScriptedGuest, move: Move) -> None:
    offer(guest, RecordingEndpoint())
    guest.connect()
    guest.open_reserved(1, guest.share(1))
    guest.unload()
    (channel,) = move(ForgetfulEndpoint())
    assert guest.take() == []
    assert channel.state is ChannelState.RELEASED
    assert [each.relid for each in guest.connect()] == [1]


def test_close_of_a_reserved_channel_under_way_is_answered(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow)
    guest.connect()
    guest.open_reserved(1, guest.share(1))
    guest.close_reserved(1, vp=2, sint=9)
    guest.unload()
    move(RecordingEndpoint())
    (answer,) = guest.take()
    assert (answer.vp, answer.sint, answer.message) == (2, 9, ChannelOnly(1))


def test_reopen_of_a_channel_whose_device_is_gone_is_forgotten(guest: ScriptedGuest, move: Move) -> None:
    slow = RecordingEndpoint()
    slow.defer_close = True
    offer(guest, slow)
    guest.connect()
    ring = guest.open_channel(1)
    guest.close(1)
    guest.open(1, ring)
    guest.teardown(1, ring)
    move()
    assert messages(guest) == [GpadlTorndown(ring), ChannelOnly(1)]
    (channel,) = guest.bus.channels
    assert (channel.state, channel.reopen) == (ChannelState.REVOKED, None)
    move()
    assert guest.take() == []
