"""Checks of a partition's saved state, and its restoration into live objects.

Source: docs/conformance.md#row-55.

Restoring does not touch guest memory: the pages that SIMP and SIEFP name hold messages and flags that the guest has
not seen yet, so they are not zeroed, and queued messages stay queued behind them.
:meth:`Partition.restore <vmbus.hypervisor.partition.Partition.restore>` calls all of these functions.
"""

from __future__ import annotations

from collections.abc import Iterable

from vmbus.errors import MalformedError
from vmbus.hypervisor.messages import Message
from vmbus.hypervisor.overlay import PageOverlay
from vmbus.hypervisor.reference_time import ReferenceTime, TscScaling, scale_for
from vmbus.hypervisor.saved_state.values import PartitionState, ReferenceTimeState, VpState
from vmbus.hypervisor.stimer import SyntheticTimer
from vmbus.hypervisor.synic import MAX_QUEUED_MESSAGES, MIN_VECTOR
from vmbus.hypervisor.vp_synic import VpSynic
from vmbus.wire.msr import CRASH_PARAMETER_COUNT, SINT, SINT_COUNT, STIMER_COUNT
from vmbus.wire.synic import EVENT_FLAG_COUNT, MESSAGE_PAYLOAD_MAX, MessageType

_LIMIT64 = 1 << 64
MAX_TIME = 1 << 62
"""Reference time of a saved state, in units of 100 ns: 14,000 years. What follows it must fit 64 bits for years."""


def check_state(state: PartitionState, vp_count: int) -> None:
    """Raise :class:`MalformedError` for a state that no partition of at most ``vp_count`` processors can have."""
    _require(0 < len(state.vps) <= vp_count, "saved-vp-count", f"{len(state.vps)} saved, {vp_count} here")
    _require(len(state.crash_parameters) == CRASH_PARAMETER_COUNT, "saved-crash-parameters")
    _require_u64(
        (
            state.guest_os_id,
            state.hypercall,
            state.reference_tsc,
            state.tsc_invariant_control,
            *state.crash_parameters,
            state.time.time,
            state.time.frequency,
            state.time.scale,
        )
    )
    _check_time(state.time)
    for vp in state.vps:
        _check_vp(vp)


def restore_reference_time(time: ReferenceTime, saved: ReferenceTimeState) -> None:
    """Put a checked state back."""
    scaling = TscScaling(saved.frequency, saved.scale, saved.offset) if saved.frequency else None
    time.restore(scaling, saved.sequence, saved.time)


def restore_vp(
    saved: VpState, assist_page: PageOverlay, synic: VpSynic, timers: Iterable[SyntheticTimer]
) -> None:
    """Put a checked state of one virtual processor back; its timers must be stopped.

    :meth:`Synic.restored <vmbus.hypervisor.synic.Synic.restored>` must follow once all processors are restored.
    """
    assist_page.restore(saved.assist_page, None)
    synic.scontrol = saved.scontrol
    synic.siefp.restore(saved.siefp.value, saved.siefp.last_gpn)
    synic.simp.restore(saved.simp.value, saved.simp.last_gpn)
    synic.sint_values = list(saved.sints)
    for queue in synic.queues:
        queue.clear()
    for message in saved.messages:
        synic.queues[message.sint].append(
            Message(message.message_type, message.payload, message.timer, message.expiration)
        )
    synic.deferred_events = set(saved.deferred_events)
    for timer, saved_timer in zip(timers, saved.timers, strict=True):
        timer.config = saved_timer.config
        timer.count = saved_timer.count
        timer.expiration = saved_timer.expiration


def _check_time(time: ReferenceTimeState) -> None:
    """Check that time can go on from here: by the clock, and by the formula with any TSC that a processor can have.

    The formula gave no time after ``time``, at a TSC that is not negative.
    """
    _require(0 <= time.sequence < 1 << 32, "saved-tsc-sequence")
    _require(time.time < MAX_TIME, "saved-time", f"{time.time}")
    _require(time.scale == (scale_for(time.frequency) if time.frequency else 0), "saved-tsc-scale")
    _require(bool(time.scale) == bool(time.frequency), "saved-tsc-frequency", f"{time.frequency} Hz")
    _require(-_LIMIT64 < time.offset <= time.time, "saved-tsc-offset", f"{time.offset} at {time.time}")


def _check_vp(vp: VpState) -> None:
    _require(len(vp.sints) == SINT_COUNT, "saved-sint-count", str(len(vp.sints)))
    for value in vp.sints:
        source = SINT.parse(value)
        _require(source.masked or source.vector >= MIN_VECTOR, "saved-sint-vector", f"{value:#x}")
    _require(len(vp.timers) == STIMER_COUNT, "saved-timer-count", str(len(vp.timers)))
    _require_u64((vp.assist_page, vp.scontrol, vp.siefp.value, vp.simp.value, *vp.sints))
    for timer in vp.timers:
        _require_u64((timer.config, timer.count))
    timers = []
    for message in vp.messages:
        _require(0 <= message.sint < SINT_COUNT, "saved-message-sint", str(message.sint))
        _require(len(message.payload) <= MESSAGE_PAYLOAD_MAX, "saved-message-size", str(len(message.payload)))
        _require(0 < message.message_type < 1 << 32, "saved-message-type", str(message.message_type))
        if message.timer is not None:
            _require(0 <= message.timer < STIMER_COUNT, "saved-message-timer", str(message.timer))
            _require(message.message_type == MessageType.TIMER_EXPIRED, "saved-message-type")
            _require_u64((message.expiration,))
            timers.append(message.timer)
    _require(len(timers) == len(set(timers)), "saved-message-timer", "a timer has two messages")
    _require(
        len(vp.messages) - len(timers) <= MAX_QUEUED_MESSAGES, "saved-message-count", str(len(vp.messages))
    )
    for sint, flag in vp.deferred_events:
        _require(0 <= sint < SINT_COUNT and 0 <= flag < EVENT_FLAG_COUNT, "saved-event", f"{sint}, {flag}")


def _require(condition: bool, reason: str, detail: str = "") -> None:
    if not condition:
        raise MalformedError(reason, detail)


def _require_u64(values: Iterable[int]) -> None:
    for value in values:
        _require(0 <= value < _LIMIT64, "saved-value", str(value))
