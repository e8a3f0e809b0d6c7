"""The hypervisor that a guest sees: CPUID, MSRs, hypercalls, SynIC, synthetic timers, reference time.

Source: docs/protocol/discovery.md.

A pure state machine: :class:`~vmbus.hypervisor.partition.Partition` is given guest memory, interrupts, a clock
and timers (:mod:`vmbus.ports`) and is driven by traps. It depends neither on QEMU nor on VMBus.
"""

from vmbus.hypervisor.cpuid import CpuidLeaf, cpuid_table
from vmbus.hypervisor.crash import CrashReport
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.guest_os import describe_guest_os
from vmbus.hypervisor.hypercalls import HypercallRegisters, UndefinedOpcode
from vmbus.hypervisor.msrs import GeneralProtection
from vmbus.hypervisor.partition import Partition, PartitionEvents
from vmbus.hypervisor.reference_time import GuestClock
from vmbus.hypervisor.saved_state.values import PartitionState

__all__ = [
    "CpuidLeaf",
    "CrashReport",
    "Features",
    "GeneralProtection",
    "GuestClock",
    "HypercallRegisters",
    "Partition",
    "PartitionEvents",
    "PartitionState",
    "UndefinedOpcode",
    "cpuid_table",
    "describe_guest_os",
]
