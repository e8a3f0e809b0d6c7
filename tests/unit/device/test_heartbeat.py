"""The heartbeat against a scripted guest (docs/protocol/devices.md#heartbeat)."""

from __future__ import annotations

import struct

import pytest
from vmbus.errors import DeviceError
from vmbus_devices.heartbeat import Contact, Heartbeat

from tests.unit.device.ic_guest import IcGuest


def beat_back(guest: IcGuest, application_state: int = 0) -> int:
    """Answer the beat that has come; returns its sequence."""
    beat = guest.take()
    sequence = int(struct.unpack_from("<Q", beat.body)[0])
    guest.answer(beat, struct.pack("<QI28x", sequence + 1, application_state))
    return sequence


@pytest.fixture
def guest() -> IcGuest:
    heartbeat = Heartbeat()
    guest = IcGuest(heartbeat)
    heartbeat._clock = lambda: guest.timers.seconds
    guest.open()
    return guest


def device(guest: IcGuest) -> Heartbeat:
    assert isinstance(guest.device, Heartbeat)
    return guest.device


def test_offer_is_the_one_of_hyper_v() -> None:
    offer = Heartbeat().offer()
    assert str(offer.interface_id) == "57164f39-9115-4e78-ab55-382f3bd5422d"
    assert str(offer.instance_id) == "fd149e91-82e0-4a7d-afa6-2a4166cbd7c0"
    assert offer.flags == 0x11
    assert offer.user_defined == struct.pack("<I116x", 4)


def test_beat_is_forty_bytes_every_two_seconds(guest: IcGuest) -> None:
    guest.negotiate()
    beat = guest.take()
    assert (beat.kind, beat.vmbus_transaction, beat.pipe) == (6, 0, (1, 60))
    assert (beat.framework, beat.type, beat.version, beat.flags) == ((3, 0), 1, (3, 0), 3)
    assert beat.body == struct.pack("<QI28x", 0, 0)
    guest.answer(beat, struct.pack("<QI28x", 1, 0))
    guest.advance(1.9)
    assert guest.receive() == []
    guest.advance(0.1)
    assert struct.unpack_from("<Q", guest.take().body) == (1,)


def test_answers_are_counted_and_timed(guest: IcGuest) -> None:
    guest.negotiate()
    assert device(guest).contact is Contact.UNKNOWN
    for expected in range(3):
        guest.advance(0.25)
        assert beat_back(guest, application_state=1) == expected
        guest.advance(1.75)
    status = device(guest).status()
    assert status["contact"] == "alive"
    assert status["application_state"] == "healthy"
    assert (status["answers"], status["missed"], status["odd_answers"]) == (3, 0, 0)
    assert status["round_trip"] == {
        "count": 3,
        "min_us": 250_000.0,
        "median_us": pytest.approx(250_000, rel=0.1),
        "max_us": 250_000.0,
    }


def test_contact_is_lost_after_three_missed_beats_and_comes_back(guest: IcGuest) -> None:
    seen: list[Contact] = []
    device(guest).contact_changed = seen.append
    guest.negotiate()
    beat_back(guest)
    guest.advance(2)
    guest.advance(4)
    assert seen == [Contact.ALIVE]
    guest.advance(2)
    assert seen == [Contact.ALIVE, Contact.LOST]
    guest.advance(600)
    assert beat_back(guest) == 1, "a guest that hung finds one beat, not hundreds"
    assert seen[-1] is Contact.ALIVE
    guest.close()
    assert seen == [Contact.ALIVE, Contact.LOST, Contact.ALIVE, Contact.UNKNOWN]


def test_interval_zero_sends_the_next_beat_with_the_answer() -> None:
    guest = IcGuest(Heartbeat(interval=0))
    guest.open()
    guest.negotiate()
    assert [beat_back(guest) for _ in range(300)] == list(range(300))
    assert device(guest).answers == 300
    guest.advance(8)
    assert device(guest).contact is Contact.LOST
    beat_back(guest)
    assert device(guest).contact is Contact.ALIVE


def test_short_and_odd_answers_are_seen(guest: IcGuest) -> None:
    guest.negotiate()
    guest.answer(guest.take(), struct.pack("<Q", 1))
    assert (device(guest).answers, device(guest).odd_answers) == (1, 0)
    guest.advance(2)
    guest.answer(guest.take(), struct.pack("<Q", 77))
    assert (device(guest).answers, device(guest).odd_answers) == (2, 1)
    guest.advance(2)
    guest.answer(guest.take(), b"\0\0\0\0")
    assert guest.refusals() == {"ic-short-body": 1}
    assert (device(guest).answers, device(guest).missed_total) == (2, 1)
    guest.advance(2)
    assert beat_back(guest) == 3


def test_no_beat_after_close_or_stop(guest: IcGuest) -> None:
    guest.negotiate()
    guest.close()
    guest.advance(60)
    guest.open()
    guest.negotiate()
    device(guest).stop()
    guest.receive()
    guest.advance(60)
    assert guest.receive() == []


def test_state_survives_a_restore_in_the_middle_of_a_beat(guest: IcGuest) -> None:
    guest.negotiate(version=(1, 0))
    beat_back(guest)
    guest.advance(2)
    beat = guest.take()
    guest.io.pause()
    state = device(guest).save()

    later = Heartbeat()
    later.restore(state)
    other = IcGuest(later, memory=guest.memory, timers=guest.timers)
    other.io.restore(guest.io.save())
    other.io.restored(other.channel)
    other.run()
    assert other.receive() == []
    other.answer(beat, struct.pack("<QI28x", 2, 0))
    assert (later.answers, later.odd_answers, later.contact) == (2, 0, Contact.ALIVE)
    other.advance(2)
    assert beat_back(other) == 2
    assert other.refusals() == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state[:-1],
        lambda state: state + b"\0",
        lambda state: b"\2\0" + state[2:],
        lambda state: state[:2] + b"\7" + state[3:],
        lambda state: state[:3] + b"\x63" + state[4:],
        lambda state: b"",
    ],
)
def test_damaged_state_is_refused_and_changes_nothing(guest: IcGuest, damage: object) -> None:
    guest.negotiate()
    beat_back(guest)
    other = Heartbeat()
    with pytest.raises(DeviceError):
        other.restore(damage(device(guest).save()))  # type: ignore[operator]
    assert (other.answers, other.state, other.version) == (0, Heartbeat().state, None)
