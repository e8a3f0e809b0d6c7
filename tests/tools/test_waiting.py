"""Waits of the guest tests: one for something impossible fails long before its timeout, and shows what there is."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.machine.guest import Guest
from vmbus.machine.host import ExitReason

from tests.guest.emulator import Emulator
from tests.guest.harness import PANIC, Booted
from tests.guest.waiting import LIMIT, NotComing, Process, reporting, until, until_blocking, while_alive


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    start = time.monotonic()
    yield
    # No wait was for its timeout; how long an interpreter needs to start and to end is a matter of the machine.
    assert time.monotonic() - start < LIMIT / 2


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Process]:
    """A process that says something and ends with status 3."""
    log = tmp_path / "log"
    script = f"import pathlib; pathlib.Path({str(log)!r}).write_text('last words'); raise SystemExit(3)"
    with Process.started("child", [sys.executable, "-S", "-c", script], log) as found:
        yield found


async def test_a_wait_ends_with_the_process_that_it_depends_on(child: Process) -> None:
    with pytest.raises(NotComing, match=r"no miracle: child .* ended with status 3") as failure:
        await until(lambda: False, "miracle", child)
    assert "last words" in str(failure.value)


def test_so_does_a_wait_without_a_loop(child: Process) -> None:
    with pytest.raises(NotComing, match=r"(?s)status 3.*last words"):
        until_blocking(lambda: False, "miracle", child)


async def test_what_is_awaited_inside_ends_too(child: Process) -> None:
    with pytest.raises(NotComing, match=r"(?s)no event: child .*last words"):
        async with while_alive("event", child):
            await asyncio.Event().wait()


async def test_an_error_of_its_own_wins(child: Process) -> None:
    async def notices() -> None:
        while not child.gone():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        async with while_alive("event", child):
            await notices()


async def test_what_comes_together_with_the_end_has_come(child: Process) -> None:
    await until(lambda: child.process.poll() == 3, "its status", child)


async def test_a_timeout_says_how_long_it_waited() -> None:
    with pytest.raises(NotComing, match=r"no miracle: not within 0\.1 s"):
        await until(lambda: False, "miracle", timeout=0.1)
    with pytest.raises(NotComing, match=r"no event: not within 0\.1 s"):
        async with while_alive("event", timeout=0.1):
            await asyncio.Event().wait()


async def test_an_awaitable_is_a_condition() -> None:
    answers = iter([False, True])

    async def ask() -> bool:
        return next(answers)

    await until(ask, "answer")


def test_a_failure_carries_each_report_once(child: Process) -> None:
    with pytest.raises(AssertionError) as failure, reporting(lambda: (child,)):
        raise AssertionError("something else")
    assert len(failure.value.__notes__) == 1
    with pytest.raises(NotComing) as failure, reporting(lambda: (child,)):
        until_blocking(lambda: False, "miracle", child)
    assert not hasattr(failure.value, "__notes__")


async def test_an_emulator_that_refuses_ends_the_wait_with_its_message(tmp_path: Path) -> None:
    emulator = Emulator.start(tmp_path, "attach", "--qmp", "/nowhere.sock", "--name", "none")
    with pytest.raises(
        NotComing, match=r"no heartbeats of none: `vmbus attach .*` ended with status 1: .*/nowhere"
    ):
        await emulator.more_beats("none")


# --- guests ---


def guest_that_ends(tmp_path: Path, served: asyncio.Future[ExitReason]) -> Booted:
    """A guest as far as waits look at it: its service ends as ``served`` does."""

    async def serve() -> ExitReason:
        return await served

    stub: Any = SimpleNamespace(
        host=SimpleNamespace(events=SimpleNamespace(crashes=[])),
        served=SimpleNamespace(serve=serve),
        command=None,
        directory=SimpleNamespace(name="stub", qemu_log=tmp_path / "qemu.log"),
    )
    (tmp_path / "console.log").write_text("[    0.1] the kernel's line\n")
    (tmp_path / "qemu.log").write_text("QEMU's line\n")
    guest = Booted(cast(Guest, stub), tmp_path / "console.log")
    guest.start_following()
    return guest


async def test_a_wait_ends_with_the_guest(tmp_path: Path) -> None:
    served: asyncio.Future[ExitReason] = asyncio.get_running_loop().create_future()
    guest = guest_that_ends(tmp_path, served)
    asyncio.get_running_loop().call_later(0.1, served.set_result, ExitReason.QEMU_GONE)
    with pytest.raises(NotComing, match="no miracle: stub ended") as failure:
        await guest.until(lambda: False, "miracle")
    assert "the kernel's line" in str(failure.value)
    assert "QEMU's line" in str(failure.value)
    assert await guest.exit_reason() is ExitReason.QEMU_GONE


async def test_a_wait_ends_with_a_host_that_fails(tmp_path: Path) -> None:
    served: asyncio.Future[ExitReason] = asyncio.get_running_loop().create_future()
    guest = guest_that_ends(tmp_path, served)
    served.set_exception(ValueError("a task failed"))
    with pytest.raises(NotComing, match=r"the host of stub failed: ValueError\('a task failed'\)"):
        await guest.says("anything")


async def test_a_wait_ends_with_a_panic_unless_the_test_wants_one(tmp_path: Path) -> None:
    guest = guest_that_ends(tmp_path, asyncio.get_running_loop().create_future())
    guest.console_path.write_text(f"[    0.2] {PANIC}: oh\n")
    with pytest.raises(NotComing, match="the kernel of stub panicked"):
        await guest.finish()
    guest.may_panic = True
    with pytest.raises(NotComing, match="not within"):
        await guest.until(lambda: False, "miracle", timeout=0.1)
    await guest.stop_following()


async def test_a_checksum_that_contains_the_word_is_no_failure(tmp_path: Path) -> None:
    guest = guest_that_ends(tmp_path, asyncio.get_running_loop().create_future())
    guest.output += b"b6aa2efa7d4184bad2f3dcba61d484aa  -\nround-1\n"
    assert guest.lines_of_failure() == []
    guest.output += b"bad-read\nround-2\n"
    assert guest.lines_of_failure() == ["bad-read"]
    await guest.stop_following()


async def test_a_wait_ends_when_the_command_has_failed_or_ended(tmp_path: Path) -> None:
    guest = guest_that_ends(tmp_path, asyncio.get_running_loop().create_future())
    guest.failure_word = b"failed"
    guest.output += b"failed: round 1\n"
    with pytest.raises(NotComing, match="the command of stub says 'failed'"):
        await guest.until(lambda: False, "miracle")
    guest.failure_word = b""
    guest.received.status = 1
    with pytest.raises(NotComing, match="the command has ended"):
        await guest.says("anything")
    await guest.stop_following()
