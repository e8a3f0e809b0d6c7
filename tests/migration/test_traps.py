"""A guest that is stopped while a trap of its is under way: the trap is served once, wherever it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.gateway.traps import Trap
from vmbus.machine.migration.drive import MigrationFailed, migrate
from vmbus.machine.migration.state_machine import Phase, Switchover

from tests.guest.harness import LOADED_MODULES
from tests.guest.waiting import LIMIT
from tests.migration.journey import Journey, journey

pytestmark = pytest.mark.guest


async def hold_traps(guest: Journey, monkeypatch: pytest.MonkeyPatch) -> list[Trap]:
    """Leave traps unanswered until the host is paused for a migration; return when there is one."""
    host = guest.host
    held: list[Trap] = []
    serve, hold = host.service.answer, host.migration.state.pause_channels

    def answer_late() -> None:
        if host.service.answer != serve:
            monkeypatch.setattr(host.service, "answer", serve)
            for trap in held:
                serve(trap)
        hold()

    monkeypatch.setattr(host.service, "answer", held.append)
    monkeypatch.setattr(host.migration.state, "pause_channels", answer_late)
    await guest.here.until(lambda: held, "unanswered trap")
    return held


async def test_an_answer_that_no_processor_fetched_goes_along(
    tmp_path: Path, guest_program: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with journey(
        tmp_path,
        add=[(guest_program("clocks"), "/bin/clocks")],
        load=(*LOADED_MODULES, "msr"),
        command=["clocks"],
    ) as guest:

        def lines() -> list[bytes]:
            return bytes(guest.here.output).splitlines(True)[:-1]

        async def more() -> dict[str, Any]:
            wanted = len(lines()) + 4
            await guest.here.until(lambda: len(lines()) >= wanted, "four more lines")
            found: dict[str, Any] = json.loads(lines()[-1])
            return found

        await more()
        # It comes back: the answer is fetched here.
        held = await hold_traps(guest, monkeypatch)
        there = await guest.target()
        coordinator = guest.host.migration
        coordinator.switchover = Switchover.OBSERVE
        moving = asyncio.ensure_future(migrate(guest.host.migration, guest.uri(there), timeout=LIMIT))
        await guest.here.migration(lambda: coordinator.phase is Phase.READY, "phase ready", there)
        await guest.here.until(lambda: coordinator.report.prepared_in, "state made ready")
        await guest.host.qmp.execute("migrate_cancel")
        with pytest.raises(MigrationFailed):
            await moving
        assert coordinator.report.answers_carried == len(held) == 1
        coordinator.switchover = Switchover.OWN
        await more()
        await guest.leave(there)

        # It leaves: the answer is fetched there, and no host is asked again.
        held = await hold_traps(guest, monkeypatch)
        there = await guest.target()
        asked: list[tuple[int, ...]] = []
        serve = there.host.service.answer

        def note(trap: Trap) -> None:
            asked.append(trap.identity)
            serve(trap)

        monkeypatch.setattr(there.host.service, "answer", note)
        outcome = await guest.move(there)
        assert outcome.report.answers_carried == len(held) == 1
        found = await more()
        assert found["back"] == 0
        # The loop asks for the same with the same registers again and again; the first was not among them.
        assert there.host.gateway._carried == {}
        assert asked
