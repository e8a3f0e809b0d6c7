"""When a controller may be rescinded: what Linux would wait for for ever is finished, and nothing follows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.errors import UserError
from vmbus.machine import removal
from vmbus.machine.removal import GAPS, QUIET_PERIOD, UNNOTICED_PERIOD, Quiet
from vmbus.testing.loopback import guest_packet
from vmbus_devices.scsi import Scsi

from tests.unit.scsi.scsi_guest import ScsiGuest, controller, memory_disk

TEST_UNIT_READY = bytes(6)
INQUIRY = b"\x12\0\0\0\x24\0"
PLACES = [(path, target) for path in range(8) for target in range(2)]
"""What Linux asks in a scan, in its order."""
SHORT = 0.05
"""Seconds of quiet that these tests wait for."""
LONG = 10.0


@dataclass
class FakeHost:
    """What the removal needs of a host."""

    stopped: bool = False
    bus: Any = field(default_factory=lambda: SimpleNamespace(channels=[], messages_waiting=0))


class Removal:
    """A controller with a disk that is being removed, and its guest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.device: Scsi = controller(memory_disk())
        self.guest = ScsiGuest(self.device)
        self.guest.open()
        self.guest.negotiate()
        self.host = FakeHost()
        self.channel = SimpleNamespace(is_open=True)

    def begin(self) -> asyncio.Task[None]:
        self.device.detach(0, 0)
        self.guest.run()
        return asyncio.ensure_future(
            removal.guest_finished(
                self.host,
                "scsi",
                cast("Any", self.channel),
                self.guest.io,
                busy=self.device.busy,
                noticed=self.device.removal_noticed,
            )
        )

    def look_for_the_disk(self) -> None:
        """Do what Linux does when it was notified: it finds the disk gone, and scans."""
        self.guest.receive()
        assert self.guest.command(TEST_UNIT_READY).srb_status == 0x20
        self.scan()

    def scan(self, places: Sequence[tuple[int, int]] = PLACES) -> None:
        for path, target in places:
            assert self.guest.command(INQUIRY, read=36, address=(path, target, 0)).good

    def removal_noticed(self) -> None:
        """Have the device say so: what else is waited for?"""
        self.monkeypatch.setattr(self.device, "removal_noticed", lambda: True)


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Removal]:
    monkeypatch.setattr(removal, "QUIET_PERIOD", SHORT)
    monkeypatch.setattr(removal, "UNNOTICED_PERIOD", LONG)
    monkeypatch.setattr(removal, "FINISH_TIMEOUT", LONG)
    yield Removal(monkeypatch)


async def goes_on(task: asyncio.Task[None]) -> None:
    """Fail unless ``task`` is still waiting after a time in which it would have ended."""
    done, _ = await asyncio.wait({task}, timeout=4 * SHORT)
    assert not done


async def test_a_guest_that_found_the_disk_gone_has_finished(removed: Removal) -> None:
    task = removed.begin()
    removed.look_for_the_disk()
    await asyncio.wait_for(task, LONG)


async def test_a_guest_that_has_not_looked_has_not_finished(removed: Removal) -> None:
    task = removed.begin()
    removed.guest.receive()  # it was notified, and is slow
    await goes_on(task)
    removed.scan()  # it finds no disk, and still knows the one that it had
    removed.guest.command(TEST_UNIT_READY, address=(1, 0, 0))
    await goes_on(task)
    removed.guest.command(TEST_UNIT_READY)
    await asyncio.wait_for(task, LONG)


async def test_a_guest_that_was_not_notified_yet_has_not_finished(removed: Removal) -> None:
    removed.removal_noticed()
    task = removed.begin()
    await goes_on(task)  # the notification is in the ring
    removed.guest.receive()
    await asyncio.wait_for(task, LONG)


async def test_an_answer_that_was_not_read_is_waited_for(removed: Removal) -> None:
    task = removed.begin()
    removed.look_for_the_disk()
    packet = removed.guest.srb(TEST_UNIT_READY)
    assert removed.guest.send(packet, transaction_id=77, completion_requested=True)
    await goes_on(task)
    assert [each.transaction_id for each in removed.guest.receive()] == [77]
    await asyncio.wait_for(task, LONG)


async def test_a_request_in_the_ring_is_waited_for(removed: Removal) -> None:
    task = removed.begin()
    removed.look_for_the_disk()
    removed.guest.io.pause_input()
    packet = guest_packet(removed.guest.srb(TEST_UNIT_READY), transaction_id=78, completion_requested=True)
    assert removed.guest.writer.write(packet) is not None
    await goes_on(task)
    removed.guest.io.resume_input()
    removed.guest.run()
    assert [each.transaction_id for each in removed.guest.receive()] == [78]
    await asyncio.wait_for(task, LONG)


async def test_a_message_that_waits_for_the_guest_is_waited_for(removed: Removal) -> None:
    task = removed.begin()
    removed.look_for_the_disk()
    removed.host.bus.messages_waiting = 1
    await goes_on(task)
    removed.host.bus.messages_waiting = 0
    await asyncio.wait_for(task, LONG)


