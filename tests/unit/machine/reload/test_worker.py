"""The start of a worker: where it fails there is one sentence, and nothing of the worker stays."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from vmbus.machine.reload.link import ReloadFailed
from vmbus.machine.reload.worker import Worker, named_program

from tests.unit.machine.reload.no_descriptors import no_descriptors

PROGRAM = [sys.executable, "-c", "import time; time.sleep(600)"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def has_child() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG) is not None
    except ChildProcessError:
        return False


@pytest.mark.parametrize("left", range(10))
async def test_a_process_without_descriptors_starts_no_worker_and_says_so(left: int) -> None:
    """At whichever step they run out."""
    before = descriptors()
    worker: Worker | None = None
    why = ""
    with no_descriptors(left):
        try:
            worker = Worker.start(PROGRAM)
        except ReloadFailed as error:
            why = str(error)
    if worker is not None:  # there were enough
        await worker.close()
    else:
        assert why == f"{sys.executable} cannot be started: Too many open files"
    assert (worker is None) or left >= 5
    assert descriptors() == before
    assert not has_child()


async def test_a_worker_that_cannot_be_followed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", full, raising=False)
    with pytest.raises(ReloadFailed, match="cannot be started: No space left on device"):
        Worker.start(PROGRAM)
    assert descriptors() == before
    assert not has_child()


def test_a_name_that_the_system_does_not_take_is_refused() -> None:
    with pytest.raises(ReloadFailed, match="cannot be started: File name too long"):
        named_program(Path("/" + "x" * 300))
