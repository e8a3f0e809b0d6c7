"""The state of a partition as plain values, and how they are captured.

Source: docs/protocol/saving.md#hypervisor-state, docs/conformance.md#row-55.

    live objects --capture_*()--> values (here) --layout--> bytes --layout--> values --restore--> live objects

No value refers to a live object. Guest pages (message slots, event flags, hypercall page, reference TSC page) are not
part of the state: they are guest RAM and are transferred with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmbus.hypervisor.overlay import PageOverlay
from vmbus.hypervisor.reference_time import ReferenceTime
from vmbus.hypervisor.stimer import SyntheticTimer
from vmbus.hypervisor.vp_synic import VpSynic


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A message that is not in its slot yet, in the order of its queue; a timer message has no payload.

    ``expiration``: of a timer message, in units of 100 ns of reference time.
    """

    sint: int
    message_type: int
    payload: bytes
    timer: int | None = None
    expiration: int = 0


@dataclass(frozen=True, slots=True)
class TimerState:
    """One synthetic timer; ``expiration`` is reference time in units of 100 ns, None if the timer does not run."""

    config: int
    count: int
    expiration: int | None


@dataclass(frozen=True, slots=True)
class PageState:
    """A page register (SIMP, SIEFP), and the number of the page that was enabled last."""

    value: int = 0
    last_gpn: int | None = None


@dataclass(frozen=True, slots=True)
class VpState:
    """One virtual processor; ``deferred_events`` are (SINT, flag) signalled while the partition was paused."""

    assist_page: int
    scontrol: int
    siefp: PageState
    simp: PageState
    sints: tuple[int, ...]
    messages: tuple[QueuedMessage, ...]
    timers: tuple[TimerState, ...]
    deferred_events: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ReferenceTimeState:
    """Reference time and the constants of the reference TSC page.

    ``time``: reference time at the save, in units of 100 ns. ``frequency``: of the TSC, in Hz; 0 if reference time
    did not follow the TSC, and then ``scale`` and ``offset`` are 0 as well.
    """

    time: int
    sequence: int
    frequency: int = 0
    scale: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PartitionState:
    """The whole state of a partition that is not guest RAM."""

    guest_os_id: int
    hypercall: int
    reference_tsc: int
    tsc_invariant_control: int
    crash_parameters: tuple[int, ...]
    time: ReferenceTimeState
    vps: tuple[VpState, ...]


def capture_reference_time(time: ReferenceTime) -> ReferenceTimeState:
    """Capture reference time and the constants that were published last."""
    scaling = time.scaling
    return ReferenceTimeState(
        time=time.now(),
        sequence=time.sequence,
        frequency=scaling.frequency if scaling else 0,
        scale=scaling.scale if scaling else 0,
        offset=scaling.offset if scaling else 0,
    )


def capture_vp(assist_page: PageOverlay, synic: VpSynic, timers: Iterable[SyntheticTimer]) -> VpState:
    """Capture one virtual processor."""
    return VpState(
        assist_page=assist_page.value,
        scontrol=synic.scontrol,
        siefp=_capture_page(synic.siefp),
        simp=_capture_page(synic.simp),
        sints=tuple(synic.sint_values),
        messages=tuple(
            QueuedMessage(sint, int(message.message_type), message.payload, message.timer, message.expiration)
            for sint, queue in enumerate(synic.queues)
            for message in queue
        ),
        timers=tuple(TimerState(timer.config, timer.count, timer.expiration) for timer in timers),
        deferred_events=tuple(sorted(synic.deferred_events)),
    )


def _capture_page(page: PageOverlay) -> PageState:
    return PageState(page.value, page.last_gpn)
