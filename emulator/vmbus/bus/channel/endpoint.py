"""The endpoint of a channel: the host's end of it (``ChannelIo`` for devices, fakes in tests).

All calls come from the event loop's thread and must not block. An exception of an endpoint never reaches the
guest's path: it is logged and counted, and the request that caused it fails.

An endpoint that cannot finish at once defers from inside the call, and finishes later:

    opened(channel)            channel.defer_open()               channel.finish_open() or finish_open(error)
    closed(channel)            channel.defer_close()              channel.finish_close()
    gpadl_torn_down(channel)   channel.defer_teardown(gpadl)      channel.finish_teardown(gpadl)

Until it finishes, the guest gets no answer (OPENCHANNEL_RESULT, GPADL_TORNDOWN, UNLOAD_RESPONSE), and its pages
may still be used. After ``closed`` (or ``finish_close``) no ring page, and after ``gpadl_torn_down`` no page of
that GPADL may be touched again (docs/protocol/messages.md#close-channel, docs/protocol/messages.md#gpadl-teardown).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError, GuestError
from vmbus.ports import GuestPages, SignalTarget
from vmbus.refusals import Refusals

_logger = logging.getLogger(__name__)


class EndpointChannel(Protocol):
    """What an endpoint may use of its channel, a :class:`~vmbus.bus.channel.channel.Channel`."""

    @property
    def offer(self) -> Offer:
        """What was offered."""

    @property
    def relid(self) -> int | None:
        """The channel id; None before the offer and after the release."""

    @property
    def gpadls(self) -> Mapping[int, Gpadl]:
        """The GPADLs of this channel by id, those that are being torn down included."""

    def ring_pages(self) -> tuple[GuestPages, GuestPages]:
        """Return the pages of the ring from the guest, and those of the ring to the guest.

        Raises :class:`ProtocolError` when the channel is not open, or its GPADL is too small for two rings.
        """

    def gpadl_pages(self, gpadl_id: int, *, read_only: bool = False) -> GuestPages:
        """Return the pages of a GPADL that is one range of whole pages, as every buffer of a real guest is.

        ``read_only``: pages that refuse writes. Raises :class:`ProtocolError` for an unknown id or another shape.
        """

    def signal_guest(self) -> None:
        """Interrupt the guest for this channel; no effect if it is not open, or wants no interrupts."""

    def signal_target(self) -> SignalTarget | None:
        """Return how compiled code does the same; ``None`` where it cannot. See ``Endpoint.retargeted``."""

    def count_signals(self, doorbells: int, interrupts: int) -> None:
        """Count doorbells of the guest that compiled code heard, and interrupts that it sent."""

    def defer_open(self) -> None:
        """Put the answer to the open off until :meth:`finish_open`; only inside ``opened``."""

    def finish_open(self, error: Exception | None = None) -> None:
        """Answer the open: with success, or with a refusal because of ``error``."""

    def defer_close(self) -> None:
        """Keep using the rings until :meth:`finish_close`; only inside ``closed``."""

    def finish_close(self) -> None:
        """Give the rings back: no page of them is in use any more."""

    def defer_teardown(self, gpadl: Gpadl) -> None:
        """Keep using the pages of ``gpadl`` until :meth:`finish_teardown`; only inside ``gpadl_torn_down``."""

    def finish_teardown(self, gpadl: Gpadl) -> None:
        """Give ``gpadl`` back: no page of it is in use any more."""


class Endpoint(Protocol):
    """The host's end of one channel."""

    def opened(self, channel: EndpointChannel) -> None:
        """Begin to use the channel: the guest opened it, ``channel.ring_pages()`` exist, it may signal at once.

        Raise :class:`~vmbus.errors.GuestError` or :class:`~vmbus.errors.DeviceError` to refuse.
        """

    def closed(self, channel: EndpointChannel) -> None:
        """Stop using the rings. Called once for each ``opened`` that succeeded."""

    def signalled(self, channel: EndpointChannel) -> None:
        """Read the ring: the guest rang the doorbell (or set the monitor bit). May be spurious."""

    def gpadl_created(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        """Take note of pages that the guest shares. Raise a GuestError or DeviceError to refuse them."""

    def gpadl_torn_down(self, channel: EndpointChannel, gpadl: Gpadl) -> None:
        """Stop using the pages of ``gpadl``."""

    def retargeted(self, channel: EndpointChannel, vp: int) -> None:
        """Take note that interrupts go to virtual processor ``vp``, or to another place of it, from now on."""


@runtime_checkable
class RestorableEndpoint(Endpoint, Protocol):
    """An endpoint that can continue a channel that was open when its bus was saved."""

    def restored(self, channel: EndpointChannel) -> None:
        """Like ``opened``, but the rings keep their contents: nothing in them may be reset.

        GPADLs are listed in ``channel.gpadls``; ``gpadl_created`` is not called for them. Called when guest memory
        is complete. Raise to have the channel rescinded and offered anew. A channel that was closing gets ``closed``
        once more, without this call before it.
        """


def can_be_restored(endpoint: Endpoint) -> TypeGuard[RestorableEndpoint]:
    """Return whether ``endpoint`` is a :class:`RestorableEndpoint`."""
    return _restorable(type(endpoint))


@functools.cache
def _restorable(kind: type) -> bool:
    """Check once per class: every channel of a restored bus asks while its guest stands still."""
    return issubclass(kind, RestorableEndpoint)


class Outcome(NamedTuple):
    """The result of a call: the exception that it raised, and whether the endpoint will finish later."""

    error: Exception | None
    deferred: bool


class EndpointCalls:
    """Calls the endpoint of one channel, and contains what it raises.

    Exceptions are counted, logged and returned as values: this is the border between the bus and device code. Calls
    may nest, because an endpoint can cause the next call from inside one.
    """

    def __init__(self, channel: EndpointChannel, endpoint: Endpoint, refusals: Refusals) -> None:
        self.endpoint = endpoint
        self._channel = channel
        self._refusals = refusals
        self._current = ""
        self._deferred = False

    def opened(self) -> Outcome:
        """Call :meth:`Endpoint.opened`."""
        return self._call("opened", self.endpoint.opened, self._channel)

    def restored(self) -> Outcome:
        """Call :meth:`RestorableEndpoint.restored`; an endpoint without it fails."""
        endpoint = self.endpoint
        if not can_be_restored(endpoint):
            return Outcome(DeviceError(f"{self._refusals.owner}: the endpoint cannot be restored"), False)
        return self._call("restored", endpoint.restored, self._channel)

    def closed(self) -> Outcome:
        """Call :meth:`Endpoint.closed`."""
        return self._call("closed", self.endpoint.closed, self._channel)

    def signalled(self) -> None:
        """Call :meth:`Endpoint.signalled`."""
        self._call("signalled", self.endpoint.signalled, self._channel)

    def gpadl_created(self, gpadl: Gpadl) -> Outcome:
        """Call :meth:`Endpoint.gpadl_created`."""
        return self._call("gpadl_created", self.endpoint.gpadl_created, self._channel, gpadl)

    def gpadl_torn_down(self, gpadl: Gpadl) -> Outcome:
        """Call :meth:`Endpoint.gpadl_torn_down`."""
        return self._call("gpadl_torn_down", self.endpoint.gpadl_torn_down, self._channel, gpadl)

    def retargeted(self, vp: int) -> None:
        """Call :meth:`Endpoint.retargeted`."""
        self._call("retargeted", self.endpoint.retargeted, self._channel, vp)

    def defer(self, name: str) -> None:
        """Note, from inside call ``name``, that it finishes later. Raises :class:`DeviceError` anywhere else."""
        if self._current != name:
            raise DeviceError(f"{self._refusals.owner}: {name}() can be deferred only from inside the call")
        self._deferred = True

    def finish(self, name: str) -> bool:
        """Finish a deferred call; return False from inside call ``name``, which then ends in the ordinary way."""
        if self._current != name:
            return True
        self._deferred = False
        return False

    def _call(self, name: str, function: Callable[..., None], *arguments: object) -> Outcome:
        outer = self._current, self._deferred
        self._current, self._deferred = name, False
        error: Exception | None = None
        try:
            function(*arguments)
        except GuestError as refused:
            self._refusals.refuse(refused.reason, refused.detail)
            error = refused
        except DeviceError as broken:
            self._refusals.refuse("device-error", f"{name}: {broken}")
            error = broken
        except Exception as bug:
            _logger.exception("%s: %s() failed", self._refusals.owner, name)
            self._refusals.refuse("device-exception", f"{name}: {type(bug).__name__}")
            error = DeviceError(f"{name}(): {type(bug).__name__}: {bug}")
        finally:
            deferred = self._deferred and error is None
            self._current, self._deferred = outer
        return Outcome(error, deferred)
