"""The guest's side of an integration component, built from plain ``struct`` formats."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmbus.testing.loopback import GuestPacket, LoopbackGuest

TRANSACTION, REQUEST, RESPONSE = 1, 2, 4


@dataclass(frozen=True)
class IcPacket:
    """A request of the host's, taken apart."""

    kind: int
    vmbus_transaction: int
    pipe: tuple[int, int]
    framework: tuple[int, int]
    type: int
    version: tuple[int, int]
    size: int
    status: int
    transaction: int
    flags: int
    body: bytes


def take_apart(packet: GuestPacket) -> IcPacket:
    pipe_type, length, fa, fi, kind, ma, mi, size, status, transaction, flags, _ = struct.unpack_from(
        "<IIHHHHHHIBBH", packet.payload
    )
    return IcPacket(
        packet.kind,
        packet.transaction_id,
        (pipe_type, length),
        (fa, fi),
        kind,
        (ma, mi),
        size,
        status,
        transaction,
        flags,
        packet.payload[28 : 28 + size],
    )


class IcGuest(LoopbackGuest):
    """Answers as Linux does: the request comes back, changed in place."""

    def take(self) -> IcPacket:
        """The one request that the host has sent."""
        packets = self.receive()
        assert len(packets) == 1, packets
        return take_apart(packets[0])

    def answer(
        self,
        request: IcPacket,
        body: bytes | None = None,
        *,
        status: int = 0,
        flags: int = TRANSACTION | RESPONSE,
        transaction: int | None = None,
        type: int | None = None,
        size: int | None = None,
        pipe: tuple[int, int] | None = None,
        **packet: object,
    ) -> None:
        body = request.body if body is None else body
        size = len(body) if size is None else size
        pipe = (1, 20 + len(body)) if pipe is None else pipe
        header = struct.pack(
            "<IIHHHHHHIBBH",
            *pipe,
            *request.framework,
            request.type if type is None else type,
            *request.version,
            size,
            status,
            request.transaction if transaction is None else transaction,
            flags,
            0,
        )
        assert self.send(header + body, **packet)  # type: ignore[arg-type]

    def negotiate(self, framework: tuple[int, int] = (3, 0), version: tuple[int, int] = (3, 0)) -> IcPacket:
        """Answer the host's offer of versions."""
        offer = self.take()
        assert offer.type == 0
        self.answer_negotiation(offer, framework, version)
        return offer

    def answer_negotiation(
        self,
        offer: IcPacket,
        framework: tuple[int, int],
        version: tuple[int, int],
        counts: tuple[int, int] = (1, 1),
    ) -> None:
        chosen = struct.pack("<HHIHHHH", *counts, 0, *framework, *version)
        self.answer(offer, chosen + offer.body[16:], size=16)

    def refusals(self) -> dict[str, int]:
        return self.io.refusals.counts
