from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from vmbus.machine.journal.recorder import RecordedParts, Recorder
from vmbus.machine.journal.store import Journal

from tests.unit.machine.test_host_state import host

MEMORY = 1 << 20


@pytest.fixture
async def recorded(tmp_path: Path) -> AsyncIterator[tuple[mmap.mmap, Journal, Recorder]]:
    """The journal of a host with an echo device, and who writes it."""
    memory = mmap.mmap(-1, MEMORY)
    journal = Journal.create(memory)
    gateway = SimpleNamespace(posts=SimpleNamespace(tail=7, hold=False, release=lambda: None), resets=3)
    gateway.carried = list
    with host(tmp_path, "echo") as made:
        parts = RecordedParts(made.partition, made.bus, made.clock, gateway, made.state)  # type: ignore[arg-type]
        recorder = Recorder(
            asyncio.get_running_loop(),
            journal,
            parts,
            broken=lambda error: pytest.fail(str(error)),
            full=lambda why: None,
        )
        recorder.begin()
        yield memory, journal, recorder
