"""The states of a channel, and its counters.

Source: docs/protocol/messages.md#channel-states.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ChannelState(enum.Enum):
    """What the guest may do: the states of docs/protocol/messages.md#channel-states."""

    RELEASED = "released"
    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSING_REOPEN = "closing, re-open pending"
    REVOKED = "revoked"
    REOFFERED = "re-offered"


class Busy(enum.Enum):
    """What the endpoint was last called for; all but ``NO`` and ``OPEN`` are calls that it has not finished."""

    NO = "no"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


@dataclass(slots=True)
class ChannelCounters:
    """What happened on a channel since its device offered it."""

    opens: int = 0
    doorbells: int = 0
    interrupts: int = 0
    interrupts_dropped: int = 0
