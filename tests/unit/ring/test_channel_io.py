"""The host's end of a channel: packets and completions in both directions, sub-channels, status."""

from __future__ import annotations

from typing import Any

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import DeviceEnvironment
from vmbus.bus.io.state import IoState
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError
from vmbus.testing.fakes import FakeTimers
from vmbus.testing.loopback import (
    COMPLETION,
    IN_BAND,
    FakeChannel,
    LoopbackGuest,
    guest_packet,
)
from vmbus.wire.packet import PacketType, TransferRange

from tests.unit.ring.recorder import INSTANCE, INTERFACE, Recorder, ids, ignore, numbered

# --- one packet, many packets ---


def test_a_request_is_answered_by_a_completion_with_its_id(guest: LoopbackGuest) -> None:
    guest.send(b"payload!", transaction_id=0xFFFF_FFFF_FFFF_FFFF, completion_requested=True)
    [answer] = guest.receive()
    assert (answer.kind, answer.flags, answer.payload) == (COMPLETION, 0, b"payload!")
    assert answer.transaction_id == 0xFFFF_FFFF_FFFF_FFFF


def test_a_request_that_wants_no_completion_is_answered_in_band(guest: LoopbackGuest) -> None:
    guest.send(b"payload!", transaction_id=5)
    [answer] = guest.receive()
    assert (answer.kind, answer.transaction_id, answer.payload) == (IN_BAND, 5, b"payload!")


def test_a_batch_is_answered_with_one_interrupt(guest: LoopbackGuest) -> None:
    assert guest.put(*numbered(30))
    assert (guest.doorbells, guest.interrupts) == (1, 1)
    assert ids(guest.receive()) == list(range(30))
    assert guest.io.counters.turns == 2  # the one at the open, and this one


def test_a_masked_guest_is_not_interrupted(guest: LoopbackGuest) -> None:
    guest.reader.mask(True)
    guest.put(*numbered(3))
    assert guest.interrupts == 0
    assert len(guest.receive()) == 3


def test_packets_of_all_kinds_arrive_with_what_they_carry(guest: LoopbackGuest, device: Recorder) -> None:
    guest.send(b"read it", ranges=[(5000, 100, [7, 8])], completion_requested=True, transaction_id=1)
    guest.send(b"in band")
    [direct, in_band] = device.packets
    assert (direct.kind, direct.ranges[0].pfns) == (PacketType.GPA_DIRECT, (7, 8))
    assert (in_band.kind, in_band.ranges) == (PacketType.IN_BAND, ())


def test_nothing_is_sent_for_a_packet_that_a_device_keeps(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(2))
        assert guest.receive() == []
        assert guest.io.owes(0)
        guest.io.complete(1, b"second")
        guest.io.complete(0)
        guest.run()
        assert [(p.transaction_id, p.payload) for p in guest.receive()] == [(1, b"second\0\0"), (0, b"")]
        assert guest.interrupts == 1
        assert not guest.io.owes(0)


def test_flush_sends_at_once_and_signals_once(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(5))
        for n in range(5):
            guest.io.complete(n)
        guest.io.flush()
        assert guest.interrupts == 1
        assert len(guest.receive()) == 5
        guest.io.flush()
        assert guest.interrupts == 1


def test_a_device_may_speak_first(device: Recorder) -> None:
    device.on_open = lambda io: io.send(b"welcome!", transaction_id=3)
    with LoopbackGuest(device) as guest:
        [hello] = guest.receive()
        assert (hello.kind, hello.payload, hello.transaction_id) == (IN_BAND, b"welcome!", 3)


def test_transfer_page_packets_are_sent(guest: LoopbackGuest) -> None:
    guest.io.send(
        b"x", transfer_set=0xCAFE, transfer_ranges=[TransferRange(60, 0)], completion_requested=True
    )
    guest.run()
    [packet] = guest.receive()
    assert (packet.kind, packet.flags, len(packet.extension)) == (7, 1, 16)


def test_packets_that_lie_in_the_ring_at_the_open_are_taken(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    for pages in (guest.channel.incoming, guest.channel.outgoing):
        pages.store_u32(64, 1)
    guest.writer.write(*numbered(2))
    guest.io.opened(guest.channel)
    guest.run()
    assert ids(device.packets) == [0, 1]


# --- completions the other way ---


def test_the_guest_completes_what_the_host_asked_for(guest: LoopbackGuest, device: Recorder) -> None:
    guest.io.send(b"question", transaction_id=9, completion_requested=True)
    guest.run()
    [question] = guest.receive()
    assert (question.flags, question.transaction_id) == (1, 9)
    guest.send(b"answered", kind=COMPLETION, transaction_id=9)
    [answer] = device.completions
    assert (answer.transaction_id, answer.payload) == (9, b"answered")
    assert device.packets == []


def test_completions_that_were_not_requested_are_refused(guest: LoopbackGuest, device: Recorder) -> None:
    guest.send(kind=COMPLETION, transaction_id=9)
    guest.io.send(b"", transaction_id=9, completion_requested=True)
    guest.run()
    for _ in range(3):
        guest.send(kind=COMPLETION, transaction_id=9)
    assert len(device.completions) == 1
    assert guest.io.refusals.counts == {"unexpected-completion": 3}
    assert guest.io.state is IoState.RUNNING


# --- the rest ---


def test_sub_channels_have_an_io_each(device: Recorder) -> None:
    offered: list[tuple[Offer, ChannelIo]] = []
    guest = LoopbackGuest(device)

    class Bus:
        def offer(self, offer: Offer, endpoint: Any) -> Any:
            offered.append((offer, endpoint))
            return FakeChannel(offer, guest.channel.incoming, guest.channel.outgoing)

        def revoke(self, channel: Any) -> None:
            raise AssertionError

    device.start(DeviceEnvironment(guest.memory, guest.timers, guest.timers.now, Bus()))
    guest.open()
    assert guest.io.subchannel_index == 0
    guest.io.offer_subchannels(2)
    assert [(o.subchannel_index, o.key[:2]) for o, _ in offered] == [
        (n, (INTERFACE, INSTANCE)) for n in (1, 2)
    ]
    assert [io.subchannel_index for io in guest.io.subchannels] == [1, 2]
    with pytest.raises(DeviceError):
        guest.io.offer_subchannels(1)
    with pytest.raises(DeviceError):
        guest.io.subchannels[0].offer_subchannels(1)
    guest.close()
    assert guest.io.subchannels == []


def test_sub_channels_need_an_environment_that_can_offer_them(guest: LoopbackGuest) -> None:
    with pytest.raises(DeviceError, match="no offers"):
        guest.io.offer_subchannels(1)
    assert guest.io.subchannels == []


def test_the_status_is_plain_values(guest: LoopbackGuest) -> None:
    guest.put(*numbered(2), guest_packet(kind=0))
    status = guest.io.status()
    assert status["state"] == "failed"
    assert status["failure"] == "invalid-descriptor-type"
    assert status["packets_in"] == 2
    assert status["refusals"] == {"invalid-descriptor-type": 1}


def test_a_channel_that_was_never_opened_is_not_there(device: Recorder) -> None:
    io = ChannelIo(device, FakeTimers())
    with pytest.raises(DeviceError, match="never opened"):
        _ = io.channel


def test_state_given_to_a_device_without_state_is_refused(device: Recorder) -> None:
    device.restore(device.save())
    with pytest.raises(DeviceError, match="has no saved state"):
        device.restore(b"something")
