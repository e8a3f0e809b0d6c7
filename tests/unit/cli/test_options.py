"""What the command line says before anything is started."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from vmbus.cli import main, parser
from vmbus.cli.options import DEFAULT_DEVICES, device_lines, size


@pytest.mark.parametrize("verb", [["run"], ["attach"], ["attach", "--qmp", "nowhere"]])
def test_device_help_lists_devices(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--device", "help"])
    assert not ended.value.code
    assert "\nheartbeat " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["echo,help", "echo,monitor=on,help"])
def test_device_help_of_one_lists_its_options(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--device", text])
    assert not ended.value.code
    assert "monitor=<on|off>" in capsys.readouterr().out


def test_device_help_of_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--device", "scis,help"])
    assert ended.value.code == 2
    assert "Did you mean scsi?" in capsys.readouterr().err


def test_help_within_a_value_is_a_value() -> None:
    arguments = parser().parse_args(["run", "--device", "scsi,image=a,,help", "--device", "echo"])
    assert arguments.device == ["scsi,image=a,,help", "echo"]


def test_devices_of_two_command_lines_do_not_mix() -> None:
    assert parser().parse_args(["run", "--device", "echo"]).device == ["echo"]
    assert parser().parse_args(["run"]).device == []


def test_default_devices_come_first_unless_configured() -> None:
    arguments = parser().parse_args(["run", "--device", "echo", "--device", "heartbeat,interval=1"])
    assert device_lines(arguments) == ["shutdown", "timesync", "echo", "heartbeat,interval=1"]
    assert device_lines(parser().parse_args(["run"])) == list(DEFAULT_DEVICES)
    assert device_lines(parser().parse_args(["run", "--no-default-devices"])) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["snapshot", "save"], "save takes [NAME] TAG"),
        (["snapshot", "load", "a", "b", "c"], "load takes [NAME] TAG"),
        (["snapshot", "list", "a", "b"], "list takes [NAME]\n"),
        (["status", "--", "ls"], "takes no command after --"),
    ],
)
def test_used_wrongly(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_qemu_args_wants_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qemu-args", "--dir", str(tmp_path / "none")]) == 2
    assert "there is no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "mib"), [("512", 512), ("512M", 512), ("2G", 2048), ("1024KiB", 1)])
def test_sizes(text: str, mib: int) -> None:
    assert size(text) == mib << 20


@pytest.mark.parametrize("text", ["", "0", "1.5G", "100K", "many"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)
