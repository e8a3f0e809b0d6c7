"""One channel of the bus, as the host sees it.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#channel-states.

    released --offer--> closed --OPEN--> opening --device--> open --CLOSE--> closing --device--> closed
                          |                                                    '-OPEN-> closing, re-open
                          '--host takes it away--> revoked --RELID_RELEASED--> (gone)
                                                      '--same device comes back--> re-offered --> closed

The state is what the guest may do; which call of the endpoint is not finished is kept beside it (``busy``). The
guest or the host can end the channel at any moment. It then *leaves*: the endpoint closes and gives every GPADL
back, and only after that the guest gets its RESCIND, or the bus sends UNLOAD_RESPONSE.
"""

from __future__ import annotations

import logging
from typing import Protocol

from vmbus.bus.channel.context import ChannelHost
from vmbus.bus.channel.endpoint import Endpoint, EndpointCalls
from vmbus.bus.channel.gpadl import Assembly, Gpadl, GpadlState
from vmbus.bus.channel.gpadl_list import GpadlList
from vmbus.bus.channel.opening import OpenRequest, check_open, split_rings
from vmbus.bus.channel.read_only import ReadOnlyPages
from vmbus.bus.channel.signals import ChannelSignals
from vmbus.bus.channel.state import Busy, ChannelCounters, ChannelState
from vmbus.bus.offers import CONNECTION_ID_BASE, Offer
from vmbus.bus.outbox import Target
from vmbus.errors import DeviceError, GuestError, ProtocolError
from vmbus.ports import GuestPages, SignalTarget
from vmbus.refusals import Refusals
from vmbus.wire.gpadl import GPADL_CREATED, GpadlCreated
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from vmbus.wire.messages import (
    CLOSE_RESERVED_RESPONSE,
    OPENCHANNEL_RESULT,
    ChannelOnly,
    OpenResult,
)
from vmbus.wire.offer import OfferFlags

_logger = logging.getLogger(__name__)


class ChannelOwner(Protocol):
    """The list that a channel is in (:class:`~vmbus.bus.channel_list.ChannelList`)."""

    def connection_id_taken(self, connection_id: int, asking: Channel) -> bool:
        """Return whether a signal on that id reaches another channel than ``asking``, or will when that opens."""

    def revoke_subchannels(self, channel: Channel) -> bool:
        """Revoke the sub-channels of ``channel``; return whether all of them are rescinded or released."""

    def rescind(self, channel: Channel) -> None:
        """Send RESCIND_CHANNELOFFER: ``channel`` has left, and is revoked now."""

    def released(self, channel: Channel) -> None:
        """Free the id of ``channel``, which has left, and is released now."""

    def send_offer(self, channel: Channel) -> None:
        """Send OFFERCHANNEL for ``channel``."""


