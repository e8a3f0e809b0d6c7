"""A scripted guest over fakes, for every test of the bus."""

from __future__ import annotations

import pytest
from vmbus.testing.scripted import ScriptedGuest


@pytest.fixture
def guest() -> ScriptedGuest:
    """Not connected; nothing is offered."""
    return ScriptedGuest.on_fakes()
