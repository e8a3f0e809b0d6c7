"""One channel of the bus, as the host sees it.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#channel-states.

    released --offer--> closed --OPEN--> opening --device--> open --CLOSE--> closing --device--> closed
                          |                                                    '-OPEN-> closing, re-open
                          '--host takes it away--> revoked --RELID_RELEASED--> (gone)
                                                      '--same device comes back--> re-offered --> closed

The state is what the guest may do; what the device was told, and has not finished, is kept beside it (``busy``).
A guest, or the host, can want the channel away at any moment. It then *leaves*: the device closes, gives every
GPADL back, and only when all that is done does the guest get its RESCIND, or the bus its UNLOAD_RESPONSE.
"""

from __future__ import annotations

import logging

from vmbus.bus.channel.endpoint import Endpoint, can_be_restored
from vmbus.bus.channel.endpoint_calls import EndpointCalls
from vmbus.bus.channel.gpadl import Assembly, Gpadl, GpadlState
from vmbus.bus.channel.gpadls import SharedPages
from vmbus.bus.channel.opening import check_open, split_rings
from vmbus.bus.channel.signals import ChannelSignals
from vmbus.bus.channel.state import (
    Busy,
    ChannelCounters,
    ChannelHost,
    ChannelState,
    OpenRequest,
)
from vmbus.bus.offers import CONNECTION_ID_BASE, Offer
from vmbus.bus.outbox import Target
from vmbus.errors import DeviceError, GuestError, ProtocolError
from vmbus.ports import GuestPages
from vmbus.refusals import Refusals
from vmbus.wire.gpadl import GPADL_CREATED, GpadlCreated
from vmbus.wire.header import STATUS_SUCCESS, STATUS_UNSUCCESSFUL
from vmbus.wire.messages import (
    CLOSE_RESERVED_RESPONSE,
    OPENCHANNEL_RESULT,
    ChannelOnly,
    OpenResult,
)

_logger = logging.getLogger(__name__)


