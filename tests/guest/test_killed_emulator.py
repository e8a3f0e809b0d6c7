"""An emulator that is killed while its guest works: the next one takes the guest over from its journal."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.guest.test_commands import User, started_by_hand, user

__all__ = ["user"]
pytestmark = pytest.mark.guest


async def test_a_guest_outlives_its_emulators(tmp_path: Path, user: User) -> None:
    async with started_by_hand(tmp_path, user, "512M") as hand:
        async with hand.attached("--journal") as emulator:
            await emulator.more_beats("hand", hand.qemu)
            emulator.process.send_signal(signal.SIGKILL)
            await emulator.killed()
        assert hand.qemu.gone() == ""
        for _ in range(3):
            shutil.rmtree(user.runtime / "vmbus")
            async with hand.attached() as emulator:
                await emulator.more_beats("hand", hand.qemu)
                emulator.process.send_signal(signal.SIGKILL)
                await emulator.killed()
        shutil.rmtree(user.runtime / "vmbus")
        async with hand.attached() as emulator:
            await emulator.more_beats("hand", hand.qemu)
            assert await user.asks("shutdown", "hand") == "ok\n"
            assert await hand.ended() == 0
            assert (await emulator.ended())[0] == 0
