"""One virtual processor's synthetic interrupt controller: registers, queues, and what its SINTs can take.

State only; :mod:`vmbus.hypervisor.synic` moves it. ``queues`` holds what is in no slot yet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vmbus.hypervisor.messages import Message
from vmbus.hypervisor.overlay import PageOverlay
from vmbus.wire.msr import SINT, SINT_COUNT, SINT_RESET, Sint


@dataclass(slots=True)
class SynicCounters:
    """How often something happened, since the partition was created."""

    messages_delivered: int = 0
    messages_behind_busy_slot: int = 0
    events_signalled: int = 0
    events_already_set: int = 0
    events_dropped: int = 0
    interrupts: int = 0
    end_of_message: int = 0
    doorbells: int = 0
    polls: int = 0


@dataclass(slots=True)
class VpSynic:
    """The controller of one virtual processor."""

    index: int
    siefp: PageOverlay
    simp: PageOverlay
    scontrol: int = 0
    sint_values: list[int] = field(default_factory=lambda: [SINT_RESET] * SINT_COUNT)
    sints: list[Sint] = field(default_factory=lambda: [SINT.parse(SINT_RESET)] * SINT_COUNT)
    queues: list[deque[Message]] = field(default_factory=lambda: [deque() for _ in range(SINT_COUNT)])
    waiting: int = 0
    """Channel messages in all queues."""
    timers_waiting: set[int] = field(default_factory=set)
    """Synthetic timers whose message is in a queue; each has at most one."""
    owed_events: set[tuple[int, int]] = field(default_factory=set)
    """(SINT, flag) signalled while paused."""
    auto_eoi_vectors: frozenset[int] = frozenset()

    @property
    def enabled(self) -> bool:
        return bool(self.scontrol & 1)

    def can_message(self, sint: int) -> bool:
        return bool(self.scontrol & 1) and not self.sints[sint].masked and self.simp.pages is not None

    def can_signal(self, sint: int) -> bool:
        return bool(self.scontrol & 1) and not self.sints[sint].masked and self.siefp.pages is not None
