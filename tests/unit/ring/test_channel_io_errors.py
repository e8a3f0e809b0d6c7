"""The host's end of a channel: what a device does wrong, and what a guest does wrong."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from vmbus.bus.io import held, turns
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.output import OUTPUT_BYTES
from vmbus.bus.io.state import IoState
from vmbus.bus.io.turns import TURN_PACKETS
from vmbus.errors import DeviceError, InternalError, MalformedError, ProtocolError, RingError
from vmbus.testing.loopback import (
    COMPLETION,
    LoopbackGuest,
    RacingPages,
    gpa_direct_extension,
    guest_packet,
)
from vmbus.wire.packet import Packet

from tests.unit.ring.recorder import Recorder, ids, ignore, numbered

# --- what a device does wrong ---


def test_a_second_completion_is_the_devices_error(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1))
        guest.io.complete(0)
        with pytest.raises(DeviceError, match="no completion is owed"):
            guest.io.complete(0)
        with pytest.raises(DeviceError):
            guest.io.complete(1)


def test_an_error_of_the_host_in_a_turn_costs_the_channel_only(
    device: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    guest = LoopbackGuest(device)
    exhausted = False

    def access(kind: str, offset: int) -> None:
        if exhausted and kind == "read":
            raise MemoryError("no memory for the copy")

    guest.channel.incoming = RacingPages(guest.channel.incoming, access)
    guest.open()
    exhausted = True
    guest.put(*numbered(1))
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "device-error")
    assert "no memory for the copy" in caplog.text
    exhausted = False
    guest.close()
    guest.open()
    guest.put(*numbered(1))
    assert ids(guest.receive()) == [0]


class Broken:
    """Compiled code that fails where it should say what has ended."""

    outstanding = 0
    link = None

    def look(self) -> None:
        raise InternalError("io_uring_enter: no")

    def close(self) -> None: ...


def test_an_error_of_compiled_code_at_the_end_of_a_turn_costs_the_channel_only(
    device: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "fast_ready", lambda io: True, raising=False)
    with LoopbackGuest(device) as guest:
        guest.io.fast = Broken()  # type: ignore[assignment]
        guest.put(*numbered(1))
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "device-error")
        guest.close()
        guest.open()
        guest.put(*numbered(1))
        assert ids(guest.receive()) == [0]


class Behind:
    """Compiled code whose answers come when the test says so."""

    outstanding = 0
    link = None

    def close(self) -> None: ...


def test_a_signal_that_fails_for_an_answer_of_compiled_code_ends_the_request_and_costs_the_channel(
    device: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackGuest(device) as guest:
        fast: Any = Behind()
        guest.io.fast = fast
        ended: list[ChannelIo] = []
        monkeypatch.setattr(device, "fast_ended", ended.append, raising=False)

        def gone() -> None:
            raise OSError("no QEMU")

        monkeypatch.setattr(guest.io, "_signal", gone)
        guest.io.fast_answered(fast, guest_packet(kind=COMPLETION, transaction_id=1))
        assert guest.io.state is IoState.FAILED
        assert ended == [guest.io]


def test_packets_without_the_flag_are_owed_nothing(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1, 77, completion_requested=False))
        with pytest.raises(DeviceError):
            guest.io.complete(77)


def test_an_id_used_twice_is_completed_twice(device: Recorder) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1, 5), *numbered(1, 5))
        guest.io.complete(5)
        guest.io.complete(5)
        with pytest.raises(DeviceError):
            guest.io.complete(5)


def test_longer_packets_than_the_driver_takes_are_the_devices_error(guest: LoopbackGuest) -> None:
    guest.io.send(bytes(4096 - 16))
    with pytest.raises(DeviceError, match="at most 4096"):
        guest.io.send(bytes(4096 - 16 + 1))


@pytest.mark.parametrize("error", [ValueError("oops"), DeviceError("gives up"), KeyError(3)])
def test_a_device_that_raises_costs_its_channel_only(
    error: Exception, device: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet)
        if packet.transaction_id == 2:
            raise error

    device.react = react
    with caplog.at_level(logging.ERROR), LoopbackGuest(device) as guest:
        guest.put(*numbered(5))
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "device-error")
        assert ids(device.packets) == [0, 1, 2]
        guest.put(*numbered(5))
        guest.doorbell()
        assert len(device.packets) == 3
        assert guest.io.refusals.counts == {"device-error": 1}
    assert device.calls == ["opened", "closed"]
    assert any(record.exc_info for record in caplog.records)


def test_a_failed_channel_works_again_when_it_is_opened_anew(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(guest_packet(kind=0))
    failed = guest.io.state
    guest.close()
    assert (failed, guest.io.state) == (IoState.FAILED, IoState.CLOSED)
    guest.open()
    guest.put(*numbered(2))
    assert (guest.io.failure, ids(guest.receive())) == ("", [0, 1])


def test_an_open_that_the_device_refuses_leaves_nothing_behind(device: Recorder) -> None:
    def refuse(io: ChannelIo) -> None:
        io.send(b"never")
        raise ProtocolError("too-early")

    device.on_open = refuse
    guest = LoopbackGuest(device)
    with pytest.raises(ProtocolError):
        guest.open()
    guest.run()
    assert (guest.io.state, guest.receive(), guest.interrupts) == (IoState.CLOSED, [], 0)


def test_an_unexpected_error_in_an_open_is_a_device_error(device: Recorder) -> None:
    def fail(io: ChannelIo) -> None:
        raise ZeroDivisionError

    device.on_open = fail
    with pytest.raises(DeviceError, match="ZeroDivisionError"):
        LoopbackGuest(device).open()


def test_a_device_that_was_not_started_says_so(device: Recorder) -> None:
    guest = LoopbackGuest(device, start=False)
    with pytest.raises(DeviceError, match="not started"):
        guest.open()


def test_a_device_that_raises_when_it_closes_is_contained(device: Recorder) -> None:
    class Bad(Recorder):
        def closed(self, io: ChannelIo) -> None:
            raise ValueError("no")

    guest = LoopbackGuest(Bad())
    guest.open()
    guest.close()
    assert guest.io.state is IoState.CLOSED


def test_a_device_that_floods_is_stopped(guest: LoopbackGuest) -> None:
    with pytest.raises(DeviceError, match="faster than the guest reads"):
        for _ in range(100_000):
            guest.io.send(bytes(64))
    assert guest.io.backlog <= OUTPUT_BYTES
    guest.run()
    assert guest.io.state is IoState.RUNNING


def test_a_device_cannot_wait_for_any_number_of_completions(
    guest: LoopbackGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "AWAITED_LIMIT", 3)
    for _ in range(3):
        guest.io.send(b"", completion_requested=True)
    with pytest.raises(DeviceError, match="waits for"):
        guest.io.send(b"", completion_requested=True)


def test_what_is_sent_on_a_closed_channel_is_dropped(device: Recorder) -> None:
    device.react = ignore
    guest = LoopbackGuest(device)
    guest.open()
    guest.put(*numbered(1))
    guest.close()
    guest.io.send(b"late")
    guest.io.complete(0)
    guest.run()
    assert guest.io.counters.dropped == 2
    assert guest.receive() == []


def test_a_channel_that_the_device_closes_from_inside_is_not_touched_any_more(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    device.react = lambda io, packet: io.closed(guest.channel)
    guest.open()
    guest.put(*numbered(3))
    assert ids(device.packets) == [0]
    assert guest.channel.incoming.load_u32(4) == 0
    assert guest.io.state is IoState.CLOSED


# --- what a guest does wrong ---


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (guest_packet(kind=0), "invalid-descriptor-type"),
        (guest_packet(flags=4), "invalid-descriptor-flags"),
        (guest_packet(kind=9, extension=bytes(8)), "invalid-gpa-direct-range-count"),
        (guest_packet(kind=9), "invalid-descriptor-lengths"),
    ],
)
@pytest.mark.conformance(58)
def test_a_corrupt_ring_stops_the_channel_after_what_came_before(
    bad: bytes, reason: str, guest: LoopbackGuest, device: Recorder
) -> None:
    guest.put(*numbered(2), bad, *numbered(2))
    assert ids(device.packets) == [0, 1]
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, reason)
    assert guest.io.refusals.counts == {reason: 1}
    guest.doorbell()
    assert guest.io.refusals.counts == {reason: 1}


@pytest.mark.parametrize("index", [4, 0x10000, 0xFFFFFFFF])
def test_bad_indices_stop_the_channel(index: int, guest: LoopbackGuest) -> None:
    guest.channel.incoming.store_u32(0, index)
    guest.doorbell()
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-ring-pointer")


def test_a_bad_read_index_stops_the_channel(device: Recorder, guest: LoopbackGuest) -> None:
    guest.channel.outgoing.store_u32(4, 12)
    guest.put(*numbered(1))
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-ring-pointer")


def test_rings_that_are_none_are_refused_at_the_open(device: Recorder) -> None:
    guest = LoopbackGuest(device)
    guest.channel.incoming = guest.memory.pages([3])
    with pytest.raises(RingError):
        guest.open()
    assert (guest.io.state, device.calls) == (IoState.CLOSED, [])


def test_a_packet_that_fits_the_driver_but_not_the_guests_ring_stops_the_channel(device: Recorder) -> None:
    with LoopbackGuest(device, ring_pages=1) as guest:
        guest.io.send(bytes(4096 - 16))
        guest.run()
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "invalid-message-length")


@pytest.mark.conformance(59)
def test_an_empty_range_is_an_error_on_that_packet_only(guest: LoopbackGuest, device: Recorder) -> None:
    empty = guest_packet(
        b"request",
        kind=9,
        extension=gpa_direct_extension([(0, 0, [])]),
        transaction_id=1,
        completion_requested=True,
    )
    guest.put(*numbered(1), empty, *numbered(1, 2))
    assert ids(device.packets) == [0, 2]
    assert device.refusals == ["gpa-range-empty"]
    assert [(p.kind, p.transaction_id, len(p.payload)) for p in guest.receive()] == [
        (COMPLETION, 0, 8),
        (COMPLETION, 1, 0),
        (COMPLETION, 2, 8),
    ]
    assert guest.io.refusals.counts == {"gpa-range-empty": 1}
    assert guest.io.state is IoState.RUNNING


def test_an_empty_range_in_a_packet_that_wants_no_completion_is_only_counted(guest: LoopbackGuest) -> None:
    guest.put(guest_packet(kind=9, extension=gpa_direct_extension([(0, 0, [])])))
    assert guest.receive() == []
    assert guest.io.refusals.counts == {"gpa-range-empty": 1}


def test_a_request_that_the_device_finds_malformed_costs_that_packet_only(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        if packet.transaction_id == 1:
            raise MalformedError("bad-cdb")
        io.answer(packet, b"fine....")

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        assert [(p.transaction_id, p.payload) for p in guest.receive()] == [
            (0, b"fine...."),
            (1, b""),
            (2, b"fine...."),
        ]
        assert device.refusals == ["bad-cdb"]


def test_a_device_that_answers_and_then_raises_is_not_answered_for_again(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet, b"answered")
        raise MalformedError("bad-tail")

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(1))
        assert [p.payload for p in guest.receive()] == [b"answered"]
        assert guest.io.state is IoState.RUNNING


def test_a_protocol_error_stops_the_channel(device: Recorder) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        raise ProtocolError("unknown-operation")

    device.react = react
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "unknown-operation")
        assert len(device.packets) == 1


def test_a_guest_that_never_reads_its_completions_is_not_served_without_end(device: Recorder) -> None:
    device.react = lambda io, packet: io.answer(packet, bytes(1000))
    with LoopbackGuest(device) as guest:
        sent = 0
        while sent < 10_000 and guest.put(*numbered(8, sent)):
            sent += 8
        assert sent < 1000
        assert guest.io.backlog < TURN_PACKETS * 1100
        got = []
        while packets := guest.receive():
            got += ids(packets)
        assert got == list(range(sent))
        assert guest.io.backlog == 0


def test_no_more_is_owed_than_the_limit(device: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(device), "max_owed", 40)
    monkeypatch.setattr(turns, "BATCH_PACKETS", 10)
    device.react = ignore
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(100))
        assert len(device.packets) == 40
        guest.io.complete(0)
        guest.run()
        assert 40 < len(device.packets) <= 51
        for n in range(1, 100):
            guest.io.complete(n)
            guest.run()
        assert ids(device.packets) == list(range(100))
