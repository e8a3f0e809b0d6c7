"""The table of synthetic MSRs: which exist for the features offered, and what reads and writes them.

Source: docs/protocol/discovery.md#synthetic-msrs.

An access to an MSR that is not in the table raises #GP, and so does a write of a read-only one. Not offered at all,
because they would need the local APIC or have no use in a guest of this emulator: EOI, ICR, TPR (0x40000070 to 72),
SIRBP, GUEST_IDLE, statistics, debug, re-enlightenment and nested MSRs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmbus.errors import GuestError


class GeneralProtection(GuestError):
    """#GP, to be injected into the guest: an MSR that is not offered or not writable, or a value it does not accept.

    :class:`~vmbus.hypervisor.partition.Partition` counts it by ``reason`` before it leaves the partition.
    """


@dataclass(frozen=True, slots=True)
class Register:
    """``read(vp)`` and ``write(vp, value)``; an access that is None raises #GP.

    ``constant``: each processor reads the same value at any time, so somebody else may read it for the partition.
    """

    read: Callable[[int], int] | None
    write: Callable[[int, int], None] | None = None
    constant: bool = False


class MsrTable:
    """MSR number -> :class:`Register`."""

    def __init__(self) -> None:
        self._registers: dict[int, Register] = {}

    def add(
        self, msr: int, read: Callable[[int], int] | None, write: Callable[[int, int], None] | None = None
    ) -> None:
        """Add ``msr`` to the table."""
        self._registers[msr] = Register(read, write)

    def add_constant(self, msr: int, read: Callable[[int], int]) -> None:
        """Add a read-only ``msr`` that has the same value on every processor as long as the guest runs."""
        self._registers[msr] = Register(read, constant=True)

    def constants(self) -> dict[int, int]:
        """Return the values of the constant MSRs, without those that are 0: these may not be known yet."""
        found = {
            msr: register.read(0)
            for msr, register in self._registers.items()
            if register.constant and register.read is not None
        }
        return {msr: value for msr, value in found.items() if value}

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the MSRs in the table, in ascending order."""
        return tuple(sorted(self._registers))

    def read(self, vp: int, msr: int) -> int:
        """Read ``msr`` on ``vp``. Raises :class:`GeneralProtection` if it does not exist or cannot be read."""
        register = self._registers.get(msr)
        if register is None:
            raise GeneralProtection("msr-not-offered", f"read of {msr:#x} on VP {vp}")
        if register.read is None:
            raise GeneralProtection("msr-write-only", f"read of {msr:#x} on VP {vp}")
        return register.read(vp)

    def write(self, vp: int, msr: int, value: int) -> None:
        """Write ``msr`` on ``vp``.

        Raises :class:`GeneralProtection` if it does not exist, is read-only or does not accept ``value``.
        """
        register = self._registers.get(msr)
        if register is None:
            raise GeneralProtection("msr-not-offered", f"write of {msr:#x} on VP {vp}")
        if register.write is None:
            raise GeneralProtection("msr-read-only", f"write of {msr:#x} on VP {vp}")
        register.write(vp, value)