class Channel:
    """A channel; made by :meth:`Bus.offer`, used by its endpoint."""

    def __init__(self, host: ChannelHost, offer: Offer, endpoint: Endpoint) -> None:
        self.offer = offer
        self.endpoint = endpoint
        self.state = ChannelState.RELEASED
        self.relid: int | None = None
        self.monitor_id: int | None = None
        self.offered = False
        """Whether the guest has the offer on this connection."""
        self.request: OpenRequest | None = None
        self.reopen: OpenRequest | None = None
        self.close_answer: Target | None = None
        """Where the client of a reserved channel waits for the end of its close."""
        self.pages = SharedPages(self, host)
        self.signals = ChannelSignals(self, host)
        self.busy = Busy.NO
        self.stopped = False
        self.revoking = False
        """The host wants it away."""
        self.abandoned = False
        """The guest is gone, or starts over."""
        self.released_by_guest = False
        self.counters = ChannelCounters()
        self.refusals = Refusals(f"channel {offer.name or offer.interface_id}", _logger)
        self.calls = EndpointCalls(self.refusals)
        self._host = host

    def __repr__(self) -> str:
        return f"<Channel {self.relid} {self.offer.name!r} {self.state.value}>"

    @property
    def connection_id(self) -> int | None:
        """The HvSignalEvent connection of the offer; None without a channel id."""
        return None if self.relid is None else CONNECTION_ID_BASE | self.relid

    @property
    def is_open(self) -> bool:
        """Whether the device may use the rings."""
        return self.busy in (Busy.OPENING, Busy.OPEN)

    @property
    def gpadls(self) -> dict[int, Gpadl]:
        """The GPADLs of this channel by id, with those that are being torn down."""
        return self.pages.by_id

    @property
    def target_vp(self) -> int | None:
        """Where the guest is interrupted; None for nowhere."""
        return self.signals.target_vp

    @property
    def leaving(self) -> bool:
        """Whether it goes away as soon as the device holds nothing of the guest's."""
        return self.abandoned or self.revoking or self.released_by_guest

    @property
    def reserved(self) -> bool:
        """Whether it is opened as a reserved channel."""
        return self.request is not None and self.request.reserved is not None

    # ---- for endpoints

    def ring_pages(self) -> tuple[GuestPages, GuestPages]:
        """The two rings: guest to host (incoming), host to guest (outgoing).

        Raises :class:`ProtocolError` when the channel is not open, or its GPADL holds no two rings.
        """
        if self.request is None:
            raise ProtocolError("ring-not-open")
        pfns, downstream = split_rings(self.request, self.gpadls)
        return self._host.memory.pages(pfns[:downstream]), self._host.memory.pages(pfns[downstream:])

    def gpadl_pages(self, gpadl_id: int) -> GuestPages:
        """The pages of a GPADL that is one range of whole pages, as every buffer of a real guest is.

        Raises :class:`ProtocolError` for an unknown id or another shape.
        """
        gpadl = self.gpadls.get(gpadl_id)
        if gpadl is None or gpadl.state is not GpadlState.ACCEPTED:
            raise ProtocolError("gpadl-unknown", f"{gpadl_id:#x}")
        return self._host.memory.pages(gpadl.aligned_pfns())

    def signal_guest(self) -> None:
        """Tell the guest to look at its ring; nothing happens if the channel is not open or wants no interrupts."""
        self.signals.signal_guest()

    def doorbell(self) -> None:
        """The guest signalled: tell the device, if it is there."""
        self.counters.doorbells += 1
        if self.is_open and not self.stopped:
            self.calls.call("signalled", self.endpoint.signalled, self)

    def defer_open(self) -> None:
        """From inside ``opened``: the answer comes with :meth:`finish_open`."""
        self.calls.defer("opened")

    def finish_open(self, error: Exception | None = None) -> None:
        """The device is ready, or refuses because of ``error``."""
        if self.busy is not Busy.OPENING:
            raise DeviceError(f"{self!r} is not being opened")
        if self.calls.finish("opened"):
            if error is not None:
                self.refusals.refuse("open-device", str(error))
            self._opened(error)
        elif error is not None:
            raise error

    def defer_close(self) -> None:
        """From inside ``closed``: rings are in use until :meth:`finish_close`."""
        self.calls.defer("closed")

    def finish_close(self) -> None:
        """No ring page is in use any more."""
        if self.busy is not Busy.CLOSING:
            raise DeviceError(f"{self!r} is not being closed")
        if self.calls.finish("closed"):
            self._closed()

    def defer_teardown(self, gpadl: Gpadl) -> None:
        """From inside ``gpadl_torn_down``: its pages are in use until :meth:`finish_teardown`."""
        self.calls.defer("gpadl_torn_down")

    def finish_teardown(self, gpadl: Gpadl) -> None:
        """No page of ``gpadl`` is in use any more."""
        self.pages.finish_teardown(gpadl)

    # ---- for whoever saves the machine, and for devices that must wait

    def stop(self) -> None:
        """From now on opens and modifications wait and doorbells are not passed on; closing is allowed."""
        self.stopped = True

    def start(self) -> None:
        """Undo :meth:`stop`: what waited happens now, and the device is signalled once."""
        if not self.stopped:
            return
        self.stopped = False
        if self.state is ChannelState.OPENING and self.busy is Busy.NO:
            self._tell_open()
        self.signals.modify_pending()
        if self.is_open:
            self.calls.call("signalled", self.endpoint.signalled, self)

    def status(self) -> dict[str, object]:
        """What a person wants to know, as JSON knows it."""
        return {
            "relid": self.relid,
            "interface": str(self.offer.interface_id),
            "instance": str(self.offer.instance_id),
            "subchannel": self.offer.subchannel_index,
            "device": self.offer.name,
            "state": self.state.value,
            "stopped": self.stopped,
            "target_vp": self.target_vp,
            "gpadls": len(self.gpadls),
            "gpadl_pages": sum(gpadl.page_count for gpadl in self.gpadls.values()),
            "opens": self.counters.opens,
            "doorbells": self.counters.doorbells,
            "interrupts": self.counters.interrupts,
            "refusals": dict(self.refusals.counts),
        }

    # ---- what a guest asks for

    def open(self, request: OpenRequest) -> None:
        """OPENCHANNEL, OPEN_RESERVED_CHANNEL."""
        if self.state is ChannelState.CLOSED:
            self._begin_open(request)
        elif self.state is ChannelState.CLOSING and not self.leaving and not request.reserved:
            self.reopen = request
            self.state = ChannelState.CLOSING_REOPEN
        else:
            self.refusals.refuse("open-state", self.state.value)

    def close(self) -> None:
        """CLOSECHANNEL: there is no answer. After a RESCIND it comes too late and is nothing wrong."""
        if self.state is ChannelState.REVOKED:
            return
        if self.state is not ChannelState.OPEN or self.reserved:
            self.refusals.refuse("close-state", "reserved" if self.reserved else self.state.value)
            return
        self._close_device()

    def close_reserved(self, target: Target) -> None:
        """CLOSE_RESERVED_CHANNEL; the answer goes to ``target``."""
        if self.state is not ChannelState.OPEN or not self.reserved:
            self.refusals.refuse("close-reserved-state", self.state.value)
            return
        self.close_answer = target
        self._close_device()

    def release(self) -> None:
        """RELID_RELEASED."""
        if self.state is ChannelState.CLOSED:
            self.released_by_guest = True
            self._leave()
        elif self.state is ChannelState.CLOSING:
            self.released_by_guest = True
        elif self.state is ChannelState.REVOKED:
            self._release()
        elif self.state is ChannelState.REOFFERED:
            self.pages.drop()
            self.state = ChannelState.CLOSED
            self._host.offer_again(self)
        else:
            self.refusals.refuse("release-state", self.state.value)

    def modify(self, vp: int) -> None:
        """MODIFYCHANNEL: interrupts to another virtual processor."""
        self.signals.modify(vp)

    def gpadl_complete(self, assembly: Assembly) -> None:
        """The range data of a GPADL is all there: check it, tell the device, answer."""
        gone = self.revoking or self.state in (ChannelState.REVOKED, ChannelState.REOFFERED)
        error = self.pages.add(assembly, tell=not gone)
        if self.abandoned or self.relid is None:
            return
        status = STATUS_SUCCESS if error is None else STATUS_UNSUCCESSFUL
        self._host.send(GPADL_CREATED.build(GpadlCreated(self.relid, assembly.gpadl_id, status)))

    def teardown(self, gpadl_id: int) -> None:
        """GPADL_TEARDOWN: TORNDOWN follows when the device has let go."""
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
            self._close_device()
            return
        self.pages.continue_teardowns()

    # ---- what the host asks for

    def revoke(self) -> None:
        """The host takes the channel away; the guest learns when the device has let go."""
        if self.revoking:
            return
        self.revoking = True
        if self.state is ChannelState.REOFFERED:
            self.state = ChannelState.REVOKED
        else:
            self._depart()

    def abandon(self) -> None:
        """The connection ends: nothing more is said to the guest about this channel."""
        if self.state is ChannelState.RELEASED or self.abandoned:
            return
        self.abandoned = True
        if self.state in (ChannelState.REVOKED, ChannelState.REOFFERED):
            self._release()
        else:
            self._depart()

    def detach(self) -> None:
        """The connection ends, but the client of a reserved channel stays."""
        self.offered = False

    def go_on(self) -> None:
        """The channel was restored, and its bus goes on: take up what was under way when it was saved.

        What the device had been asked for and not answered it is asked for once more. One that cannot go on
        with an open channel loses it: the guest gets a RESCIND, and the same offer anew.
        """
        if self.state is ChannelState.OPENING and self.leaving:
            self._forget_open()
            self._leave()
        elif self.state is ChannelState.OPENING and not self.stopped:
            self._tell_open()
        elif self.state is ChannelState.OPEN:
            self._go_on_open()
        elif self.state in (ChannelState.CLOSING, ChannelState.CLOSING_REOPEN) and self.request is not None:
            self._tell_close()
        elif self.leaving and self.state is not ChannelState.REVOKED:
            self._leave()
        self.pages.continue_teardowns()

    def _go_on_open(self) -> None:
        if not can_be_restored(self.endpoint):
            self._start_over()
            return
        self._connect()
        error = self.calls.call("restored", self.endpoint.restored, self).error
        self.busy = Busy.NO if error is not None else Busy.OPEN
        if error is not None:
            self._start_over()
            return
        self.signals.arm_unstick()
        if not self.stopped:
            self.signals.modify_pending()
        self.calls.call("signalled", self.endpoint.signalled, self)

    def _start_over(self) -> None:
        """Rescind, and offer again with the same id once the guest has released it."""
        self.refusals.refuse("not-restored", "the channel is rescinded and offered anew")
        for gpadl in self.gpadls.values():
            gpadl.device_notified = False
        if not self.offered:
            self.abandoned = True
            self._closed()
            return
        comes_again = not self.revoking and not self.offer.transient
        self.revoking = True
        self._closed()
        if comes_again and self.state is ChannelState.REVOKED:
            self.revoking = False
            self.state = ChannelState.REOFFERED

    # ---- opening

    def _begin_open(self, request: OpenRequest) -> None:
        self.request = request
        self.signals.target_vp = request.target_vp
        self.state = ChannelState.OPENING
        try:
            check_open(request, self.gpadls, self.connection_id, self._host)
        except GuestError as error:
            self.refusals.refuse(error.reason, error.detail)
            self._fail_open()
            return
        if not self.stopped:
            self._tell_open()

    def _connect(self) -> None:
        self.busy = Busy.OPENING
        if self.request is not None:
            self.signals.connect(self.request)

    def _tell_open(self) -> None:
        self._connect()
        outcome = self.calls.call("opened", self.endpoint.opened, self)
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
            self._close_device()
            return
        self.state = ChannelState.OPEN
        self._answer_open(STATUS_SUCCESS)
        self.signals.arm_unstick()
        ring = self.gpadls.get(self.request.ring_gpadl_id) if self.request else None
        if ring is None or ring.state is GpadlState.TEARING_DOWN:
            self._close_device()

    def _fail_open(self) -> None:
        if not self.revoking:
            self._answer_open(STATUS_UNSUCCESSFUL)
        self._forget_open()
        self._after_device()

    def _answer_open(self, status: int) -> None:
        request = self.request
        if request is None or self.relid is None or self.abandoned:
            return
        payload = OPENCHANNEL_RESULT.build(OpenResult(self.relid, request.open_id, status))
        self._host.send(payload, request.reserved.target if request.reserved else None)

    # ---- closing and leaving

    def _close_device(self) -> None:
        self.state = ChannelState.CLOSING
        self._host.leave_subchannels(self)
        self.signals.cancel_unstick()
        self._tell_close()

    def _tell_close(self) -> None:
        self.busy = Busy.CLOSING
        if not self.calls.call("closed", self.endpoint.closed, self).deferred:
            self._closed()

    def _closed(self) -> None:
        self.busy = Busy.NO
        answer, self.close_answer = self.close_answer, None
        was_reserved = self.reserved
        self._forget_open()
        if answer is not None and self.relid is not None and not self.abandoned:
            self._host.send(CLOSE_RESERVED_RESPONSE.build(ChannelOnly(self.relid)), answer)
        if was_reserved and not self.offered:
            self.abandoned = True
        self._after_device()

    def _forget_open(self) -> None:
        self.signals.disconnect()
        self.request = None

    def _after_device(self) -> None:
        """The device has let the rings go: whatever waited for that goes on."""
        reopen, self.reopen = self.reopen, None
        self.pages.continue_teardowns()
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
            self._close_device()
        elif self.busy is Busy.NO:
            self._forget_open()
            self._leave()

    def _leave(self) -> None:
        """The device has closed: take its GPADLs back, then go. Nothing can be opened meanwhile."""
        self.state = ChannelState.CLOSING
        self._host.leave_subchannels(self)
        self.pages.take_all_back()
        self.leave_when_idle()

    def leave_when_idle(self) -> None:
        """Go, if the channel is to leave and the device holds nothing of the guest's any more."""
        if not self.leaving or self.state in (ChannelState.RELEASED, ChannelState.REVOKED):
            return
        if self.busy is not Busy.NO or not self.pages.all_back:
            return
        if self.abandoned or not self.revoking or not self.offered:
            self._release()
        elif self._host.leave_subchannels(self):
            self.pages.answer_teardowns()
            self.state = ChannelState.REVOKED
            self._host.rescinded(self)

    def _release(self) -> None:
        """Free what the guest knew it by."""
        self.pages.drop()
        self.state = ChannelState.RELEASED
        self.offered = self.abandoned = self.released_by_guest = False
        self._host.left(self)
