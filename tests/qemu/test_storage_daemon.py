"""Images of QEMU's formats through a real qemu-storage-daemon, without a guest."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmbus.errors import UsageError, UserError
from vmbus.machine.qemu.storage_daemon import QemuImages
from vmbus.provision.qemu import find_qemu
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
    backend = opened(overlay)
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
