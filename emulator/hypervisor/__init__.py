"""What a guest sees of Hyper-V: CPUID, MSRs, hypercalls, SynIC, reference time (spec/vmbus.md 1 to 4).

A pure state machine: :class:`~emulator.hypervisor.partition.Partition` is given guest memory, interrupts, a clock
and timers (:mod:`emulator.ports`) and is driven by traps. It knows neither QEMU nor VMBus.
"""

from emulator.hypervisor.cpuid import CpuidLeaf, cpuid_table
from emulator.hypervisor.crash import CrashReport
from emulator.hypervisor.events import PartitionEvents
from emulator.hypervisor.faults import GeneralProtection, GuestFault, UndefinedOpcode
from emulator.hypervisor.features import Features
from emulator.hypervisor.guest_os import describe_guest_os
from emulator.hypervisor.hypercalls import HypercallRegisters
from emulator.hypervisor.partition import Partition
from emulator.hypervisor.reference_time import GuestClock
from emulator.hypervisor.state import PartitionState

__all__ = [
    "CpuidLeaf",
    "CrashReport",
    "Features",
    "GeneralProtection",
    "GuestClock",
    "GuestFault",
    "HypercallRegisters",
    "Partition",
    "PartitionEvents",
    "PartitionState",
    "UndefinedOpcode",
    "cpuid_table",
    "describe_guest_os",
]
