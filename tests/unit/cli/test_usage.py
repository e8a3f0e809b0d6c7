"""What is typed wrong, or what the machine refuses, is one sentence with what to do; never a traceback."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from vmbus import cli
from vmbus.cli import device, migrate, run, with_values
from vmbus.cli.options import (
    MAX_HOLD,
    MAX_MEMORY,
    MAX_TIMEOUT,
    hold_limit,
    seconds,
    size,
    whole_number,
)
from vmbus.cli.os_errors import os_sentence
from vmbus.devices.options import parse_size
from vmbus.devices.registry import Registry
from vmbus.errors import UsageError, UserError
from vmbus.machine import rundir, unix_path
from vmbus.machine.control import ControlServer, ask
from vmbus.machine.migration.drive import described_error
from vmbus_devices.nbd.uri import parse_uri

# --- errors of the operating system ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/run/user/1/vmbus"),
            "/run/user/1/vmbus: Permission denied; give yourself the right to use it, or name another place",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", b"/a"),
            "/a: Read-only file system; name another place",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space there"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"),
            "/a and /b: Invalid cross-device link",
        ),
        (OSError("AF_UNIX path too long"), "AF_UNIX path too long"),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "a host name is not known here (Name or service not known): check its spelling",
        ),
    ],
)
def test_an_error_of_the_system_is_a_sentence(error: OSError, sentence: str) -> None:
    assert os_sentence(error) == sentence


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "vmbus cont: /x: Permission denied; "),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "vmbus cont: Broken pipe"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_no_error_of_the_system_is_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    shown: str,
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("vmbus.cli.cont.main", fail)
    assert cli.main(["cont"]) == status
    found = capsys.readouterr().err
    assert found.startswith(shown) and found.count("\n") == (1 if shown else 0)


def test_a_bug_has_its_traceback_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(arguments: argparse.Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("vmbus.cli.cont.main", fail)
    assert cli.main(["cont"]) == 1
    assert "please report" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vmbus.aml").mkdir()
    assert cli.main(["qemu-args", "--dir", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"vmbus qemu-args: {tmp_path}/vmbus.aml: Is a directory; name a file in it\n"
    )


@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".", "a" * 300])
def test_a_host_that_no_name_server_can_have_is_wrong_usage(host: str) -> None:
    with pytest.raises(UsageError, match="write nbd://HOST"):
        parse_uri(f"nbd://{host}/disk")


# --- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "0", "1e300", "soon", "", "9" * 400])
def test_no_timeout(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="number of seconds"):
        seconds(text)


def test_timeouts_and_limits() -> None:
    assert (seconds("0.5"), seconds(str(MAX_TIMEOUT))) == (0.5, MAX_TIMEOUT)
    assert (hold_limit("0"), hold_limit(str(MAX_HOLD))) == (0, MAX_HOLD)
    for text in ("nan", "-1", "4000001"):
        with pytest.raises(argparse.ArgumentTypeError, match="0 for no limit"):
            hold_limit(text)


@pytest.mark.parametrize(
    "text", ["0", "-1", "5", "99999999999999999999", "9" * 5000, "1.5", "٣", "", "+", "+-3"]
)
def test_numbers_out_of_range(text: str) -> None:
    parse = whole_number(1, 4)
    if text == "٣":
        assert parse(text) == 3  # a digit like any other
        return
    with pytest.raises(argparse.ArgumentTypeError, match="whole number from 1 to 4"):
        parse(text)


@pytest.mark.parametrize("text", ["65T", "99999999999T", "9" * 5000, "-1", "nan", "0"])
def test_sizes_out_of_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


def test_the_largest_sizes() -> None:
    assert size("64T") == MAX_MEMORY
    assert parse_size("9223372036854775807") == (1 << 63) - 1
    for text in ("9223372036854775808", "99999999T", "9" * 5000, "0", "-1"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(text)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["run", "--timeout", "nan"], "is not a timeout"),
        (["run", "--smp", "99999999999"], "from 1 to 4096"),
        (["run", "--hold-limit", "-1"], "is not a limit"),
        (["demo", "--smp", "0"], "from 1 to 4096"),
        (["migrate", "--timeout", "nan"], "is not a timeout"),
        (["migrate", "--save-buffer", "-1"], "whole number from 1"),
        (["snapshot", "list", "--timeout", "inf"], "is not a timeout"),
    ],
)
def test_wrong_numbers_are_wrong_usage(
    words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert shown in capsys.readouterr().err


# --- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["run", "--"], "vmbus run: nothing follows --"),
        (["status", "--"], "vmbus status takes no command after --"),
        (["status", "--", "ls"], "vmbus status takes no command after --"),
        (["run", "--name", "a/b", "--dry-run"], "is not a guest name"),
        (["run", "--incoming", f"fd:{'9' * 30}", "--dry-run"], "no descriptor has this number"),
    ],
)
def test_wrong_words(words: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "--incoming" in words:
        with pytest.raises(UsageError, match=shown):
            migrate.own_descriptor(int(words[2].removeprefix("fd:")))
        return
    assert cli.main(words) == 2
    assert shown in capsys.readouterr().err


def test_options_for_qemu_begin_with_a_dash() -> None:
    assert with_values(["run", "--qemu", "-foo", "-v", "--append", "-x", "--qemu", "--dry-run"]) == [
        "run",
        "--qemu=-foo",
        "-v",
        "--append=-x",
        "--qemu",
        "--dry-run",
    ]
    assert cli.parser().parse_args(with_values(["run", "--qemu", "-foo"])).qemu == "-foo"


def test_a_device_that_is_given_twice_is_refused_before_anything_starts() -> None:
    registry = Registry()
    for second in ("echo", "echo,id=second"):
        with pytest.raises(UsageError, match="echo has this instance GUID already; give each device"):
            registry.create_all(["echo", second])
    lines = ["echo", f"echo,id=second,instance={UUID(int=1)}"]
    assert [each.name for each in registry.create_all(lines)] == ["echo", "second"]


# --- files of the caller --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("scsi,image=data.img", "scsi,image={here}/data.img"),
        ("scsi,image=a,,b:c.img,lun=1", "scsi,image={here}/a,,b:c.img,lun=1"),
        ("scsi,image=/abs/data.img", "scsi,image=/abs/data.img"),
        ("scsi,image=nbd://host/disk", "scsi,image=nbd://host/disk"),
        ("scsi,image=nbd+unix:///d?socket=/s", "scsi,image=nbd+unix:///d?socket=/s"),
        (
            "scsi,image=a.qcow2,backing=base.img;/b,data_file=d",
            "scsi,image={here}/a.qcow2,backing={here}/base.img;/b,data_file={here}/d",
        ),
        ("scsi,image=a.qcow2,backing=on", "scsi,image={here}/a.qcow2,backing=on"),
        ("echo,id=x", "echo,id=x"),
    ],
)
def test_files_of_a_device_are_the_caller_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sent: str
) -> None:
    """The emulator was started in another folder."""
    here = tmp_path / "with, comma"
    here.mkdir()
    monkeypatch.chdir(here)
    requests: list[dict[str, Any]] = []

    def answered(path: Path, command: str, **arguments: Any) -> object:
        requests.append(arguments)
        return {"done": "added"}

    monkeypatch.setattr(device, "ask", answered)
    monkeypatch.setattr("vmbus.machine.rundir.find", lambda name: tmp_path)
    assert cli.main(["device", "add", line]) == 0
    assert requests[0]["line"] == sent.format(here=str(here).replace(",", ",,"))


@pytest.mark.parametrize(
    ("uri", "sent"),
    [
        ("file:state", "file:{here}/state"),
        ("file:state,offset=0x1000", "file:{here}/state,offset=0x1000"),
        ("unix:m.sock", "unix:{here}/m.sock"),
        ("unix:/m.sock", "unix:/m.sock"),
        ("tcp:host:4444", "tcp:host:4444"),
        ("exec:cat > x", "exec:cat > x"),
    ],
)
def test_addresses_of_a_migration_are_the_caller_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, sent: str
) -> None:
    monkeypatch.chdir(tmp_path)
    requests: list[dict[str, Any]] = []

    def answered(path: Path, command: str, **arguments: Any) -> object:
        requests.append(arguments)
        raise UserError("that was all")

    monkeypatch.setattr(migrate, "ask", answered)
    monkeypatch.setattr("vmbus.machine.rundir.find", lambda name: tmp_path)
    assert cli.main(["migrate", "web", uri, "--cpr", "unix:cpr.sock"]) == 1
    assert requests[0]["uri"] == sent.format(here=tmp_path)
    assert requests[0]["cpr"] == f"unix:{tmp_path}/cpr.sock"


@pytest.mark.parametrize("name", ["nbd:1.qcow2", "-x"])
def test_an_image_for_snapshots_is_a_file_whatever_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """``qemu-img`` takes what is before a colon for a protocol, and ``-x`` for an option."""
    monkeypatch.chdir(tmp_path)

    class Qemu:
        def qemu_img(self) -> list[str]:
            """Refuse what the real one does not take for the name of a file."""
            check = "import sys; name = sys.argv[-2]; assert name[0] == '/'; open(name, 'w').close()"
            return [sys.executable, "-c", check]

    run.make_image(Qemu(), Path(name))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- who said so ------------------------------------------------------------------------------


def test_a_number_of_the_target_is_not_all_that_the_user_hears() -> None:
    shown = described_error({"error-desc": "Sibling indicated error 1"}) or ""
    assert "Sibling" not in shown and "at the target" in shown
    assert described_error({"error-desc": "Unable to write to socket: Broken pipe"}) == (
        "Unable to write to socket: Broken pipe"
    )
    assert described_error({}) is None


# --- what is no emulator --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"garbage\n", b"[]\n", b'{"x": 1}\n', b'"text"\n'])
async def test_an_answer_that_is_none_is_a_sentence(tmp_path: Path, answer: bytes) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    path = tmp_path / "control.sock"
    async with await asyncio.start_unix_server(connected, path):
        with pytest.raises(UserError, match="not the control socket of an emulator"):
            await asyncio.to_thread(ask, path, "status")


async def test_a_bug_in_an_answer_is_told_and_ends_no_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: Mapping[str, Any]) -> object:
        raise ZeroDivisionError

    server = ControlServer(tmp_path / "control.sock", {"status": fail})
    await server.start()
    with pytest.raises(UserError, match="internal error in the emulator"):
        await asyncio.to_thread(ask, tmp_path / "control.sock", "status")
    await server.stop()
    assert "please report" in caplog.text


@pytest.mark.parametrize("verb", ["status", "shutdown", "cont"])
def test_a_verb_that_only_asks_does_not_import_the_host(verb: str, tmp_path: Path) -> None:
    """They are called in loops, and answer in a tenth of the time that the import of the host takes."""
    script = (
        "import sys\nfrom vmbus.cli import main\n"
        f"assert main([{verb!r}, 'nobody']) == 1\n"
        "print(sorted({'construct', 'vmbus.machine.host', 'vmbus_devices'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "no emulator serves a guest named nobody" in done.stderr
    assert done.stdout == "[]\n"


# --- words in any order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("snapshot save --json before", {"words": ["before"]}),
        ("snapshot save web --timeout 5 before", {"words": ["web", "before"], "timeout": 5.0}),
        ("snapshot --json save web before", {"what": "save", "words": ["web", "before"]}),
        ("migrate web --json tcp:target:4444", {"name": "web", "uri": "tcp:target:4444"}),
        ("device add web --json echo", {"name": "web", "line": "echo"}),
        ("device resize web --json scsi/0:1 2G", {"name": "web", "device": "scsi/0:1", "size": "2G"}),
        (
            "channel save web heartbeat --buffer 64 hb",
            {"name": "web", "channel": "heartbeat", "file": Path("hb")},
        ),
        ("channel save heartbeat --buffer 64 hb", {"name": None, "channel": "heartbeat", "file": Path("hb")}),
        ("status --json web", {"name": "web", "json": True}),
    ],
)
def test_options_are_taken_between_the_other_words(line: str, found: dict[str, object]) -> None:
    arguments = vars(cli.parser().parse_args(line.split()))
    assert {key: arguments[key] for key in found} == found


@pytest.mark.parametrize("line", ["snapshot", "device add web --json x y", "migrate a b c", "status --no a"])
def test_too_few_and_too_many_words_are_refused(line: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.parser().parse_args(line.split())


def test_ctrl_c_ends_a_command_quietly_before_its_verb_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(words: object) -> argparse.ArgumentParser:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", interrupted)
    try:
        status = cli.main(["status"])
    except KeyboardInterrupt:  # it would end the whole test run
        pytest.fail("Ctrl-C shows a traceback")
    assert status == 130


def test_the_longest_timeout_is_no_short_one(tmp_path: Path) -> None:
    """Python's sockets keep 31 bits of the milliseconds: 4294967.6 seconds were 0.3."""
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        with unix_path.short(path) as address:
            listener.bind(address)
        listener.listen()
        with ThreadPoolExecutor() as executor:
            asking = executor.submit(ask, path, "status", answer_timeout=4294967.6)
            connection, _ = listener.accept()
            with connection:
                time.sleep(1.0)
                connection.sendall(b'{"return": "late"}\n')
                assert asking.result(timeout=10) == "late"


