"""A partition's state as plain records, for saving it and putting it back.

Source: docs/protocol/saving.md#hypervisor-state, docs/conformance.md#row-55.

Pages of the guest (message slots, event flags, hypercall page, reference TSC page) are guest RAM and travel with
it; here is only what is not in RAM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A message that is in no slot yet, in the order of its queue; a timer's has no payload."""

    sint: int
    message_type: int
    payload: bytes
    timer: int | None = None
    expiration: int = 0


@dataclass(frozen=True, slots=True)
class TimerState:
    """One synthetic timer; ``expiration`` is reference time, None if it does not run."""

    config: int
    count: int
    expiration: int | None


@dataclass(frozen=True, slots=True)
class PageState:
    """A page register, and the page that it had in use last."""

    value: int = 0
    last_gpn: int | None = None


@dataclass(frozen=True, slots=True)
class VpState:
    """One virtual processor; ``owed_events`` are (SINT, flag) signalled while the partition was paused."""

    assist_page: int
    scontrol: int
    siefp: PageState
    simp: PageState
    sints: tuple[int, ...]
    messages: tuple[QueuedMessage, ...]
    timers: tuple[TimerState, ...]
    owed_events: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ReferenceTimeState:
    """``time`` is the reference time at the save; frequency 0: the TSC was not followed."""

    time: int
    sequence: int
    frequency: int = 0
    scale: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PartitionState:
    """Everything of a partition that is not guest RAM."""

    guest_os_id: int
    hypercall: int
    reference_tsc: int
    tsc_invariant_control: int
    crash_parameters: tuple[int, ...]
    time: ReferenceTimeState
    vps: tuple[VpState, ...]
