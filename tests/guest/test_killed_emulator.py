"""An emulator that is killed while its guest works: the next one takes the guest over from its journal."""

from __future__ import annotations

import contextlib
import json
import mmap
import shutil
import signal
from pathlib import Path

import pytest
from vmbus.machine.journal.areas import areas
from vmbus.machine.journal.recovery import contents_of
from vmbus.machine.journal.store import Journal
from vmbus.machine.journal.values import identity_of, is_channel
from vmbus.wire.ic import HEARTBEAT_INSTANCE

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


def damage_heartbeat(qemu: int) -> None:
    """Make what the journal of a QEMU has of the heartbeat's channel unreadable; no emulator is attached."""
    [file] = [
        each
        for each in Path(f"/proc/{qemu}/fd").iterdir()
        if each.is_symlink() and "vmbus-journal" in str(each.readlink())
    ]
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        found = contents_of(memory)
        [key] = [
            key
            for key in found.values
            if is_channel(key) and identity_of(key).instance_id == HEARTBEAT_INSTANCE
        ]
        store, beside = areas(memory)
        with beside or contextlib.nullcontext():
            journal = Journal.resume(store, found)
            journal.commit({key: b"damaged"})
            journal.close()
        store.release()


async def test_a_device_whose_state_is_lost_begins_anew_in_its_guest(tmp_path: Path, user: User) -> None:
    async with started_by_hand(tmp_path, user, "512M") as hand:
        async with hand.attached("--journal") as emulator:
            await emulator.more_beats("hand", hand.qemu)
            emulator.process.send_signal(signal.SIGKILL)
            await emulator.killed()
        damage_heartbeat(hand.qemu.process.pid)
        shutil.rmtree(user.runtime / "vmbus")
        async with hand.attached() as emulator:
            await emulator.more_beats("hand", hand.qemu)
            [problem] = json.loads(await user.asks("status", "hand", "--json"))["problems"]
            assert "offered anew" in problem
            assert "heartbeat" in problem
            assert await user.asks("shutdown", "hand") == "ok\n"
            assert await hand.ended() == 0
            assert (await emulator.ended())[0] == 0
