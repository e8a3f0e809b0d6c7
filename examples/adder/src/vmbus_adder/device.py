"""The adder: answers every amount that the guest sends with the sum of all amounts so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import construct as c
from vmbus.api import Channel, ControlCommand, Device, GuestError, Help, Offer, Packet, Record, SavedState

from vmbus_adder.protocol import ADD, INSTANCE, INTERFACE, Add

LIMIT = 1 << 63
"""The sum has 64 bits, one of them for the sign."""


@dataclass(frozen=True, slots=True)
class AdderSaved:
    """What survives a migration."""

    sum: int


ADDER_SAVED = SavedState(Record(AdderSaved, "sum" / c.Int64sl))


class Adder(Device):
    """Adds up what the guest sends."""

    name = "adder"

    def __init__(
        self, *, start: Annotated[int, Help("the sum to begin with", least=0, most=LIMIT - 1)] = 0
    ) -> None:
        self.start_sum = start
        self.sum = start

    def offer(self) -> Offer:
        return Offer(interface_id=INTERFACE, instance_id=INSTANCE, name=self.name)

    def opened(self, io: Channel) -> None:
        self.sum = self.start_sum

    def packet(self, io: Channel, packet: Packet) -> None:
        request = ADD.parse(packet.payload)  # too short: MalformedError
        total = self.sum + request.amount
        if not -LIMIT <= total < LIMIT:
            raise GuestError("adder-overflow", f"{self.sum} + {request.amount} has more than 64 bits")
        self.sum = total
        io.answer(packet, ADD.build(Add(total)))

    def save(self) -> bytes:
        return ADDER_SAVED.save(AdderSaved(self.sum))

    def restore(self, state: bytes) -> None:
        self.sum = ADDER_SAVED.load(state, self.name).sum

    def status(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def control_commands(self) -> Mapping[str, ControlCommand]:
        return {"adder-reset": self._reset}

    async def _reset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        before, self.sum = self.sum, self.start_sum
        return {"before": before}
