"""QEMU's main loop asks for the state while the emulator waits for QEMU's main loop: neither waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import json
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

from tests.guest.waiting import LIMIT, while_alive
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


def continue_and_follow(path: Path, begin: threading.Event, ended: threading.Event) -> None:
    """Send ``migrate-continue`` over a monitor of its own once ``begin`` is set; set ``ended`` with the migration."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:

        def execute(command: str, **arguments: str) -> None:
            lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            lines.flush()

        connection.connect(str(path))
        execute("qmp_capabilities")
        begin.wait(LIMIT)
        execute("migrate-continue", state="pre-switchover")
        for line in lines:
            found = json.loads(line)
            if found.get("event") == "MIGRATION" and found["data"]["status"] in ("failed", "completed"):
                break
    ended.set()


def answer_nobody(guest: Journey, until: threading.Event) -> float:
    """Write through QEMU again and again until an event is set; return the longest wait for its main loop."""
    longest, end = 0.0, time.monotonic() + LIMIT
    while not until.is_set() and (before := time.monotonic()) < end:
        guest.host.memory.write_through(PAGE, 16)
        longest = max(longest, time.monotonic() - before)
    return longest


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
    third = tmp_path / "third"
    extra = ("-qmp", f"unix:{third},server=on,wait=off")
    async with journey(tmp_path, snapshots=True, extra=extra) as guest:
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
            begin, ended = threading.Event(), threading.Event()
            driver = threading.Thread(target=continue_and_follow, args=(third, begin, ended), daemon=True)
            driver.start()
            begin.set()
            # From here on the event loop does nothing else: it cannot answer Save() before QEMU's main loop waits.
            waited = answer_nobody(guest, ended)
            driver.join(LIMIT)
            assert waited < AT_MOST
            await guest.here.migration(lambda: coordinator.phase is Phase.IDLE, "phase idle")
        await more_beats(guest)
        await other.close()

        with pytest.raises(SnapshotFailed, match="without the emulator"):
            await load(coordinator, "behind")
