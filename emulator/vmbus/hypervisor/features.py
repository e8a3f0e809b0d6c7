"""The Hyper-V features that are offered to the guest: one switch per feature.

Source: docs/protocol/discovery.md#privileges-and-features, docs/protocol/discovery.md#published-cpuid-values.

The switches control both the CPUID leaves (:mod:`vmbus.hypervisor.cpuid`) and which MSRs exist
(:mod:`vmbus.hypervisor.msrs`), so that the two cannot disagree. GUEST_OS_ID, HYPERCALL, VP_INDEX, VP_ASSIST_PAGE and
the SynIC registers are always offered: no guest finds the bus without them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmbus.wire.cpuid import HostVersion

_HOST_VERSION = HostVersion()


@dataclass(frozen=True, slots=True)
class Features:
    """The switches; the defaults give a reliable TSC, known frequencies, crash reports and no synthetic timers."""

    post_messages: bool = True
    signal_events: bool = True
    reference_counter: bool = True
    """TIME_REF_COUNT. Offer it only with ``reference_tsc``: otherwise Linux traps on every reading of its clock."""
    reference_tsc: bool = True
    invariant_tsc: bool = True
    """TSC_INVARIANT_CONTROL; without it Linux marks the TSC unstable and uses slower clocks."""
    frequency: bool = True
    crash: bool = True
    reset: bool = True
    vp_runtime: bool = False
    stimer: bool = False
    stimer_direct: bool = False
    sint_polling: bool = False
    """Announce the polling bit of SINTs; the bit works whether it is announced or not."""
    hypercall_lock: bool = False
    """Announce the lock bit of HYPERCALL; the bit works whether it is announced or not."""
    relaxed_timing: bool = True
    deprecate_auto_eoi: bool = True
    """Recommend that the guest does not use auto-EOI; a SINT with auto-EOI gets it all the same."""
    host_version: HostVersion = _HOST_VERSION
