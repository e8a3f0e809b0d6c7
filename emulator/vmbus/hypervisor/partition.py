"""The partition: CPUID, MSRs, hypercalls, SynIC and timers of one guest, as one object driven by traps.

Source: docs/protocol/discovery.md.

    GUEST_OS_ID   HYPERCALL        hypercalls
    -----------   ---------------  -----------------------------------------------------------------------
    0             0                #UD
    0             enable written   neither enable nor locked sticks (TLFS: identify yourself first); #UD
    id            0                #UD
    id            enable           served; the page was filled when it was enabled or moved
    id -> 0       any              enable is cleared, the page is not written any more
    any           locked           unchanged; writes of HYPERCALL raise #GP until reset

Registers of the partition (GUEST_OS_ID, HYPERCALL, REFERENCE_TSC, crash, TSC_INVARIANT_CONTROL) read the same on
every processor. HYPERCALL is the only one that refuses a page that is not RAM (#GP): the guest would execute an
address without memory.

    running ──pause──▶ paused ──save──▶ paused ──resume──▶ running          (also after a migration that failed)
    any ───────────restore─────────▶ paused ──resume──▶ running

While the partition is paused no message, event, timer or interrupt reaches the guest; traps are still answered.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable

from vmbus.errors import InternalError
from vmbus.hypervisor.crash import CONTROL_CAPABILITIES, CrashRegisters, CrashReport
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.guest_os import describe_guest_os
from vmbus.hypervisor.hypercalls import (
    HypercallRegisters,
    HypercallResult,
    Hypercalls,
    MessageHandler,
    UndefinedOpcode,
)
from vmbus.hypervisor.msrs import GeneralProtection, MsrTable
from vmbus.hypervisor.overlay import PageOverlay
from vmbus.hypervisor.reference_time import GuestClock, ReferenceTime
from vmbus.hypervisor.saved_state.restore import check_state, restore_reference_time, restore_vp
from vmbus.hypervisor.saved_state.values import (
    PartitionState,
    VpState,
    capture_reference_time,
    capture_vp,
)
from vmbus.hypervisor.stimer import SyntheticTimers
from vmbus.hypervisor.synic import Synic, SynicEvents
from vmbus.ports import PAGE_SIZE, GuestMemory, Interrupts, Timers
from vmbus.refusals import Refusals
from vmbus.wire.gateway import MSR_ADD_VCPU, ConstantMsr, DoorbellRule, PostRule
from vmbus.wire.hypercall import HYPERCALL_PAGE_CODE, HYPERCALL_PAGE_FILLER
from vmbus.wire.msr import (
    CRASH_PARAMETER_COUNT,
    HYPERCALL_PAGE,
    PAGE_REGISTER,
    SINT_COUNT,
    STIMER_COUNT,
    SYNIC_VERSION,
    Msr,
)

_logger = logging.getLogger(__name__)
_MASK64 = (1 << 64) - 1
_DEFAULT_FEATURES = Features()
_ENABLE = 1
_LOCKED = 2
_RESET = 1
_PAGE_IMAGE = HYPERCALL_PAGE_CODE.ljust(PAGE_SIZE, bytes((HYPERCALL_PAGE_FILLER,)))


class PartitionEvents(SynicEvents):
    """Notifications of a :class:`Partition`; override those of interest.

    They are called in the middle of a trap: return soon, and do not call back into the partition.
    """

    def guest_os_changed(self, os_id: int) -> None:
        """GUEST_OS_ID changed; 0: the guest shuts down its use of Hyper-V (kexec, crash, hibernation, reset)."""

    def crashed(self, report: CrashReport) -> None:
        """The guest reported a crash; it continues to run (to unload drivers, to write a dump)."""

    def reset_requested(self) -> None:
        """The guest wrote RESET, which asks for a reset of the machine."""


class Partition:
    """The hypervisor side of one guest. All calls are made from one thread; none of them blocks."""

    def __init__(
        self,
        *,
        vp_count: int,
        memory: GuestMemory,
        interrupts: Interrupts,
        clock: GuestClock,
        timers: Timers,
        features: Features = _DEFAULT_FEATURES,
        events: PartitionEvents | None = None,
        present: int | None = None,
    ) -> None:
        """``vp_count``: processors that can exist; ``present``: those that exist from the start, if not all do."""
        self.features = features
        self.vp_count = vp_count
        self.refusals = Refusals("partition", _logger)
        self._memory = memory
        self._clock = clock
        self._events = events or PartitionEvents()
        self.reference_time = ReferenceTime(clock)
        self.synic = Synic(
            vp_count, memory, interrupts, timers, self.reference_time, self._events, self.refusals
        )
        self.synthetic_timers = SyntheticTimers(
            vp_count,
            self.synic,
            interrupts,
            timers,
            self.reference_time,
            direct_offered=features.stimer_direct,
        )
        self.hypercalls = Hypercalls(memory, features, self.synic.event_ports, self.refusals)
        self.guest_os_id = 0
        self.hypercall_value = 0
        self.tsc_invariant_control = 0
        self.crash = CrashRegisters()
        self.reference_tsc = PageOverlay("REFERENCE_TSC", memory, self.refusals)
        self.assist_pages = [
            PageOverlay(f"VP_ASSIST_PAGE of VP {vp}", memory, self.refusals) for vp in range(vp_count)
        ]
        self._msrs = self._make_msr_table()
        self._present = vp_count if present is None else present
        self._power_on = self._capture_vps()[0]

    # --- traps ---

    def read_msr(self, vp: int, msr: int) -> int:
        """Handle RDMSR on ``vp``; return 64 bits. Raises :class:`GeneralProtection`."""
        self._check_vp(vp)
        try:
            return self._msrs.read(vp, msr)
        except GeneralProtection as fault:
            self.refusals.refuse(fault.reason, fault.detail)
            raise

    def write_msr(self, vp: int, msr: int, value: int) -> None:
        """Handle WRMSR of the 64-bit ``value`` on ``vp``. Raises :class:`GeneralProtection`."""
        self._check_vp(vp)
        try:
            self._msrs.write(vp, msr, value & _MASK64)
        except GeneralProtection as fault:
            self.refusals.refuse(fault.reason, fault.detail)
            raise

    def hypercall(self, vp: int, registers: HypercallRegisters) -> HypercallResult:
        """Handle VMCALL at CPL 0 on ``vp``. Raises :class:`UndefinedOpcode` while the hypercall page is not enabled.

        The caller calls the result's ``act_afterwards`` once the processor has the result.
        """
        self._check_vp(vp)
        if not self.hypercalls_enabled:
            self.refusals.refuse("hypercall-page-not-enabled", f"VP {vp}")
            raise UndefinedOpcode("hypercall-page-not-enabled", f"VP {vp}")
        return self.hypercalls.call(vp, registers)

    # --- for the owner ---

    @property
    def msr_numbers(self) -> tuple[int, ...]:
        """Numbers of the MSRs that exist with the features offered, in ascending order."""
        return self._msrs.numbers

    def connect_message_port(self, connection_id: int, handler: MessageHandler) -> None:
        """Let HvPostMessage on ``connection_id`` call ``handler(vp, connection_id, payload)``."""
        self.hypercalls.message_ports[connection_id] = handler

    def constant_msrs(self) -> tuple[ConstantMsr, ...]:
        """Return the MSRs that the gateway may read by itself. The clock is known."""
        found = [ConstantMsr(msr, value & _MASK64) for msr, value in self._msrs.constants().items()]
        return (ConstantMsr(Msr.VP_INDEX, 0, MSR_ADD_VCPU), *found)

    def doorbell_rules(self, first_connection: int, count: int) -> tuple[DoorbellRule, ...]:
        """Return which hypercalls the gateway answers by itself; their doorbells go to ``synic.ring_event_port``."""
        return self.hypercalls.doorbell_rules(first_connection, count)

    def post_rule(self, messages: Iterable[int]) -> PostRule:
        """Return what the gateway may post while :attr:`hypercalls_enabled`: ``messages``, and EOM in any case.

        What was posted goes to :meth:`posted_message` and to ``synic.end_of_message``.
        """
        return self.hypercalls.post_rule(messages, Msr.EOM)

    @property
    def hypercalls_enabled(self) -> bool:
        """Whether the guest has enabled the hypercall page: otherwise a hypercall raises #UD."""
        return bool(self.hypercall_value & _ENABLE)

    def posted_message(self) -> None:
        """Count an HvPostMessage that has succeeded already."""
        self.hypercalls.counters.messages += 1

    @property
    def reference_tsc_waits(self) -> bool:
        """Whether an enabled reference TSC page is invalid because the TSC was not known, and may be written now.

        The page belongs to whoever enabled it: a guest need not identify itself in GUEST_OS_ID before.
        """
        return (
            self.reference_tsc.pages is not None
            and self.reference_time.scaling is None
            and not self.synic.paused
        )

    def publish_reference_tsc(self) -> None:
        """Write the reference TSC page with a new sequence number; no effect while the guest has not enabled it."""
        if self.reference_tsc.pages is not None:
            self.reference_time.publish(self.reference_tsc.pages)

    def pause(self) -> None:
        """Let no message, event, timer or interrupt reach the guest until :meth:`resume`."""
        self.synic.pause()
        self.synthetic_timers.pause()

    def resume(self) -> None:
        """End :meth:`pause`: deliver what waits, and interrupt where flags or messages are present."""
        if self.reference_time.stale:
            self.publish_reference_tsc()
        self.synic.resume()
        self.synthetic_timers.resume()

    def reset(self) -> None:
        """Return to the power-on state, as a reset of the machine does. Ports and counters stay."""
        had_os = self.guest_os_id != 0
        self.guest_os_id = 0
        self.hypercall_value = 0
        self.tsc_invariant_control = 0
        self.crash = CrashRegisters()
        self.reference_tsc.reset()
        for page in self.assist_pages:
            page.reset()
        self.synthetic_timers.reset()
        self.synic.reset()
        self.reference_time.reset()
        if had_os:
            self._events.guest_os_changed(0)

    def save(self) -> PartitionState:
        """Return everything that is not guest RAM. The partition should be paused: otherwise the state may change."""
        return PartitionState(
            guest_os_id=self.guest_os_id,
            hypercall=self.hypercall_value,
            reference_tsc=self.reference_tsc.value,
            tsc_invariant_control=self.tsc_invariant_control,
            crash_parameters=tuple(self.crash.parameters),
            time=capture_reference_time(self.reference_time),
            vps=self._vps_in_use(),
        )

    def _capture_vps(self) -> tuple[VpState, ...]:
        return tuple(
            capture_vp(page, synic, timers)
            for page, synic, timers in zip(
                self.assist_pages, self.synic.vps, self.synthetic_timers.vps, strict=True
            )
        )

    def _vps_in_use(self) -> tuple[VpState, ...]:
        """Return the states of processors, up to the last that exists from the start or was used since.

        So the state of a guest without hot-added processors does not depend on how many could be added.
        """
        states = self._capture_vps()
        count = len(states)
        while count > self._present and states[count - 1] == self._power_on:
            count -= 1
        return states[:count]

    def check_state(self, state: PartitionState) -> None:
        """Raise :class:`~vmbus.errors.MalformedError` if :meth:`restore` would; change nothing."""
        check_state(state, self.vp_count)

    def restore(self, state: PartitionState, *, checked: bool = False) -> None:
        """Put a saved state back; guest memory is not touched. The partition is paused afterwards.

        ``checked``: :meth:`check_state` has accepted this very state. Raises
        :class:`~vmbus.errors.MalformedError`, before anything changes, for a state that this partition cannot have.
        """
        if not checked:
            check_state(state, self.vp_count)
        self.pause()
        self.guest_os_id = state.guest_os_id
        self.hypercall_value = state.hypercall
        self.tsc_invariant_control = state.tsc_invariant_control
        self.crash.parameters[:] = state.crash_parameters
        self.reference_tsc.restore(state.reference_tsc, None)
        restore_reference_time(self.reference_time, state.time)
        self.synthetic_timers.reset()
        absent = (self._power_on,) * (self.vp_count - len(state.vps))
        for vp, saved in enumerate(state.vps + absent):
            restore_vp(saved, self.assist_pages[vp], self.synic.vps[vp], self.synthetic_timers.vps[vp])
        self.synic.restored()
        self._events.guest_os_changed(self.guest_os_id)

    def status(self) -> dict[str, object]:
        """Return registers, timers and counters for ``vmbus status``, as values that JSON can represent."""
        hypercall = HYPERCALL_PAGE.parse(self.hypercall_value)
        time = self.reference_time
        counters = self.hypercalls.counters
        return {
            "guest_os": describe_guest_os(self.guest_os_id),
            "guest_os_id": f"{self.guest_os_id:#x}",
            "hypercall_page": {
                "enabled": hypercall.enable,
                "locked": hypercall.locked,
                "gpn": hypercall.gpn,
            },
            "reference_time": time.now(),
            "reference_tsc": {
                "enabled": self.reference_tsc.pages is not None,
                "sequence": time.sequence,
                "tsc_frequency": time.scaling.frequency if time.scaling else None,
            },
            "vps": [
                {**synic.status(), "timers": self.synthetic_timers.status(synic.index)}
                for synic in self.synic.vps[: len(self._vps_in_use())]
            ],
            "counters": {
                **dataclasses.asdict(self.synic.counters),
                "messages_posted": counters.messages,
                "events_posted": counters.events,
                "hypercall_failures": {f"{code:#x}": count for code, count in counters.statuses.items()},
            },
            "refusals": dict(self.refusals.counts),
        }

    # --- the MSRs ---

    def _make_msr_table(self) -> MsrTable:
        table = MsrTable()
        features = self.features
        clock = self._clock
        table.add(Msr.GUEST_OS_ID, lambda vp: self.guest_os_id, self._write_guest_os_id)
        table.add(Msr.HYPERCALL, lambda vp: self.hypercall_value, self._write_hypercall)
        table.add(Msr.VP_INDEX, lambda vp: vp)
        table.add(Msr.VP_ASSIST_PAGE, lambda vp: self.assist_pages[vp].value, self._write_assist_page)
        if features.reset:
            table.add(Msr.RESET, lambda vp: 0, self._write_reset)
        if features.vp_runtime:  # the processors are not shared with other partitions: they run all the time
            table.add(Msr.VP_RUNTIME, lambda vp: self.reference_time.now())
        if features.reference_counter:
            table.add(Msr.TIME_REF_COUNT, lambda vp: self.reference_time.now() & _MASK64)
        if features.reference_tsc:
            table.add(Msr.REFERENCE_TSC, lambda vp: self.reference_tsc.value, self._write_reference_tsc)
        if features.frequency:
            table.add_constant(Msr.TSC_FREQUENCY, lambda vp: clock.tsc_frequency)
            table.add_constant(Msr.APIC_FREQUENCY, lambda vp: clock.apic_frequency)
        if features.invariant_tsc:
            table.add(
                Msr.TSC_INVARIANT_CONTROL, lambda vp: self.tsc_invariant_control, self._write_tsc_invariant
            )
        if features.crash:
            self._add_crash_msrs(table)
        self._add_synic_msrs(table)
        if features.stimer:
            self._add_timer_msrs(table)
        return table

    def _add_synic_msrs(self, table: MsrTable) -> None:
        synic = self.synic
        vps = synic.vps
        table.add(Msr.SCONTROL, lambda vp: vps[vp].scontrol, synic.write_scontrol)
        table.add_constant(Msr.SVERSION, lambda vp: SYNIC_VERSION)
        table.add(Msr.SIEFP, lambda vp: vps[vp].siefp.value, synic.write_siefp)
        table.add(Msr.SIMP, lambda vp: vps[vp].simp.value, synic.write_simp)
        table.add(Msr.EOM, lambda vp: 0, lambda vp, value: synic.end_of_message(vp))
        for number in range(SINT_COUNT):

            def read(vp: int, sint: int = number) -> int:
                return vps[vp].sint_values[sint]

            def write(vp: int, value: int, sint: int = number) -> None:
                synic.write_sint(vp, sint, value)

            table.add(Msr.SINT0 + number, read, write)

    def _add_timer_msrs(self, table: MsrTable) -> None:
        timers = self.synthetic_timers
        for number in range(STIMER_COUNT):

            def read_config(vp: int, index: int = number) -> int:
                return timers.vps[vp][index].config

            def write_config(vp: int, value: int, index: int = number) -> None:
                timers.write_config(vp, index, value)

            def read_count(vp: int, index: int = number) -> int:
                return timers.vps[vp][index].count

            def write_count(vp: int, value: int, index: int = number) -> None:
                timers.write_count(vp, index, value)

            table.add(Msr.STIMER0_CONFIG + 2 * number, read_config, write_config)
            table.add(Msr.STIMER0_COUNT + 2 * number, read_count, write_count)

    def _add_crash_msrs(self, table: MsrTable) -> None:
        for number in range(CRASH_PARAMETER_COUNT):

            def read(vp: int, index: int = number) -> int:
                return self.crash.parameters[index]

            def write(vp: int, value: int, index: int = number) -> None:
                self.crash.parameters[index] = value

            table.add(Msr.CRASH_P0 + number, read, write)
        table.add(Msr.CRASH_CTL, lambda vp: CONTROL_CAPABILITIES, self._write_crash_control)

    def _write_guest_os_id(self, vp: int, value: int) -> None:
        self.guest_os_id = value
        if value == 0 and not self.hypercall_value & _LOCKED:
            self.hypercall_value &= ~_ENABLE
        self._events.guest_os_changed(value)
        _logger.debug("guest OS: %s (%#x)", describe_guest_os(value), value)

    def _write_hypercall(self, vp: int, value: int) -> None:
        if self.hypercall_value & _LOCKED:
            raise GeneralProtection("hypercall-msr-locked", f"write of {value:#x}")
        if self.guest_os_id == 0:
            value &= ~(_ENABLE | _LOCKED)
        before, after = HYPERCALL_PAGE.parse(self.hypercall_value), HYPERCALL_PAGE.parse(value)
        if after.enable and not (before.enable and before.gpn == after.gpn):
            gpa = after.gpn * PAGE_SIZE
            if not self._memory.is_ram(gpa, PAGE_SIZE):
                raise GeneralProtection("hypercall-page-not-ram", f"{gpa:#x}")
            self._memory.write_code(gpa, _PAGE_IMAGE)
        self.hypercall_value = value

    def _write_assist_page(self, vp: int, value: int) -> None:
        if PAGE_REGISTER.parse(value).reserved:
            raise GeneralProtection("assist-page-reserved", f"{value:#x}")
        self.assist_pages[vp].write(value)

    def _write_reset(self, vp: int, value: int) -> None:
        if value & _RESET:
            _logger.debug("the guest requested a reset")
            self._events.reset_requested()

    def _write_reference_tsc(self, vp: int, value: int) -> None:
        self.reference_tsc.write(value)
        self.publish_reference_tsc()

    def _write_tsc_invariant(self, vp: int, value: int) -> None:
        if value & ~_ENABLE:
            raise GeneralProtection("tsc-invariant-reserved", f"{value:#x}")
        self.tsc_invariant_control = value

    def _write_crash_control(self, vp: int, value: int) -> None:
        report = self.crash.write_control(value, self._memory, self.refusals)
        if report is not None:
            self._events.crashed(report)

    def _check_vp(self, vp: int) -> None:
        if not 0 <= vp < self.vp_count:
            raise InternalError(f"VP {vp} does not exist: the partition has {self.vp_count}")
