"""Started, PostStarted and Suspend: what a device is told of pauses, as the contract of KMCL orders it."""

from __future__ import annotations

import uuid

import pytest
from vmbus.api import Channel, Device, DeviceError, Offer, Packet
from vmbus.bus.io.state import IoState
from vmbus.testing import LoopbackGuest


class Diary(Device):
    """Writes down what it is told; ``bad``: the hook that raises."""

    name = "diary"

    def __init__(self, bad: str = "") -> None:
        self.calls: list[str] = []
        self.bad = bad

    def offer(self) -> Offer:
        return Offer(interface_id=uuid.UUID(int=1), instance_id=uuid.UUID(int=2), name=self.name)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.bad:
            raise ValueError(call)

    def opened(self, io: Channel) -> None:
        self._note("opened")

    def started(self, io: Channel) -> None:
        self._note("started")
        io.send(b"started.")

    def post_started(self, io: Channel) -> None:
        self._note("post_started")

    def packet(self, io: Channel, packet: Packet) -> None:
        self._note("packet")

    def suspended(self, io: Channel) -> None:
        self._note("suspended")

    def closed(self, io: Channel) -> None:
        self._note("closed")

    def taken(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


def test_hooks_come_in_the_order_of_the_contract() -> None:
    device = Diary()
    guest = LoopbackGuest(device)
    guest.open()
    assert device.taken() == ["opened", "started", "post_started"]
    assert [each.payload for each in guest.receive()] == [b"started."]
    guest.send(b"1")
    guest.io.pause()
    assert device.taken() == ["packet", "suspended"]
    guest.io.pause()
    guest.send(b"2")
    assert device.taken() == []
    guest.io.resume()
    assert device.taken() == ["started"]
    guest.run()
    assert sorted(device.taken()) == ["packet", "post_started"]
    guest.close()
    assert device.taken() == ["suspended", "closed"]


def test_a_channel_opened_in_a_pause_starts_at_its_end() -> None:
    device = Diary()
    guest = LoopbackGuest(device)
    guest.io.pause()
    assert device.taken() == []
    guest.open()
    assert device.taken() == ["opened"]
    guest.io.resume()
    guest.run()
    assert device.taken() == ["started", "post_started"]
    guest.io.pause()
    guest.close()
    assert device.taken() == ["suspended", "closed"]


def test_post_started_is_not_called_for_a_channel_that_was_suspended_meanwhile() -> None:
    device = Diary()
    guest = LoopbackGuest(device)
    guest.open()
    guest.io.pause()
    device.taken()
    guest.io.resume()
    guest.io.pause()
    guest.run()
    assert device.taken() == ["started", "suspended"]
    guest.io.resume()
    guest.io.pause()
    guest.io.resume()
    guest.run()
    assert device.taken() == ["started", "suspended", "started", "post_started"]


@pytest.mark.parametrize("bad", ["started", "post_started", "suspended"])
def test_a_hook_that_raises_fails_its_channel_only(bad: str) -> None:
    device = Diary(bad)
    guest = LoopbackGuest(device)
    guest.open()
    guest.io.pause()
    assert (guest.io.state, guest.io.failure) == (IoState.FAILED, "device-error")
    guest.io.resume()
    guest.run()
    guest.close()
    assert device.taken()[-1] == "closed"
    device.bad = ""
    guest.open()
    assert device.taken() == ["opened", "started", "post_started"]


def test_no_more_packets_are_taken_than_the_transaction_quota_allows() -> None:
    class Lazy(Diary):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[int] = []

        def opened(self, io: Channel) -> None:
            io.set_transaction_quota(3)

        def packet(self, io: Channel, packet: Packet) -> None:
            self.kept.append(packet.transaction_id)

    device = Lazy()
    guest = LoopbackGuest(device)
    guest.open()
    for number in range(1, 11):
        guest.send(transaction_id=number, completion_requested=True)
    assert device.kept == [1, 2, 3]
    guest.io.complete(1)
    guest.run()
    assert device.kept == [1, 2, 3, 4]
    guest.io.set_transaction_quota(1)
    guest.io.complete(2)
    guest.run()
    assert device.kept == [1, 2, 3, 4]
    guest.io.set_transaction_quota(100)
    guest.run()
    assert device.kept == list(range(1, 11))
    guest.io.pause()
    saved = guest.io.save()
    assert saved.transaction_quota == 100
    again = LoopbackGuest(Diary())
    again.io.restore(saved)
    assert again.io.transaction_quota == 100
    with pytest.raises(DeviceError, match="at least 1"):
        guest.io.set_transaction_quota(0)
