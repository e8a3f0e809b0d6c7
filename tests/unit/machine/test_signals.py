"""Whatever signal ends ``vmbus run``, and whenever it comes: nothing of the guest stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine import signals

from tests.guest.waiting import until
from tests.unit.provision.fake_programs import write_program

LIMIT = 60.0

QEMU = """
case "$*" in
*-kernel*) echo started; exec sleep 1000 ;;
*--version*) echo "QEMU emulator version 11.1.3 (a test)" ;;
*-qtest*) cat >/dev/null ;;
*) echo "-plugin [file=]<file>" ;;
esac"""
"""A QEMU that never gets as far as to make its QMP socket, and has no dbus-vmstate."""


@pytest.fixture(autouse=True)
def _hang_up_is_not_ignored() -> Iterator[None]:
    """Under ``nohup`` it is, also for the programs that a test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def starting(folder: Path, *before: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """``vmbus run`` while its QEMU starts, after the words ``before``; and the folder of run directories."""
    for name in ("kernel", "initrd"):
        (folder / name).write_bytes(bytes(4096))
    runtime = Path(os.environ.get("TMPDIR", "/tmp")) / f"vmbus-s{os.getpid()}"
    runtime.symlink_to(folder)
    words = ("run", "--name", "web", "--memory", "4M", "--no-default-devices", "--kernel", "kernel")
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "vmbus", *words, "--initrd", "initrd"],
        cwd=folder,
        env={
            **os.environ,
            "XDG_RUNTIME_DIR": str(runtime),
            "VMBUS_QEMU": str(write_program(folder / "qemu-system-x86_64", QEMU)),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, folder / "vmbus"
    finally:
        process.kill()
        process.communicate()
        runtime.unlink()


async def started(process: subprocess.Popen[str], runs: Path) -> None:
    log = runs / "web/qemu.log"
    await until(
        lambda: process.poll() is not None or (log.exists() and "started" in log.read_text()),
        "start of QEMU",
        timeout=LIMIT,
    )
    assert process.poll() is None, process.communicate()
    assert (runs / "web/memory").stat().st_size == 4 << 20


@pytest.mark.parametrize(
    "number", (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM), ids=lambda number: number.name
)
async def test_a_start_that_is_ended_by_a_signal_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    with starting(tmp_path) as (process, runs):
        await started(process, runs)
        process.send_signal(number)
        _, errors = await asyncio.to_thread(process.communicate, timeout=LIMIT)
        assert process.returncode == 128 + number, errors
        assert errors == ""
        assert list(runs.iterdir()) == []


async def test_more_signals_do_not_cut_the_end_short(tmp_path: Path) -> None:
    with starting(tmp_path) as (process, runs):
        await started(process, runs)
        for _ in range(20):
            for number in signals.SIGNALS:
                process.send_signal(number)
        _, errors = await asyncio.to_thread(process.communicate, timeout=LIMIT)
        assert process.returncode in {128 + number for number in signals.SIGNALS}, errors
        assert list(runs.iterdir()) == []


async def test_nohup_is_respected(tmp_path: Path) -> None:
    with starting(tmp_path, "nohup") as (process, runs):
        await started(process, runs)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.communicate, timeout=LIMIT)
        assert process.returncode == 128 + signal.SIGTERM
        assert list(runs.iterdir()) == []


async def test_the_innermost_action_is_called(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []
    here = os.getpid()
    with signals.handled(lambda number: heard.append(("outer", number))):
        with signals.handled(lambda number: heard.append(("inner", number))):
            os.kill(here, signal.SIGQUIT)
            await until(lambda: heard, "signal", timeout=LIMIT)
        os.kill(here, signal.SIGHUP)
        await until(lambda: len(heard) == 2, "signal", timeout=LIMIT)
    assert heard == [("inner", signal.SIGQUIT), ("outer", signal.SIGHUP)]


async def test_work_that_must_be_finished_is_finished_by_a_task_that_is_cancelled_again_and_again() -> None:
    steps: list[int] = []

    async def work() -> None:
        for step in range(5):
            await asyncio.sleep(0)
            steps.append(step)

    task = asyncio.ensure_future(signals.finished(work()))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == [0, 1, 2, 3, 4]


def test_the_handlers_of_before_are_back_afterwards() -> None:
    """A program that executes a command has its own, and what it ignores, it ignores."""

    def own(number: int, frame: object) -> None: ...

    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
    handlers: tuple[Any, ...] = (own, own, signal.SIG_IGN, signal.default_int_handler)
    before = [signal.signal(number, handler) for number, handler in zip(numbers, handlers, strict=True)]
    came: list[int] = []

    async def work() -> int:
        handled = asyncio.Event()

        def action(number: int) -> None:
            came.append(number)
            handled.set()

        with signals.handled(action):
            os.kill(os.getpid(), signal.SIGTERM)
            await handled.wait()
        return 0

    try:
        assert signals.run(work()) == 0
        assert came == [signal.SIGTERM]
        assert tuple(signal.getsignal(number) for number in numbers) == handlers
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