def test_take_back_answers_in_json_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rundir, "find", lambda name: Path(name))
    monkeypatch.setattr(migrate, "ask", lambda path, command: {})
    assert cli.main(["migrate", "web", "--take-back", "--json"]) == 0
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.parametrize(
    ("mode", "words", "named"),
    [
        ("--take-back", ["tcp:host:1"], "the URI tcp:host:1"),
        ("--take-back", ["--wait-ready"], "--wait-ready"),
        ("--take-back", ["--save-buffer", "4096"], "--save-buffer"),
        ("--take-back", ["--timeout", "5"], "--timeout"),
        ("--take-back", ["--keep", "--cpr", "unix:c"], "--cpr, --keep"),
        ("--wait-ready", ["--save-buffer", "4096"], "--save-buffer"),
        ("--wait-ready", ["--carrier", "file:c"], "--carrier"),
        ("--wait-ready", ["--keep", "--share-memory"], "--share-memory, --keep"),
    ],
)
def test_options_without_effect_on_a_migration_that_does_not_begin_are_refused(
    mode: str,
    words: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rundir, "find", lambda name: Path(name))
    monkeypatch.setattr(migrate, "ask", lambda path, command, **_: {"state_bytes": 1})
    assert cli.main(["migrate", "web", mode, *words]) == 2
    assert f"leave out {named}" in capsys.readouterr().err


def test_waiting_for_another_program_s_migration_has_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def ask(path: Path, command: str, **words: object) -> object:
        asked.append(words["timeout"])
        return {"state_bytes": 1}

    monkeypatch.setattr(rundir, "find", lambda name: Path(name))
    monkeypatch.setattr(migrate, "ask", ask)
    assert cli.main(["migrate", "web", "--wait-ready", "--timeout", "5"]) == 0
    assert cli.main(["migrate", "web", "--wait-ready"]) == 0
    assert asked == [5, 600]


def test_ctrl_c_at_a_migration_says_that_the_migration_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(stream: object) -> bool:
        raise KeyboardInterrupt

    done = threading.Event()
    monkeypatch.setattr(rundir, "find", lambda name: Path(name))
    monkeypatch.setattr(migrate, "ask", lambda path, command, **words: done.wait(10))
    monkeypatch.setattr(migrate, "is_terminal", interrupted)
    try:
        assert cli.main(["migrate", "web"]) == 130
    finally:
        done.set()
    assert "the emulator carries on with the migration" in capsys.readouterr().err
