"""What guest and host agree on: the adder's GUIDs and its one message, in both directions."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import construct as c
from vmbus.api import Record

INTERFACE = uuid.UUID("7d2f4a5e-94f1-4d0b-8e39-0d2b2b6a9c11")
INSTANCE = uuid.UUID("0b0a7f6e-2a53-4c57-9d6b-5f2b8c1f7a02")


@dataclass(frozen=True, slots=True)
class Add:
    """A request: ``amount`` is added. The answer is the same record, with the sum."""

    amount: int


ADD = Record(Add, "amount" / c.Int64sl)
