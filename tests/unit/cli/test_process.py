"""A command leaves the process as it was: tests, and programs that call ``main``, execute several."""

from __future__ import annotations

import logging
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmbus import cli
from vmbus.cli import output
from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.sandbox import confinement, memory


@pytest.fixture
def bound() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield before
    resource.setrlimit(resource.RLIMIT_DATA, before)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """A command that changes what ``run`` and ``attach`` change, and fails."""

    def find(name: str) -> Path:
        confinement.enable(False)
        memory.limit(1 << 40)
        logging.getLogger("vmbus.test").info("this is for -v")
        raise UserError("no such guest")

    monkeypatch.setattr(rundir, "find", find)
    return cli.main([*words, "status", "web"])


def test_limits_the_sandbox_s_switch_and_signals_are_as_before(
    monkeypatch: pytest.MonkeyPatch, bound: tuple[int, int]
) -> None:
    umask = os.umask(0o022)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    environment = dict(os.environ)
    try:
        assert command(monkeypatch) == 1
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
    assert resource.getrlimit(resource.RLIMIT_DATA) == bound
    assert confinement.enabled()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert dict(os.environ) == environment


def test_each_command_logs_as_much_as_it_was_asked_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bound: tuple[int, int]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        for words, shown in (((), False), (("-v",), True), ((), False)):
            assert command(monkeypatch, *words) == 1
            assert ("this is for -v" in capsys.readouterr().err) is shown
        assert (root.handlers, root.level) == ([], level)
    finally:
        root.setLevel(level)


def test_output_that_one_command_owed_is_not_waited_for_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second has a reader that reads nothing, and nothing that is worth to wait for it."""
    monkeypatch.setattr(output, "FLUSH_TIMEOUT", 0.05)
    reading, writing = os.pipe()
    assert stat.S_ISFIFO(os.fstat(writing).st_mode)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with output.serving():
            output.Echo(stream).owe()
        ended = threading.Event()

        def second() -> None:
            with output.serving():
                writer = output._writer(stream)
                assert writer is not None
                monkeypatch.setitem(output._writers, 1, writer)  # type: ignore[arg-type]
                writer.put(bytes(1 << 20))
            ended.set()

        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        in_time = ended.wait(10)
        os.close(reading)  # the write ends, and with it the thread
        thread.join(20)
    assert in_time
