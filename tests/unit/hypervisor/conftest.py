from __future__ import annotations

import pytest

from tests.unit.hypervisor.scripted_guest import ScriptedGuest


@pytest.fixture
def guest() -> ScriptedGuest:
    """One processor, nothing set up."""
    return ScriptedGuest()


@pytest.fixture
def running() -> ScriptedGuest:
    """Two processors, hypercall page and SynIC (SINT2) set up on both."""
    guest = ScriptedGuest(vps=2)
    guest.enable_hypercalls()
    guest.enable_synic(0)
    guest.enable_synic(1)
    guest.vectors()
    return guest
