"""Mistakes that a user makes at the command line: each is one sentence that says what to do, and a status."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.cli import main
from vmbus.cli.run import make_image
from vmbus.devices.registry import Registry
from vmbus.errors import DeviceError, QemuUnsuitable, UserError
from vmbus.machine.qemu.image_files import check_names
from vmbus.machine.qemu.qmp import Qmp


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["run", "ls", "-l"],
            "vmbus run: unrecognized arguments: ls -l; a command for the guest is written behind --",
        ),
        (["run", "--devise", "echo"], "--devise echo; `vmbus run --help` shows what it takes"),
        (["status", "web", "db"], "vmbus status: unrecognized arguments: db; `vmbus status --help`"),
        (["device", "remove", "a", "b", "c"], "vmbus device: unrecognized arguments: c"),
        (["snapshot", "save"], "save takes [NAME] TAG: the name of the snapshot is missing"),
        (["run", "--initrd", "/nowhere/initrd"], "--initrd /nowhere/initrd: there is no such file"),
        (["run", "--device", "scsi,image="], "image= names nothing; write a file"),
        (
            ["run", "--device", "scsi,image=http://host/x"],
            "NBD is the only protocol; write nbd://HOST/EXPORT",
        ),
        (["run", "--device", "scsi,imagee=x"], "scsi has no option 'imagee'. Did you mean image=?"),
        (
            ["run", "--incoming", "tcp:0:99999"],
            "tcp:0:99999: there is no port 99999; write a number up to 65535",
        ),
        (["migrate", "web", "tcp:host:65536"], "tcp:host:65536: there is no port 65536"),
    ],
)
def test_a_mistake(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "run":
        words = [*words[:1], "--dry-run", "--sandbox", "off", *words[1:]]
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_choice_is_explained_in_words_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--switchover", "later"])
    assert ended.value.code == 2
    assert "'later' is neither of the two ways; write own or observe" in capsys.readouterr().err


def test_a_missing_action_is_named_by_what_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["snapshot"])
    assert "required: {save,load,list,delete}" in capsys.readouterr().err


def test_an_image_for_snapshots_that_is_something_else(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(UserError, match="it is not a qcow2 image; name one, or a new file"):
        make_image(None, path)  # type: ignore[arg-type]


def test_an_image_of_another_format_is_not_called_a_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    with pytest.raises(DeviceError, match="it is not a VMDK of one file; write the format that it has"):
        check_names(path, "vmdk")


def test_an_empty_default_is_not_shown() -> None:
    assert "(default )" not in Registry().help("scsi")


async def test_no_qemu_at_a_socket(tmp_path: Path) -> None:
    with pytest.raises(
        QemuUnsuitable, match="No such file or directory; start QEMU with the options that `vmbus qemu-args`"
    ):
        await Qmp.connect(str(tmp_path / "qmp.sock"))
