"""The host's end of a channel: pauses, saved state, timers."""

from __future__ import annotations

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import DeviceEnvironment
from vmbus.bus.io.state import ChannelIoState, IoState
from vmbus.errors import DeviceError, InternalError
from vmbus.testing.loopback import (
    COMPLETION,
    IN_BAND,
    LoopbackGuest,
    guest_packet,
)
from vmbus.wire.packet import Packet

from tests.unit.ring.recorder import Recorder, ids, ignore, numbered

# --- paused, saved, restored ---


@pytest.mark.conformance(39)
def test_a_paused_channel_touches_no_ring_and_loses_nothing(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        guest.io.pause()
        before = bytes(guest.memory.ram)
        guest.io.complete(1)
        guest.io.send(b"news", transaction_id=99)
        guest.io.flush()
        guest.doorbell()
        guest.advance(10)
        assert guest.memory.ram == before
        guest.writer.write(*numbered(2, 3))
        guest.io.resume()
        guest.run()
        assert ids(device.packets) == [0, 1, 2, 3, 4]
        assert ids(guest.receive()) == [1, 99]
        guest.io.resume()
        guest.run()
        assert ids(device.packets) == [0, 1, 2, 3, 4]


def test_a_pause_in_the_middle_of_a_batch_leaves_the_rest_in_the_ring(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet)
        if packet.transaction_id == 4:
            io.pause()

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(10))
        assert ids(device.packets) == [0, 1, 2, 3, 4]
        assert guest.channel.incoming.load_u32(4) == 5 * 32
        assert guest.receive() == []
        state = guest.io.save()
        assert (len(state.output), state.owed) == (5, ())
        guest.io.resume()
        guest.run()
        assert ids(guest.receive()) == list(range(10))


def test_a_saved_channel_is_restored_elsewhere(device: Recorder) -> None:
    device.react = ignore
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(*numbered(4))
    for _ in range(14):
        guest.io.send(bytes(1000), completion_requested=True, transaction_id=7)
    guest.run()
    guest.io.complete(2, b"done")
    guest.writer.write(*numbered(2, 4))
    guest.io.pause()
    state = guest.io.save()
    assert dict(state.owed) == {0: 1, 1: 1, 3: 1}
    assert dict(state.awaited) == {7: 14}

    heir = Recorder(ignore)
    heir.start(DeviceEnvironment(guest.memory, guest.timers, guest.timers.now))
    io = ChannelIo(heir, guest.timers, poll_window=0)
    io.restore(state)
    interrupts = guest.interrupts
    io.restored(guest.channel)
    assert guest.interrupts == interrupts + 1
    guest.io = io
    guest.run()
    assert (heir.calls, ids(heir.packets)) == (["restored"], [])  # blocked until the guest reads
    got = []
    while packets := guest.receive():
        got += [(packet.kind, packet.transaction_id) for packet in packets]
    assert got == [(IN_BAND, 7)] * 14 + [(COMPLETION, 2)]
    assert ids(heir.packets) == [4, 5]
    io.complete(0)
    with pytest.raises(DeviceError):
        io.complete(2)


def test_a_failed_channel_is_restored_failed(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(guest_packet(kind=0))
    state = guest.io.save()
    guest.close()
    guest.io.restore(state)
    guest.io.restored(guest.channel)
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-descriptor-type")


def test_only_a_paused_channel_is_saved_and_only_a_closed_one_takes_a_state(guest: LoopbackGuest) -> None:
    with pytest.raises(InternalError):
        guest.io.save()
    with pytest.raises(InternalError):
        guest.io.restore(ChannelIoState())


# --- timers ---


def test_timers_of_a_channel_end_with_it_and_wait_while_it_is_paused(device: Recorder) -> None:
    fired: list[str] = []
    guest = LoopbackGuest(device)
    guest.open()
    guest.io.call_later(1, lambda: fired.append("first"))
    guest.io.call_later(1, lambda: fired.append("never")).cancel()
    guest.advance(1)
    guest.io.pause()
    guest.io.call_later(1, lambda: fired.append("late"))
    cancelled = guest.io.call_later(1, lambda: fired.append("never"))
    guest.advance(5)
    assert fired == ["first"]
    cancelled.cancel()
    guest.io.resume()
    assert fired == ["first", "late"]
    guest.io.call_later(1, lambda: fired.append("never"))
    guest.close()
    guest.open()
    guest.advance(5)
    assert fired == ["first", "late"]


def test_a_timer_that_raises_fails_its_channel_only(guest: LoopbackGuest) -> None:
    def broken() -> None:
        raise ValueError

    guest.io.call_later(1, broken)
    guest.advance(1)
    assert guest.io.failure == "device-error"
