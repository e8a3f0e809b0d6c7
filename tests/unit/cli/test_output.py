"""No text of a guest, server or peer reaches a terminal as something that it executes; no output hangs or is lost."""

from __future__ import annotations

import argparse
import ast
import asyncio
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest
import vmbus.cli
import vmbus_devices
from vmbus.cli import output, run
from vmbus.cli.output import Echo, OutputClosed, OutputFailed
from vmbus.cli.status import render
from vmbus.cli.table import table
from vmbus.errors import UserError
from vmbus.machine.host import ExitReason
from vmbus.printable import harmless, indented, one_line
from vmbus.provision import progress, system_packages
from vmbus.provision.command_output import START
from vmbus.provision.system_packages import SystemPackage

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
"""OSC 52: sets the clipboard of the terminal."""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9\u4e2d text\n\tindented", "plain \u00e9\u4e2d text\n\tindented"),
        (CLIPBOARD, r"\x1b]52;c;cm0gLXJmIH4=\x07"),
        ("\x9b2J", r"\x9b2J"),  # CSI as one character
        ("over\rwritten\b\x7f", r"over\rwritten\x08\x7f"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # right-to-left
        ("\udc9b", r"\udc9b"),  # from a file name that is not UTF-8
    ],
)
def test_what_a_terminal_would_execute_is_shown(text: str, shown: str) -> None:
    assert harmless(text) == shown


def test_text_for_one_line_stays_in_it() -> None:
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert table(("name",), [("one\nforged row",)]).splitlines() == ["name", r"one\nforged row"]
    assert indented("failed:\nvmbus run: forged") == "failed:\n  vmbus run: forged"


PRINTING = {"vmbus/cli/output.py", "vmbus/cli/writer.py", "vmbus/provision/progress.py"}
"""The modules that write to standard output and standard error; all that they print goes through the filter."""


def test_no_other_module_prints() -> None:
    wrong = []
    for package in (vmbus, vmbus_devices):
        folder = Path(package.__path__[0])
        for path in folder.rglob("*.py"):
            name = str(path.relative_to(folder.parent))
            for node in ast.walk(ast.parse(path.read_text())) if name not in PRINTING else ():
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    given = " ".join(ast.unparse(each) for each in node.args)
                    if called in ("print", "json.dump") or (
                        ".write" in called and "sys.std" in called + given
                    ):
                        wrong.append(f"{name}:{node.lineno}: {called}")
    assert not wrong


class Terminal(io.StringIO):
    """A terminal that keeps what it is given."""

    def isatty(self) -> bool:
        return True


def test_progress_shows_what_mirrors_and_packages_are_called() -> None:
    """A mirror's name is out of the machine's settings, and what a mirror offers is its own choice."""
    terminal = Terminal()
    shown = progress.for_stream(terminal)
    shown.step(f"package lists of {CLIPBOARD}\nforged")
    shown.advance(1, 2, f"\x1b[2J{CLIPBOARD}")
    shown.finish()
    assert "\x1b" not in terminal.getvalue() and "\x07" not in terminal.getvalue()
    assert r"\x1b]52;c;cm0gLXJmIH4=\x07\nforged ..." in terminal.getvalue()


def test_progress_survives_a_terminal_that_is_gone() -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    shown = progress.for_stream(Gone())
    shown.step("loading")
    shown.advance(1, 2, "B")
    shown.finish()


def test_installing_packages_is_said_through_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stderr=""))
    said = io.StringIO()
    system_packages.ensure([SystemPackage(f"gcc{CLIPBOARD}", "compiles", lambda: False)], said)
    assert said.getvalue() == "installing gcc\\x1b]52;c;cm0gLXJmIH4=\\x07 with apt-get " + (
        "(gcc\\x1b]52;c;cm0gLXJmIH4=\\x07: compiles)\n"
    )


def test_status_shows_hostile_names_in_their_places(capsys: pytest.CaptureFixture[str]) -> None:
    channel = {
        "relid": 1,
        "device": f"echo{CLIPBOARD}",
        "state": "open",
        "target_vp": 0,
        "doorbells": 0,
        "interrupts": 0,
        "refusals": {f"{CLIPBOARD}\nforged": 1},
    }
    status = {
        "name": "web",
        "vcpus": 1,
        "qemu": {"version": "11"},
        "partition": {"guest_os": f"Linux{CLIPBOARD}", "refusals": {}},
        "bus": {"version": None, "refusals": {}},
        "crashes": [f"at \x1b[2J\n{CLIPBOARD}"],
        "stopped_because": [f"no room\n{CLIPBOARD}"],
        "channels": [channel],
    }
    output.show(render(status))
    output.show_json(status)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown
    text, _, data = shown.partition("{")
    assert len(text.splitlines()) == 5
    assert json.loads("{" + data) == status


