"""Commands of a saved controller: each channel's are executed when it is open, runs, and memory has room."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from vmbus.bus.budget import MemoryBudget
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.state import IoState
from vmbus.testing import FakeTimers
from vmbus.wire.packet import Packet, PacketType
from vmbus_devices.scsi.restored import RestoredCommands


class FakeIo:
    """What is used of a channel; its commands cost 10 bytes each of ``budget``."""

    def __init__(self, index: int, budget: MemoryBudget) -> None:
        self.subchannel_index = index
        self.state = IoState.RUNNING
        self.budget = budget
        self.due: list[Callable[[], None]] = []

    def owes(self, transaction_id: int) -> bool:
        return transaction_id < 100

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.due.append(callback)

    def resume(self) -> None:
        self.state = IoState.RUNNING
        due, self.due = self.due, []
        for callback in due:
            callback()


class Rig:
    """Restored commands of two channels; ``done``: (channel, transaction id, how it ended)."""

    def __init__(self) -> None:
        self.budget = MemoryBudget(10)
        self.timers = FakeTimers()
        self.first, self.second = FakeIo(0, self.budget), FakeIo(1, self.budget)
        self.under_way: dict[FakeIo, set[int]] = {self.first: set(), self.second: set()}
        self.done: list[tuple[int, int, str]] = []
        self.restored = RestoredCommands(
            lambda: cast("dict[ChannelIo, set[int]]", self.under_way),
            lambda io, packet: self._begin(cast("FakeIo", io), packet, "executed"),
            lambda io, packet: self.done.append((io.subchannel_index, packet.transaction_id, "aborted")),
        )

    def _begin(self, io: FakeIo, packet: Packet, how: str) -> None:
        self.done.append((io.subchannel_index, packet.transaction_id, how))
        self.under_way[io].add(packet.transaction_id)
        self.budget.charge(10)

    def ends(self, io: FakeIo) -> None:
        """A command of ``io`` ends."""
        self.under_way[io].pop()
        self.budget.refund(10)
        self.restored.continue_soon(self.timers)
        self.timers.advance(0)

    def open(self, io: FakeIo, *transactions: int) -> None:
        for each in transactions:
            packet = Packet(PacketType.IN_BAND, 1, each, b"")
            self.restored.add(cast("ChannelIo", io), packet)
        self.restored.open(cast("ChannelIo", io))

    def ids(self) -> list[int]:
        return [each for _, each, _ in self.done]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_commands_follow_as_memory_becomes_free_in_their_order(rig: Rig) -> None:
    rig.open(rig.first, 1, 2, 3)
    assert rig.ids() == [1]
    rig.ends(rig.first)
    assert rig.ids() == [1, 2]
    rig.ends(rig.first)
    assert rig.ids() == [1, 2, 3]


def test_a_paused_channel_does_not_keep_the_commands_of_another_waiting(rig: Rig) -> None:
    rig.first.state = IoState.PAUSED
    rig.open(rig.first, 1)
    rig.open(rig.second, 11, 12)
    assert rig.ids() == [11]
    rig.ends(rig.second)
    assert rig.ids() == [11, 12]
    rig.first.resume()
    assert rig.ids() == [11, 12, 1]


def test_a_paused_channel_is_asked_once(rig: Rig) -> None:
    rig.first.state = IoState.PAUSED
    rig.open(rig.first, 1, 2)
    for _ in range(5):
        rig.restored.run()
    assert len(rig.first.due) == 1


def test_a_reset_aborts_all_at_once_and_what_is_not_owed_is_dropped(rig: Rig) -> None:
    rig.first.state = IoState.PAUSED
    rig.open(rig.first, 1, 200, 2)
    rig.restored.run(aborted=True)
    assert rig.done == [(0, 1, "aborted"), (0, 2, "aborted")]
    rig.first.resume()
    assert len(rig.done) == 2


def test_a_channel_that_closes_takes_its_commands_with_it(rig: Rig) -> None:
    rig.first.state = IoState.PAUSED
    rig.open(rig.first, 1)
    rig.restored.forget(cast("ChannelIo", rig.first), opened=True)
    rig.first.due.clear()
    rig.first.resume()
    rig.open(rig.first, 2)
    assert rig.ids() == [2]
