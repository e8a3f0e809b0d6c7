"""The process that keeps a guest: what a worker asks for and cannot be done is refused, and the guest is served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.errors import InternalError, UserError
from vmbus.machine.host import ExitReason
from vmbus.machine.reload.keeper import Keeper, Kept, Serving
from vmbus.machine.reload.link import Link, ReloadFailed
from vmbus.machine.reload.worker import Worker

from tests.unit.machine.reload.no_descriptors import no_descriptors


class Machines:
    """QEMUs that cannot be started, nor ended, because of ``error``."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def open_machine(self, *, share_memory: bool) -> Any:
        raise self.error

    async def take_machine(self) -> None:
        raise self.error

    async def discard_machine(self) -> None:
        raise self.error


class Following:
    """The next worker, a process that the keeper has started."""

    def __init__(self) -> None:
        self.process = SimpleNamespace(pid=7)
        ours, self.theirs = socket.socketpair()
        self.link = Link(ours, "the next worker")
        self.closed = False

    async def close(self) -> str:
        self.closed = True
        self.link.close()
        self.theirs.close()
        return "process 7 ended"


class Keeping:
    """A keeper whose guest is served by a worker; ``there`` is the worker's end."""

    def __init__(self, error: Exception) -> None:
        here, there = socket.socketpair()
        self.there = Link(there, "the keeper")
        self.served = SimpleNamespace(machines=Machines(error))
        self.keeper = Keeper(cast("Serving", self.served))
        self.worker = SimpleNamespace(
            keeper=Link(here, "the worker"), ended=self._ended, close=self._ended, program=("vmbus",)
        )
        self.keeper._worker = cast("Worker", self.worker)
        self.exit_reason = asyncio.ensure_future(self.keeper.exit_reason())

    async def _ended(self) -> str:
        return "process 6 ended"

    async def refusal(self, kind: str, **values: object) -> str:
        """Ask for something; return the reason of the refusal."""
        await self.there.tell(kind, values)
        with pytest.raises(ReloadFailed) as found:
            await self.there.hear("done", "started")
        assert not self.exit_reason.done()
        return str(found.value)

    async def end(self) -> None:
        """End the service as a worker does, which the keeper has to hear."""
        await self.there.tell("ended", {"reason": ExitReason.POWERED_OFF.value})
        self.there.close()
        async with asyncio.timeout(30):
            assert await self.exit_reason is ExitReason.POWERED_OFF


@contextlib.asynccontextmanager
async def keeping(error: Exception | None = None) -> AsyncIterator[Keeping]:
    found = Keeping(error or InternalError("not used"))
    try:
        yield found
        await found.end()
    finally:
        found.exit_reason.cancel()
        found.there.close()
        found.worker.keeper.close()


@pytest.mark.parametrize("kind", ["open", "take", "discard"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/memory"),
            "/run/memory: No space left on device",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (RuntimeError("can't start new thread"), "internal error .*can't start new thread"),
    ],
)
async def test_a_move_that_the_system_has_no_room_for_is_refused(
    kind: str, error: Exception, reason: str
) -> None:
    async with keeping(error) as guest:
        said = await guest.refusal(kind, share_memory=False)
        assert re.fullmatch(f"{reason}.*", said), said


async def test_a_program_that_cannot_even_be_looked_at_is_refused() -> None:
    async with keeping() as guest:
        said = await guest.refusal("start", emulator="/" + "x" * 300)
        assert "File name too long" in said


async def test_a_keeper_without_descriptors_starts_no_worker_and_keeps_the_guest() -> None:
    async with keeping() as guest:
        with no_descriptors():
            said = await guest.refusal("start", emulator=None)
        assert "Too many open files" in said


async def test_a_worker_that_ended_before_its_answer_is_heard_to_its_last_word() -> None:
    async with keeping() as guest:
        await guest.there.tell("failed")
        # and then its end, which is there before the keeper can answer


async def test_a_next_worker_whose_link_cannot_be_passed_on_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    following = Following()
    monkeypatch.setattr(Worker, "start", lambda program, *, supervised: following)
    async with keeping() as guest:

        async def full(*arguments: object) -> int:
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")

        monkeypatch.setattr(guest.worker.keeper, "_send_descriptors", full)
        assert "Too many references" in await guest.refusal("start", emulator=None)
        assert following.closed


async def test_a_worker_that_gets_no_link_to_the_next_one_has_that_ended() -> None:
    """It has no descriptor left for it."""
    here, there = socket.socketpair()
    kept, keeper = (
        Kept(cast("Serving", SimpleNamespace()), Link(there, "the keeper")),
        Link(here, "the worker"),
    )
    asked = asyncio.ensure_future(kept.reload({}))
    assert (await keeper.hear("start")).values == {"emulator": None}
    reading, writing = os.pipe()
    with no_descriptors():
        await keeper.tell("started", {"pid": 7}, descriptors=[writing])
        await keeper.hear("failed")
    os.close(writing)
    await keeper.tell("gone", {"how": "process 7 ended"})
    with pytest.raises(ReloadFailed, match="no room for the descriptors"):
        await asked
    assert os.read(reading, 1) == b""
    os.close(reading)
    keeper.close()
    there.close()


async def test_a_worker_that_ends_without_a_word_ends_the_service() -> None:
    found = Keeping(InternalError("not used"))
    found.there.close()
    with pytest.raises(UserError, match="ended unexpectedly: process 6 ended"):
        await found.exit_reason
    found.worker.keeper.close()
