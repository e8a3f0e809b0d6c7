"""Exceptions that a trapped instruction may raise in the guest instead of being answered."""

from __future__ import annotations

from vmbus.errors import GuestError


class GuestFault(GuestError):
    """The instruction faults; ``reason`` is a stable name, and is counted where the fault is raised."""


class GeneralProtection(GuestFault):
    """Inject #GP: an MSR that is not offered, not writable, or a value that it does not take."""


class UndefinedOpcode(GuestFault):
    """Inject #UD: a hypercall although the hypercall page is not enabled."""
