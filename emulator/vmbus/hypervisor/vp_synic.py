"""One virtual processor's synthetic interrupt controller: registers, message queues, and its status.

State only: :mod:`vmbus.hypervisor.synic` delivers messages and events. ``queues`` holds the messages that are in no
slot yet, one queue per SINT.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vmbus.hypervisor.messages import Message
from vmbus.hypervisor.overlay import PageOverlay
from vmbus.wire.msr import SINT, SINT_COUNT, SINT_RESET, Sint


@dataclass(slots=True)
class SynicCounters:
    """Numbers of events since the partition was created, of all processors together; a reset does not clear them."""

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
    """Number of channel messages in all queues."""
    timers_waiting: set[int] = field(default_factory=set)
    """Indices of the synthetic timers whose message is in a queue; each has at most one."""
    deferred_events: set[tuple[int, int]] = field(default_factory=set)
    """(SINT, flag) signalled while paused, delivered on resume."""
    auto_eoi_vectors: frozenset[int] = frozenset()
    """Vectors of the unmasked SINTs with auto-EOI."""

    @property
    def enabled(self) -> bool:
        """Whether SCONTROL enables the controller."""
        return bool(self.scontrol & 1)

    def can_message(self, sint: int) -> bool:
        """Whether a message for ``sint`` can be written to the message page (if its slot is free)."""
        return bool(self.scontrol & 1) and not self.sints[sint].masked and self.simp.pages is not None

    def can_signal(self, sint: int) -> bool:
        """Whether an event flag of ``sint`` can be set in the event page."""
        return bool(self.scontrol & 1) and not self.sints[sint].masked and self.siefp.pages is not None

    def status(self) -> dict[str, object]:
        """Return registers and queue lengths for ``vmbus status``: SINTs that are unmasked or have messages."""
        return {
            "synic_enabled": self.enabled,
            "message_page": self.simp.gpn_in_use,
            "event_page": self.siefp.gpn_in_use,
            "sints": {
                str(number): {
                    "vector": sint.vector,
                    "auto_eoi": sint.auto_eoi,
                    "polling": sint.polling,
                    "queued": len(self.queues[number]),
                }
                for number, sint in enumerate(self.sints)
                if not sint.masked or self.queues[number]
            },
        }
