"""What a guest sees of Hyper-V: CPUID, MSRs, hypercalls, SynIC, reference time.

Source: docs/protocol/discovery.md.

A pure state machine: :class:`~vmbus.hypervisor.partition.Partition` is given guest memory, interrupts, a clock
and timers (:mod:`vmbus.ports`) and is driven by traps. It knows neither QEMU nor VMBus.
"""

from vmbus.hypervisor.cpuid import CpuidLeaf, cpuid_table
from vmbus.hypervisor.crash import CrashReport
from vmbus.hypervisor.events import PartitionEvents
from vmbus.hypervisor.faults import GeneralProtection, GuestFault, UndefinedOpcode
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.guest_os import describe_guest_os
from vmbus.hypervisor.hypercalls import HypercallRegisters
from vmbus.hypervisor.partition import Partition
from vmbus.hypervisor.reference_time import GuestClock
from vmbus.hypervisor.saved_state.values import PartitionState

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
