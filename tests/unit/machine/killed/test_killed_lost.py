"""A guest of which one device cannot be continued: that device begins anew, and nothing else is lost."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmbus.errors import DeviceError
from vmbus.machine.journal.store import Journal, read
from vmbus.machine.journal.values import CHANNEL_VALUE, identity_of, is_channel
from vmbus.wire.echo import ECHO_INSTANCE
from vmbus.wire.saved import ChannelIdentity
from vmbus_devices.echo import Echo

from tests.unit.machine.killed.echoes import echoes
from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.machine import JOURNAL_SIZE, Fate, Machine
from tests.unit.machine.killed.storage import BLOCK, Storage
from tests.unit.machine.killed.test_killed_disk import image, lines

OTHER = uuid.UUID("12345678-0000-4000-8000-000000000002")
Spoil = Callable[[Machine, pytest.MonkeyPatch], None]
Change = Callable[[bytes], bytes | None]


def change_values(machine: Machine, change: Callable[[ChannelIdentity, bytes], bytes | None]) -> None:
    """Change the values of channels in the journal of an emulator that was killed."""
    with mmap.mmap(machine.journal, JOURNAL_SIZE) as memory:
        found = read(memory)
        journal = Journal.resume(memory, found)
        values = found.values.items()
        journal.commit({key: change(identity_of(key), value) for key, value in values if is_channel(key)})
        journal.close()


def change_value(machine: Machine, instance: uuid.UUID, change: Change, *, index: int = 0) -> None:
    """Change the value of one channel."""

    def changed(identity: ChannelIdentity, value: bytes) -> bytes | None:
        mine = (identity.instance_id, identity.subchannel_index) == (instance, index)
        return change(value) if mine else value

    change_values(machine, changed)


def damaged(value: bytes) -> bytes:
    channel = CHANNEL_VALUE.parse(value)
    return CHANNEL_VALUE.build(dataclasses.replace(channel, chunks=channel.chunks[:-3] + b"\xff\xff\xff"))


def changing(change: Change) -> Spoil:
    """Return what changes the value of the first echo device."""
    return lambda machine, patch: change_value(machine, ECHO_INSTANCE, change)


def failing(method: str) -> Spoil:
    """Return what has the first echo device, and not the other, raise an error in a method."""

    def begin(machine: Machine, patch: pytest.MonkeyPatch) -> None:
        original = getattr(Echo, method)

        def raises(device: Echo, *arguments: object) -> object:
            if device.instance == ECHO_INSTANCE:
                raise DeviceError(f"no {method} today")
            return original(device, *arguments)

        patch.setattr(Echo, method, raises)

    return begin


def of_another(machine: Machine, patch: pytest.MonkeyPatch) -> None:
    """The value of the first device is that of the other one."""
    with mmap.mmap(machine.journal, JOURNAL_SIZE) as memory:
        values = read(memory).values.items()
        found = {identity_of(key).instance_id: value for key, value in values if is_channel(key)}
    change_value(machine, ECHO_INSTANCE, lambda value: found[OTHER])


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path, ["echo", f"echo,instance={OTHER}"])
    yield made
    made.close()


@pytest.mark.parametrize("dies_again", [False, True])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (failing("restore"), "no restore today"),
        (failing("check_restore"), "no check_restore today"),
        (changing(damaged), "chunk|checksum|damaged"),
        (changing(lambda value: value[:7]), "bytes|truncated|short"),
        (changing(lambda value: None), "could not say its state"),
        (of_another, "has the state of"),
    ],
    ids=["restore", "check", "damaged", "short", "none", "of another"],
)
def test_a_device_that_cannot_be_continued_begins_anew_and_the_others_go_on(
    machine: Machine,
    dies_again: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Spoil,
    words: str,
) -> None:
    guest = KilledGuest(machine)
    guest.boot()
    relids = {offer.instance_id: offer.relid for offer in guest.connect()}
    lost, other = relids[ECHO_INSTANCE], relids[OTHER]
    gpadl_id = guest.open_rings(lost)
    guest.open_rings(other)
    echoes(guest, lost, 2)
    echoes(guest, other, 2)
    machine.kill()
    with monkeypatch.context() as patch:
        spoil(machine, patch)
        [rescinded] = guest.take()
    assert (rescinded.number.name, rescinded.message.relid) == ("RESCIND_CHANNELOFFER", lost)
    assert machine.host is not None
    [problem] = machine.host.problems.sentences
    assert "echo" in problem
    assert re.search(words, problem), problem
    assert problem in caplog.text
    del guest.channels[lost]
    echoes(guest, other, 3)
    if dies_again:
        machine.kill()
    guest.teardown(lost, gpadl_id)
    [offered] = guest.release(lost)
    assert offered.instance_id == ECHO_INSTANCE
    guest.open_rings(offered.relid)
    for _ in range(2):
        echoes(guest, offered.relid, 3)
        echoes(guest, other, 2)
        machine.kill()
        machine.run()
        assert machine.host.problems.sentences == [], "the next one has lost nothing"
    errors = {each.name for each in caplog.records if each.levelno >= logging.ERROR}
    assert errors <= {"vmbus.saving.channel"}, "which has the traceback of a device's error"


@pytest.mark.parametrize("end", range(1, 26))
def test_it_begins_anew_once_although_that_emulator_is_killed_too(machine: Machine, end: int) -> None:
    guest = KilledGuest(machine)
    guest.boot()
    relids = {offer.instance_id: offer.relid for offer in guest.connect()}
    for relid in relids.values():
        guest.open_rings(relid)
        echoes(guest, relid, 2)
    machine.kill()
    change_value(machine, ECHO_INSTANCE, damaged)
    machine.fates.insert(0, Fate(end))
    [rescinded] = guest.take()
    assert rescinded.number.name == "RESCIND_CHANNELOFFER"
    lost = relids[ECHO_INSTANCE]
    assert rescinded.message.relid == lost
    del guest.channels[lost]
    echoes(guest, relids[OTHER], 3)
    [offered] = guest.release(lost)
    guest.open_rings(offered.relid)
    echoes(guest, offered.relid, 3)
    assert len(machine.deaths) == 2


def test_a_device_that_never_says_its_state_is_lost_and_its_guest_goes_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing("save")(machine, monkeypatch)
    guest = KilledGuest(machine)
    guest.boot()
    relids = [offer.relid for offer in guest.connect()]
    for relid in relids:
        guest.open_rings(relid)
        echoes(guest, relid, 2)
    assert "what echo does is lost if this emulator is killed: no save today" in caplog.text
    machine.kill()
    [rescinded] = guest.take()
    assert rescinded.number.name == "RESCIND_CHANNELOFFER"
    [other] = [relid for relid in relids if relid != rescinded.message.relid]
    del guest.channels[rescinded.message.relid]
    echoes(guest, other, 3)
    [offered] = guest.release(rescinded.message.relid)
    guest.open_rings(offered.relid)
    echoes(guest, offered.relid, 3)


@pytest.mark.parametrize("index", [0, 1])
def test_a_controller_that_has_lost_a_channel_begins_anew_with_all_of_them(
    tmp_path: Path, index: int
) -> None:
    machine = Machine(tmp_path, lines(tmp_path))
    guest = KilledGuest(machine)
    guest.boot()
    [offer] = guest.connect()
    disk = Storage(guest, offer.relid)
    disk.negotiate(subchannels=1)
    [offered] = guest.take()
    disk.open(offered.message.relid)
    before = disk.read(8, 2, offered.message.relid)
    assert disk.end(offered.message.relid)[before].good
    machine.kill()
    change_value(machine, offer.instance_id, damaged, index=index)
    rescinded = guest.take()
    assert [each.message.relid for each in rescinded] == [offered.message.relid, offer.relid]
    assert {each.number.name for each in rescinded} == {"RESCIND_CHANNELOFFER"}
    guest.channels.clear()
    assert guest.release(offered.message.relid) == []
    [again] = guest.release(offer.relid)
    disk = Storage(guest, again.relid)
    disk.negotiate(subchannels=1)
    [offered] = guest.take()
    disk.open(offered.message.relid)
    for relid in (again.relid, offered.message.relid):
        number = disk.read(3, 5, relid)
        answer = disk.end(relid)[number]
        assert answer.good
        assert disk.data(answer) == image()[3 * BLOCK : 8 * BLOCK]
    machine.close()


def test_a_channel_that_is_not_open_is_not_rescinded(machine: Machine) -> None:
    guest = KilledGuest(machine)
    guest.boot()
    offers = guest.connect()
    machine.kill()
    change_values(machine, lambda identity, value: b"?")
    assert guest.take() == []
    for offer in offers:
        guest.open_rings(offer.relid)
        echoes(guest, offer.relid, 2)
    machine.kill()
    for offer in offers:
        echoes(guest, offer.relid, 2)


def test_a_lost_device_that_is_not_offered_any_more_is_missing(machine: Machine) -> None:
    guest = KilledGuest(machine)
    guest.boot()
    for offer in guest.connect():
        guest.open_rings(offer.relid)
    machine.kill()
    change_value(machine, OTHER, damaged)
    del machine.lines[1]
    [rescinded] = guest.take()
    assert machine.host is not None
    assert list(machine.host.problems.keyed()) == ["missing-devices"]
    assert guest.release(rescinded.message.relid) == []
