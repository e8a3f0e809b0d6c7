"""A guest's trap, as the gateway passes it, and its possible results."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from vmbus.wire.gateway import TrapKind


class Fault(Enum):
    """The fault of a trap in the guest: #GP for MSRs, #UD for VMCALL."""

    GP = "general protection"
    UD = "undefined opcode"


class Trap(NamedTuple):
    """One instruction that waits for an answer; registers as they were before it.

    In code that is not 64-bit the upper halves and ``r8`` are 0. ``tsc``: the host's TSC at the first trap.
    """

    vcpu: int
    slot: int
    sequence: int
    kind: TrapKind
    long_mode: bool
    tsc: int
    pc: int
    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    r8: int
    rsp: int

    @property
    def msr(self) -> int:
        """Number of the MSR (RDMSR, WRMSR)."""
        return self.rcx & 0xFFFFFFFF

    @property
    def msr_value(self) -> int:
        """The value that WRMSR writes."""
        return (self.rdx & 0xFFFFFFFF) << 32 | self.rax & 0xFFFFFFFF

    @property
    def identity(self) -> tuple[int, ...]:
        """A key that is equal for a trap and for its repetition in another QEMU after a migration."""
        return (self.vcpu, int(self.kind), *self[6:])


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """An answer, and the request that it is for: the slot's place among all slots, and its sequence number."""

    place: int
    sequence: int
    verdict: int
    value: int


class Unclaimed(NamedTuple):
    """An answer that its vCPU has not fetched, for a migration."""

    identity: tuple[int, ...]
    verdict: int
    value: int