def test_errors_are_shown_without_what_they_quote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise UserError(f"the guest ended; the end of its console:\n{CLIPBOARD}\nvmbus: all is well")

    monkeypatch.setattr("vmbus.cli.cont.main", fail)
    assert vmbus.cli.main(["cont"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "vmbus cont: the guest ended; the end of its console:",
        r"  \x1b]52;c;cm0gLXJmIH4=\x07",
        "  vmbus: all is well",
    ]


# --- what a guest's command prints ---------------------------------------------------------------------------


class Stream:
    """A text stream with bytes below it, as standard output has; ``terminal``: whether it is one."""

    encoding = "utf-8"

    def __init__(self, *, terminal: bool, buffer: object = None) -> None:
        self.bytes = io.BytesIO()
        self.buffer = buffer or self.bytes
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_a_file_gets_the_bytes_of_a_command() -> None:
    stream = Stream(terminal=False)
    echo = Echo(cast(TextIO, stream))
    data = CLIPBOARD.encode() + bytes(range(256))
    echo.write(data)
    echo.write(b"", final=True)
    assert stream.bytes.getvalue() == data


def test_a_terminal_gets_the_text_of_a_command() -> None:
    stream = Stream(terminal=True)
    echo = Echo(cast(TextIO, stream))
    for part in (b"10 %\r20 %\n\x1b", b"]52;c;AA", b"AA\x07\xc3", b"\xa4\xff\xc2", b"\x9b"):
        echo.write(part)
    echo.write(b"\xc3", final=True)
    assert stream.bytes.getvalue().decode() == "10 %\r20 %\n\\x1b]52;c;AAAA\\x07\u00e4\\xff\\x9b\\xc3"


class Guest:
    """A guest whose command prints for ever."""

    def __init__(self) -> None:
        self.command = object()
        self.ended: asyncio.Future[ExitReason] = asyncio.get_running_loop().create_future()
        self.served = SimpleNamespace(
            serve=self._serve, stop=lambda: self.ended.set_result(ExitReason.STOPPED)
        )
        self.host = SimpleNamespace()

    async def _serve(self) -> ExitReason:
        return await self.ended

    async def command_output(self) -> AsyncIterator[bytes]:
        yield START
        while True:
            yield b"line\n" * 1000
            await asyncio.sleep(0)


async def test_a_command_ends_with_the_reader_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest would continue, and wait for ever for somebody to read."""
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # not the standard output of the tests
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as raw:
        stream = Stream(terminal=False, buffer=raw)
        async with asyncio.timeout(20):
            with pytest.raises(OutputClosed):
                await run._command(cast(Any, Guest()), Echo(cast(TextIO, stream)), under_way=False)


async def test_a_qemu_that_was_killed_is_named_where_a_command_ran(tmp_path: Path) -> None:
    guest = Guest()
    guest.command_output = silent  # type: ignore[method-assign]
    guest.ended.set_result(ExitReason.QEMU_GONE)

    async def written() -> None: ...

    more: dict[str, Any] = {
        "console_written": written,
        "directory": SimpleNamespace(console=tmp_path / "console.log"),
        "process": SimpleNamespace(
            stop=lambda: None, ending=lambda: "QEMU was killed by SIGBUS", messages=lambda: ""
        ),
    }
    vars(guest).update(more)
    with pytest.raises(UserError, match="before its command started: QEMU was killed by SIGBUS; the end"):
        await run._command(cast(Any, guest), Echo(cast(TextIO, Stream(terminal=False))), under_way=False)


async def silent() -> AsyncIterator[bytes]:
    """Print nothing."""
    nothing: tuple[bytes, ...] = ()
    for data in nothing:
        yield data


# --- standard output and standard error that cannot be written ------------------------------------------------


@pytest.mark.parametrize(
    ("words", "redirection", "message"),
    [
        ("--help", ">/dev/full", "No space left on device"),
        ("--help", ">&-", "Bad file descriptor"),
        ("--help", "2>&- >/dev/full", ""),
        ("run --device help", ">/dev/full", "No space left on device"),
        ("run --device help", "| true", ""),
    ],
)
def test_an_output_that_cannot_be_written_is_one_sentence(words: str, redirection: str, message: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m vmbus {words} {redirection}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if message:
        assert done.stderr.startswith("vmbus") and message in done.stderr and done.stderr.count("\n") == 1
    else:
        assert not done.stderr
    if redirection != "| true":
        assert done.returncode == 1


def test_output_that_failed_once_does_not_fail_again_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "import sys\nfrom vmbus.cli import output\n"
        "try:\n    output.show('x' * 100)\nexcept output.OutputFailed:\n    sys.exit(7)"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=full,
            check=False,
            timeout=60,
        )
    assert done.returncode == 7
    assert issubclass(OutputFailed, UserError)
    assert not capfd.readouterr().err
