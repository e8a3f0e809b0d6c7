"""What the parts of a channel may use of the channel and of the bus.

A channel is divided by subject: :mod:`~vmbus.bus.channel.signals`, :mod:`~vmbus.bus.channel.gpadl_list`,
:mod:`~vmbus.bus.channel.endpoint`. The parts see neither each other nor the channel's state machine; the channel
calls them, and they reach back through :class:`ChannelContext` alone.
"""

from __future__ import annotations

from typing import Protocol

from vmbus.bus.channel.endpoint import EndpointCalls
from vmbus.bus.channel.gpadl import GpadlAssembler
from vmbus.bus.channel.state import ChannelCounters
from vmbus.bus.contact import Connection
from vmbus.bus.outbox import Target
from vmbus.ports import GuestMemory, Synic, Timers
from vmbus.refusals import Refusals


class ChannelHost(Protocol):
    """What a channel needs of its bus."""

    memory: GuestMemory
    synic: Synic
    timers: Timers
    connection: Connection
    refusals: Refusals
    gpadl_assembler: GpadlAssembler

    def send(self, payload: bytes, target: Target | None = None) -> None:
        """Send a message to the guest; with a target, to the client of a reserved channel."""

    def signal_through_page(self, relid: int) -> bool:
        """Signal through the interrupt page; return False when this connection has none."""

    def monitor_changed(self) -> None:
        """Start or stop polling the monitor page: a channel with a monitor bit was opened or closed."""


class ChannelContext(Protocol):
    """What the parts of a channel share."""

    @property
    def host(self) -> ChannelHost:
        """The bus."""

    @property
    def relid(self) -> int | None:
        """The channel id; None before the offer and after the release."""

    @property
    def calls(self) -> EndpointCalls:
        """The endpoint."""

    @property
    def counters(self) -> ChannelCounters:
        """The counters of the channel."""

    @property
    def refusals(self) -> Refusals:
        """Where refusals of guest input are counted."""

    def answer(self, payload: bytes, target: Target | None = None) -> None:
        """Send a message about this channel, unless the guest's connection is over."""
