"""Images of QEMU's formats through a real qemu-storage-daemon, without a guest."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vmbus.cli.run import make_image
from vmbus.errors import UsageError, UserError, VmbusError
from vmbus.machine.qemu import image_files
from vmbus.machine.qemu.storage_daemon import QemuImages
from vmbus.provision.qemu import find_qemu
from vmbus.sandbox import landlock
from vmbus_devices.scsi.drive import DriveOptions, Format, open_drive
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.image import ImageBackend, ImageFile

pytestmark = pytest.mark.qemu

MIB = 1 << 20
LIMIT = 120.0
Open = Callable[..., ImageBackend]


def qemu_img(*words: object) -> str:
    line = [*find_qemu().qemu_img(), *map(str, words)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    return path


@pytest.fixture
def opened() -> Iterator[Open]:
    backends: list[ImageBackend] = []

    def make(path: Path, format: str = "qcow2", *, reconnect: float = 5.0, **options: object) -> ImageBackend:
        options.setdefault("cache", Cache.WRITEBACK)
        image = ImageFile(path, format, **options)  # type: ignore[arg-type]
        backends.append(ImageBackend(QemuImages(), image, reconnect=reconnect))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()
        assert backend.wait_closed(LIMIT)
    assert children() == set()


def children() -> set[int]:
    """Storage daemons of this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            numbers = (task / "children").read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in numbers:
            with contextlib.suppress(OSError):  # it has ended
                if b"qemu-storage-daemon" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
    return found


def read(backend: ImageBackend, offset: int, length: int) -> bytes:
    view = memoryview(bytearray(length))
    backend.read(offset, [view])
    return bytes(view)


