"""What a partition tells its owner."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from vmbus.hypervisor.crash import CrashReport


class PartitionEvents:
    """Override what is of interest. Called in the middle of a trap: return soon, do not call back into it."""

    def guest_os_changed(self, os_id: int) -> None:
        """GUEST_OS_ID was written; 0: the guest leaves (kexec, crash, hibernation)."""

    def crashed(self, report: CrashReport) -> None:
        """The guest reported a crash; it goes on running (unload, dump)."""

    def reset_requested(self) -> None:
        """The guest wrote RESET: the machine is to be reset."""

    def synic_changed(self, vp: int) -> None:
        """SCONTROL, SIMP, SIEFP or a SINT of ``vp`` was written."""

    def auto_eoi_changed(self, vp: int, vectors: AbstractSet[int]) -> None:
        """From now on these are the vectors of ``vp`` that the local APIC has to end by itself."""
