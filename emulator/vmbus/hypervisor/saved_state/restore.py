"""A partition as records (:mod:`vmbus.hypervisor.saved_state.values`), back again, and as a status for people.

Importing touches no guest memory: pages that SIMP and SIEFP name hold messages and flags that the guest has yet
to see, so they are not zeroed, and queued messages stay behind them (docs/conformance.md#row-55).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vmbus.errors import MalformedError
from vmbus.hypervisor.guest_os import describe_guest_os
from vmbus.hypervisor.messages import Message
from vmbus.hypervisor.overlay import PageOverlay
from vmbus.hypervisor.reference_time import TscScaling
from vmbus.hypervisor.saved_state.values import (
    PageState,
    PartitionState,
    QueuedMessage,
    ReferenceTimeState,
    TimerState,
    VpState,
)
from vmbus.hypervisor.synic import FIRST_VECTOR, QUEUE_LIMIT
from vmbus.wire.msr import CRASH_PARAMETER_COUNT, HYPERCALL_PAGE, SINT, SINT_COUNT, STIMER_COUNT
from vmbus.wire.synic import EVENT_FLAG_COUNT, MESSAGE_PAYLOAD_MAX, MessageType

if TYPE_CHECKING:
    from vmbus.hypervisor.partition import Partition

_LIMIT64 = 1 << 64


def export_partition(partition: Partition) -> PartitionState:
    """See :meth:`Partition.export_state`."""
    time = partition.reference_time
    scaling = time.scaling
    return PartitionState(
        guest_os_id=partition.guest_os_id,
        hypercall=partition.hypercall_value,
        reference_tsc=partition.reference_tsc.value,
        tsc_invariant_control=partition.tsc_invariant_control,
        crash_parameters=tuple(partition.crash.parameters),
        time=ReferenceTimeState(
            time=time.now(),
            sequence=time.sequence,
            frequency=scaling.frequency if scaling else 0,
            scale=scaling.scale if scaling else 0,
            offset=scaling.offset if scaling else 0,
        ),
        vps=tuple(_export_vp(partition, vp) for vp in range(partition.vp_count)),
    )


def _export_vp(partition: Partition, vp: int) -> VpState:
    synic = partition.synic.vps[vp]
    return VpState(
        assist_page=partition.assist_pages[vp].value,
        scontrol=synic.scontrol,
        siefp=_export_page(synic.siefp),
        simp=_export_page(synic.simp),
        sints=tuple(synic.sint_values),
        messages=tuple(
            QueuedMessage(sint, int(message.message_type), message.payload, message.timer, message.expiration)
            for sint, queue in enumerate(synic.queues)
            for message in queue
        ),
        timers=tuple(
            TimerState(timer.config, timer.count, timer.expiration)
            for timer in partition.synthetic_timers.vps[vp]
        ),
        owed_events=tuple(sorted(synic.owed_events)),
    )


def _export_page(page: PageOverlay) -> PageState:
    return PageState(page.value, page.last_gpn)


def check(state: PartitionState, vp_count: int) -> None:
    """Raises :class:`MalformedError` for a state that no partition of ``vp_count`` processors can have."""
    _require(len(state.vps) == vp_count, "saved-vp-count", f"{len(state.vps)} saved, {vp_count} here")
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
    _require(0 <= state.time.sequence < 1 << 32, "saved-tsc-sequence")
    _require(-_LIMIT64 < state.time.offset < _LIMIT64, "saved-tsc-offset")
    for vp in state.vps:
        _check_vp(vp)


def _check_vp(vp: VpState) -> None:
    _require(len(vp.sints) == SINT_COUNT, "saved-sint-count", str(len(vp.sints)))
    for value in vp.sints:
        source = SINT.parse(value)
        _require(source.masked or source.vector >= FIRST_VECTOR, "saved-sint-vector", f"{value:#x}")
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
    _require(len(vp.messages) - len(timers) <= QUEUE_LIMIT, "saved-message-count", str(len(vp.messages)))
    for sint, flag in vp.owed_events:
        _require(0 <= sint < SINT_COUNT and 0 <= flag < EVENT_FLAG_COUNT, "saved-event", f"{sint}, {flag}")


def _require(condition: bool, reason: str, detail: str = "") -> None:
    if not condition:
        raise MalformedError(reason, detail)


def _require_u64(values: Iterable[int]) -> None:
    for value in values:
        _require(0 <= value < _LIMIT64, "saved-value", str(value))


def import_partition(partition: Partition, state: PartitionState) -> None:
    """See :meth:`Partition.import_state`; ``state`` is checked and the partition paused."""
    partition.guest_os_id = state.guest_os_id
    partition.hypercall_value = state.hypercall
    partition.tsc_invariant_control = state.tsc_invariant_control
    partition.crash.parameters[:] = state.crash_parameters
    partition.reference_tsc.restore(state.reference_tsc, None)
    scaling = None
    if state.time.frequency:
        scaling = TscScaling(state.time.frequency, state.time.scale, state.time.offset)
    partition.reference_time.restore(scaling, state.time.sequence, state.time.time)
    partition.synthetic_timers.reset()
    for vp, saved in enumerate(state.vps):
        partition.assist_pages[vp].restore(saved.assist_page, None)
        synic = partition.synic.vps[vp]
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
        synic.owed_events = set(saved.owed_events)
        for timer, saved_timer in zip(partition.synthetic_timers.vps[vp], saved.timers, strict=True):
            timer.config = saved_timer.config
            timer.count = saved_timer.count
            timer.expiration = saved_timer.expiration
    partition.synic.restored()


def status(partition: Partition) -> dict[str, object]:
    """See :meth:`Partition.status`."""
    hypercall = HYPERCALL_PAGE.parse(partition.hypercall_value)
    time = partition.reference_time
    return {
        "guest_os": describe_guest_os(partition.guest_os_id),
        "guest_os_id": f"{partition.guest_os_id:#x}",
        "hypercall_page": {"enabled": hypercall.enable, "locked": hypercall.locked, "gpn": hypercall.gpn},
        "reference_time": time.now(),
        "reference_tsc": {
            "enabled": partition.reference_tsc.pages is not None,
            "sequence": time.sequence,
            "tsc_frequency": time.scaling.frequency if time.scaling else None,
        },
        "vps": [_vp_status(partition, vp) for vp in range(partition.vp_count)],
        "counters": {
            **dataclasses.asdict(partition.synic.counters),
            "messages_posted": partition.hypercalls.counters.messages,
            "events_posted": partition.hypercalls.counters.events,
            "hypercall_failures": {
                f"{code:#x}": count for code, count in partition.hypercalls.counters.statuses.items()
            },
        },
        "refusals": dict(partition.refusals.counts),
    }


def _vp_status(partition: Partition, vp: int) -> dict[str, object]:
    synic = partition.synic.vps[vp]
    return {
        "synic_enabled": synic.enabled,
        "message_page": _page_status(synic.simp),
        "event_page": _page_status(synic.siefp),
        "sints": {
            str(number): {
                "vector": sint.vector,
                "auto_eoi": sint.auto_eoi,
                "polling": sint.polling,
                "queued": len(synic.queues[number]),
            }
            for number, sint in enumerate(synic.sints)
            if not sint.masked or synic.queues[number]
        },
        "timers": {
            str(timer.index): {"expiration": timer.expiration, "expired": timer.expired}
            for timer in partition.synthetic_timers.vps[vp]
            if timer.expiration is not None or timer.expired
        },
    }


def _page_status(page: PageOverlay) -> int | None:
    """The page's number while it is in use."""
    return page.last_gpn if page.pages is not None else None
