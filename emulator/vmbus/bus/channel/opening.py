"""What a guest asks for when it opens a channel, and whether it can have it.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#ring-gpadl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vmbus.bus.channel.gpadl import Gpadl, GpadlState
from vmbus.bus.contact import MULTICLIENT_CONNECTION_ID
from vmbus.bus.offers import CONNECTION_ID_BASE, MAX_CONNECTION_ID, MAX_RELID
from vmbus.bus.outbox import Target
from vmbus.errors import ProtocolError
from vmbus.wire.version import NO_FEATURES, Feature, Version


@dataclass(frozen=True, slots=True)
class ReservedClient:
    """The client that opened a reserved channel: where its answers go, and what was agreed when it connected."""

    target: Target
    version: Version
    features: Feature = NO_FEATURES


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """The parameters of OPENCHANNEL or OPEN_RESERVED_CHANNEL.

    ``target_vp`` None: no interrupts. ``downstream_offset``: the page of the ring GPADL with which the ring from
    host to guest begins. ``event_flag`` and ``connection_id`` are the guest's choice, None when that was not
    negotiated. ``reserved``: the client of a reserved channel.
    """

    open_id: int
    ring_gpadl_id: int
    target_vp: int | None
    downstream_offset: int
    user_data: bytes = b""
    event_flag: int | None = None
    connection_id: int | None = None
    redirect_interrupt: bool = False
    reserved: ReservedClient | None = None


def split_rings(request: OpenRequest, gpadls: Mapping[int, Gpadl]) -> tuple[Sequence[int], int]:
    """Return the page frame numbers of both rings, and how many of them belong to the first one.

    Each ring has a control page and at least one page of data. Raises :class:`ProtocolError`.
    """
    gpadl = gpadls.get(request.ring_gpadl_id)
    if gpadl is None or gpadl.state is not GpadlState.ACCEPTED:
        raise ProtocolError("open-gpadl-unknown", f"{request.ring_gpadl_id:#x}")
    pfns = gpadl.aligned_pfns()
    downstream = request.downstream_offset
    if not 2 <= downstream <= len(pfns) - 2:
        raise ProtocolError("open-ring-split", f"page {downstream} of {len(pfns)}")
    return pfns, downstream


def check_open(
    request: OpenRequest,
    gpadls: Mapping[int, Gpadl],
    *,
    relid: int | None,
    vp_count: int,
    connection_id_taken: Callable[[int], bool],
) -> None:
    """Raise :class:`ProtocolError` unless channel ``relid`` can be opened with ``request``.

    A connection id of the guest's choice may be the channel's own, or any that is not the bus's, not in the range
    that offers are given, and not taken.
    """
    if request.target_vp is not None and request.target_vp >= vp_count:
        raise ProtocolError("open-target-vp", f"{request.target_vp}")
    split_rings(request, gpadls)
    flag, chosen = request.event_flag, request.connection_id
    if flag is not None and flag > MAX_RELID:
        raise ProtocolError("open-event-flag", f"{flag}")
    if chosen is None or (relid is not None and chosen == CONNECTION_ID_BASE | relid):
        return
    by_offer = CONNECTION_ID_BASE < chosen <= CONNECTION_ID_BASE + MAX_RELID
    if not MULTICLIENT_CONNECTION_ID < chosen <= MAX_CONNECTION_ID or by_offer:
        raise ProtocolError("open-connection-id", f"{chosen:#x}")
    if connection_id_taken(chosen):
        raise ProtocolError("open-connection-id-taken", f"{chosen:#x}")
