"""Messages on their way: order, holding, dropping."""

from __future__ import annotations

from vmbus.bus.outbox import Outbox, Outgoing, Target
from vmbus.testing.fakes import FakeSynic

HERE, THERE = Target(0, 2), Target(1, 5)


def texts(synic: FakeSynic) -> list[bytes]:
    return [payload for _, _, payload in synic.messages]


def test_messages_wait_in_order_until_every_holder_releases() -> None:
    synic = FakeSynic(2)
    outbox = Outbox(synic)
    outbox.post(Outgoing(HERE, b"1"))
    outbox.pause("guest")
    outbox.pause("bus")
    outbox.post(Outgoing(HERE, b"2"))
    outbox.post(Outgoing(THERE, b"3"))
    assert outbox.undelivered(HERE) == 2
    assert [message.payload for message in outbox.waiting] == [b"2", b"3"]
    outbox.resume("guest")
    assert texts(synic) == [b"1"]
    outbox.resume("bus")
    assert texts(synic) == [b"1", b"2", b"3"]
    assert outbox.waiting == ()


def test_dropping_keeps_what_lasts() -> None:
    synic = FakeSynic(2)
    outbox = Outbox(synic)
    outbox.post(Outgoing(HERE, b"delivered, lasting", lasting=True))
    synic.messages.popleft()
    for payload in (b"a", b"b"):
        outbox.post(Outgoing(HERE, payload))
    outbox.post(Outgoing(HERE, b"lasting 1", lasting=True))
    outbox.pause("guest")
    outbox.post(Outgoing(THERE, b"lasting 2", lasting=True))
    outbox.post(Outgoing(THERE, b"c"))
    outbox.drop()
    outbox.resume("guest")
    assert texts(synic) == [b"lasting 1", b"lasting 2"]


def test_delivered_messages_are_forgotten() -> None:
    synic = FakeSynic(1)
    outbox = Outbox(synic)
    for number in range(100):
        outbox.post(Outgoing(HERE, bytes(8), lasting=True))
        if number % 3:
            synic.messages.popleft()
    assert sum(len(posted) for posted in outbox._posted.values()) <= len(synic.messages)
    synic.messages.clear()
    outbox.drop()
    assert outbox._posted == {}