def wait(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels"])
def test_every_format_keeps_what_was_written(tmp_path: Path, opened: Open, format: str) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", format, path, "64M")
    backend = opened(path, format)
    assert backend.size >= 64 * MIB
    backend.lock()
    data = os.urandom(3 * MIB)
    backend.write(MIB + 512, [memoryview(data)[:1000], memoryview(data)[1000:]], fua=True)
    backend.flush()
    assert read(backend, MIB, 4 * MIB) == bytes(512) + data + bytes(MIB - 512)
    backend.unlock()
    wait(lambda: not children(), "end of the daemon")
    qemu_img("convert", "-f", format, "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes()[MIB + 512 :][: len(data)] == data


def test_an_overlay_leaves_what_is_under_it_alone(image: Path, tmp_path: Path, opened: Open) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(os.urandom(4 * MIB))
    before = base.read_bytes()
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", overlay)
    backend = opened(overlay, backing=(base,))
    backend.lock()
    backend.write(4096, [memoryview(bytes(4096))])
    assert read(backend, 0, 4 * MIB) == before[:4096] + bytes(4096) + before[8192:]
    assert base.read_bytes() == before


def test_discarded_blocks_take_no_room_and_zeros_none(image: Path, opened: Open) -> None:
    backend = opened(image)
    backend.lock()
    backend.write(0, [memoryview(os.urandom(16 * MIB))])
    backend.flush()
    assert image.stat().st_blocks * 512 > 16 * MIB
    backend.discard(0, 12 * MIB)
    backend.write_zeroes(12 * MIB, 2 * MIB, unmap=True)
    backend.flush()
    assert image.stat().st_blocks * 512 < 4 * MIB
    assert read(backend, 0, 14 * MIB) == bytes(14 * MIB)
    extents = backend.extents(0, 32 * MIB)
    assert sum(length for _, length, there in extents if there) == 2 * MIB


def test_two_guests_cannot_write_to_one_image(image: Path, opened: Open) -> None:
    first, second = opened(image), opened(image, reconnect=0.1)
    first.lock()
    assert read(first, 0, 512) == bytes(512)
    second.lock()
    with pytest.raises(OSError, match='"write" lock'):
        read(second, 0, 512)
    first.write(0, [memoryview(b"x" * 512)])
    second.unlock()
    first.unlock()
    second.lock()

    def has_it() -> bool:
        try:
            return read(second, 0, 512) == b"x" * 512
        except OSError:
            return False

    wait(has_it, "image that was released")


def test_the_next_one_gets_it_as_soon_as_it_is_let_go_of(image: Path, opened: Open) -> None:
    """As at a migration on one machine, there and back."""
    first, second = opened(image), opened(image)
    for number in range(6):
        here, there = (first, second) if number % 2 == 0 else (second, first)
        here.lock()
        here.write(number * 4096, [memoryview(bytes([number + 1]) * 4096)])
        here.unlock()
        there.lock()
        assert read(there, 0, 4096 * (number + 1)) == b"".join(
            bytes([each + 1]) * 4096 for each in range(number + 1)
        )
        there.unlock()


def test_a_daemon_that_is_killed_is_replaced(image: Path, opened: Open) -> None:
    backend = opened(image)
    backend.lock()
    backend.write(0, [memoryview(b"x" * 4096)])
    backend.flush()
    [child] = children()
    os.kill(child, signal.SIGKILL)
    assert read(backend, 0, 4096) == b"x" * 4096
    backend.write(4096, [memoryview(b"y" * 4096)])
    assert read(backend, 0, 8192) == b"x" * 4096 + b"y" * 4096
    assert backend.client.sessions == 2
    assert child not in children()


def test_an_image_grows_under_its_disk(image: Path, opened: Open) -> None:
    backend = opened(image)
    backend.lock()
    backend.write(0, [memoryview(b"x" * 4096)])
    backend.grow(128 * MIB)
    assert backend.refresh() == 128 * MIB
    backend.write(127 * MIB, [memoryview(b"y" * 4096)])
    assert read(backend, 0, 4096) == b"x" * 4096
    with pytest.raises(UserError, match="cannot resize"):
        backend.grow(MIB)


def test_the_daemon_ends_with_the_emulator_however_that_ends(image: Path) -> None:
    program = f"""
import pathlib, sys, time
from vmbus_devices.scsi.image import ImageBackend, ImageFile
from vmbus_devices.scsi.file import Cache
from vmbus.machine.qemu.storage_daemon import QemuImages
backend = ImageBackend(QemuImages(), ImageFile(pathlib.Path({str(image)!r}), "qcow2", cache=Cache.WRITEBACK))
backend.lock()
backend.write(0, [memoryview(b"x" * 4096)])
print(backend.client._connector._server.process.pid, flush=True)
time.sleep(60)
"""
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as emulator:
        assert emulator.stdout is not None
        daemon = int(emulator.stdout.readline())
        assert Path(f"/proc/{daemon}").exists()
        emulator.kill()
    wait(lambda: not Path(f"/proc/{daemon}").exists(), "end of the daemon")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host that no user names."""
    path = tmp_path / "secret"
    path.write_bytes(b"secret!!" * (MIB // 8))
    return path


@pytest.fixture
def unopened(tmp_path: Path) -> Iterator[Path]:
    """A file of the host that nobody may open: a lease on it (fcntl(2)) shows that somebody tries to."""
    path = tmp_path / "unopened"
    path.write_bytes(bytes(MIB))
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield path
        assert fcntl.fcntl(file, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
        open_drive(DriveOptions(str(path), **{"format": Format.QCOW2, **options}), "d", QemuImages())
    assert children() == set()


@pytest.mark.parametrize("format", ["qcow2", "qcow", "qed", "vmdk"])
def test_a_backing_file_is_opened_only_when_the_user_says_so(
    tmp_path: Path, secret: Path, unopened: Path, format: str
) -> None:
    path = tmp_path / "stranger"
    of = "vmdk" if format == "vmdk" else "raw"
    if of == "vmdk":
        secret.unlink()
        qemu_img("create", "-q", "-f", "vmdk", secret, "1M")
    qemu_img("create", "-q", "-f", format, "-b", secret, "-F", of, path, "1M")
    refused(path, f"names the backing file {secret}; add backing=on", format=Format(format))
    refused(path, "not one of the files in backing=", format=Format(format), backing=str(unopened))
    if format == "qcow":  # it does not record it
        refused(path, "does not say which format", format=Format(format), backing="on")
        return
    for allowed in ("on", f"{unopened};{secret}"):
        options = DriveOptions(str(path), format=Format(format), backing=allowed, cache=Cache.WRITEBACK)
        unit = open_drive(options, "d", QemuImages())
        assert isinstance(unit.backend, ImageBackend)
        unit.backend.lock()
        assert read(unit.backend, 0, 4096) == (bytes(4096) if of == "vmdk" else b"secret!!" * 512)
        unit.close()
        assert unit.backend.wait_closed(LIMIT)


def test_every_backing_file_of_a_chain_has_to_be_allowed(tmp_path: Path, secret: Path, image: Path) -> None:
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", middle)
    qemu_img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    refused(top, f"{middle} names the backing file {secret}, which is not one", backing=str(middle))
    unit = open_drive(
        DriveOptions(str(top), format=Format.QCOW2, backing=f"{secret};{middle}"), "d", QemuImages()
    )
    assert unit.backend.size == MIB
    unit.close()
    for name, message in (
        ("json:{}", "not a file on this machine"),
        ("nbd://127.0.0.1:1/x", "not a file on this machine"),
        (str(tmp_path / "none"), "not a file on this machine"),
    ):
        qemu_img("rebase", "-u", "-F", "raw", "-b", name, top)
        refused(top, message, backing="on")
    qemu_img("rebase", "-u", "-F", "raw", "-b", top, top)  # as raw, it is no chain
    open_drive(DriveOptions(str(top), format=Format.QCOW2, backing="on"), "d", QemuImages()).close()
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", top, top)
    refused(top, "more than 64 backing files", backing="on")


def test_a_qcow2_writes_to_no_data_file_that_it_names_itself(
    tmp_path: Path, secret: Path, unopened: Path
) -> None:
    path, data = tmp_path / "stranger", tmp_path / "datafile"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", path, "1M")
    content = path.read_bytes()
    assert content.count(str(data).encode()) == 1
    path.write_bytes(content.replace(str(data).encode(), str(unopened).encode()))
    refused(path, f"keeps its data in the file {unopened}")
    path.write_bytes(content)
    refused(path, f"keeps its data in the file {data}; add data_file=")
    refused(path, f"keeps its data in the file {data}", backing="on")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", top)
    refused(top, f"{path}: it keeps its data in", backing="on")
    options = DriveOptions(str(path), format=Format.QCOW2, data_file=str(secret), cache=Cache.WRITEBACK)
    unit = open_drive(options, "d", QemuImages())
    assert isinstance(unit.backend, ImageBackend)
    unit.backend.lock()
    unit.backend.write(0, [memoryview(b"x" * 4096)])
    unit.backend.flush()
    unit.close()
    assert unit.backend.wait_closed(LIMIT)
    assert b"x" * 4096 in secret.read_bytes()
    assert data.read_bytes() == bytes(MIB)


def test_a_data_file_that_an_image_has_not(image: Path, secret: Path) -> None:
    refused(image, "has no external data file", data_file=str(secret))


@pytest.mark.parametrize("embedded", [False, True])
def test_a_vmdk_opens_no_extent_unless_the_user_says_so(
    tmp_path: Path, secret: Path, unopened: Path, embedded: bool
) -> None:
    path = tmp_path / "stranger.vmdk"

    def write(name: Path) -> None:
        text = (
            '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            f'RW 2048 FLAT "{name}" 0\n'
        ).encode()
        header = b"KDMV" + struct.pack("<IIQQQ", 1, 3, 0, 128, 1) if embedded else b""
        path.write_bytes((header.ljust(512, b"\0") if embedded else b"") + text.ljust(4096))

    write(unopened)
    refused(path, f"its data are in {unopened}; add extents=on", format=Format.VMDK, backing="on")
    write(secret)
    refused(path, f"its data are in {secret}", format=Format.VMDK)
    options = DriveOptions(str(path), format=Format.VMDK, extents=True, cache=Cache.WRITEBACK)
    unit = open_drive(options, "d", QemuImages())
    assert isinstance(unit.backend, ImageBackend)
    unit.backend.lock()
    assert read(unit.backend, 0, 4096) == b"secret!!" * 512
    unit.close()
    assert unit.backend.wait_closed(LIMIT)


def test_what_the_daemon_has_open_is_compared_with_what_was_allowed(
    tmp_path: Path, image: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that changes after it was looked at, or a name that was overlooked."""
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret}", overlay, "1M")
    monkeypatch.setattr(image_files, "check_names", lambda *arguments, **more: None)
    if landlock.version():
        refused(overlay, "Permission denied")  # the kernel refuses it before anything is compared
    monkeypatch.setattr(landlock, "version", lambda: 0)
    refused(overlay, f"opens {secret}, which ")

    def examine(image: image_files.Image, execute: image_files.Execute) -> image_files.Chain:
        found = image_files.examine(dataclasses.replace(image, data_file=secret), execute)  # type: ignore[type-var]
        [level] = found.levels
        return image_files.Chain((dataclasses.replace(level, files=level.files[:1]),))

    monkeypatch.setattr("vmbus.machine.qemu.storage_daemon.examine", examine)
    refused(overlay, f"opens {secret}, which ")


def test_an_image_that_was_looked_at_is_opened_by_one_daemon_and_looked_at_again_when_it_has_changed(
    tmp_path: Path, image: Path, secret: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest waits meanwhile."""
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    overlay = tmp_path / "overlay.qcow2"
    for each in (first, second):
        qemu_img("create", "-q", "-f", "qcow2", each, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", first, "-F", "qcow2", overlay)
    looks: list[object] = []

    def examine(image: image_files.Image, execute: image_files.Execute) -> image_files.Chain:
        looks.append(image)
        return image_files.examine(image, execute)

    monkeypatch.setattr("vmbus.machine.qemu.storage_daemon.examine", examine)
    backend = opened(overlay, backing=(first, second))
    assert len(looks) == 1
    before = children()

    def open_again() -> set[str]:
        """Lock and unlock it; return the files that its daemon had open."""
        backend.lock()
        backend.claim(30)
        [process] = children() - before
        found = {str(each.readlink()) for each in Path(f"/proc/{process}/fd").iterdir()}
        backend.unlock()
        wait(lambda: children() == before, "the end of the daemon")
        return found & {str(first), str(second), str(overlay)}

    for _ in range(2):
        assert open_again() == {str(first), str(overlay)}
    assert len(looks) == 1
    qemu_img("rebase", "-u", "-b", second, "-F", "qcow2", overlay)
    assert open_again() == {str(second), str(overlay)}
    assert len(looks) == 2
    qemu_img("rebase", "-u", "-b", secret, "-F", "raw", overlay)
    backend.lock()
    with pytest.raises(VmbusError, match="which is not one of the files in backing="):
        backend.claim(10)


def test_an_overlay_grows_without_showing_what_is_under_it(
    tmp_path: Path, secret: Path, opened: Open
) -> None:
    """A base that is longer than its overlay: what is new reads as zeros."""
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", overlay, "512K")
    backend = opened(overlay, backing=True)
    backend.lock()
    assert read(backend, 0, 4096) == b"secret!!" * 512
    backend.grow(MIB)
    assert backend.refresh() == MIB
    assert read(backend, MIB // 2 - 4096, 8192) == b"secret!!" * 512 + bytes(4096)


def test_an_image_for_snapshots_names_no_other_file(tmp_path: Path, secret: Path) -> None:
    path = tmp_path / "snapshots.qcow2"
    make_image(find_qemu(), path)
    make_image(find_qemu(), path)
    path.unlink()
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret}", path, "64K")
    with pytest.raises(UserError, match=f"keeps its data in the file {secret}"):
        make_image(find_qemu(), path)


def test_images_that_cannot_be_used(tmp_path: Path, image: Path) -> None:
    images = QemuImages()
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(MIB))
    for options, message in (
        (DriveOptions(str(raw), format=Format.QCOW2), "not in qcow2 format"),
        (DriveOptions(str(tmp_path / "no"), format=Format.QCOW2), "No such file"),
        (DriveOptions(None, format=Format.QCOW2), "needs image="),
        (DriveOptions("nbd://host/x", format=Format.QCOW2), "raw data"),
    ):
        with pytest.raises(UserError, match=message):
            open_drive(options, "d", images)
    with pytest.raises(UsageError, match="needs qemu-storage-daemon"):
        open_drive(DriveOptions(str(image), format=Format.QCOW2), "d")
    assert children() == set()


def test_auto_finds_qcow2_and_nothing_else(tmp_path: Path, image: Path) -> None:
    vdi = tmp_path / "disk.vdi"
    qemu_img("create", "-q", "-f", "vdi", vdi, "64M")
    for path, kind, size in ((image, "image", 64 * MIB), (vdi, "file", vdi.stat().st_size)):
        unit = open_drive(DriveOptions(str(path), format=Format.AUTO), "d", QemuImages())
        assert (unit.backend.status()["backend"], unit.backend.size) == (kind, size)
        unit.close()
