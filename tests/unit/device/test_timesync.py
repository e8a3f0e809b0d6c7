"""Time synchronisation against a scripted guest (docs/protocol/devices.md#time-synchronisation)."""

from __future__ import annotations

import struct

import pytest
from vmbus.bus.io.device import DeviceEnvironment
from vmbus.errors import DeviceError
from vmbus.testing.fakes import FakeMemory, FakeTimers
from vmbus_devices.timesync import TimeSync

from tests.unit.device.ic_guest import IcGuest

Y2K = 946_684_800
"""2000-01-01 UTC in Unix time, and ..."""
Y2K_1601 = 125_911_584_000_000_000
"""... in 100 ns since 1601-01-01 UTC: 145 731 days."""


def make(*, clock: bool = True, **options: object) -> IcGuest:
    timers = FakeTimers()
    device = TimeSync(wall_clock=lambda: Y2K * 10**9 + timers.now() * 100, **options)  # type: ignore[arg-type]
    memory = FakeMemory(1 << 20)
    device.start(DeviceEnvironment(memory, timers, (lambda: 5_000 + timers.now()) if clock else None))
    guest = IcGuest(device, memory=memory, timers=timers, start=False)
    guest.open()
    return guest


def status(guest: IcGuest) -> dict[str, object]:
    return guest.device.status()


def offered_versions(guest: IcGuest) -> list[tuple[int, ...]]:
    offer = guest.take()
    frameworks, messages = struct.unpack_from("<HH", offer.body)
    words = struct.unpack_from(f"<{2 * (frameworks + messages)}H", offer.body, 8)
    return [words[2 * index : 2 * index + 2] for index in range(frameworks, frameworks + messages)]


def test_version_4_needs_the_reference_clock() -> None:
    assert offered_versions(make()) == [(1, 0), (3, 0), (4, 0)]
    assert offered_versions(make(clock=False)) == [(1, 0), (3, 0)]
    assert offered_versions(make(reference=False)) == [(1, 0), (3, 0)]


def test_version_4_sends_both_clocks() -> None:
    guest = make()
    guest.advance(1)
    guest.negotiate(version=(4, 0))
    sync = guest.take()
    assert sync.type == 4
    assert sync.version == (4, 0)
    second = 10_000_000
    assert sync.body == struct.pack("<QQBBB5x", Y2K_1601 + second, 5_000 + second, 1, 0, 0)


@pytest.mark.parametrize("version", [(1, 0), (3, 0)])
def test_older_versions_send_the_host_time(version: tuple[int, int]) -> None:
    guest = make()
    guest.negotiate(version=version)
    assert guest.take().body == struct.pack("<QQQB3x", Y2K_1601, 0, 0, 1)


def test_one_sync_then_samples_after_each_answer() -> None:
    guest = make(interval=7.0)
    guest.negotiate(version=(4, 0))
    sync = guest.take()
    assert sync.body[16] == 1
    guest.advance(50)
    assert guest.receive() == [], "nothing more until the guest has answered"
    for _ in range(3):
        guest.answer(sync)
        guest.advance(6.9)
        assert guest.receive() == []
        guest.advance(0.1)
        sync = guest.take()
        assert sync.body[16] == 2
    assert (status(guest)["syncs"], status(guest)["samples"], status(guest)["answers"]) == (1, 3, 3)


def test_sync_can_be_asked_for() -> None:
    guest = make()
    device = guest.device
    assert isinstance(device, TimeSync)
    guest.negotiate(version=(4, 0))
    pending = guest.take()
    device.sync()
    guest.run()
    assert guest.receive() == []
    guest.answer(pending)
    again = guest.take()
    assert again.body[16] == 1
    guest.answer(again)
    guest.advance(1)
    device.sync()
    guest.run()
    assert guest.take().body[16] == 1
    guest.advance(10)
    assert guest.receive() == []


def test_guest_that_does_not_answer_or_fails_is_counted() -> None:
    guest = make()
    guest.negotiate(version=(4, 0))
    guest.advance(60)
    assert status(guest)["missed"] == 1
    guest.answer(guest.take(), status=0x80004005)
    assert status(guest)["failed"] == 1
    guest.advance(5)
    guest.answer(guest.take(), type=3)
    assert status(guest)["failed"] == 2
    guest.advance(5)
    assert guest.take().type == 4


def test_close_and_stop_end_it() -> None:
    guest = make()
    guest.negotiate(version=(4, 0))
    guest.answer(guest.take())
    guest.close()
    guest.advance(60)
    guest.open()
    guest.negotiate(version=(4, 0))
    sync = guest.take()
    assert sync.body[16] == 1
    guest.answer(sync)
    guest.device.stop()
    guest.advance(60)
    assert guest.receive() == []


def test_nothing_is_saved_and_a_restored_guest_is_asked_anew() -> None:
    guest = make()
    guest.negotiate(version=(4, 0))
    sync = guest.take()
    guest.io.pause()
    assert guest.device.save() == b""
    later = TimeSync()
    later.restore(b"")
    with pytest.raises(DeviceError):
        later.restore(b"\0")
    other = IcGuest(later, memory=guest.memory, timers=guest.timers)
    other.io.restore(guest.io.save())
    other.io.restored(other.channel)
    other.run()
    offer = other.take()
    other.answer(sync)
    assert other.refusals() == {"ic-stale-answer": 1}
    other.answer_negotiation(offer, (3, 0), (4, 0))
    assert other.take().body[16] == 1