class Channel:
    """A channel of one offer; made by :meth:`Bus.offer`, used by its endpoint.

    ``host`` is the bus, ``owner`` the list that the channel is in.
    """

    def __init__(self, host: ChannelHost, owner: ChannelOwner, offer: Offer, endpoint: Endpoint) -> None:
        self.host = host
        self.offer = offer
        self.state = ChannelState.RELEASED
        self.relid: int | None = None
        self.monitor_id: int | None = None
        self.offered = False
        """Whether the guest has the offer on this connection."""
        self.request: OpenRequest | None = None
        """The parameters of the open, from OPENCHANNEL to the end of the close."""
        self.reopen: OpenRequest | None = None
        """The parameters of an OPENCHANNEL that waits for the end of a close."""
        self.close_answer: Target | None = None
        """Where the client of a reserved channel waits for the end of its close."""
        self.busy = Busy.NO
        self.paused = False
        self.revoking = False
        """The host takes the channel away."""
        self.comes_again = False
        """It is taken away to be offered anew."""
        self.lost = False
        """The state of the endpoint of a restored channel is lost; see :meth:`resume_restored`."""
        self.abandoned = False
        """The connection of the guest is over: no message about the channel is sent any more."""
        self.released_by_guest = False
        self.counters = ChannelCounters()
        self.refusals = Refusals(f"channel {offer.name or offer.interface_id}", _logger)
        self.calls = EndpointCalls(self, endpoint, self.refusals)
        self.gpadl_list = GpadlList(self, self.leave_when_idle)
        self.signals = ChannelSignals(self)
        self._owner = owner

    def __repr__(self) -> str:
        return f"<Channel {self.relid} {self.offer.name!r} {self.state.value}>"

    @property
    def endpoint(self) -> Endpoint:
        """The host's end; a restored channel gets it when its device is offered."""
        return self.calls.endpoint

    @endpoint.setter
    def endpoint(self, endpoint: Endpoint) -> None:
        self.calls.endpoint = endpoint

    @property
    def connection_id(self) -> int | None:
        """The HvSignalEvent connection of the offer; None without a channel id."""
        return None if self.relid is None else CONNECTION_ID_BASE | self.relid

    @property
    def is_open(self) -> bool:
        """Whether the endpoint may use the rings."""
        return self.busy in (Busy.OPENING, Busy.OPEN)

    @property
    def gpadls(self) -> dict[int, Gpadl]:
        """The GPADLs of this channel by id, with those that are being torn down."""
        return self.gpadl_list.by_id

    @property
    def target_vp(self) -> int | None:
        """The virtual processor that is interrupted; None for none."""
        return self.signals.target_vp

    @property
    def leaving(self) -> bool:
        """Whether the channel goes away as soon as the endpoint holds neither rings nor GPADLs."""
        return self.abandoned or self.revoking or self.released_by_guest

    @property
    def reserved(self) -> bool:
        """Whether the guest opened it as a reserved channel."""
        return self.request is not None and self.request.reserved is not None

    def answer(self, payload: bytes, target: Target | None = None) -> None:
        """Send a message about this channel, unless the guest's connection is over."""
        if not self.abandoned:
            self.host.send(payload, target)

    # --- for endpoints ---

    def ring_pages(self) -> tuple[GuestPages, GuestPages]:
        """Return the pages of both rings: guest to host (incoming), host to guest (outgoing).

        Raises :class:`ProtocolError` when the channel is not open, or its GPADL is too small for two rings.
        """
        if self.request is None:
            raise ProtocolError("ring-not-open")
        pfns, downstream = split_rings(self.request, self.gpadls)
        return self.host.memory.pages(pfns[:downstream]), self.host.memory.pages(pfns[downstream:])

    def gpadl_pages(self, gpadl_id: int, *, read_only: bool = False) -> GuestPages:
        """Return the pages of a GPADL that is one range of whole pages, as every buffer of a real guest is.

        ``read_only``: pages that refuse writes. Raises :class:`ProtocolError` for an unknown id or another shape.
        """
        gpadl = self.gpadls.get(gpadl_id)
        if gpadl is None or gpadl.state is not GpadlState.ACCEPTED:
            raise ProtocolError("gpadl-unknown", f"{gpadl_id:#x}")
        pages = self.host.memory.pages(gpadl.aligned_pfns())
        return ReadOnlyPages(pages) if read_only else pages

    def signal_guest(self) -> None:
        """Interrupt the guest for this channel; no effect if it is not open, or wants no interrupts."""
        self.signals.signal_guest()

    def signal_target(self) -> SignalTarget | None:
        """Return how compiled code signals the guest; ``None`` where only :meth:`signal_guest` can."""
        return self.signals.target()

    def count_signals(self, doorbells: int, interrupts: int) -> None:
        """Count doorbells of the guest that compiled code heard, and interrupts that it sent."""
        self.counters.doorbells += doorbells
        self.counters.interrupts += interrupts

    def doorbell(self) -> None:
        """Pass a signal of the guest on to the endpoint, unless the channel is paused or not open."""
        self.counters.doorbells += 1
        if self.is_open and not self.paused:
            self.calls.signalled()

    def defer_open(self) -> None:
        """Put the answer to the open off until :meth:`finish_open`; only inside ``opened``."""
        self.calls.defer("opened")

    def finish_open(self, error: Exception | None = None) -> None:
        """Answer the open: with success, or with a refusal because of ``error``."""
        if self.busy is not Busy.OPENING:
            raise DeviceError(f"{self!r} is not being opened")
        if self.calls.finish("opened"):
            if error is not None:
                self.refusals.refuse("open-device", str(error))
            self._opened(error)
        elif error is not None:
            raise error

    def defer_close(self) -> None:
        """Let the endpoint use the rings until :meth:`finish_close`; only inside ``closed``."""
        self.calls.defer("closed")

    def finish_close(self) -> None:
        """End the close: no ring page is in use any more."""
        if self.busy is not Busy.CLOSING:
            raise DeviceError(f"{self!r} is not being closed")
        if self.calls.finish("closed"):
            self._closed()

    def defer_teardown(self, gpadl: Gpadl) -> None:
        """Let the endpoint use ``gpadl`` until :meth:`finish_teardown`; only inside ``gpadl_torn_down``."""
        self.calls.defer("gpadl_torn_down")

    def finish_teardown(self, gpadl: Gpadl) -> None:
        """End the teardown of ``gpadl``: none of its pages is in use any more."""
        self.gpadl_list.finish_teardown(gpadl)

    # --- pausing, and reports ---

    def pause(self) -> None:
        """Let opens and modifications wait, and pass no doorbells on, until :meth:`resume`; closing is allowed."""
        self.paused = True

    def resume(self) -> None:
        """Undo :meth:`pause`: act on what waited, and signal the endpoint once."""
        if not self.paused:
            return
        self.paused = False
        if self.state is ChannelState.OPENING and self.busy is Busy.NO:
            self._open_endpoint()
        self.signals.apply_pending_target()
        if self.is_open:
            self.calls.signalled()

    def status(self) -> dict[str, object]:
        """Return the channel's part of ``vmbus status``: plain values for JSON."""
        return {
            "relid": self.relid,
            "interface": str(self.offer.interface_id),
            "instance": str(self.offer.instance_id),
            "subchannel": self.offer.subchannel_index,
            "device": self.offer.name,
            "state": self.state.value,
            "stopped": self.paused,
            "target_vp": self.target_vp,
            "gpadls": len(self.gpadls),
            "gpadl_pages": sum(gpadl.page_count for gpadl in self.gpadls.values()),
            "opens": self.counters.opens,
            "doorbells": self.counters.doorbells,
            "interrupts": self.counters.interrupts,
            "refusals": dict(self.refusals.counts),
        }

    # --- requests of the guest ---

    def open(self, request: OpenRequest) -> None:
        """Handle OPENCHANNEL and OPEN_RESERVED_CHANNEL."""
        if self.state is ChannelState.CLOSED:
            self._begin_open(request)
        elif self.state is ChannelState.CLOSING and not self.leaving and not request.reserved:
            self.reopen = request
            self.state = ChannelState.CLOSING_REOPEN
        else:
            self.refusals.refuse("open-state", self.state.value)

    def close(self) -> None:
        """Handle CLOSECHANNEL, which has no answer. After a RESCIND it comes too late, and is no error."""
        if self.state is ChannelState.REVOKED:
            return
        if self.state is not ChannelState.OPEN or self.reserved:
            self.refusals.refuse("close-state", "reserved" if self.reserved else self.state.value)
            return
        self._begin_close()

    def close_reserved(self, target: Target) -> None:
        """Handle CLOSE_RESERVED_CHANNEL; the answer goes to ``target``."""
        if self.state is not ChannelState.OPEN or not self.reserved:
            self.refusals.refuse("close-reserved-state", self.state.value)
            return
        self.close_answer = target
        self._begin_close()

    def release(self) -> None:
        """Handle RELID_RELEASED."""
        if self.state is ChannelState.CLOSED:
            self.released_by_guest = True
            self._leave()
        elif self.state is ChannelState.CLOSING:
            self.released_by_guest = True
        elif self.state is ChannelState.REVOKED:
            self._release()
        elif self.state is ChannelState.REOFFERED:
            self.gpadl_list.drop()
            self.state = ChannelState.CLOSED
            self._owner.send_offer(self)
        else:
            self.refusals.refuse("release-state", self.state.value)

    def modify(self, vp: int) -> None:
        """Handle MODIFYCHANNEL: interrupts go to another virtual processor."""
        if self.state is not ChannelState.OPEN:
            self.signals.refuse_modify(f"channel is {self.state.value}")
        elif self.reserved:
            self.signals.refuse_modify("channel has no interrupts")
        else:
            self.signals.modify(vp, paused=self.paused)

    def accept_gpadl(self, assembly: Assembly) -> None:
        """Check and keep a GPADL of which all range data has arrived, notify the endpoint, answer GPADL_CREATED."""
        gone = self.revoking or self.state in (ChannelState.REVOKED, ChannelState.REOFFERED)
        error = self.gpadl_list.accept(assembly, notify_device=not gone)
        if self.relid is None:
            return
        status = STATUS_SUCCESS if error is None else STATUS_UNSUCCESSFUL
        self.answer(GPADL_CREATED.build(GpadlCreated(self.relid, assembly.gpadl_id, status)))

    def teardown(self, gpadl_id: int) -> None:
        """Handle GPADL_TEARDOWN; the answer follows when the endpoint has given the pages back."""
        gpadl = self.gpadls.get(gpadl_id)
        if gpadl is None or gpadl.state is not GpadlState.ACCEPTED:
            self.refusals.refuse("teardown-unknown", f"{gpadl_id:#x}")
            return
        in_ring = self.request is not None and self.request.ring_gpadl_id == gpadl_id
        if in_ring and self.reserved:
            self.refusals.refuse("teardown-reserved", f"{gpadl_id:#x}")
            return
        gpadl.state = GpadlState.TEARING_DOWN
        if in_ring and self.busy is Busy.NO and self.state is ChannelState.OPENING:
            self.refusals.refuse("open-gpadl-torn-down", f"{gpadl_id:#x}")
            self._fail_open()
        elif in_ring and self.state is ChannelState.OPEN:
            self.refusals.refuse("teardown-open-ring", f"{gpadl_id:#x}")
            self._begin_close()
            return
        self._continue_teardowns()

    # --- requests of the host ---

    def revoke(self) -> None:
        """Take the channel away; the guest gets RESCIND_CHANNELOFFER when the endpoint has finished."""
        self.comes_again = False
        if self.revoking:
            return
        self.revoking = True
        if self.state is ChannelState.REOFFERED:
            self.state = ChannelState.REVOKED
        else:
            self._depart()

    def abandon(self) -> None:
        """End the channel with the connection: no message about it is sent to the guest any more."""
        if self.state is ChannelState.RELEASED or self.abandoned:
            return
        self.abandoned = True
        if self.state in (ChannelState.REVOKED, ChannelState.REOFFERED):
            self._release()
        else:
            self._depart()

    def detach(self) -> None:
        """Outlive the connection: the client of a reserved channel keeps it."""
        self.offered = False

    def resume_restored(self) -> None:
        """Continue what was under way when the channel was saved: its bus resumes, guest memory is complete.

        A call of the endpoint that had not finished is made once more. An open channel whose endpoint cannot be
        restored is :attr:`lost`: the guest gets a RESCIND, and the same offer anew. So does any channel whose offer
        has the flag FORCE_NEW_CHANNEL.
        """
        lost, self.lost = self.lost, False
        renewed = OfferFlags.FORCE_NEW_CHANNEL in self.offer.flags and not self.leaving
        if renewed and self.state in (ChannelState.OPENING, ChannelState.OPEN, ChannelState.CLOSED):
            self._renew()
        elif lost and self.state is ChannelState.OPEN:
            self.refusals.refuse("lost", "the channel is rescinded and offered anew")
            self._start_over()
        elif self.state is ChannelState.OPENING and self.leaving:
            self._forget_open()
            self._leave()
        elif self.state is ChannelState.OPENING and not self.paused:
            self._open_endpoint()
        elif self.state is ChannelState.OPEN:
            self._resume_open()
        elif self.state in (ChannelState.CLOSING, ChannelState.CLOSING_REOPEN) and self.request is not None:
            self._close_endpoint()
        elif self.leaving and self.state is not ChannelState.REVOKED:
            self._leave()
        self._continue_teardowns()

    def continue_endpoint(self) -> None:
        """Have the endpoint of an open channel continue: a state was restored into it while the guest ran."""
        if self.busy is Busy.OPEN:
            self._restore_endpoint()

    def _resume_open(self) -> None:
        self._connect()
        self._restore_endpoint()

    def _renew(self) -> None:
        """Have the endpoint forget what was restored; rescind the channel, and offer it anew."""
        if self.state is ChannelState.OPEN:
            self.calls.closed()
        self.busy = Busy.NO
        self._start_over()

    def _restore_endpoint(self) -> None:
        if OfferFlags.FORCE_NEW_CHANNEL in self.offer.flags:
            self._renew()
            return
        error = self.calls.restored().error
        self.busy = Busy.NO if error is not None else Busy.OPEN
        if error is not None:
            self.refusals.refuse("not-restored", "the channel is rescinded and offered anew")
            self._start_over()
            return
        self.signals.signal_later()
        if not self.paused:
            self.signals.apply_pending_target()
        self.calls.signalled()

    def _start_over(self) -> None:
        """Rescind, and offer again with the same id once the guest has released it."""
        for gpadl in self.gpadls.values():
            gpadl.device_notified = False
        if not self.offered:
            self.abandoned = True
            self._closed()
            return
        self.comes_again = not self.revoking and not self.offer.transient
        self.revoking = True
        self._closed()

    # --- opening ---

    def _begin_open(self, request: OpenRequest) -> None:
        self.request = request
        self.signals.target_vp = request.target_vp
        self.state = ChannelState.OPENING
        try:
            check_open(
                request,
                self.gpadls,
                relid=self.relid,
                vp_count=self.host.synic.vp_count,
                connection_id_taken=lambda number: self._owner.connection_id_taken(number, self),
            )
        except GuestError as error:
            self.refusals.refuse(error.reason, error.detail)
            self._fail_open()
            return
        if not self.paused:
            self._open_endpoint()

    def _connect(self) -> None:
        self.busy = Busy.OPENING
        if self.request is not None and self.relid is not None:
            self.signals.connect(self.relid, self.request, self.doorbell)
            self._monitor_changed()

    def _monitor_changed(self) -> None:
        if self.monitor_id is not None:
            self.host.monitor_changed()

    def _open_endpoint(self) -> None:
        self._connect()
        outcome = self.calls.opened()
        if not outcome.deferred:
            self._opened(outcome.error)

    def _opened(self, error: Exception | None) -> None:
        if error is not None:
            self.busy = Busy.NO
            self._fail_open()
            return
        self.busy = Busy.OPEN
        self.counters.opens += 1
        if self.abandoned or self.revoking:
            self._begin_close()
            return
        self.state = ChannelState.OPEN
        self._answer_open(STATUS_SUCCESS)
        self.signals.signal_later()
        ring = self.gpadls.get(self.request.ring_gpadl_id) if self.request else None
        if ring is None or ring.state is GpadlState.TEARING_DOWN:
            self._begin_close()

    def _fail_open(self) -> None:
        if not self.revoking:
            self._answer_open(STATUS_UNSUCCESSFUL)
        self._forget_open()
        self._after_endpoint()

    def _answer_open(self, status: int) -> None:
        request = self.request
        if request is not None and self.relid is not None:
            payload = OPENCHANNEL_RESULT.build(OpenResult(self.relid, request.open_id, status))
            self.answer(payload, request.reserved.target if request.reserved else None)

    # --- closing and leaving ---

    def _begin_close(self) -> None:
        self.state = ChannelState.CLOSING
        self._owner.revoke_subchannels(self)
        self.signals.close()
        self._close_endpoint()

    def _close_endpoint(self) -> None:
        self.busy = Busy.CLOSING
        if not self.calls.closed().deferred:
            self._closed()

    def _closed(self) -> None:
        self.busy = Busy.NO
        target, self.close_answer = self.close_answer, None
        was_reserved = self.reserved
        self._forget_open()
        if target is not None and self.relid is not None:
            self.answer(CLOSE_RESERVED_RESPONSE.build(ChannelOnly(self.relid)), target)
        if was_reserved and not self.offered:
            self.abandoned = True
        self._after_endpoint()

    def _forget_open(self) -> None:
        self.signals.disconnect()
        self._monitor_changed()
        self.request = None

    def _continue_teardowns(self) -> None:
        if self.busy in (Busy.NO, Busy.OPEN):
            self.gpadl_list.continue_teardowns()

    def _after_endpoint(self) -> None:
        """Continue what waited until the endpoint gave the rings back."""
        reopen, self.reopen = self.reopen, None
        self._continue_teardowns()
        if self.busy is not Busy.NO or self.state in (ChannelState.RELEASED, ChannelState.REVOKED):
            return
        if self.leaving:
            self._leave()
        elif reopen is not None:
            self._begin_open(reopen)
        else:
            self.state = ChannelState.CLOSED

    def _depart(self) -> None:
        """Begin to leave, from any state in which the guest has the channel."""
        self.reopen = None
        if self.state is ChannelState.CLOSING_REOPEN:
            self.state = ChannelState.CLOSING
        if self.busy is Busy.OPEN:
            self._begin_close()
        elif self.busy is Busy.NO:
            self._forget_open()
            self._leave()

    def _leave(self) -> None:
        """Take the GPADLs back from an endpoint that has closed, then go. Nothing can be opened meanwhile."""
        self.state = ChannelState.CLOSING
        self._owner.revoke_subchannels(self)
        self.gpadl_list.take_all_back()
        self.leave_when_idle()

    def leave_when_idle(self) -> None:
        """Go, if the channel is to leave and the endpoint holds neither rings nor GPADLs any more."""
        if not self.leaving or self.state in (ChannelState.RELEASED, ChannelState.REVOKED):
            return
        if self.busy is not Busy.NO or not self.gpadl_list.all_returned:
            return
        if self.abandoned or not self.revoking or not self.offered:
            self._release()
        elif self._owner.revoke_subchannels(self):
            self.gpadl_list.answer_teardowns()
            self.state = ChannelState.REVOKED
            self._owner.rescind(self)
            if self.comes_again:
                self.comes_again = self.revoking = False
                self.state = ChannelState.REOFFERED

    def _release(self) -> None:
        """Free everything by which the guest knew the channel."""
        if self.comes_again:
            self.comes_again = self.revoking = False
        self.gpadl_list.drop()
        self.state = ChannelState.RELEASED
        self.offered = self.abandoned = self.released_by_guest = False
        self._owner.released(self)
