"""What a guest and its host say to each other about channels, and a reset, while emulators are killed."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from vmbus.ports import PAGE_SIZE
from vmbus.wire.gpadl import GpaRange, split_gpadl
from vmbus.wire.msr import Msr

from tests.unit.machine.killed.echoes import answers_to, ask, checksum, echoes
from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.matrix import Matrix

SECOND = "echo,instance=12345678-0000-4000-8000-000000000002"
PAGES = 80


def sharing(guest: KilledGuest) -> list[object]:
    """GPADLs of several messages, one of which is given up half-way."""
    guest.boot()
    [offer] = guest.connect()
    relid = offer.relid
    ring = guest.open_rings(relid)
    pfns = guest.pages(PAGES)[::-1]
    data = bytes(range(251)) * (PAGES * PAGE_SIZE // 251 + 1)
    for number, pfn in enumerate(pfns):
        guest.memory.write(pfn * PAGE_SIZE, data[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
    ranges = [GpaRange(PAGES * PAGE_SIZE, 0, tuple(pfns))]
    shared = guest.new_gpadl_id()
    [created] = guest.post_ranges(relid, ranges, shared)
    assert created.status == 0
    read = checksum(guest, relid, shared, 5000, 70 * PAGE_SIZE)
    assert read == zlib.crc32(data[5000 : 5000 + 70 * PAGE_SIZE])
    half = guest.new_gpadl_id()
    for message in split_gpadl(relid, half, ranges)[:2]:
        assert guest.ask(message) == []
    echoes(guest, relid, 2)
    for each in (shared, ring):
        if each == ring:
            guest.close(relid)
        [torn_down] = guest.teardown(relid, each)
        assert torn_down.gpadl_id == each
    guest.unload()
    guest.connect()
    guest.open_rings(relid)
    echoes(guest, relid, 2)
    return [guest.names(), guest.messages]


def hot_plug(guest: KilledGuest) -> list[object]:
    """A device is added, used, and taken away; then again."""
    guest.boot()
    [offer] = guest.connect()
    guest.open_rings(offer.relid)
    for _ in range(2):
        guest.machine.add(SECOND)
        added = guest.take()[0].message
        gpadl_id = guest.open_rings(added.relid)
        echoes(guest, added.relid, 2)
        guest.machine.remove(SECOND)
        [rescinded] = guest.take()
        assert rescinded.message.relid == added.relid
        del guest.channels[added.relid]
        guest.close(added.relid)
        guest.teardown(added.relid, gpadl_id)
        guest.release(added.relid)
        echoes(guest, offer.relid, 2)
    return [guest.names(), guest.messages]


def reset(guest: KilledGuest) -> list[object]:
    """The machine is reset while the host has much to do, and the guest boots again."""
    guest.boot()
    [offer] = guest.connect()
    guest.open_rings(offer.relid)
    echoes(guest, offer.relid, 2)
    for number in range(3):
        assert guest.send(offer.relid, guest.request(bytes(24), number))
    for message in split_gpadl(offer.relid, 0x99, [GpaRange(PAGE_SIZE, 0, tuple(guest.pages(1)))]):
        guest.post(message)
    guest.machine.reset()
    guest.machine.run()
    again = KilledGuest(guest.machine)
    assert [again.rdmsr(each) for each in (Msr.GUEST_OS_ID, Msr.HYPERCALL, Msr.SCONTROL, Msr.SIMP)] == [0] * 4
    again.boot()
    [offer] = again.connect()
    again.open_rings(offer.relid)
    echoes(again, offer.relid, 2)
    return [guest.names(), again.names(), again.messages]


def saving(guest: KilledGuest) -> list[object]:
    """The guest is saved, and then stays: a migration or a snapshot was given up. The next emulator is not paused."""
    guest.boot()
    [offer] = guest.connect()
    relid = offer.relid
    guest.open_rings(relid)
    for stopped_in_between in (True, False):
        guest.machine.command(lambda host: host.state.pause())
        for number in range(3):
            ask(guest, relid, number)
        guest.post(split_gpadl(relid, 0x77, [GpaRange(PAGE_SIZE, 0, tuple(guest.pages(1)))])[0])
        if stopped_in_between:
            guest.machine.run()
        guest.machine.command(lambda host: host.state.paused and host.state.save())
        guest.machine.command(lambda host: host.state.resume())
        [created] = guest.take()
        assert created.message.gpadl_id == 0x77
        answers_to(guest, relid, 3)
        guest.teardown(relid, 0x77)
    return [guest.names(), guest.messages]


SHARING = Matrix(sharing, 200, ["echo"])
HOT_PLUG = Matrix(hot_plug, 211, ["echo"])
RESET = Matrix(reset, 198, ["echo"])
SAVING = Matrix(saving, 147, ["echo"])
OFFERED = ["VERSION_RESPONSE", "OFFERCHANNEL", "ALLOFFERS_DELIVERED"]
OPENED = ["GPADL_CREATED", "OPENCHANNEL_RESULT"]
TAKEN_AWAY = ["RESCIND_CHANNELOFFER", "GPADL_TORNDOWN"]


@pytest.mark.parametrize(
    ("matrix", "told"),
    [
        pytest.param(
            SHARING,
            [
                *OFFERED,
                *OPENED,
                "GPADL_CREATED",
                *["GPADL_TORNDOWN"] * 2,
                "UNLOAD_RESPONSE",
                *OFFERED,
                *OPENED,
            ],
            id="sharing",
        ),
        pytest.param(HOT_PLUG, OFFERED + OPENED + 2 * ["OFFERCHANNEL", *OPENED, *TAKEN_AWAY], id="hot plug"),
        pytest.param(RESET, OFFERED + OPENED, id="reset"),
        pytest.param(SAVING, OFFERED + OPENED + 2 * ["GPADL_CREATED", "GPADL_TORNDOWN"], id="saving"),
    ],
)
def test_the_sessions_have_these_messages(tmp_path: Path, matrix: Matrix, told: list[str]) -> None:
    seen = matrix.undisturbed(tmp_path)
    assert isinstance(seen, list)
    assert seen[0] == told


@pytest.mark.parametrize("end", SHARING.each_step(9))
def test_memory_stays_shared(tmp_path: Path, end: int) -> None:
    SHARING.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), SHARING.each_pair(31))
def test_memory_stays_shared_over_two_deaths(tmp_path: Path, end: int, next_end: int) -> None:
    SHARING.killed_at(tmp_path, end, next_end)


@pytest.mark.parametrize("end", HOT_PLUG.each_step(9))
def test_a_device_comes_and_goes(tmp_path: Path, end: int) -> None:
    HOT_PLUG.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), HOT_PLUG.each_pair(31))
def test_a_device_comes_and_goes_over_two_deaths(tmp_path: Path, end: int, next_end: int) -> None:
    HOT_PLUG.killed_at(tmp_path, end, next_end)


@pytest.mark.parametrize("end", RESET.each_step(4))
def test_a_guest_boots_after_a_reset(tmp_path: Path, end: int) -> None:
    RESET.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), RESET.each_pair(31))
def test_a_guest_boots_after_a_reset_and_two_deaths(tmp_path: Path, end: int, next_end: int) -> None:
    RESET.killed_at(tmp_path, end, next_end)


@pytest.mark.parametrize("end", SAVING.each_step(9))
def test_a_guest_that_was_saved_goes_on(tmp_path: Path, end: int) -> None:
    SAVING.killed_at(tmp_path, end)


@pytest.mark.parametrize(("end", "next_end"), SAVING.each_pair(31))
def test_a_guest_that_was_saved_goes_on_after_two_deaths(tmp_path: Path, end: int, next_end: int) -> None:
    SAVING.killed_at(tmp_path, end, next_end)
