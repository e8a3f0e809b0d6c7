"""The GPADLs of one channel: handed to its endpoint, taken back from it.

Source: docs/protocol/messages.md#gpadl-teardown.

    accepted --GPADL_TEARDOWN--> tearing down --endpoint has finished--> GPADL_TORNDOWN

The pages of a GPADL that the endpoint was notified of (``device_notified``) belong to the guest again only when
the endpoint has finished ``gpadl_torn_down``.
"""

from __future__ import annotations

from collections.abc import Callable

from vmbus.bus.channel.context import ChannelContext
from vmbus.bus.channel.gpadl import Assembly, Gpadl, GpadlState
from vmbus.errors import DeviceError, GuestError
from vmbus.wire.gpadl import GPADL_TORNDOWN, GpadlTorndown


class GpadlList:
    """The complete GPADLs of one channel. ``returned`` is called whenever the endpoint has given one back."""

    def __init__(self, context: ChannelContext, returned: Callable[[], None]) -> None:
        self.by_id: dict[int, Gpadl] = {}
        self._context = context
        self._returned = returned
        self._returning: set[int] = set()
        """Ids of the GPADLs that the endpoint was asked to give back, and has not yet."""

    @property
    def all_returned(self) -> bool:
        """Whether the endpoint holds none."""
        return not self._returning and not any(gpadl.device_notified for gpadl in self.by_id.values())

    def accept(self, assembly: Assembly, *, notify_device: bool) -> Exception | None:
        """Check a complete assembly, keep it, notify the endpoint. Return why it was refused, or None."""
        context = self._context
        try:
            gpadl = context.host.gpadl_assembler.finish(assembly)
        except GuestError as refused:
            context.refusals.refuse(refused.reason, refused.detail)
            return refused
        self.by_id[gpadl.gpadl_id] = gpadl
        if not notify_device:
            return None
        gpadl.device_notified = True
        error = context.calls.gpadl_created(gpadl).error
        if error is not None:
            gpadl.device_notified = False
            self._forget(gpadl)
        return error

    def restore(self, relid: int, gpadl: Gpadl) -> None:
        """Keep a GPADL of a saved channel; its weight counts against the limits from now on."""
        self.by_id[gpadl.gpadl_id] = gpadl
        self._context.host.gpadl_assembler.quota.charge(relid, gpadl.weight, gpadl.saved_bytes)

    def continue_teardowns(self) -> None:
        """Answer the teardowns that can be answered, and ask the endpoint for the others.

        Not while the endpoint opens or closes: it may be using any of the pages.
        """
        for gpadl in list(self.by_id.values()):
            if gpadl.state is not GpadlState.TEARING_DOWN or gpadl.gpadl_id in self._returning:
                continue
            if gpadl.device_notified:
                self._take_back(gpadl)
            else:
                self._answer(gpadl)

    def take_all_back(self) -> None:
        """Ask the endpoint for all that it holds: the channel leaves."""
        for gpadl in list(self.by_id.values()):
            if gpadl.device_notified and gpadl.gpadl_id not in self._returning:
                self._take_back(gpadl)

    def finish_teardown(self, gpadl: Gpadl) -> None:
        """See :meth:`Channel.finish_teardown`."""
        if gpadl.gpadl_id not in self._returning:
            raise DeviceError(f"{self._context!r}: GPADL {gpadl.gpadl_id:#x} is not being torn down")
        if self._context.calls.finish("gpadl_torn_down"):
            self._finish_return(gpadl)

    def answer_teardowns(self) -> None:
        """Send GPADL_TORNDOWN for every teardown: the endpoint holds none."""
        for gpadl in list(self.by_id.values()):
            if gpadl.state is GpadlState.TEARING_DOWN:
                self._answer(gpadl)

    def drop(self) -> None:
        """Forget all of them, and the assemblies of the channel, without a message to the guest."""
        if self._context.relid is not None:
            self._context.host.gpadl_assembler.abandon_all(self._context.relid)
        for gpadl in list(self.by_id.values()):
            self._forget(gpadl)

    def _take_back(self, gpadl: Gpadl) -> None:
        self._returning.add(gpadl.gpadl_id)
        if not self._context.calls.gpadl_torn_down(gpadl).deferred:
            self._finish_return(gpadl)

    def _finish_return(self, gpadl: Gpadl) -> None:
        self._returning.discard(gpadl.gpadl_id)
        gpadl.device_notified = False
        if gpadl.state is GpadlState.TEARING_DOWN:
            self._answer(gpadl)
        self._returned()

    def _answer(self, gpadl: Gpadl) -> None:
        if self._forget(gpadl):
            self._context.answer(GPADL_TORNDOWN.build(GpadlTorndown(gpadl.gpadl_id)))

    def _forget(self, gpadl: Gpadl) -> bool:
        """Remove a GPADL; return False if it was gone already."""
        relid = self._context.relid
        if self.by_id.get(gpadl.gpadl_id) is not gpadl or relid is None:
            return False
        del self.by_id[gpadl.gpadl_id]
        self._context.host.gpadl_assembler.quota.refund(relid, gpadl.weight, gpadl.saved_bytes)
        return True
