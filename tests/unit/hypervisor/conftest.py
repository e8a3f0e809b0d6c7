from __future__ import annotations

import pytest

from tests.unit.hypervisor.scripted_guest import ScriptedGuest


@pytest.fixture
def guest() -> ScriptedGuest:
    """Return a guest with one processor that has set up nothing."""
    return ScriptedGuest()


@pytest.fixture
def running() -> ScriptedGuest:
    """Return a guest with two processors that has set up the hypercall page and SINT2 on both."""
    guest = ScriptedGuest(vps=2)
    guest.enable_hypercalls()
    guest.enable_synic(0)
    guest.enable_synic(1)
    guest.vectors()
    return guest
