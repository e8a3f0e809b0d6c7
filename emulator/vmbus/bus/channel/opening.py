"""What a guest may open a channel with: rings, and signals of its own choice.

Source: docs/protocol/messages.md#open-channel, docs/protocol/messages.md#ring-gpadl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmbus.bus.channel.gpadl import Gpadl, GpadlState
from vmbus.bus.channel.state import ChannelHost, OpenRequest
from vmbus.bus.contact import MULTICLIENT_CONNECTION_ID
from vmbus.bus.offers import CONNECTION_ID_BASE, MAX_CONNECTION_ID, MAX_RELID
from vmbus.errors import ProtocolError


def split_rings(request: OpenRequest, gpadls: Mapping[int, Gpadl]) -> tuple[Sequence[int], int]:
    """Page frame numbers of both rings, and how many of them are the first's.

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
    request: OpenRequest, gpadls: Mapping[int, Gpadl], own_connection_id: int | None, host: ChannelHost
) -> None:
    """Raise :class:`ProtocolError` unless a channel can be opened as ``request`` says.

    A connection id of the guest's choice may be the channel's own, or any that is not the bus's, not in the
    range that offers are given, and not taken.
    """
    if request.target_vp is not None and request.target_vp >= host.synic.vp_count:
        raise ProtocolError("open-target-vp", f"{request.target_vp}")
    split_rings(request, gpadls)
    flag, chosen = request.event_flag, request.connection_id
    if flag is not None and flag > MAX_RELID:
        raise ProtocolError("open-event-flag", f"{flag}")
    if chosen is None or chosen == own_connection_id:
        return
    by_offer = CONNECTION_ID_BASE < chosen <= CONNECTION_ID_BASE + MAX_RELID
    if not MULTICLIENT_CONNECTION_ID < chosen <= MAX_CONNECTION_ID or by_offer:
        raise ProtocolError("open-connection-id", f"{chosen:#x}")
    if host.connection_id_taken(chosen):
        raise ProtocolError("open-connection-id-taken", f"{chosen:#x}")
