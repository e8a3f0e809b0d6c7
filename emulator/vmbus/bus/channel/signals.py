"""Signals of one channel: interrupts to the guest, and doorbells of its choice.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#modify-channel.

    target None  --OPEN, MODIFYCHANNEL--> target VP --close--> None

A guest with a stopped device has its MODIFYCHANNEL wait: the first from 5.3 on, where each is answered, the
latest before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmbus.bus.channel.state import ChannelHost, ChannelState, OpenRequest
from vmbus.bus.contact import MESSAGE_SINT
from vmbus.ports import TimerHandle
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from vmbus.wire.messages import MODIFYCHANNEL_RESPONSE, ModifyChannelResponse
from vmbus.wire.version import Version

if TYPE_CHECKING:
    from vmbus.bus.channel.channel import Channel

UNSTICK_DELAY = 0.1
"""Seconds after an open until the guest is signalled once, in case it missed what came first."""


class ChannelSignals:
    """Where the guest of ``channel`` is signalled, and what it may ring."""

    def __init__(self, channel: Channel, host: ChannelHost) -> None:
        self.target_vp: int | None = None
        """Virtual processor of the interrupts; None for none."""
        self.pending_target: int | None = None
        """Of a MODIFYCHANNEL that waits."""
        self.port: int | None = None
        """The guest's own choice of connection id, while open."""
        self._channel = channel
        self._host = host
        self._unstick: TimerHandle | None = None

    def connect(self, request: OpenRequest) -> None:
        """The device is about to use the channel."""
        chosen = request.connection_id
        if chosen is not None and chosen != self._channel.connection_id:
            self.port = chosen
            self._host.synic.connect_event_port(chosen, self._channel.doorbell)
        self._monitor_changed()

    def disconnect(self) -> None:
        """The device does not use it any more; what waited has failed."""
        self.cancel_unstick()
        if self.pending_target is not None:
            self.pending_target = None
            self._answer(STATUS_UNSUCCESSFUL)
        if self.port is not None:
            self._host.synic.disconnect_event_port(self.port)
            self.port = None
        self.target_vp = None
        self._monitor_changed()

    def signal_guest(self) -> None:
        """See :meth:`Channel.signal_guest`."""
        channel = self._channel
        if not channel.is_open or self.target_vp is None or channel.relid is None:
            channel.counters.interrupts_dropped += 1
            return
        channel.counters.interrupts += 1
        if not self._host.connection.at_least(Version.WIN8) and self._host.shared_signal(channel.relid):
            return
        flag = channel.relid
        if channel.request is not None and channel.request.event_flag is not None:
            flag = channel.request.event_flag
        self._host.synic.signal_event(self.target_vp, MESSAGE_SINT, flag)

    def modify(self, vp: int) -> None:
        """MODIFYCHANNEL."""
        channel = self._channel
        error = self._modify_error(vp)
        if error:
            channel.refusals.refuse("modify", error)
            self._answer(STATUS_UNSUCCESSFUL)
        elif not channel.stopped:
            self._retarget(vp)
        elif self.pending_target is not None and self._host.connection.at_least(Version.IRON):
            channel.refusals.refuse("modify-pending")
        else:
            self.pending_target = vp

    def modify_pending(self) -> None:
        """What waited for the device happens now."""
        if self.pending_target is not None:
            vp, self.pending_target = self.pending_target, None
            self._retarget(vp)

    def arm_unstick(self) -> None:
        """Signal the guest once, a while from now."""
        self._unstick = self._host.timers.call_later(UNSTICK_DELAY, self._unstick_guest)

    def cancel_unstick(self) -> None:
        """The channel closes."""
        if self._unstick is not None:
            self._unstick.cancel()
            self._unstick = None

    def _unstick_guest(self) -> None:
        self._unstick = None
        self.signal_guest()

    def _modify_error(self, vp: int) -> str:
        channel = self._channel
        if channel.state is not ChannelState.OPEN:
            return f"channel is {channel.state.value}"
        if channel.reserved or self.target_vp is None:
            return "channel has no interrupts"
        if vp >= self._host.synic.vp_count:
            return f"virtual processor {vp:#x}"
        return ""

    def _retarget(self, vp: int) -> None:
        channel = self._channel
        self.target_vp = vp
        channel.calls.call("retargeted", channel.endpoint.retargeted, channel, vp)
        self._answer(STATUS_SUCCESS)
        self.signal_guest()

    def _answer(self, status: int) -> None:
        channel = self._channel
        if channel.relid is None or channel.abandoned or not self._host.connection.at_least(Version.IRON):
            return
        answer = ModifyChannelResponse(channel.relid, status)
        self._host.send(MODIFYCHANNEL_RESPONSE.build(answer))

    def _monitor_changed(self) -> None:
        if self._channel.monitor_id is not None:
            self._host.monitor_changed()
