"""Internal snapshots of a qcow2, through a real qemu-storage-daemon and qemu-img, without a guest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vmbus.bus.io.snapshots import DiskSnapshot, SnapshotDisk
from vmbus.errors import DeviceError, VmbusError
from vmbus.machine.qemu.storage_daemon import QemuImages
from vmbus.provision.qemu import find_qemu
from vmbus_devices.scsi.drive import DriveOptions, Format, open_drive
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.image import ImageBackend, ImageFile

from tests.qemu.test_storage_daemon import LIMIT, MIB, children, qemu_img, read, wait

pytestmark = pytest.mark.qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    return path


@pytest.fixture
def backend(image: Path) -> Iterator[ImageBackend]:
    made = ImageBackend(QemuImages(), ImageFile(image, "qcow2", cache=Cache.WRITEBACK), reconnect=0.5)
    yield made
    made.close()
    assert made.wait_closed(LIMIT)
    assert children() == set()


def disk_of(backend: ImageBackend) -> SnapshotDisk:
    assert backend.snapshot_disk is not None
    return backend.snapshot_disk


def names(disk: SnapshotDisk) -> list[str]:
    return [each.name for each in disk.snapshots()]


def write(backend: ImageBackend, text: bytes) -> None:
    """Not flushed: the disk has a write cache."""
    backend.write(0, [memoryview(text.ljust(4096))])


def content(backend: ImageBackend) -> bytes:
    return read(backend, 0, 4096).rstrip()


def test_a_disk_goes_back_and_forth(backend: ImageBackend, image: Path) -> None:
    disk = disk_of(backend)
    backend.lock()
    write(backend, b"10")
    disk.save_snapshot("vmbus-first@1.000000002")
    write(backend, b"41")
    assert content(backend) == b"41"
    assert disk.snapshots() == [DiskSnapshot("vmbus-first@1.000000002", 64 * MIB)]
    disk.load_snapshot("vmbus-first@1.000000002", keep="vmbus-before")
    assert content(backend) == b"10"
    write(backend, b"11")
    assert names(disk) == ["vmbus-first@1.000000002", "vmbus-before"]
    disk.load_snapshot("vmbus-before")
    assert content(backend) == b"41"
    for name in names(disk):
        disk.delete_snapshot(name)
    assert disk.snapshots() == []
    assert content(backend) == b"41"
    backend.unlock()
    wait(lambda: not children(), "end of the daemon")
    assert json.loads(qemu_img("check", "--output=json", image)).get("leaks", 0) == 0


def test_an_image_that_nobody_has_open_stays_closed(backend: ImageBackend) -> None:
    disk = disk_of(backend)
    disk.save_snapshot("one")
    disk.load_snapshot("one", keep="two")
    disk.delete_snapshot("two")
    assert names(disk) == ["one"]
    assert children() == set()


def test_an_overlay_goes_back_alone(tmp_path: Path) -> None:
    """Its backing file is not opened for that, and not changed."""
    base, overlay = tmp_path / "base.img", tmp_path / "overlay.qcow2"
    base.write_bytes(b"base".ljust(MIB))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    file = ImageFile(overlay, "qcow2", cache=Cache.WRITEBACK, backing=(base,))
    backend = ImageBackend(QemuImages(), file)
    disk = disk_of(backend)
    backend.lock()
    disk.save_snapshot("one")
    write(backend, b"overlay")
    disk.load_snapshot("one")
    assert content(backend) == b"base"
    assert base.read_bytes() == b"base".ljust(MIB)
    backend.close()
    assert backend.wait_closed(LIMIT)


def test_a_load_that_fails_changes_nothing(
    backend: ImageBackend, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_of(backend)
    backend.lock()
    write(backend, b"10")
    with pytest.raises(DeviceError, match="none"):
        disk.load_snapshot("none", keep="before")
    assert (content(backend), names(disk)) == (b"10", [])
    with pytest.raises(DeviceError):
        disk.delete_snapshot("none")
    disk.save_snapshot("one")
    with pytest.raises(DeviceError, match="one"):
        disk.save_snapshot("one")
    assert content(backend) == b"10"


def test_an_image_that_somebody_else_took_is_refused(backend: ImageBackend, image: Path) -> None:
    disk = disk_of(backend)
    disk.save_snapshot("one")
    other = ImageBackend(QemuImages(), ImageFile(image, "qcow2", cache=Cache.WRITEBACK))
    other.claim(LIMIT)
    with pytest.raises(VmbusError, match="lock"):
        disk.save_snapshot("two")
    with pytest.raises(VmbusError, match="lock"):
        disk.load_snapshot("one", keep="two")
    assert names(disk) == ["one"]
    other.close()
    assert other.wait_closed(LIMIT)


def test_a_daemon_that_was_killed_leaves_nothing_to_keep(backend: ImageBackend) -> None:
    """What was acknowledged and not flushed may be missing in the image: the guest's memory has it as written."""
    disk = disk_of(backend)
    backend.lock()
    write(backend, b"old")
    disk.save_snapshot("old")
    write(backend, b"10")
    [child] = children()
    os.kill(child, signal.SIGSTOP)
    backend.unlock()
    os.kill(child, signal.SIGKILL)
    with pytest.raises(DeviceError, match="did not end properly"):
        disk.save_snapshot("one")
    assert names(disk) == ["old"]
    disk.load_snapshot("old", keep="before")  # the image as it is then is of no matter
    disk.delete_snapshot("before")
    backend.lock()
    assert content(backend) == b"old"
    disk.save_snapshot("one")
    assert names(disk) == ["old", "one"]


@pytest.mark.parametrize(
    "options",
    [
        {"format": Format.QCOW2, "readonly": True},
        {"format": Format.QCOW2, "data_file": "data"},
        {"format": Format.VDI},
        {"format": Format.RAW},
    ],
)
def test_disks_without_snapshots_of_their_own(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "disk"
    more = ["-o", f"data_file={tmp_path / 'data'}"] if "data_file" in options else []
    if more:
        options["data_file"] = str(tmp_path / "data")
    qemu_img("create", "-q", "-f", options["format"].value, *more, path, "1M")
    unit = open_drive(DriveOptions(str(path), cache=Cache.WRITEBACK, **options), "d", QemuImages())
    assert unit.backend.snapshot_disk is None
    unit.close()
    assert unit.backend.wait_closed(LIMIT)


def test_qemu_img_opens_no_other_file(tmp_path: Path, image: Path, backend: ImageBackend) -> None:
    """An image that was exchanged for one with an external data file after it was opened."""
    data = tmp_path / "data"
    disk = disk_of(backend)
    image.unlink()
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, "64M")
    before = data.read_bytes()
    with pytest.raises(VmbusError, match="keeps its data in"):
        disk.save_snapshot("one")
    with pytest.raises(VmbusError, match="keeps its data in"):
        disk.load_snapshot("one")
    assert data.read_bytes() == before


def test_a_tag_is_no_option_of_qemu_img(backend: ImageBackend) -> None:
    disk = disk_of(backend)
    disk.save_snapshot("-l;$(x) ü")
    disk.load_snapshot("-l;$(x) ü")
    assert names(disk) == ["-l;$(x) ü"]


def test_where_there_is_no_qemu_img(backend: ImageBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = disk_of(backend)
    disk.save_snapshot("one")
    monkeypatch.setattr(type(find_qemu()), "qemu_img", lambda self: ("/nonexistent/qemu-img",))
    with pytest.raises((DeviceError, subprocess.SubprocessError), match="qemu-img"):
        disk.load_snapshot("one", keep="before")
