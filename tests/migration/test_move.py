"""A guest moves into a new QEMU under its own name: what others see of it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.machine.migration.drive import MigrationFailed

from tests.guest.harness import boot
from tests.guest.test_boot import complaints
from tests.guest.waiting import LIMIT

pytestmark = pytest.mark.guest

COUNT = (
    "(read line </dev/ttyS1; touch /tmp/enough) & i=0; "
    "while [ ! -e /tmp/enough ]; do i=$((i+1)); echo $i; usleep 10000; done; exit 7"
)


async def test_name_output_and_status_of_a_command_survive_moves(tmp_path: Path) -> None:
    async with boot(
        tmp_path,
        devices=("heartbeat,interval=0.05", "shutdown"),
        command=[COUNT],
    ) as guest:
        await guest.says("10\n")
        pids = {guest.guest.process.pid}
        for share in (False, True, True):
            answers = guest.device("heartbeat").status()["answers"]
            outcome = await guest.guest.move(share_memory=share, timeout=LIMIT)
            assert (outcome.memory_bytes < 4 << 20) == share
            pids.add(guest.guest.process.pid)
            await guest.until(
                lambda: guest.device("heartbeat").status()["answers"] > answers,
                "heartbeats after the move",
            )
        assert len(pids) == 4
        guest.tell("enough")
        assert await guest.finish() == 7
        numbers = [int(word) for word in guest.output.split()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert complaints(guest.console()) == []
        assert guest.console().count("Linux version") == 1  # one console, from the boot to the end


async def test_a_guest_that_cannot_move_stays(tmp_path: Path) -> None:
    async with boot(tmp_path, devices=("heartbeat,interval=0.05", "shutdown")) as guest:
        await guest.until(lambda: guest.device("heartbeat").status()["answers"] > 3, "heartbeats")
        before = sorted(path.name for path in guest.guest.directory.path.iterdir())
        guest.guest._new_devices = lambda lines: []
        for share in (False, True):
            with pytest.raises(MigrationFailed, match="not-there"):
                await guest.guest.move(share_memory=share, timeout=LIMIT)
        answers = guest.device("heartbeat").status()["answers"]
        await guest.until(
            lambda: guest.device("heartbeat").status()["answers"] > answers + 3, "heartbeats after that"
        )
        assert sorted(path.name for path in guest.guest.directory.path.iterdir()) == before
