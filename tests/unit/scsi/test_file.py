"""Images in files: every cache mode, direct I/O, discards, sizes, locks, and CD-ROMs."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from vmbus.errors import DeviceError, UserError
from vmbus.ports import PAGE_SIZE
from vmbus.wire.scsi import Sense
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.drive import DriveOptions, open_drive
from vmbus_devices.scsi.file import Cache, FileBackend

from tests.unit.scsi.scsi_guest import IN, OUT, ScsiGuest, controller

MIB = 1 << 20
READ_10 = struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0)
WRITE_10 = struct.pack(">BBIBHB", 0x2A, 0, 0, 0, 1, 0)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def aligned(data: bytes) -> memoryview:
    view = memoryview(mmap.mmap(-1, len(data)))
    view[:] = data
    return view


def test_data_may_be_in_more_pieces_than_a_system_call_takes(image: Path) -> None:
    disk = Disk(FileBackend(image, cache=Cache.WRITEBACK), "scattered")
    with ScsiGuest(controller(disk)) as guest:
        guest.negotiate()
        # Each range crosses the end of a page: two pieces.
        ranges = [(64, PAGE_SIZE - 32, [1024 + 2 * (n % 256), 512 + 2 * (n % 256)]) for n in range(1024)]
        for opcode, direction in ((0x2A, OUT), (0x28, IN)):
            payload = guest.srb(
                struct.pack(">BBIBHB", opcode, 0, 0, 0, 128, 0), length=65536, direction=direction
            )
            guest.send(payload, transaction_id=opcode, completion_requested=True, ranges=ranges)
            guest.run()
            assert [answer.good for answer in guest.answers()] == [True]


@pytest.mark.parametrize("cache", list(Cache))
def test_every_cache_mode_keeps_what_was_written(image: Path, cache: Cache) -> None:
    backend = FileBackend(image, cache=cache)
    data = os.urandom(8192)
    backend.write(4096, [aligned(data[:4096]), aligned(data[4096:])], fua=True)
    backend.flush()
    back = [aligned(bytes(4096)), aligned(bytes(4096))]
    backend.read(4096, back)
    assert b"".join(back) == data
    backend.close()
    assert image.read_bytes()[4096:12288] == data


def test_what_the_guest_sees_of_the_cache_mode(image: Path) -> None:
    seen = {
        cache.value: (backend.write_cache, backend.flush_needed)
        for cache in Cache
        for backend in [FileBackend(image, cache=cache)]
    }
    assert seen == {
        "none": (True, True),
        "writeback": (True, True),
        "writethrough": (False, False),
        "directsync": (False, False),
        "unsafe": (True, False),
    }


def test_discarded_blocks_take_no_room_and_read_as_zeros(image: Path) -> None:
    backend = FileBackend(image, cache=Cache.WRITEBACK)
    before = image.stat().st_blocks
    backend.discard(0, MIB // 2)
    assert image.read_bytes()[: MIB // 2] == bytes(MIB // 2)
    assert image.stat().st_size == MIB
    assert image.stat().st_blocks < before
    assert backend.extents(0, MIB) == [(0, MIB // 2, False), (MIB // 2, MIB // 2, True)]


@pytest.mark.parametrize("unmap", [False, True])
def test_zeros_are_written_without_data(image: Path, unmap: bool) -> None:
    backend = FileBackend(image)
    backend.write_zeroes(512, 8192, unmap=unmap)
    assert image.read_bytes()[512 : 512 + 8192] == bytes(8192)
    assert image.read_bytes()[:512].strip(b"\0")


def test_an_image_that_shrank_gives_errors_and_no_stale_data(image: Path) -> None:
    backend = FileBackend(image, cache=Cache.WRITEBACK)
    os.truncate(image, 4096)
    with pytest.raises(OSError, match="ends at"):
        backend.read(0, [aligned(bytes(8192))])
    assert backend.refresh() == 4096


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize(("block", "tail"), [(512, 100), (512, 511), (4096, 512), (4096, 1)])
def test_an_image_whose_end_is_no_whole_block_keeps_its_end(
    image: Path, cache: str, block: int, tail: int
) -> None:
    content = os.urandom(tail)
    with image.open("ab") as file:
        file.write(content)
    options = DriveOptions(str(image), cache=Cache(cache), block=block)
    unit = open_drive(options, "d")
    device = controller(unit)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        last = MIB // block
        assert unit.blocks == last + 1
        answer = guest.command(struct.pack(">BBIBHB", 0x28, 0, last, 0, 1, 0), read=block, offset=8)
        assert answer.data == content.ljust(block, b"\0")
        assert not device.resize(0, 0)
        answer = guest.command(struct.pack(">BBIBHB", 0x28, 0, last - 1, 0, 2, 0), read=2 * block, offset=8)
        assert answer.data[block:] == content.ljust(block, b"\0")
        assert image.stat().st_size == MIB + tail
        assert guest.command(
            struct.pack(">BBIBHB", 0x2A, 0, last, 0, 1, 0), write=b"x" * block, offset=8
        ).good
        assert not device.resize(0, 0)
    device.stop()
    assert image.read_bytes()[MIB:] == b"x" * block


def test_a_disc_whose_end_is_no_whole_block_keeps_its_end(disc: Path) -> None:
    with disc.open("ab") as file:
        file.write(b"the end")
    with ScsiGuest(controller(open_drive(DriveOptions(str(disc)), "cd"))) as guest:
        guest.negotiate()
        answer = guest.command(struct.pack(">BBIBHB", 0x28, 0, 300, 0, 1, 0), read=2048, offset=8)
        assert answer.data == b"the end".ljust(2048, b"\0")
        assert guest.command(bytes((0x25,)), read=8).data == struct.pack(">II", 300, 2048)


def test_a_state_of_a_release_that_left_the_end_out_is_taken(image: Path) -> None:
    os.truncate(image, MIB - 100)
    device = controller(open_drive(DriveOptions(str(image)), "d"))
    with ScsiGuest(device) as guest:
        guest.negotiate()
        state = device.save()
        old = state.replace(struct.pack("<Q", MIB // 512), struct.pack("<Q", MIB // 512 - 1))
        assert old != state
        other = controller(open_drive(DriveOptions(str(image)), "d"))
        other.restore(old)
        assert other.units[0, 0].attentions == [Sense.CAPACITY_CHANGED]
        os.truncate(image, MIB)
        other = controller(open_drive(DriveOptions(str(image)), "d"))
        with pytest.raises(DeviceError, match="another number of blocks"):
            other.restore(old)


def test_only_one_guest_writes_to_an_image(image: Path) -> None:
    first, second = FileBackend(image), FileBackend(image)
    first.lock()
    with pytest.raises(DeviceError, match="used by another guest"):
        second.lock()
    first.unlock()
    second.lock()
    second.close()
    readers = [FileBackend(image, read_only=True) for _ in range(2)]
    for each in readers:
        each.lock()


def test_the_images_are_free_once_a_controller_was_saved(image: Path) -> None:
    first, second = (controller(open_drive(DriveOptions(str(image)), "d")) for _ in range(2))
    with ScsiGuest(first) as guest:
        guest.negotiate()
        other = ScsiGuest(second)
        with pytest.raises(UserError, match=r"scsi/0:0: the image .* is used by another guest"):
            second.claim()
        leave(first)
        second.claim()
        other.open()
        other.close()
        second.stop()
        assert guest.read(0, 1, offset=8).good, "after a failed migration the source continues"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbus_devices.scsi.unit_table._CLAIM_TIMEOUT", 0.0)


@pytest.mark.usefixtures("no_waiting")
def test_an_image_is_one_disk_of_one_guest(image: Path) -> None:
    device = controller(*(open_drive(DriveOptions(str(image)), name) for name in "ab"))
    with pytest.raises(
        UserError, match=r"scsi/0:1: the image .* is used by another guest, or by another disk"
    ):
        device.claim()
    device.stop()
    shared = controller(*(open_drive(DriveOptions(str(image), readonly=True), name) for name in "ab"))
    shared.claim()
    writer = controller(open_drive(DriveOptions(str(image)), "c"))
    with pytest.raises(UserError, match="used by another guest"):
        writer.claim()
    shared.stop()
    writer.claim()
    writer.claim()


def test_a_claim_waits_for_somebody_who_gives_the_image_up(image: Path) -> None:
    first, second = FileBackend(image), FileBackend(image)
    first.lock()
    timer = threading.Timer(0.1, first.unlock)
    timer.start()
    second.claim(30.0)
    timer.join()
    with pytest.raises(DeviceError, match="used by another guest"):
        first.claim(0.1)


# What QEMU's programs lock (block/file-posix.c): a byte of what they do, a byte of what others may not do.
QEMU_READS, QEMU_WRITES, QEMU_FORBIDS_WRITES = 100, 101, 201


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("byte", "readonly", "refused"),
    [
        (QEMU_READS, False, False),
        (QEMU_WRITES, False, True),
        (QEMU_WRITES, True, True),
        (QEMU_FORBIDS_WRITES, False, True),
        (QEMU_FORBIDS_WRITES, True, False),
    ],
)
def test_an_image_that_a_program_of_qemu_uses(image: Path, byte: int, readonly: bool, refused: bool) -> None:
    with image.open("rb") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_RDLCK, 0, byte, 1, 0))
        device = controller(open_drive(DriveOptions(str(image), readonly=readonly), "d"))
        if refused:
            with pytest.raises(UserError, match="used by a QEMU program"):
                device.claim()
        else:
            device.claim()
    device.claim()

    def locked(byte: int) -> bool:
        with image.open("rb+") as file:
            query = struct.pack("@hhqqi4x", fcntl.F_WRLCK, 0, byte, 1, 0)
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, query)
        return bool(struct.unpack("@hhqqi4x", answer)[0] != fcntl.F_UNLCK)

    assert (locked(QEMU_READS), locked(QEMU_WRITES), locked(QEMU_FORBIDS_WRITES)) == (
        True,
        not readonly,
        True,
    )
    leave(device)
    assert not any(map(locked, (QEMU_READS, QEMU_WRITES, QEMU_FORBIDS_WRITES)))


def leave(device: Scsi) -> None:
    """Save the controller of a guest that leaves."""
    assert device.save()
    device.guest_saved()


def test_a_save_alone_gives_nothing_up(image: Path) -> None:
    """A snapshot and ``vmbus channel save`` save a controller whose guest stays."""
    device, other = (controller(open_drive(DriveOptions(str(image)), "d")) for _ in range(2))
    with ScsiGuest(device) as guest:
        guest.negotiate()
        guest.io.pause()
        for _ in range(2):
            assert device.save()
            with pytest.raises(UserError, match="used by another guest"):
                other.claim()
        device.guest_saved()
        other.claim()


def saved_and_taken(image: Path, **options: Any) -> tuple[Scsi, FileBackend]:
    """A controller that was saved for a migration; meanwhile somebody else took its image."""
    device = controller(open_drive(DriveOptions(str(image), **options), "d"))
    other = FileBackend(image)
    return device, other


def test_commands_wait_for_an_image_that_somebody_took_while_it_was_saved(image: Path) -> None:
    device, other = saved_and_taken(image)
    content = image.read_bytes()
    with ScsiGuest(device) as guest:
        guest.negotiate()
        leave(device)
        other.lock()
        guest.start(READ_10, read=512, offset=8)
        guest.timers.advance(4.0)
        guest.run()
        assert guest.answers() == []
        assert guest.command(bytes(6)).good  # nothing of the image is needed
        assert "used by another guest" in device.status()["units"]["0:0"]["trouble"]
        assert len(device.save_packets(guest.io)) == 1  # it would be saved
        other.unlock()
        guest.timers.advance(0.2)
        guest.run()
        [answer] = guest.answers()
        assert answer.good
        assert guest.buffer(512, offset=8) == content[:512]
        assert "trouble" not in device.status()["units"]["0:0"]


def test_commands_fail_when_an_image_stays_away_and_the_channel_goes_on(image: Path) -> None:
    device, other = saved_and_taken(image, reconnect=1.0)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        leave(device)
        other.lock()
        guest.start(READ_10, read=512, offset=8)
        guest.start(WRITE_10, write=bytes(512), offset=8, at=8)
        guest.timers.advance(1.2)
        guest.run()
        assert [answer.condition for answer in guest.answers()] == [(3, 0x11, 0), (3, 0x0C, 0)]
        assert guest.write(0, bytes(512), offset=8).condition == (3, 0x0C, 0)  # at once
        other.unlock()
        assert guest.write(0, bytes(512), offset=8).good
        leave(device)
        other.lock()
        guest.start(READ_10, read=512, offset=8)  # and the next time it waits again
        assert guest.answers() == []
        other.unlock()
        guest.timers.advance(0.2)
        guest.run()
        assert [answer.good for answer in guest.answers()] == [True]


def test_a_guest_that_stays_after_a_save_has_its_images_again_at_once(image: Path) -> None:
    device, other = saved_and_taken(image)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        leave(device)
        device.guest_resumed()
        with pytest.raises(DeviceError, match="used by another guest"):
            other.lock()
        guest.io.pause()
        leave(device)
        device.guest_resumed()  # of a guest that left: somebody resumed its QEMU
        other.lock()


@pytest.mark.parametrize(
    ("cache", "flushes"), [("writeback", 1), ("none", 1), ("unsafe", 0), ("writethrough", 0)]
)
def test_a_save_makes_what_was_written_safe(
    image: Path, cache: str, flushes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = controller(open_drive(DriveOptions(str(image), cache=Cache(cache)), "d"))
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        device.save()
        assert len(flushed) == flushes

        def fails(fd: int) -> None:
            raise OSError(errno.EIO, "the medium is broken")

        monkeypatch.setattr(os, "fdatasync", fails)
        assert guest.write(0, bytes(512), offset=8).good
        if flushes:
            with pytest.raises(
                DeviceError, match=r"what was written is not safe in its image yet: .*is broken"
            ):
                device.save()
            with pytest.raises(DeviceError, match="used by another guest"):  # nothing was given up
                FileBackend(image).lock()


def test_a_disk_in_a_file_through_the_channel(image: Path) -> None:
    device = controller(open_drive(DriveOptions(str(image)), "d"))
    content = image.read_bytes()
    with ScsiGuest(device) as guest:
        guest.negotiate()
        # The fake memory is no mapping: neither its address nor the offsets here are good for direct I/O.
        assert guest.read(8, 16, offset=8).data == content[4096:12288]
        assert guest.write(3, b"written!" * 64, offset=8).good
        os.truncate(image, 2 * MIB)
        assert device.resize(0, 0)
        guest.run()
        guest.receive()
        assert guest.read(0, 1, offset=8).condition == (6, 0x2A, 9)
        assert guest.read(4095, 1, offset=8).data == bytes(512)
        status = device.status()["units"]["0:0"]
        assert status["image"] == str(image)
        assert status["size"] == 2 * MIB
        assert status["latency"]["count"] == 4
    device.stop()
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"written!" * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DriveOptions("/nowhere/disk.img"), "No such file"),
        (DriveOptions("/proc"), "directory"),
        (DriveOptions("/dev/null"), "neither a file nor a block device"),
        (DriveOptions(None), "needs image="),
    ],
)
def test_images_that_cannot_be_used(options: DriveOptions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_drive(options, "d")


# --- CD-ROM ---


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    path = tmp_path / "disc.iso"
    path.write_bytes(b"".join(struct.pack("<Q", block) * 256 for block in range(300)))
    return path


def test_an_iso_is_a_disc_in_a_drive(disc: Path) -> None:
    unit = open_drive(DriveOptions(str(disc)), "cd")
    assert isinstance(unit, CdRom)
    with ScsiGuest(controller(unit)) as guest:
        guest.negotiate()
        inquiry = guest.command(struct.pack(">BBBHB", 0x12, 0, 0, 36, 0), read=36).data
        assert inquiry[:2] == bytes((5, 0x80))
        assert guest.command(bytes((0x25,)), read=8).data == struct.pack(">II", 299, 2048)
        answer = guest.command(struct.pack(">BBIBHB", 0x28, 0, 7, 0, 2, 0), read=4096, offset=8)
        assert answer.data == struct.pack("<Q", 7) * 256 + struct.pack("<Q", 8) * 256
        assert guest.command(struct.pack(">BBIIBB", 0xA8, 0, 300, 1, 0, 0), read=2048).condition == (
            5,
            0x21,
            0,
        )
        assert guest.write(0, bytes(2048)).condition == (5, 0x20, 0)


def test_a_disc_can_be_taken_out_unless_that_is_prevented(disc: Path) -> None:
    unit = open_drive(DriveOptions(str(disc)), "cd")
    ready, eject, load = bytes(6), bytes((0x1B, 0, 0, 0, 2, 0)), bytes((0x1B, 0, 0, 0, 3, 0))
    event = struct.pack(">BBBBBBBHB", 0x4A, 1, 0, 0, 0x10, 0, 0, 8, 0)
    with ScsiGuest(controller(unit)) as guest:
        guest.negotiate()
        assert guest.command(bytes((0x1E, 0, 0, 0, 1, 0))).good
        assert guest.command(eject).condition == (5, 0x53, 2)
        assert guest.command(bytes((0x1E, 0, 0, 0, 0, 0))).good
        assert guest.command(event, read=8).data == bytes((0, 6, 4, 0x10, 0, 2, 0, 0))
        assert guest.command(eject).good
        assert guest.command(ready).condition == (2, 0x3A, 0)
        assert guest.command(event, read=8).data[5] == 0
        assert guest.command(struct.pack(">BBIBHB", 0x28, 0, 7, 0, 2, 0), read=4096).condition == (2, 0x3A, 0)
        assert guest.command(load).good
        assert guest.command(ready).condition == (6, 0x28, 0)
        assert guest.command(ready).good


def test_what_a_drive_says_about_its_disc(disc: Path) -> None:
    unit = open_drive(DriveOptions(str(disc)), "cd")
    with ScsiGuest(controller(unit)) as guest:
        guest.negotiate()

        def toc(form: int, flags: int = 0, start: int = 0) -> bytes:
            return struct.pack(">BBBBBBBHB", 0x43, flags, form, 0, 0, 0, start, 255, 0)

        data = guest.command(toc(0), read=255).data
        assert data == struct.pack(">HBB", 18, 1, 1) + bytes((0, 0x14, 1, 0)) + bytes(4) + bytes(
            (0, 0x14, 0xAA, 0)
        ) + struct.pack(">I", 300)
        assert guest.command(toc(0, 2), read=255).data[8:12] == bytes((0, 0, 2, 0))
        assert guest.command(toc(1), read=255).data[:4] == struct.pack(">HBB", 10, 1, 1)
        assert guest.command(toc(0, 0, 0xAA), read=255).transferred == 12
        assert guest.command(toc(5), read=255).condition == (5, 0x24, 0)
        assert guest.command(toc(0, 0, 9), read=255).condition == (5, 0x24, 0)
        features = guest.command(struct.pack(">BBBBBBBHB", 0x46, 0, 0, 0, 0, 0, 0, 255, 0), read=255).data
        assert struct.unpack_from(">IHH", features) == (len(features) - 4, 0, 8)
        page = guest.command(struct.pack(">BBBBBB", 0x1A, 0, 0x2A, 0, 255, 0), read=255).data
        assert page[4:6] == bytes((0x2A, 18))
