"""A bus that is saved, and restored in another one."""

from __future__ import annotations

from typing import Any

from vmbus.bus.channel.channel import Channel
from vmbus.bus.channel.endpoint import Endpoint
from vmbus.testing.scripted import ScriptedGuest, an_offer
from vmbus.wire.header import MessageType

NAMES = ("a", "b", "c")


def messages(guest: ScriptedGuest) -> list[Any]:
    return [answer.message for answer in guest.take()]


def numbers(guest: ScriptedGuest) -> list[MessageType]:
    return [answer.number for answer in guest.take()]


class Move:
    """The scripted guest's bus is saved; the state is restored in another bus with these devices."""

    def __init__(self, guest: ScriptedGuest) -> None:
        self.guest = guest

    def __call__(self, *endpoints: Endpoint, early: bool = False, **options: Any) -> list[Channel]:
        state = self.guest.save()
        bus = self.guest.another_bus(**options)
        offered = list(zip(NAMES, endpoints, strict=False))
        channels = []
        if early:
            channels = [bus.offer(an_offer(name), endpoint) for name, endpoint in offered]
        bus.restore(state)
        if not early and all(channel.relid for channel in state.channels):
            assert bus.save() == state
        if not early:
            channels = [bus.offer(an_offer(name), endpoint) for name, endpoint in offered]
        self.guest.bus = bus
        bus.resume()
        return channels


def offer(guest: ScriptedGuest, *endpoints: Endpoint) -> list[Channel]:
    """Devices a, b, c get the ids 1, 2, 3."""
    return [
        guest.bus.offer(an_offer(name), endpoint) for name, endpoint in zip(NAMES, endpoints, strict=False)
    ]
