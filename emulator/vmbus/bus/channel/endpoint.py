"""What a channel calls: the host's end of it (``ChannelIo`` for devices, fakes in tests).

All calls come from the event loop's thread and must not block. What an endpoint raises never reaches the guest's
path: it is logged, and the request that caused it fails.

An endpoint that cannot finish at once says so from inside the call, and finishes later:

    opened(channel)            channel.defer_open()               channel.finish_open() or finish_open(error)
    closed(channel)            channel.defer_close()              channel.finish_close()
    gpadl_torn_down(channel)   channel.defer_teardown(gpadl)      channel.finish_teardown(gpadl)

Until it finishes, the guest gets no answer (OPENCHANNEL_RESULT, GPADL_TORNDOWN, UNLOAD_RESPONSE), and its pages
may still be used. After ``closed`` (or ``finish_close``) no ring page, and after ``gpadl_torn_down`` no page of
that GPADL may be touched again (docs/protocol/messages.md#close-channel, docs/protocol/messages.md#gpadl-teardown).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel
    from vmbus.bus.channel.gpadl import Gpadl


class Endpoint(Protocol):
    """The host's end of one channel."""

    def opened(self, channel: Channel) -> None:
        """The guest opened the channel; ``channel.ring_pages()`` are there, and it may signal at once.

        Raise :class:`~vmbus.errors.GuestError` or :class:`~vmbus.errors.DeviceError` to refuse.
        """

    def closed(self, channel: Channel) -> None:
        """Stop using the rings. Called once for each ``opened`` that succeeded."""

    def signalled(self, channel: Channel) -> None:
        """The guest rang the doorbell (or set the monitor bit); may be spurious."""

    def gpadl_created(self, channel: Channel, gpadl: Gpadl) -> None:
        """The guest shares pages. Raise a GuestError or DeviceError to refuse them."""

    def gpadl_torn_down(self, channel: Channel, gpadl: Gpadl) -> None:
        """The pages are the guest's again."""

    def retargeted(self, channel: Channel, vp: int) -> None:
        """Interrupts go to virtual processor ``vp`` from now on."""


@runtime_checkable
class RestorableEndpoint(Endpoint, Protocol):
    """An endpoint that can go on with a channel that was open when its bus was saved."""

    def restored(self, channel: Channel) -> None:
        """Like ``opened``, but the rings hold what they held: nothing in them may be reset.

        GPADLs are listed in ``channel.gpadls``; ``gpadl_created`` is not called for them. Called when guest
        memory is complete. Raise to have the channel rescinded and offered anew. A channel that was closing is
        told ``closed`` once more, without this call before it.
        """


def can_be_restored(endpoint: Endpoint) -> TypeGuard[RestorableEndpoint]:
    """Whether it is a :class:`RestorableEndpoint`."""
    return _restorable(type(endpoint))


@functools.cache
def _restorable(kind: type) -> bool:
    """Looked at once a class: all channels go on in the moment in which their guest does."""
    return issubclass(kind, RestorableEndpoint)
