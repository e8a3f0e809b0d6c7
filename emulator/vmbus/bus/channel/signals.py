"""Signals of one channel: interrupts to the guest, and doorbells of the guest's choice.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#modify-channel.

    target None --OPEN, MODIFYCHANNEL--> target VP --close--> None

While the channel is paused one MODIFYCHANNEL waits: from version 5.3 on, where it has an answer, the first one, and
others are refused until then; before 5.3 the latest one.
"""

from __future__ import annotations

from collections.abc import Callable

from vmbus.bus.channel.context import ChannelContext
from vmbus.bus.channel.opening import OpenRequest
from vmbus.bus.contact import MESSAGE_SINT
from vmbus.bus.offers import CONNECTION_ID_BASE
from vmbus.ports import SignalTarget, TimerHandle
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from vmbus.wire.messages import MODIFYCHANNEL_RESPONSE, ModifyChannelResponse
from vmbus.wire.version import Version

RESIGNAL_DELAY = 0.1
"""Seconds after an open until the guest is signalled once more, in case it missed the first signal."""


class ChannelSignals:
    """Where the guest is interrupted for one channel, and the connection id on which it rings."""

    def __init__(self, context: ChannelContext) -> None:
        self.target_vp: int | None = None
        """The virtual processor that is interrupted; None for none."""
        self.pending_target: int | None = None
        """The virtual processor of a MODIFYCHANNEL that waits."""
        self.port: int | None = None
        """The connection id of the guest's choice, while the channel is connected."""
        self._context = context
        self._connected = False
        self._event_flag = 0
        self._signal_timer: TimerHandle | None = None

    def connect(self, relid: int, request: OpenRequest, doorbell: Callable[[], None]) -> None:
        """Let signals pass both ways: the endpoint is about to use the channel."""
        self._connected = True
        self._event_flag = relid if request.event_flag is None else request.event_flag
        chosen = request.connection_id
        if chosen is not None and chosen != CONNECTION_ID_BASE | relid:
            self.port = chosen
            self._context.host.synic.connect_event_port(chosen, doorbell)

    def close(self) -> None:
        """Interrupt the guest no more: the endpoint is about to close."""
        self._connected = False
        if self._signal_timer is not None:
            self._signal_timer.cancel()
            self._signal_timer = None

    def disconnect(self) -> None:
        """End both directions, and fail a MODIFYCHANNEL that waits: the endpoint has closed."""
        self.close()
        if self.pending_target is not None:
            self.pending_target = None
            self._answer_modify(STATUS_UNSUCCESSFUL)
        if self.port is not None:
            self._context.host.synic.disconnect_event_port(self.port)
            self.port = None
        self.target_vp = None

    def signal_guest(self) -> None:
        """See :meth:`Channel.signal_guest`."""
        context = self._context
        if not self._connected or self.target_vp is None or context.relid is None:
            context.counters.interrupts_dropped += 1
            return
        context.counters.interrupts += 1
        host = context.host
        if not host.connection.at_least(Version.WIN8) and host.signal_through_page(context.relid):
            return
        host.synic.signal_event(self.target_vp, MESSAGE_SINT, self._event_flag)

    def target(self) -> SignalTarget | None:
        """Return how compiled code signals the guest; ``None`` where only :meth:`signal_guest` can.

        That is so without a target, for guests that have one interrupt page for all channels, and for a channel whose
        connection id is the guest's choice.
        """
        context = self._context
        if not self._connected or self.target_vp is None or context.relid is None or self.port is not None:
            return None
        if not context.host.connection.at_least(Version.WIN8):
            return None
        return context.host.synic.event_target(self.target_vp, MESSAGE_SINT, self._event_flag)

    def modify(self, vp: int, *, paused: bool) -> None:
        """Handle MODIFYCHANNEL for an open channel."""
        if self.target_vp is None:
            self.refuse_modify("channel has no interrupts")
        elif vp >= self._context.host.synic.vp_count:
            self.refuse_modify(f"virtual processor {vp:#x}")
        elif not paused:
            self._retarget(vp)
        elif self.pending_target is not None and self._context.host.connection.at_least(Version.IRON):
            self._context.refusals.refuse("modify-pending")
        else:
            self.pending_target = vp

    def refuse_modify(self, detail: str) -> None:
        """Answer MODIFYCHANNEL with a failure."""
        self._context.refusals.refuse("modify", detail)
        self._answer_modify(STATUS_UNSUCCESSFUL)

    def apply_pending_target(self) -> None:
        """Act on a MODIFYCHANNEL that waited."""
        if self.pending_target is not None:
            vp, self.pending_target = self.pending_target, None
            self._retarget(vp)

    def signal_later(self) -> None:
        """Signal the guest once, :data:`RESIGNAL_DELAY` from now."""
        self._signal_timer = self._context.host.timers.call_later(RESIGNAL_DELAY, self._signal_again)

    def _signal_again(self) -> None:
        self._signal_timer = None
        self.signal_guest()

    def _retarget(self, vp: int) -> None:
        self.target_vp = vp
        self._context.calls.retargeted(vp)
        self._answer_modify(STATUS_SUCCESS)
        self.signal_guest()

    def _answer_modify(self, status: int) -> None:
        context = self._context
        if context.relid is not None and context.host.connection.at_least(Version.IRON):
            context.answer(MODIFYCHANNEL_RESPONSE.build(ModifyChannelResponse(context.relid, status)))
