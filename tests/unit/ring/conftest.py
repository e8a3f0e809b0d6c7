"""A device that records, and a guest that has its channel open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vmbus.testing.loopback import (
    LoopbackGuest,
)

from tests.unit.ring.recorder import Recorder


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def guest(device: Recorder) -> Iterator[LoopbackGuest]:
    with LoopbackGuest(device) as guest:
        yield guest
