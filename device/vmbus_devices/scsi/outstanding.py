"""The requests of a controller's channels that have not ended, and the channels whose closing waits for that.

    open(io) ──▶ open ──close(io), nothing outstanding─────────────────────────────────────────▶ closed
                  '───close(io)──▶ closing ──finish_close(io), after the last request has ended──^

A guest may close a channel while its requests are under way: their buffers are the guest's memory, so the bus answers
the guest only when the last of them has ended. Requests that compiled code has taken count here, too, although only
the channel knows of them (``ChannelIo.fast_in_flight``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.output import memory_of
from vmbus.wire.packet import Packet
from vmbus.wire.storvsp import SrbStatus

from vmbus_devices.scsi.request import Request


class OutstandingRequests:
    """The outstanding requests of one controller, for each channel that is open or closing."""

    def __init__(self) -> None:
        self.closing: set[ChannelIo] = set()
        """Channels that the guest has closed: their requests end without an answer."""
        self._requests: dict[ChannelIo, set[Request]] = {}

    def __contains__(self, io: ChannelIo) -> bool:
        """Return whether a channel is open or closing."""
        return io in self._requests

    # --- channels ---

    def open(self, io: ChannelIo) -> None:
        """Begin with a channel that has no request yet."""
        self._requests[io] = set()

    def close(self, io: ChannelIo) -> None:
        """Forget a channel that the guest closed; with requests outstanding, have the bus wait for their end."""
        if not self.busy(io):
            self._requests.pop(io, None)
            return
        self.closing.add(io)
        io.channel.defer_close()
        for request in self._requests[io]:  # which the channel does not count any more
            request.hold(request.held + memory_of(request.packet))

    def finish_close(self, io: ChannelIo) -> None:
        """Forget a channel that waited to be closed, if nothing of it is outstanding any more."""
        if io in self.closing and not self.busy(io):
            self.closing.discard(io)
            self._requests.pop(io, None)
            io.channel.finish_close()

    def open_channels(self) -> Mapping[ChannelIo, Collection[Request]]:
        """Return the channels that take commands, each with its requests."""
        return {io: requests for io, requests in self._requests.items() if io not in self.closing}

    @property
    def indexes(self) -> set[int]:
        """Indexes of the channels that are open or closing; 0 is the primary one."""
        return {io.subchannel_index for io in self._requests}

    def recall(self) -> None:
        """Take the rings of all channels back from compiled code: what it uses is about to change."""
        for io in tuple(self._requests):
            io.recall()

    # --- requests ---

    def add(self, request: Request) -> None:
        """Add a request that has begun."""
        self._requests[request.io].add(request)

    def remove(self, request: Request) -> bool:
        """Remove a request that has ended; return whether it was here: an error of the host's may have ended it."""
        requests = self._requests.get(request.io)
        if requests is None or request not in requests:
            return False
        requests.discard(request)
        return True

    def cancel(self, io: ChannelIo) -> None:
        """Abort the requests that only wait (for the delay of a fault, or for the guest to be resumed)."""
        for request in tuple(self._requests.get(io, ())):
            if request.cancel is not None:
                cancel, request.cancel = request.cancel, None
                cancel()
                request.finish(SrbStatus.ABORTED)

    def cancel_all(self) -> None:
        """Do :meth:`cancel` for all channels."""
        for io in tuple(self._requests):
            self.cancel(io)

    def busy(self, io: ChannelIo) -> bool:
        """Return whether requests of a channel are outstanding."""
        return bool(self._requests.get(io)) or io.fast_in_flight > 0

    @property
    def any_busy(self) -> bool:
        """Whether requests of any channel are outstanding."""
        return any(map(self.busy, self._requests))

    @property
    def total(self) -> int:
        """Outstanding requests of all channels."""
        return sum(len(each) + io.fast_in_flight for io, each in self._requests.items())

    def settled(self, io: ChannelIo) -> bool:
        """Return whether all requests of a channel only wait, so that none uses guest memory."""
        return not io.fast_in_flight and all(each.cancel is not None for each in self._requests.get(io, ()))

    def packets(self, io: ChannelIo) -> list[Packet]:
        """Return the packets of a channel's requests, oldest first, without those in compiled code."""
        requests = sorted(self._requests.get(io, ()), key=lambda request: request.begun)
        return [request.packet for request in requests]
