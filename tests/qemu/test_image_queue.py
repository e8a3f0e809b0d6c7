"""A queue to a real qemu-storage-daemon: confined as always, on one block node with NBD, and killed."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vmbus.machine.qemu.storage_daemon import QemuImages
from vmbus.provision.qemu import find_qemu
from vmbus_devices.nbd.wire import Command
from vmbus_devices.scsi.file import Cache
from vmbus_devices.scsi.image import ImageFile

from tests.unit.engine.engine_guest import BUFFERS, PAGE, compile_device
from tests.unit.fastpath.image_disk import ImageDisk
from tests.unit.fastpath.test_engine_storage import BLOCK, DISK, request

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    line = [*find_qemu().qemu_img(), "create", "-q", "-f", "qcow2", str(path), str(DISK)]
    subprocess.run(line, check=True)
    return path


@pytest.fixture(params=[Cache.NONE, Cache.WRITEBACK, Cache.DIRECTSYNC], ids=lambda each: each.value)
async def disk(
    device: Path, image: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ImageDisk]:
    monkeypatch.delenv("VMBUS_FASTPATH", raising=False)
    disk = ImageDisk(device, QemuImages(), ImageFile(image, "qcow2", cache=request.param))
    yield disk
    await disk.end()


def packet(number: int, *, write: bool, place: int, inside: int = 0) -> bytes:
    return request(number, write=write, lba=40, blocks=24, place=place, inside=inside)


async def test_both_ways_lead_to_one_disk_and_outlive_its_daemon(disk: ImageDisk) -> None:
    guest, backend = disk.guest, disk.backend
    await disk.until(lambda: backend.queue)
    assert backend.leaves_fua == (backend.cache is not Cache.DIRECTSYNC)
    disk.use()
    written = os.urandom(3 * PAGE)
    guest.memory.write(BUFFERS * PAGE + 1000, written)  # direct I/O could not use it where it is
    guest.give()
    guest.send(packet(1, write=True, place=BUFFERS, inside=1000))
    await asyncio.to_thread(guest.receive, 1)
    found = memoryview(bytearray(len(written)))
    await asyncio.to_thread(backend.read, 40 * BLOCK, [found])
    assert found == written
    again = os.urandom(3 * PAGE)
    await asyncio.to_thread(backend.write, 40 * BLOCK, [memoryview(again)])
    guest.send(packet(2, write=False, place=BUFFERS + 10))
    await asyncio.to_thread(guest.receive, 1)
    assert guest.memory.read((BUFFERS + 10) * PAGE, len(again)) == again
    assert backend.status()["path"] == "vhost-user"
    assert backend.status()["queued"] == 2

    await asyncio.to_thread(backend.client.call, Command.FLUSH, 0, 0, [], 0)  # also where no guest would
    before = backend.queue
    process = backend._server.process  # type: ignore[attr-defined]
    os.kill(process.pid, signal.SIGSTOP)
    guest.send(packet(3, write=True, place=BUFFERS, inside=1000))
    await disk.until(lambda: backend._queues.activity() == (2, 1))
    os.kill(process.pid, signal.SIGKILL)
    await disk.until(lambda: backend.queue not in (0, before))
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [packet(3, write=True, place=BUFFERS, inside=1000)]
    guest.recall()
    await asyncio.to_thread(backend.read, 40 * BLOCK, [found])
    assert found == again  # nobody has done it in between
    disk.use()
    guest.give()
    guest.send(packet(4, write=False, place=BUFFERS + 20))
    await asyncio.to_thread(guest.receive, 1)
    assert guest.memory.read((BUFFERS + 20) * PAGE, len(again)) == again


async def test_a_request_that_is_refused_is_returned_and_the_queue_goes_on(disk: ImageDisk) -> None:
    guest = disk.guest
    await disk.until(lambda: disk.backend.queue)
    disk.unit.blocks *= 2
    disk.use()
    guest.give()
    beyond = request(1, write=False, lba=DISK // BLOCK, blocks=8, place=BUFFERS)
    guest.send(beyond)
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [beyond]
    guest.recall()
    guest.give()
    guest.send(packet(2, write=False, place=BUFFERS))
    await asyncio.to_thread(guest.receive, 1)


async def test_a_queue_whose_rules_are_broken_is_replaced_by_nbd(disk: ImageDisk) -> None:
    backend = disk.backend
    await disk.until(lambda: backend.queue)
    backend._queues._broken("says the test")
    await disk.until(lambda: not backend.queue)
    found = memoryview(bytearray(PAGE))
    await asyncio.to_thread(backend.read, 0, [found])
    assert backend.status()["path"] == "nbd"
    assert backend.client.trouble == ""


async def test_what_cannot_be_read_is_known_at_once_and_costs_no_daemon(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed clusters, whose bytes are others for a while."""
    monkeypatch.delenv("VMBUS_FASTPATH", raising=False)
    raw, image = tmp_path / "raw", tmp_path / "disk.qcow2"
    content = b"".join(hashlib.sha256(b"%d" % each).hexdigest().encode() for each in range(DISK // 64))
    raw.write_bytes(content)
    line = [*find_qemu().qemu_img(), "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(image)]
    await asyncio.to_thread(subprocess.run, line, check=True)
    right = image.read_bytes()
    with image.open("r+b") as file:
        file.seek(len(right) * 3 // 4)
        file.write(bytes([0xFF]) * (len(right) // 4))
    disk = ImageDisk(device, QemuImages(), ImageFile(image, "qcow2", cache=Cache.WRITEBACK))
    guest, backend = disk.guest, disk.backend
    await disk.until(lambda: backend.queue)
    disk.use()
    guest.give()
    last = request(1, write=False, lba=DISK // BLOCK - 8, blocks=8, place=BUFFERS)
    guest.send(last)
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [last]
    errors: list[Exception | None] = []
    found = memoryview(bytearray(PAGE))
    backend.start(DISK - PAGE, [found], PAGE, False, False, errors.append)
    await disk.until(lambda: errors)
    assert isinstance(errors[0], OSError)
    assert errors[0].errno == errno.EIO
    assert backend.client.sessions == 1, errors
    with image.open("r+b") as file:
        file.write(right)
    backend.start(DISK - PAGE, [found], PAGE, False, False, errors.append)
    await disk.until(lambda: errors[1:])
    assert errors[1:] == [None]
    assert found == content[-PAGE:]
    assert backend.client.sessions == 1
    await disk.end()