async def test_the_time_of_a_stop_does_not_count(removed: Removal) -> None:
    task = removed.begin()
    removed.look_for_the_disk()
    removed.host.stopped = True
    await goes_on(task)
    removed.host.stopped = False
    await asyncio.wait_for(task, LONG)


async def test_a_guest_that_never_used_the_disk_is_not_waited_for_long(
    removed: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "UNNOTICED_PERIOD", 2 * SHORT)
    task = removed.begin()
    removed.guest.receive()
    await asyncio.wait_for(task, LONG)


@pytest.mark.parametrize("why", ["closed", "failed"])
async def test_a_channel_on_which_nothing_comes_is_not_waited_for(removed: Removal, why: str) -> None:
    if why == "closed":
        removed.channel.is_open = False
    else:
        removed.guest.send(bytes(2), completion_requested=True)  # shorter than any request
        assert removed.guest.io.failure
        removed.removal_noticed()
    task = removed.begin()
    await asyncio.wait_for(task, LONG)


@pytest.mark.parametrize(
    ("stopped", "told"), [(False, "still uses it"), (True, r"resume it \(`vmbus cont`\)")]
)
async def test_a_guest_that_does_not_finish_keeps_the_controller(
    removed: Removal, monkeypatch: pytest.MonkeyPatch, stopped: bool, told: str
) -> None:
    monkeypatch.setattr(removal, "FINISH_TIMEOUT", SHORT)
    removed.host.stopped = stopped
    task = removed.begin()
    with pytest.raises(UserError, match=f"scsi is without its disks, .*{told}.*--force"):
        await task
    assert removed.guest.command(TEST_UNIT_READY).srb_status == 0x20  # it is still served


def test_a_slow_guest_gets_more_time() -> None:
    quiet = Quiet(0.0)
    for now, packets in ((0.0, 1), (1.0, 2), (2.0, 3)):
        quiet.look(now, packets, at_rest=True, stopped=False)
    quiet.look(2.0 + QUIET_PERIOD, 3, at_rest=True, stopped=False)
    assert not quiet.lasts(noticed=True)
    quiet.look(2.0 + GAPS * 1.0, 3, at_rest=True, stopped=False)
    assert quiet.lasts(noticed=True)
    assert not quiet.lasts(noticed=False)
    quiet.look(2.0 + UNNOTICED_PERIOD, 3, at_rest=True, stopped=False)
    assert quiet.lasts(noticed=False)


def test_a_stop_is_no_pause_between_two_requests() -> None:
    quiet = Quiet(0.0)
    quiet.look(0.0, 1, at_rest=True, stopped=False)
    for now in (10.0, 20.0):
        quiet.look(now, 1, at_rest=True, stopped=True)
    quiet.look(20.1, 2, at_rest=True, stopped=False)
    assert not quiet.lasts(noticed=True)
    quiet.look(20.1 + QUIET_PERIOD, 2, at_rest=True, stopped=False)
    assert quiet.lasts(noticed=True)


async def test_a_scan_that_is_not_at_its_end_is_waited_for(removed: Removal) -> None:
    task = removed.begin()
    removed.guest.receive()
    removed.guest.command(TEST_UNIT_READY)
    removed.scan(PLACES[:-1])
    await goes_on(task)
    removed.scan(PLACES[-1:])
    await asyncio.wait_for(task, LONG)


async def test_the_end_of_a_scan_from_before_the_removal_tells_nothing(removed: Removal) -> None:
    removed.scan(PLACES[:8])
    task = removed.begin()
    removed.guest.receive()
    removed.scan(PLACES[8:])
    removed.guest.command(TEST_UNIT_READY)
    await goes_on(task)
    removed.scan()
    await asyncio.wait_for(task, LONG)


def test_a_scan_of_an_empty_controller_is_seen(removed: Removal) -> None:
    removed.scan()
    assert removed.device.removal_noticed()
    removed.scan(PLACES[:3])  # a user has it scanned again
    assert not removed.device.removal_noticed()


def test_a_disk_that_comes_back_was_never_gone(removed: Removal) -> None:
    removed.device.detach(0, 0)
    removed.device.attach(memory_disk(), 0, 0)
    removed.scan()
    assert removed.device.removal_noticed()


def test_a_guest_that_opens_the_controller_anew_scans_it_anew(removed: Removal) -> None:
    removed.scan()
    removed.guest.close()
    removed.guest.open()
    assert not removed.device.removal_noticed()


def test_a_guest_without_a_driver_cannot_know_the_disk() -> None:
    device = controller(memory_disk())
    with ScsiGuest(device) as guest:
        device.detach(0, 0)
        guest.negotiate()
        for path, target in PLACES:
            guest.command(INQUIRY, read=36, address=(path, target, 0))
        assert device.removal_noticed()
