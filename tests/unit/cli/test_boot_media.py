"""``vmbus run --cdrom``, ``--disk-boot``, ``--firmware``: what QEMU is given, and what is refused before that."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest
from vmbus.cli import main, parser, run
from vmbus.errors import MissingRequirement, UsageError
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.boot_media import BootDisk, BootMedia
from vmbus.machine.qemu.launch import GuestOptions, command_line
from vmbus.machine.rundir import RunDirectory
from vmbus.provision import cache, firmware
from vmbus.sandbox.landlock import CHANGE, IOCTL_DEV, READ

QCOW2_WITH_DATA_FILE = (
    b"QFI\xfb"
    + (3).to_bytes(4, "big")
    + bytes(12)
    + (16).to_bytes(4, "big")  # cluster_bits
    + bytes(48)
    + (4).to_bytes(8, "big")  # incompatible features: an external data file
    + bytes(20)
    + (104).to_bytes(4, "big")
)


def image(folder: Path, name: str = "image", size: int = 65536) -> Path:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def options(line: list[str], name: str) -> list[str]:
    return [line[at + 1] for at, word in enumerate(line) if word == name]


def line_of(media: BootMedia, kernel: Path | None = None) -> list[str]:
    directory = RunDirectory(Path("/run/me/vm"), Path("/dev/shm/vm"))
    return command_line(("qemu",), directory, None, GuestOptions(kernel=kernel, media=media))


def test_a_guest_without_a_kernel_boots_the_disk_before_the_cd_rom(tmp_path: Path) -> None:
    media = BootMedia(BootDisk(image(tmp_path, "a,b"), "qcow2"), image(tmp_path, "cd.iso"))
    line = line_of(media)
    assert not {"-kernel", "-append", "-initrd", "-bios"} & set(line)
    assert "graphics=off" in line  # SeaBIOS and its boot loaders print on the serial port, too
    disk, cdrom = map(json.loads, options(line, "-blockdev"))
    assert disk["driver"] == "qcow2"
    assert disk["backing"] is None
    assert disk["file"]["filename"] == str(tmp_path / "a,b")
    assert cdrom["driver"] == "raw"
    assert cdrom["read-only"] is cdrom["file"]["read-only"] is True
    assert [each.split(",")[0] for each in options(line, "-device")] == ["ide-hd", "ide-cd"]
    assert [each.rpartition("=")[2] for each in options(line, "-device")] == ["0", "1"]


@pytest.mark.parametrize(("size", "option"), [(4 << 20, "-bios"), (3653632, "pflash0=vmbus-firmware")])
def test_a_firmware_is_a_bios_or_a_flash_memory(tmp_path: Path, size: int, option: str) -> None:
    line = line_of(BootMedia(firmware=image(tmp_path, size=size)), Path("vmlinuz"))
    assert option in line
    assert "-kernel" in line


def test_the_sandbox_lets_qemu_read_the_cd_rom_and_write_the_disk(tmp_path: Path) -> None:
    media = BootMedia(BootDisk(image(tmp_path, "disk")), image(tmp_path, "cd.iso"), image(tmp_path, "rom"))
    line = line_of(media)
    limits = confined.qemu(("qemu",), line, tmp_path / "run")
    rights = {each.path.name: each.rights for each in limits.access or ()}
    assert rights["disk"] == CHANGE
    assert rights["cd.iso"] == READ | IOCTL_DEV
    assert rights["rom"] == READ


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("/a/b.img", BootDisk(Path("/a/b.img"))),
        ("/a,,b.img,format=qcow2", BootDisk(Path("/a,b.img"), "qcow2")),
    ],
)
def test_a_disk_names_its_format(text: str, disk: BootDisk) -> None:
    assert BootDisk.parse(text) == disk


@pytest.mark.parametrize("text", ["a.img,format=host", "a.img,readonly=on", ",format=raw", "a.img,b"])
def test_a_disk_that_is_written_wrongly(text: str) -> None:
    with pytest.raises(UsageError, match="--disk-boot"):
        BootDisk.parse(text)


def test_an_image_that_names_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(QCOW2_WITH_DATA_FILE)
    with pytest.raises(UsageError, match="names another file"):
        BootMedia(BootDisk(path, "qcow2")).check()


@pytest.mark.parametrize("option", ["cdrom", "disk", "flash", "bios"])
def test_a_name_that_qemu_s_json_cannot_express_is_said_at_once(option: str, tmp_path: Path) -> None:
    path = image(tmp_path, os.fsdecode(b"b\xfcroot"), 65536 if option != "flash" else 1000)
    if option == "bios":  # is no JSON
        BootMedia(firmware=path).check()
        return
    media = {
        "cdrom": BootMedia(cdrom=path),
        "disk": BootMedia(BootDisk(path)),
        "flash": BootMedia(firmware=path),
    }[option]
    with pytest.raises(UsageError, match=r"b\?root: the name is not valid UTF-8"):
        media.check()


def test_a_device_file_is_no_image() -> None:
    with pytest.raises(UsageError, match="neither a file nor a block device"):
        BootMedia(cdrom=Path(os.devnull)).check()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cdrom", "/none.iso"], "--cdrom /none.iso: No such file or directory; name a file"),
        (["--disk-boot"], "--device scsi"),
        (["--cdrom", "CD", "--append", "debug"], "--append is for a Linux kernel"),
        (["--cdrom", "CD", "--root", "/dev/sda1"], "--root is for a Linux kernel"),
        (["--cdrom", "CD", "--", "true"], "a command after -- is for a Linux kernel"),
        (["--firmware", "/none.fd"], "--firmware /none.fd: No such file"),
        (["--cdrom", "CD", "--fast-boot"], "--fast-boot is for a Linux kernel"),
        (["--kernel", "CD", "--fast-boot"], "--fast-boot is for the embedded guests"),
    ],
)
def test_what_cannot_be_booted_is_said_at_once(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(image(tmp_path)) if word == "CD" else word for word in words]
    assert main(["run", "--dry-run", "--sandbox", "off", *given]) == 2
    assert said in capsys.readouterr().err


def test_ovmf_is_of_this_machine_or_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingRequirement, match="vmbus setup --firmware"):
        firmware.find_firmware(tmp_path, ())
    place = tmp_path / "firmware/ovmf-1"
    with cache.filling(place, {"image": "OVMF.fd"}) as temporary:
        image(temporary, "OVMF.fd")
    assert firmware.find_firmware(tmp_path, ()) == place / "OVMF.fd"
    own = image(tmp_path, "own.fd")
    assert firmware.find_firmware(tmp_path, (tmp_path / "none", own)) == own

    monkeypatch.setattr(run, "find_firmware", lambda: own)
    arguments = run_arguments("--firmware", "ovmf", "--cdrom", str(own))
    assert run._media(arguments) == BootMedia(cdrom=own, firmware=own)


def run_arguments(*words: str) -> argparse.Namespace:
    arguments = parser().parse_args(["run", *words])
    arguments.command = []
    return arguments
