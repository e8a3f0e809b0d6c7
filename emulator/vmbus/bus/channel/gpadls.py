"""The GPADLs of one channel: told to its device, taken back from it.

Source: docs/protocol/messages.md#gpadl-teardown.

    accepted --TEARDOWN--> tearing down --device let go--> TORNDOWN

A list that the device knows (``device_notified``) is the guest's again only when the device says so. While the
device opens or closes, teardowns wait: it may be using any of the pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmbus.bus.channel.gpadl import Assembly, Gpadl, GpadlState
from vmbus.bus.channel.state import Busy, ChannelHost
from vmbus.errors import DeviceError, GuestError
from vmbus.wire.gpadl import GPADL_TORNDOWN, GpadlTorndown

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel


class SharedPages:
    """What the guest shares over ``channel``."""

    def __init__(self, channel: Channel, host: ChannelHost) -> None:
        self.by_id: dict[int, Gpadl] = {}
        self._channel = channel
        self._host = host
        self._going: set[int] = set()

    @property
    def all_back(self) -> bool:
        """Whether the device knows of none."""
        return not self._going and not any(gpadl.device_notified for gpadl in self.by_id.values())

    def add(self, assembly: Assembly, *, tell: bool) -> Exception | None:
        """A list is complete: check it, tell the device. Why it was refused, or None."""
        channel = self._channel
        try:
            gpadl = self._host.gpadls.finish(assembly)
        except GuestError as refused:
            channel.refusals.refuse(refused.reason, refused.detail)
            return refused
        self.by_id[gpadl.gpadl_id] = gpadl
        if not tell:
            return None
        gpadl.device_notified = True
        error = channel.calls.call("gpadl_created", channel.endpoint.gpadl_created, channel, gpadl).error
        if error is not None:
            gpadl.device_notified = False
            self._forget(gpadl)
        return error

    def continue_teardowns(self) -> None:
        """Take back what is torn down, unless the device is opening or closing."""
        if self._channel.busy in (Busy.OPENING, Busy.CLOSING):
            return
        for gpadl in list(self.by_id.values()):
            if gpadl.state is not GpadlState.TEARING_DOWN or gpadl.gpadl_id in self._going:
                continue
            if gpadl.device_notified:
                self._take_back(gpadl)
            else:
                self._answer(gpadl)

    def take_all_back(self) -> None:
        """The channel leaves."""
        for gpadl in list(self.by_id.values()):
            if gpadl.device_notified and gpadl.gpadl_id not in self._going:
                self._take_back(gpadl)

    def finish_teardown(self, gpadl: Gpadl) -> None:
        """The device has let go of a list that it was told to let go of."""
        if gpadl.gpadl_id not in self._going:
            raise DeviceError(f"{self._channel!r}: GPADL {gpadl.gpadl_id:#x} is not being torn down")
        if self._channel.calls.finish("gpadl_torn_down"):
            self._back(gpadl)

    def answer_teardowns(self) -> None:
        """Say TORNDOWN for what the guest waits for; nobody uses it any more."""
        for gpadl in list(self.by_id.values()):
            if gpadl.state is GpadlState.TEARING_DOWN:
                self._answer(gpadl)

    def drop(self) -> None:
        """All of them, and those in progress, without a word to the guest."""
        if self._channel.relid is not None:
            self._host.gpadls.abandon_all(self._channel.relid)
        for gpadl in list(self.by_id.values()):
            self._forget(gpadl)

    def _take_back(self, gpadl: Gpadl) -> None:
        self._going.add(gpadl.gpadl_id)
        channel = self._channel
        outcome = channel.calls.call("gpadl_torn_down", channel.endpoint.gpadl_torn_down, channel, gpadl)
        if not outcome.deferred:
            self._back(gpadl)

    def _back(self, gpadl: Gpadl) -> None:
        self._going.discard(gpadl.gpadl_id)
        gpadl.device_notified = False
        if gpadl.state is GpadlState.TEARING_DOWN:
            self._answer(gpadl)
        self._channel.leave_when_idle()

    def _answer(self, gpadl: Gpadl) -> None:
        if self._forget(gpadl) and not self._channel.abandoned:
            self._host.send(GPADL_TORNDOWN.build(GpadlTorndown(gpadl.gpadl_id)))

    def _forget(self, gpadl: Gpadl) -> bool:
        """Whether it was still there."""
        if self.by_id.get(gpadl.gpadl_id) is not gpadl or self._channel.relid is None:
            return False
        del self.by_id[gpadl.gpadl_id]
        self._host.gpadls.remove(self._channel.relid, gpadl)
        return True
