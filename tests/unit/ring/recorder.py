"""A device that records what its channel tells it, and packets for it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device
from vmbus.bus.offers import Offer
from vmbus.errors import GuestError
from vmbus.testing.loopback import (
    guest_packet,
)
from vmbus.wire.packet import Packet

INTERFACE = uuid.UUID("7ad3ffb0-3b2c-4d8e-a8e6-0d4cbf0e8a11")


INSTANCE = uuid.UUID("0b1a4c4e-97aa-4f87-8bd1-2a9f5a1e0c22")


class Recorder(Device):
    """A device that records its calls; ``react`` handles a packet."""

    name = "recorder"

    def __init__(self, react: Callable[[ChannelIo, Packet], None] | None = None) -> None:
        self.react = react or (lambda io, packet: io.answer(packet, packet.payload))
        self.calls: list[str] = []
        self.packets: list[Packet] = []
        self.completions: list[Packet] = []
        self.refusals: list[str] = []
        self.on_open: Callable[[ChannelIo], None] = lambda io: None
        self.on_writable: Callable[[ChannelIo], None] = lambda io: None

    def offer(self) -> Offer:
        return Offer(INTERFACE, INSTANCE, name=self.name)

    def opened(self, io: ChannelIo) -> None:
        self.calls.append("opened")
        self.on_open(io)

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        self.packets.append(packet)
        self.react(io, packet)

    def completed(self, io: ChannelIo, packet: Packet) -> None:
        self.completions.append(packet)

    def refused(self, io: ChannelIo, packet: Packet, error: GuestError) -> None:
        self.refusals.append(error.reason)
        super().refused(io, packet, error)

    def writable(self, io: ChannelIo) -> None:
        self.calls.append("writable")
        self.on_writable(io)

    def closed(self, io: ChannelIo) -> None:
        self.calls.append("closed")

    def restored(self, io: ChannelIo) -> None:
        self.calls.append("restored")


def ignore(io: ChannelIo, packet: Packet) -> None:
    """A device that takes packets and answers none."""


def numbered(count: int, first: int = 0, *, completion_requested: bool = True, size: int = 8) -> list[bytes]:
    return [
        guest_packet(bytes(size), transaction_id=first + n, completion_requested=completion_requested)
        for n in range(count)
    ]


def ids(packets: list[Any]) -> list[int]:
    return [packet.transaction_id for packet in packets]
