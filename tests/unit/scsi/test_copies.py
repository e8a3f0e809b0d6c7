"""Snapshots of a raw file: copies that are complete, private, found again, and put back whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError, UsageError, UserError
from vmbus_devices.scsi import copies
from vmbus_devices.scsi.copies import FileCopies
from vmbus_devices.scsi.drive import DriveOptions, Format, open_drive
from vmbus_devices.scsi.file import FileBackend

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "copies"
    folder.mkdir()
    return folder


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[FileBackend]:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    backend = FileBackend(image)
    backend.lock()
    yield backend
    backend.close()


@pytest.fixture
def disk(backend: FileBackend, folder: Path) -> FileCopies:
    return FileCopies(backend, folder)


def fill(backend: FileBackend, at: int, text: bytes) -> None:
    with backend.path.open("r+b") as file:
        file.seek(at)
        file.write(text.ljust(4096, b"."))


def content(backend: FileBackend) -> bytes:
    return backend.path.read_bytes()


def test_a_disk_goes_back_and_forth_with_its_holes(
    backend: FileBackend, disk: FileCopies, folder: Path
) -> None:
    fill(backend, MIB, b"first")
    first = content(backend)
    disk.save_snapshot("vmbus-tag@1.000000002")
    assert list(disk.snapshots()) == [DiskSnapshot("vmbus-tag@1.000000002", SIZE)]
    [copy] = folder.iterdir()
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.stat().st_blocks * 512 < MIB  # the holes are not copied
    fill(backend, MIB, b"second")
    fill(backend, 5 * MIB, b"more")
    second = content(backend)
    disk.load_snapshot("vmbus-tag@1.000000002", keep="vmbus-before@3")
    assert content(backend) == first
    assert backend.path.stat().st_blocks * 512 < MIB
    disk.load_snapshot("vmbus-before@3")
    assert content(backend) == second
    for each in disk.snapshots():
        disk.delete_snapshot(each.name)
    assert list(folder.iterdir()) == []
    assert content(backend) == second


@pytest.mark.parametrize("name", ["web/before", "ä%2F\n", "..", "a.part"])
def test_any_name_of_a_snapshot_is_a_file_in_the_folder(disk: FileCopies, folder: Path, name: str) -> None:
    disk.save_snapshot(name)
    assert [each.name for each in disk.snapshots()] == [name]
    assert len(list(folder.iterdir())) == 1
    disk.delete_snapshot(name)
    assert list(folder.iterdir()) == []


def test_a_name_that_no_file_can_have_is_refused(disk: FileCopies) -> None:
    with pytest.raises(DeviceError, match="too long for a file; choose a shorter name"):
        disk.save_snapshot("n" * 250)


def test_files_of_one_name_have_their_own_copies(tmp_path: Path, disk: FileCopies, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "disk.img").write_bytes(bytes(4096))
    second = FileBackend(other / "disk.img")
    FileCopies(second, folder).save_snapshot("one")
    second.close()
    assert disk.snapshots() == []


def test_without_copy_file_range(
    backend: FileBackend, disk: FileCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    fill(backend, 0, b"first")
    fill(backend, SIZE - 4096, b"last")
    before = content(backend)
    monkeypatch.setattr(os, "copy_file_range", refused)
    disk.save_snapshot("one")
    fill(backend, 0, b"changed")
    disk.load_snapshot("one", keep="two")
    assert content(backend) == before


def test_a_copy_that_fails_leaves_nothing(
    backend: FileBackend, disk: FileCopies, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(backend, 0, b"data")
    (folder / ".another").touch()
    with monkeypatch.context() as patch:
        patch.setattr(copies, "_copy_range", full)
        with pytest.raises(DeviceError, match=r"cannot be made in .*: No space left on device"):
            disk.save_snapshot("one")
    assert [each.name for each in folder.iterdir()] == [".another"]
    disk.save_snapshot("one")
    with pytest.raises(DeviceError, match="already"):
        disk.save_snapshot("one")
    with pytest.raises(DeviceError, match="No such file"):
        disk.load_snapshot("none", keep="kept")
    with pytest.raises(DeviceError, match="No such file"):
        disk.delete_snapshot("none")
    assert [each.name for each in disk.snapshots()] == ["one"]


def test_what_a_process_left_that_ended_is_removed(disk: FileCopies, folder: Path) -> None:
    disk.save_snapshot("one")
    [copy] = folder.iterdir()
    copy.rename(folder / f".{copy.name}")
    assert disk.snapshots() == []
    disk.save_snapshot("two")
    assert [each.name for each in disk.snapshots()] == ["two"]
    assert len(list(folder.iterdir())) == 1


def test_a_disk_that_cannot_be_put_back_is_as_it_was(
    backend: FileBackend, disk: FileCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in (0, MIB, 2 * MIB):
        fill(backend, at, b"old")
    disk.save_snapshot("one")
    for at in (0, MIB, 2 * MIB, 3 * MIB):
        fill(backend, at, b"new")
    before = content(backend)
    calls = 0
    work = copies._copy_range

    def second_fails(source: int, target: int, at: int, length: int) -> int:
        nonlocal calls
        if os.fstat(target).st_ino == backend.path.stat().st_ino:
            calls += 1
            if calls == 2:
                full()
        return work(source, target, at, length)

    monkeypatch.setattr(copies, "_copy_range", second_fails)
    with pytest.raises(DeviceError, match="cannot be put back"):
        disk.load_snapshot("one", keep="kept")
    assert calls > 2
    assert content(backend) == before
    assert [each.name for each in disk.snapshots()] == ["one"]


def test_the_last_part_of_a_block_belongs_to_the_disk(tmp_path: Path, folder: Path) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(b"x" * 1000)
    backend = FileBackend(image)
    backend.round_up(512)
    disk = FileCopies(backend, folder)
    disk.save_snapshot("one")
    assert disk.size == 1024
    assert list(disk.snapshots()) == [DiskSnapshot("one", 1024)]
    disk.load_snapshot("one")
    assert image.read_bytes() == b"x" * 1000
    backend.close()


def test_a_planted_link_is_not_followed(backend: FileBackend, disk: FileCopies, folder: Path) -> None:
    disk.save_snapshot("one")
    [copy] = folder.iterdir()
    copy.rename(folder / "elsewhere")
    copy.symlink_to(folder / "elsewhere")
    assert disk.snapshots() == []
    with pytest.raises(DeviceError, match="Too many levels of symbolic links"):
        disk.load_snapshot("one")


def test_folders_that_are_refused(tmp_path: Path, backend: FileBackend, folder: Path) -> None:
    with pytest.raises(UserError, match="not a folder that can be written to; make it first"):
        FileCopies(backend, tmp_path / "none")
    folder.chmod(0o777)
    with pytest.raises(UserError, match="other users can write to"):
        FileCopies(backend, folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"readonly": True}, "disks that the guest writes to"),
        ({"format": Format.QCOW2}, "a qcow2 keeps its snapshots in itself"),
        ({"image": "nbd://localhost"}, "applies only to raw files"),
        ({"image": None, "format": Format.MEMORY}, "applies only to raw files"),
    ],
)
def test_disks_that_have_no_copies(
    tmp_path: Path, folder: Path, options: dict[str, object], said: str
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    with pytest.raises(UsageError, match=said):
        open_drive(DriveOptions(**{"image": str(image), "copies": str(folder), **options}), "d")  # type: ignore[arg-type]


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
