"""A scripted guest over fakes, for every test of the bus."""

from __future__ import annotations

import pytest
from vmbus.testing.scripted import ScriptedGuest

from tests.unit.bus.moving import Move


@pytest.fixture
def guest() -> ScriptedGuest:
    """Not connected; nothing is offered."""
    return ScriptedGuest.on_fakes()


@pytest.fixture
def move(guest: ScriptedGuest) -> Move:
    return Move(guest)
