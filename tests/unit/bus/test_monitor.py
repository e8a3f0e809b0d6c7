"""Monitored notification: doorbells that are bits in a page.

Source: docs/protocol/messages.md#monitor-pages.
"""

from __future__ import annotations

import pytest
from vmbus.bus.channel.signals import RESIGNAL_DELAY
from vmbus.ports import PAGE_SIZE
from vmbus.testing.scripted import RecordingEndpoint, ScriptedGuest, an_offer
from vmbus.wire.messages import MODIFY_CONNECTION, ModifyConnection
from vmbus.wire.offer import OfferFlags
from vmbus.wire.version import Feature, Version

LATENCY = 50_000  # 5 ms
LOOK = 0.005


@pytest.fixture
def page(guest: ScriptedGuest) -> int:
    """Two monitored channels (ids 1 and 2, monitors 0 and 1) are offered; the child-to-parent page."""
    pages = [pfn * PAGE_SIZE for pfn in guest.pages(2)]
    for name in ("a", "b"):
        offer = an_offer(name, flags=OfferFlags.REQUEST_MONITORED_NOTIFICATION, monitor_latency=LATENCY)
        guest.bus.offer(offer, RecordingEndpoint())
    guest.connect(Version.COPPER, features=Feature.MODIFY_CONNECTION, monitor_pages=(pages[0], pages[1]))
    return pages[1]


def doorbells(guest: ScriptedGuest) -> list[int]:
    return [channel.counters.doorbells for channel in guest.bus.channels]


def pending_timers(guest: ScriptedGuest) -> int:
    return sum(1 for _, _, timer in guest.timers._queue if not timer.cancelled)


def test_pending_bit_is_a_doorbell_and_is_cleared(guest: ScriptedGuest, page: int) -> None:
    guest.open_channel(1)
    guest.memory.write(page + 8, b"\x01\0\0\0")
    guest.timers.advance(LOOK * 1.5)
    assert doorbells(guest) == [1, 0]
    assert guest.memory.read(page, 0x28) == bytes(0x28)
    guest.timers.advance(LOOK * 5)
    assert doorbells(guest) == [1, 0]


def test_all_open_channels_of_a_group_are_signalled_because_the_word_is_cleared_whole(
    guest: ScriptedGuest, page: int
) -> None:
    guest.open_channel(1)
    guest.open_channel(2)
    guest.memory.write(page + 8, b"\x02")
    guest.timers.advance(LOOK * 1.5)
    assert doorbells(guest) == [1, 1]


def test_other_groups_are_not_touched(guest: ScriptedGuest, page: int) -> None:
    guest.open_channel(1)
    guest.memory.write(page + 16, b"\xff" * 4)
    guest.timers.advance(1)
    assert doorbells(guest) == [0, 0]
    assert guest.memory.read(page + 16, 4) == b"\xff" * 4


def test_nothing_polls_while_no_monitored_channel_is_open(guest: ScriptedGuest, page: int) -> None:
    guest.timers.advance(1)
    assert pending_timers(guest) == 0
    guest.open_channel(1)
    guest.timers.advance(RESIGNAL_DELAY * 2)
    assert pending_timers(guest) == 1
    guest.close(1)
    assert pending_timers(guest) == 0
    guest.open_channel(1)
    guest.unload()
    assert pending_timers(guest) == 0
    looks = guest.bus._monitor.polls
    guest.timers.advance(1)
    assert guest.bus._monitor.polls == looks


def test_a_bus_that_is_closed_leaves_guest_memory_alone(guest: ScriptedGuest, page: int) -> None:
    guest.open_channel(1)
    guest.timers.advance(RESIGNAL_DELAY * 2)
    assert pending_timers(guest) == 1
    guest.bus.close()
    assert pending_timers(guest) == 0
    looks = guest.bus._monitor.polls
    guest.timers.advance(1)
    assert guest.bus._monitor.polls == looks


def test_pages_may_move(guest: ScriptedGuest, page: int) -> None:
    guest.open_channel(1)
    new = [pfn * PAGE_SIZE for pfn in guest.pages(2)]
    guest.ask(MODIFY_CONNECTION.build(ModifyConnection(*new)))
    guest.memory.write(page + 8, b"\x01")
    guest.timers.advance(LOOK * 3)
    assert doorbells(guest) == [0, 0]
    guest.memory.write(new[1] + 8, b"\x01")
    guest.timers.advance(LOOK * 3)
    assert doorbells(guest) == [1, 0]
    guest.ask(MODIFY_CONNECTION.build(ModifyConnection(0, 0)))
    guest.timers.advance(1)
    assert pending_timers(guest) == 0


def test_monitored_offer_without_pages_still_has_its_doorbell(guest: ScriptedGuest) -> None:
    offer = an_offer(flags=OfferFlags.REQUEST_MONITORED_NOTIFICATION)
    guest.bus.offer(offer, RecordingEndpoint())
    guest.connect()
    guest.open_channel(1)
    guest.synic.ports[0x2001]()
    assert doorbells(guest) == [1]
