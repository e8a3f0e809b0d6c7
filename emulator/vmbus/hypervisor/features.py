"""What of Hyper-V is offered to the guest: one switch a feature.

Source: docs/protocol/discovery.md#privileges-and-features, docs/protocol/discovery.md#published-cpuid-values.

The switches rule both what CPUID says (:mod:`vmbus.hypervisor.cpuid`) and which MSRs exist
(:mod:`vmbus.hypervisor.msrs`), so that the two cannot disagree. Always offered, because no guest finds the
bus without them: GUEST_OS_ID, HYPERCALL, VP_INDEX, VP_ASSIST_PAGE and the SynIC registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmbus.wire.cpuid import HostVersion

_HOST_VERSION = HostVersion()


@dataclass(frozen=True, slots=True)
class Features:
    """The defaults give a guest with a reliable TSC, known frequencies, crash reports and no synthetic timers."""

    post_messages: bool = True
    signal_events: bool = True
    reference_counter: bool = True
    """TIME_REF_COUNT. Never without ``reference_tsc``: Linux would trap on every reading of its clock."""
    reference_tsc: bool = True
    invariant_tsc: bool = True
    """TSC_INVARIANT_CONTROL; without it Linux calls the TSC unstable and falls back to slower clocks."""
    frequency: bool = True
    crash: bool = True
    reset: bool = True
    vp_runtime: bool = False
    stimer: bool = False
    stimer_direct: bool = False
    sint_polling: bool = False
    """Says that the polling bit of a SINT works; it always does."""
    hypercall_lock: bool = False
    """Says that HYPERCALL has a lock bit; it always has."""
    relaxed_timing: bool = True
    deprecate_auto_eoi: bool = True
    """The guest is asked to end interrupts itself; those that ask for auto-EOI get it all the same."""
    host_version: HostVersion = _HOST_VERSION
