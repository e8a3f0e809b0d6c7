"""What is offered to the guest, and under which channel ids (docs/protocol/messages.md#offers).

Offers go out in the order (interface, order, instance), with the lowest free ids, so that the same devices get
the same ids on every connection. An offer with an absolute order precedes all that have none.
"""

from __future__ import annotations

import uuid
from collections.abc import Container
from dataclasses import dataclass

from vmbus.errors import DeviceError
from vmbus.wire.offer import (
    NO_MONITOR,
    OFFERCHANNEL,
    PIPE_AREA,
    SOCKET_AREA,
    SOCKET_AREA_VERSION,
    USER_DEFINED_SIZE,
    OfferChannel,
    OfferFlags,
    PipeArea,
    PipeMode,
    SocketArea,
)
from vmbus.wire.version import Feature

MAX_RELID = 2047
"""Channel ids are event flag numbers; 0 is the shared flag."""

CONNECTION_ID_BASE = 0x2000
"""HvSignalEvent connection of channel ``relid`` is ``CONNECTION_ID_BASE | relid``."""

MAX_CONNECTION_ID = 0xFF_FFFF
"""Connection ids have 24 bits."""

NO_UUID = uuid.UUID(int=0)

OfferKey = tuple[uuid.UUID, uuid.UUID, int]
"""Interface, instance and sub-channel index: two offers with equal keys are the same device."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One channel of a device.

    ``order`` sorts within the interface, or over all interfaces when ``absolute_order``. ``monitor_latency``
    (100 ns) is how often the monitor bit is polled when the offer asks for monitored notification.
    """

    interface_id: uuid.UUID
    instance_id: uuid.UUID
    flags: OfferFlags = OfferFlags.ENUMERATE_DEVICE_INTERFACE
    user_defined: bytes = b""
    mmio_megabytes: int = 0
    subchannel_index: int = 0
    order: int | None = None
    name: str = ""
    mmio_megabytes_optional: int = 0
    absolute_order: bool = False
    monitor_latency: int = 1000

    def __post_init__(self) -> None:
        if len(self.user_defined) > USER_DEFINED_SIZE:
            raise DeviceError(f"offer {self.name!r}: {len(self.user_defined)} bytes of user data, not 120")
        if not 0 <= self.subchannel_index <= 0xFFFF:
            raise DeviceError(f"offer {self.name!r}: sub-channel index {self.subchannel_index}")
        if not (0 <= self.mmio_megabytes <= 0xFFFF and 0 <= self.mmio_megabytes_optional <= 0xFFFF):
            raise DeviceError(f"offer {self.name!r}: {self.mmio_megabytes} MiB of MMIO")

    @property
    def key(self) -> OfferKey:
        return (self.interface_id, self.instance_id, self.subchannel_index)

    @property
    def transient(self) -> bool:
        """Whether the offer ends with the connection, as sub-channels and sockets do, which guests ask for."""
        return self.subchannel_index != 0 or OfferFlags.TLNPI_PROVIDER in self.flags

    @property
    def monitored(self) -> bool:
        return OfferFlags.REQUEST_MONITORED_NOTIFICATION in self.flags


def sort_key(offer: Offer) -> tuple[int, ...]:
    """Return the key by which offers are sorted before they get their ids."""
    identity = (offer.interface_id.int, offer.instance_id.int, offer.subchannel_index)
    if offer.order is None:
        return (1, offer.interface_id.int, 1, 0, *identity)
    if offer.absolute_order:
        return (0, offer.order, 0, 0, *identity)
    return (1, offer.interface_id.int, 0, offer.order, *identity)


def pipe_area(mode: PipeMode, user_data: bytes = b"", pipe_flags: int = 0) -> bytes:
    """Build the user-defined area of a channel in named-pipe mode (set the flag as well)."""
    return PIPE_AREA.build(PipeArea(mode, user_data.ljust(112, b"\0"), pipe_flags))


SOCKET_FLAGS = OfferFlags.ENUMERATE_DEVICE_INTERFACE | OfferFlags.NAMED_PIPE_MODE | OfferFlags.TLNPI_PROVIDER


def socket_offer(
    service_id: uuid.UUID, endpoint_id: uuid.UUID, *, for_guest_accept: bool, silo_id: uuid.UUID = NO_UUID
) -> Offer:
    """Return the offer of a socket (hvsock) channel.

    To answer TL_CONNECT_REQUEST pass the ids of the request and ``for_guest_accept=False``; to connect to a listener
    in the guest, its service and a new random endpoint id.
    """
    area = SocketArea(PipeMode.BYTE, int(for_guest_accept), 0, SOCKET_AREA_VERSION, silo_id)
    return Offer(service_id, endpoint_id, SOCKET_FLAGS, SOCKET_AREA.build(area), name=f"socket {endpoint_id}")


def visible_flags(flags: OfferFlags, features: Feature, *, trusted: bool) -> OfferFlags:
    """Return ``flags`` without those that are not defined on this connection."""
    if Feature.CONFIDENTIAL_CHANNELS not in features or not trusted:
        flags &= ~(OfferFlags.CONFIDENTIAL_RING_BUFFER | OfferFlags.CONFIDENTIAL_EXTERNAL_MEMORY)
    if Feature.GPA_PINNING not in features:
        flags &= ~OfferFlags.REQUIRE_PINNED_EXTERNAL_MEMORY
    return flags


def build_offer(
    offer: Offer, relid: int, connection_id: int, monitor_id: int | None, features: Feature, *, trusted: bool
) -> bytes:
    """Build OFFERCHANNEL for ``offer``."""
    return OFFERCHANNEL.build(
        OfferChannel(
            interface_id=offer.interface_id,
            instance_id=offer.instance_id,
            flags=int(visible_flags(offer.flags, features, trusted=trusted)),
            mmio_megabytes=offer.mmio_megabytes,
            user_defined=offer.user_defined.ljust(USER_DEFINED_SIZE, b"\0"),
            subchannel_index=offer.subchannel_index,
            mmio_megabytes_optional=offer.mmio_megabytes_optional,
            relid=relid,
            monitor_id=NO_MONITOR if monitor_id is None else monitor_id,
            monitor_allocated=int(monitor_id is not None),
            is_dedicated=1,
            connection_id=connection_id,
        )
    )


def lowest_free(taken: Container[int | None], first: int, last: int) -> int | None:
    """Return the lowest number from ``first`` to ``last`` that is not taken."""
    return next((number for number in range(first, last + 1) if number not in taken), None)
