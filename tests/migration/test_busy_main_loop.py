"""QEMU's main loop asks for the state while the emulator waits for QEMU's main loop: neither waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from vmbus.machine.host import Host
from vmbus.machine.migration.snapshots import SnapshotFailed, load
from vmbus.machine.migration.state_machine import Phase, Switchover
from vmbus.machine.qemu.qmp import Qmp

from tests.guest.waiting import while_alive
from tests.migration.journey import Journey, journey
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest

AT_MOST = 8.0
"""Seconds; without the emulator's answer QEMU waits for 25, and the emulator used to end after 10."""
PAGE = 0x100000


@contextlib.contextmanager
def swallowing(path: Path) -> Iterator[str]:
    """An address that reads a migration and answers nothing, in a thread: an event loop that waits does not stop it.

    A target's emulator in this process would wait for the same event loop as that of the source.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def read() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    while connection.recv(1 << 16):
                        pass

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield f"unix:{path}"
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


async def wait_for_main_loop_during(
    guest: Journey, other: Qmp, event: tuple[str, str | None], begin: Callable[[], Awaitable[object]]
) -> float:
    """Write through QEMU as soon as it has sent ``event``; return the seconds that the event loop waited."""
    began = asyncio.ensure_future(begin())
    async with while_alive(f"event {event}", guest.here):
        async for name, data in other.events():
            if (name, data.get("status")) == event:
                break
    before = time.monotonic()
    memory = guest.host.memory
    memory.write_through(PAGE, 16)
    waited = time.monotonic() - before
    await began
    return waited


async def test_savevm_and_an_early_continue_during_a_write_through(tmp_path: Path) -> None:
    async with journey(tmp_path, snapshots=True) as guest:
        await more_beats(guest)
        other = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
        host: Host = guest.host

        waited = await wait_for_main_loop_during(
            guest, other, ("STOP", None), lambda: other.monitor("savevm behind")
        )
        assert waited < AT_MOST
        await more_beats(guest)

        coordinator = host.migration
        coordinator.switchover = Switchover.OBSERVE
        reached = asyncio.ensure_future(coordinator.until(lambda: coordinator.phase is Phase.READY, 60))
        with swallowing(tmp_path / "target") as uri:
            await other.execute("migrate", {"uri": uri})
            await reached
            waited = await wait_for_main_loop_during(
                guest,
                other,
                ("MIGRATION", "device"),
                lambda: other.execute("migrate-continue", {"state": "pre-switchover"}),
            )
            assert waited < AT_MOST
            await guest.here.migration(lambda: coordinator.phase is Phase.IDLE, "phase idle")
        await more_beats(guest)
        await other.close()

        with pytest.raises(SnapshotFailed, match="without the emulator"):
            await load(coordinator, "behind")
