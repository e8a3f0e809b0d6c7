"""The commands of a disk: data, what it says about itself, and the sense data of every refusal."""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import UserError
from vmbus_devices.scsi.backend import MemoryBackend, NullBackend
from vmbus_devices.scsi.blocks import TRANSFER_HEADROOM
from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.faults import FaultPlan, parse_faults

from tests.unit.scsi.scsi_guest import BUFFER_PFN, IN, OUT, Answer, ScsiGuest, controller, memory_disk

INVALID_OPCODE = (5, 0x20, 0)
OUT_OF_RANGE = (5, 0x21, 0)
INVALID_FIELD = (5, 0x24, 0)


def ready(disk: Disk) -> ScsiGuest:
    guest = ScsiGuest(controller(disk))
    guest.open()
    guest.properties = guest.negotiate()
    return guest


def contents(disk: Disk) -> mmap.mmap:
    assert isinstance(disk.backend, MemoryBackend)
    return disk.backend.data


def cdb(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    """Any form of a command with a range of blocks."""
    group = opcode >> 5
    if group == 0:
        return struct.pack(">BBHBB", opcode, lba >> 16, lba & 0xFFFF, blocks & 0xFF, 0)
    if group == 4:
        return struct.pack(">BBQIBB", opcode, flags, lba, blocks, 0, 0)
    if group == 5:
        return struct.pack(">BBIIBB", opcode, flags, lba, blocks, 0, 0)
    return struct.pack(">BBIBHB", opcode, flags, lba, 0, blocks, 0)


def pattern(lba: int, blocks: int) -> bytes:
    return b"".join(struct.pack("<Q", lba + index) * 64 for index in range(blocks))


@pytest.mark.parametrize("opcode", [0x08, 0x28, 0xA8, 0x88])
@pytest.mark.parametrize("offset", [0, 512, 4000])
def test_every_read_puts_the_blocks_where_the_guest_wants_them(opcode: int, offset: int) -> None:
    guest = ready(memory_disk())
    answer = guest.command(cdb(opcode, 77, 40), read=40 * 512, offset=offset)
    assert answer.good
    assert answer.transferred == 40 * 512
    assert answer.data == pattern(77, 40)
    assert sum(length for _, length in guest.memory.stored) == 40 * 512


@pytest.mark.parametrize("opcode", [0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0xAE, 0x8E])
@pytest.mark.parametrize("offset", [0, 512, 4000])
def test_every_write_takes_the_guests_bytes(opcode: int, offset: int) -> None:
    disk = memory_disk()
    guest = ready(disk)
    data = bytes(range(256)) * 80
    answer = guest.command(cdb(opcode, 100, 40), write=data, offset=offset)
    assert answer.good
    assert answer.transferred == len(data)
    assert contents(disk)[100 * 512 : 140 * 512] == data
    assert contents(disk)[99 * 512 : 100 * 512] == pattern(99, 1)


def test_a_read_of_six_bytes_with_length_zero_is_of_256_blocks() -> None:
    guest = ready(memory_disk())
    assert guest.command(cdb(0x08, 1, 0), read=256 * 512).data == pattern(1, 256)


@pytest.mark.parametrize("opcode", [0x28, 0xA8, 0x88, 0x2A, 0xAA, 0x8A, 0x2F, 0x8F])
def test_a_transfer_of_no_blocks_is_no_error(opcode: int) -> None:
    guest = ready(memory_disk())
    answer = guest.command(cdb(opcode, 5, 0))
    assert (answer.good, answer.transferred) == (True, 0)


@pytest.mark.parametrize(
    "opcode", [0x08, 0x28, 0xA8, 0x88, 0x0A, 0x2A, 0xAA, 0x8A, 0x2F, 0x8F, 0xAF, 0x35, 0x91, 0x41, 0x93]
)
@pytest.mark.parametrize(("lba", "blocks"), [(4095, 2), (4096, 1), (5000, 1)])
def test_blocks_beyond_the_end_are_refused(opcode: int, lba: int, blocks: int) -> None:
    guest = ready(memory_disk())
    write = opcode in (0x0A, 0x2A, 0xAA, 0x8A, 0x41, 0x93)
    answer = guest.command(
        cdb(opcode, lba, blocks),
        write=bytes(512 * blocks) if write else b"",
        read=0 if write else 512 * blocks,
    )
    assert answer.condition == OUT_OF_RANGE
    assert answer.transferred == 0
    assert guest.memory.stored == []


def test_addresses_near_the_end_of_64_bits_are_beyond_the_end() -> None:
    guest = ready(memory_disk())
    assert guest.command(cdb(0x88, (1 << 64) - 1, 0xFFFFFFFF), read=512).condition == OUT_OF_RANGE


@pytest.mark.parametrize(("opcode", "write"), [(0x28, False), (0x2A, True), (0x2E, True), (0x2F, True)])
def test_a_transfer_a_little_larger_than_announced_is_executed(opcode: int, write: bool) -> None:
    """Drivers count pages: 66, where 64 are announced. What is accepted has a limit all the same."""
    guest = ready(memory_disk())
    blocks = 66 * 4096 // 512
    assert guest.properties[12:16] == struct.pack("<I", 256 << 10)

    def sent(blocks: int) -> Answer:
        flags = 2 if opcode == 0x2F else 0  # compare
        data = bytes(guest.device.units[0, 0].backend.data[: blocks * 512])  # type: ignore[attr-defined]
        buffer = {"write": data} if write else {"read": len(data)}
        return guest.command(cdb(opcode, 0, blocks, flags), **buffer)

    assert sent(blocks).good
    most = ((256 << 10) + TRANSFER_HEADROOM) // 512
    assert most > blocks
    assert sent(most).good
    assert sent(most + 1).condition == INVALID_FIELD


@pytest.mark.parametrize(
    ("length", "direction"), [(511, IN), (0, IN), (512, OUT)], ids=["short", "none", "wrong way"]
)
def test_a_buffer_that_does_not_fit_the_command_is_refused(length: int, direction: int) -> None:
    guest = ready(memory_disk())
    answer = guest.command(cdb(0x28, 0, 1), read=512, length=length, direction=direction)
    assert answer.condition == INVALID_FIELD
    answer = guest.command(cdb(0x2A, 0, 1), read=512, length=length, direction=IN + OUT - direction)
    assert answer.condition == INVALID_FIELD


def test_the_transfer_length_may_not_be_longer_than_the_pages() -> None:
    guest = ready(memory_disk())
    answer = guest.command(cdb(0x28, 0, 2), read=512, length=1024)
    assert answer.condition == INVALID_FIELD
    assert guest.memory.stored == []


def test_a_buffer_outside_of_ram_is_refused_and_counted() -> None:
    guest = ready(memory_disk())
    guest.next_id += 1
    payload = guest.srb(cdb(0x28, 0, 8), length=4096, direction=IN)
    guest.send(payload, transaction_id=9, completion_requested=True, ranges=[(4096, 0, [1 << 40])])
    [answer] = guest.answers()
    assert (answer.srb_status, answer.transferred) == (6, 0)
    assert guest.io.refusals.counts == {"not-ram": 1}
    assert guest.device.status()["units"]["0:0"]["queue_depth"] == 0


def test_protection_information_is_not_there() -> None:
    guest = ready(memory_disk())
    assert guest.command(cdb(0x28, 0, 1, 0x20), read=512).condition == INVALID_FIELD


def test_a_cdb_that_is_too_long_is_refused() -> None:
    guest = ready(memory_disk())
    assert guest.command(cdb(0x28, 0, 1), read=512, cdb_length=17).condition == INVALID_FIELD


def test_a_read_only_disk_refuses_all_that_writes() -> None:
    disk = memory_disk()
    disk.backend.read_only = True
    disk = Disk(disk.backend, "ro")
    guest = ready(disk)
    for opcode in (0x0A, 0x2A, 0xAA, 0x8A, 0x2E, 0x41, 0x93):
        assert guest.command(cdb(opcode, 0, 1), write=bytes(512)).condition == (7, 0x27, 0)
    assert guest.command(cdb(0x42, 0, 24), write=bytes(24)).condition == INVALID_OPCODE
    assert guest.read(0, 1).good
    sense = guest.command(struct.pack(">BBBBBB", 0x1A, 0, 0x3F, 0, 255, 0), read=255)
    assert sense.data[2] & 0x80


class Journal(MemoryBackend):
    """Records all calls; raises the error it was given."""

    flush_needed = True
    write_cache = True

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.calls: list[tuple[object, ...]] = []
        self.error: Exception | None = None

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def read(self, offset: int, views: Sequence[memoryview]) -> None:
        self._note("read", offset, sum(map(len, views)))

    def write(self, offset: int, views: Sequence[memoryview], *, fua: bool = False) -> None:
        self._note("write", offset, sum(map(len, views)), fua)

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._note("zeroes", offset, length, unmap)


def test_fua_and_flushes_reach_the_medium() -> None:
    backend = Journal()
    guest = ready(Disk(backend, "journal"))
    for opcode, flags in ((0x2A, 0), (0x2A, 8), (0xAA, 8), (0x8A, 8), (0x2E, 0), (0x0A, 0)):
        assert guest.command(cdb(opcode, 8, 1, flags), write=bytes(512)).good
    assert [call[3] for call in backend.calls] == [False, True, True, True, True, False]
    for opcode in (0x35, 0x91):
        assert guest.command(cdb(opcode, 0, 0)).good
    assert backend.calls[-2:] == [("flush",), ("flush",)]
    backend.error = OSError(errno.EIO, "broken")
    assert guest.command(cdb(0x35, 0, 0)).condition == (3, 0x0C, 0)


@pytest.mark.parametrize(
    ("error", "on_read", "on_write"),
    [
        (OSError(errno.EIO, ""), (3, 0x11, 0), (3, 0x0C, 0)),
        (OSError(errno.ENOSPC, ""), (7, 0x27, 7), (7, 0x27, 7)),
        (OSError(errno.EROFS, ""), (3, 0x11, 0), (7, 0x27, 0)),
        (ValueError("a bug"), (4, 0x44, 0), (4, 0x44, 0)),
    ],
)
def test_errors_of_the_back_end_become_sense_data(
    error: Exception, on_read: tuple[int, ...], on_write: tuple[int, ...]
) -> None:
    backend = Journal()
    backend.immediate = False
    backend.error = error
    guest = ready(Disk(backend, "broken"))
    assert guest.read(0, 1).condition == on_read
    assert guest.write(0, bytes(512)).condition == on_write
    assert guest.device.status()["units"]["0:0"]["errors"]


def test_memory_that_is_not_aligned_goes_through_a_buffer() -> None:
    backend = MemoryBackend(1 << 20)
    backend.alignment = 512
    seen: list[int] = []
    read, write = backend.read, backend.write
    backend.read = lambda offset, views: (seen.append(len(views)), read(offset, views))[1]  # type: ignore
    backend.write = lambda offset, views, fua=False: (seen.append(len(views)), write(offset, views))[1]  # type: ignore
    guest = ready(Disk(backend, "direct"))
    data = bytes(range(256)) * 32
    assert guest.write(4, data, offset=100).good
    assert guest.read(4, 16, offset=100).data == data
    assert seen == [1, 1]
    assert guest.read(4, 16, offset=512).data == data
    assert seen[2] == 3


# --- a disk in memory ---


def resident() -> int:
    """Bytes of memory that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_disk_in_memory_takes_room_only_for_what_was_written() -> None:
    data = bytes(range(1, 129)) * (1 << 17)
    before = resident()
    backend = MemoryBackend(8 << 30)
    for offset in (0, (4 << 30) + 512, (8 << 30) - len(data)):
        backend.write(offset, [memoryview(data)])
    assert backend.data[(4 << 30) : (4 << 30) + 520] == bytes(512) + data[:8]
    assert len(data) < resident() - before < 8 * len(data)
    backend.discard(512, (8 << 30) - 1024)
    assert resident() - before < len(data)
    assert backend.data[:520] == data[:512] + bytes(8)
    assert backend.data[-520:] == bytes(8) + data[-512:]
    backend.write(0, [memoryview(b"x" * 4096)])
    backend.write_zeroes(1024, 512, unmap=False)
    assert backend.data[:4096] == b"x" * 1024 + bytes(512) + b"x" * 2560


def test_a_disk_that_has_no_room_in_this_machine() -> None:
    with pytest.raises(UserError, match="make it smaller"):
        MemoryBackend(1 << 62)


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (cdb(0x42, 0, 24), struct.pack(">HHIQII", 22, 16, 0, 8, 8, 0)),
        (cdb(0x93, 8, 8), bytes(512)),
        (cdb(0x93, 8, 8), b"x" * 512),
    ],
    ids=["unmap", "zeros", "data"],
)
def test_changes_of_any_length_are_made_outside_the_event_loop(command: bytes, data: bytes) -> None:
    disk = memory_disk()
    guest = ready(disk)
    guest.workers.paused = True
    before = contents(disk)[4096:8192]
    assert guest.read(8, 8).data == before  # which are moved at once
    guest.start(command, write=data)
    assert guest.answers() == []
    assert contents(disk)[4096:8192] == before
    guest.workers.release()
    guest.run()
    assert [answer.good for answer in guest.answers()] == [True]
    assert contents(disk)[4096:8192] == (data[:1] * 4096 if len(data) == 512 else bytes(4096))


# --- about itself ---


def inquiry(page: int | None = None, length: int = 255) -> bytes:
    return struct.pack(">BBBHB", 0x12, page is not None, page or 0, length, 0)


def test_inquiry_says_disk_of_microsoft() -> None:
    guest = ready(memory_disk())
    data = guest.command(inquiry(), read=255).data
    assert data == bytes((0, 0, 5, 2, 31, 0, 0, 2)) + b"Msft    Virtual Disk    1.0 "
    assert guest.command(inquiry(length=5), read=255).data == data[:5]
    assert guest.command(inquiry(length=255), read=10).data == data[:10]
    assert guest.command(bytes((0x12, 0, 0x80, 0, 255, 0)), read=255).condition == INVALID_FIELD


def test_vital_product_data() -> None:
    guest = ready(memory_disk(serial="S-123", rotation=7200))
    pages = guest.command(inquiry(0), read=255).data
    assert pages == bytes((0, 0, 0, 6, 0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
    assert guest.command(inquiry(0x80), read=255).data == b"\0\x80\0\5S-123"
    identification = guest.command(inquiry(0x83), read=255).data
    assert identification[:8] == bytes((0, 0x83, 0, 12, 1, 3, 0, 8))
    assert identification[8] >> 4 == 3
    limits = guest.command(inquiry(0xB0), read=255).data
    assert len(limits) == 64
    assert struct.unpack_from(">IIIIIIIQ", limits, 8) == (512, 0, 0, 0xFFFFFFFF, 256, 8, 0x80000000, 0x3FFFF)
    assert struct.unpack_from(">H", guest.command(inquiry(0xB1), read=255).data, 4) == (7200,)
    assert guest.command(inquiry(0xB2), read=255).data[4:8] == bytes((0, 0xE0, 2, 0))
    for page in (0x89, 0xB7, 0xFF, 0x01):
        assert guest.command(inquiry(page), read=255).condition == INVALID_FIELD


@pytest.mark.parametrize(("block", "exponent"), [(512, 3), (4096, 0)])
def test_capacity(block: int, exponent: int) -> None:
    guest = ready(memory_disk(block_size=block))
    last = 4096 * 512 // block - 1
    assert guest.command(bytes((0x25,)), read=8).data == struct.pack(">II", last, block)
    data = guest.command(bytes((0x9E, 0x10)) + bytes(8) + struct.pack(">I", 32), read=32).data
    assert data == struct.pack(">QIBBH", last, block, 0, exponent, 0x8000) + bytes(16)
    assert guest.command(bytes((0x9E, 0x11)), read=32).condition == INVALID_FIELD


def test_a_disk_of_more_than_two_tebibytes_has_no_short_capacity() -> None:
    backend = Journal()
    backend.size = 3 << 40
    guest = ready(Disk(backend, "large"))
    assert guest.command(bytes((0x25,)), read=8).data == struct.pack(">II", 0xFFFFFFFF, 512)
    lba = (3 << 40) // 512 - 1
    assert guest.command(cdb(0x88, lba, 1), read=512).good
    assert backend.calls == [("read", lba * 512, 512)]


@pytest.mark.parametrize("cache", [False, True])
def test_mode_pages(cache: bool) -> None:
    backend = Journal()
    backend.write_cache = cache
    guest = ready(Disk(backend, "mode"))
    caching = bytes((8, 18, 4 if cache else 0)) + bytes(17)
    control = bytes((0x0A, 10, 2, 0x10)) + bytes(8)
    for page, expected in ((8, caching), (0x0A, control), (0x3F, caching + control)):
        six = guest.command(struct.pack(">BBBBBB", 0x1A, 0, page, 0, 255, 0), read=255).data
        assert six == bytes((3 + len(expected), 0, 0x10, 0)) + expected
        ten = guest.command(struct.pack(">BBBBBBBHB", 0x5A, 0, page, 0, 0, 0, 0, 255, 0), read=255).data
        assert ten == struct.pack(">HBBHH", 6 + len(expected), 0, 0x10, 0, 0) + expected
    changeable = guest.command(struct.pack(">BBBBBB", 0x1A, 0, 0x48, 0, 255, 0), read=255).data
    assert changeable[4:] == bytes((8, 18)) + bytes(18)
    for page, subpage, expected_sense in (
        (0x1C, 0, INVALID_FIELD),
        (0x0A, 5, INVALID_FIELD),
        (0xC8, 0, (5, 0x39, 0)),
    ):
        answer = guest.command(struct.pack(">BBBBBB", 0x1A, 0, page, subpage, 255, 0), read=255)
        assert answer.condition == expected_sense


def test_commands_that_do_nothing_succeed_and_unknown_ones_are_refused() -> None:
    guest = ready(memory_disk())
    for opcode in (0x00, 0x1B, 0x1E):
        assert guest.command(bytes((opcode,)) + bytes(5)).good
    sense = guest.command(bytes((3, 0, 0, 0, 252, 0)), read=252)
    assert sense.data == bytes((0x70, 0, 0, 0, 0, 0, 0, 10)) + bytes(10)
    assert guest.command(bytes((3, 1, 0, 0, 252, 0)), read=252).condition == INVALID_FIELD
    for opcode in (0x01, 0x15, 0x55, 0xA3, 0x7F, 0x9F, 0xFF, 0x43, 0x46):
        assert guest.command(bytes((opcode,)).ljust(16, b"\0")).condition == INVALID_OPCODE
    assert guest.device.status()["units"]["0:0"]["errors"]["5/20/00"] == 9


# --- unmap, write same, verify, status ---


def unmap_list(*ranges: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack(">QI4x", *each) for each in ranges)
    return struct.pack(">HH4x", 6 + len(body), len(body)) + body


def unmap(guest: ScsiGuest, data: bytes, flags: int = 0) -> Answer:
    return guest.command(struct.pack(">BBIBHB", 0x42, flags, 0, 0, len(data), 0), write=data)


def test_unmap_gives_every_range_back() -> None:
    disk = memory_disk()
    guest = ready(disk)
    assert unmap(guest, unmap_list((1, 2), (10, 0), (4095, 1))).good
    assert contents(disk)[512 : 3 * 512] == bytes(1024)
    assert contents(disk)[-512:] == bytes(512)
    assert contents(disk)[3 * 512 : 4 * 512] == pattern(3, 1)
    assert guest.command(struct.pack(">BBIBHB", 0x42, 0, 0, 0, 0, 0)).good


@pytest.mark.parametrize(
    ("data", "flags", "condition"),
    [
        (unmap_list((4095, 2)), 0, OUT_OF_RANGE),
        (unmap_list((1 << 63, 0xFFFFFFFF)), 0, OUT_OF_RANGE),
        (unmap_list((0, 1)), 1, INVALID_FIELD),
        (unmap_list((0, 1))[:7], 0, (5, 0x1A, 0)),
        (struct.pack(">HH4x", 22, 32) + bytes(16), 0, (5, 0x1A, 0)),
        (unmap_list(*[(0, 1)] * 257), 0, (5, 0x26, 0)),
    ],
)
def test_an_unmap_that_is_wrong_unmaps_nothing(data: bytes, flags: int, condition: tuple[int, ...]) -> None:
    disk = memory_disk()
    guest = ready(disk)
    assert unmap(guest, data, flags).condition == condition
    assert contents(disk)[:512] == pattern(0, 1)


@pytest.mark.conformance(68)
@pytest.mark.parametrize("opcode", [0x41, 0x93])
@pytest.mark.parametrize("block", [b"\0", b"\x5a"])
def test_write_same_writes_one_block_many_times(opcode: int, block: bytes) -> None:
    disk = memory_disk()
    guest = ready(disk)
    answer = guest.command(cdb(opcode, 10, 3000), write=block * 512)
    assert (answer.good, answer.transferred) == (True, 512)
    assert contents(disk)[10 * 512 : 3010 * 512] == block * 512 * 3000
    assert contents(disk)[9 * 512 : 10 * 512] == pattern(9, 1)
    assert contents(disk)[3010 * 512 : 3011 * 512] == pattern(3010, 1)


@pytest.mark.conformance(68)
def test_write_same_can_unmap_and_can_do_without_data() -> None:
    backend = Journal()
    guest = ready(Disk(backend, "same"))
    assert guest.command(cdb(0x93, 8, 16, 0x08), write=bytes(512)).good
    assert guest.command(cdb(0x93, 8, 16, 0x01)).good
    assert guest.command(cdb(0x41, 8, 16), write=bytes(512)).good
    assert backend.calls == [
        ("zeroes", 4096, 8192, True),
        ("zeroes", 4096, 8192, False),
        ("zeroes", 4096, 8192, False),
    ]
    for flags, blocks in ((0x10, 1), (0, 0), (0x20, 1)):
        assert guest.command(cdb(0x93, 0, blocks, flags), write=bytes(512)).condition == INVALID_FIELD
    assert guest.command(cdb(0x93, 0, 1)).condition == INVALID_FIELD, "no data"


@pytest.mark.parametrize("opcode", [0x2F, 0xAF, 0x8F])
def test_verify_compares(opcode: int) -> None:
    disk = memory_disk()
    guest = ready(disk)
    contents(disk)[8 * 512 : 10 * 512] = bytes(1024)
    assert guest.command(cdb(opcode, 0, 4096)).good
    assert guest.command(cdb(opcode, 5, 3, 2), write=pattern(5, 3)).good
    assert guest.command(cdb(opcode, 5, 3, 2), write=pattern(4, 3)).condition == (0xE, 0x1D, 0)
    assert guest.command(cdb(opcode, 8, 2, 6), write=bytes(512)).good
    assert guest.command(cdb(opcode, 8, 3, 6), write=bytes(512)).condition == (0xE, 0x1D, 0)
    assert guest.command(cdb(opcode, 5, 1, 4), write=bytes(512)).condition == INVALID_FIELD


def test_lba_status_tells_where_data_is() -> None:
    class Holey(Journal):
        def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
            return [(offset, 4096 - offset, True), (4096, 8192, False), (12288, 4096, True)]

    guest = ready(Disk(Holey(), "holes"))
    command = bytes((0x9E, 0x12)) + struct.pack(">QI", 2, 56) + bytes(2)
    data = guest.command(command, read=56).data
    assert struct.unpack_from(">I", data) == (4 + 3 * 16,)
    assert [struct.unpack_from(">QIB", data, 8 + 16 * n) for n in range(3)] == [
        (2, 6, 0),
        (8, 16, 1),
        (24, 8, 0),
    ]
    beyond = bytes((0x9E, 0x12)) + struct.pack(">QI", 1 << 40, 56) + bytes(2)
    assert guest.command(beyond, read=56).condition == OUT_OF_RANGE


def test_block_status_for_a_buffer_that_is_not_ram_is_refused_also_when_it_comes_from_a_thread() -> None:
    disk = memory_disk()
    disk.backend.immediate = False
    guest = ready(disk)
    number = guest.next_id = 77
    srb = guest.srb(bytes((0x9E, 0x12)) + struct.pack(">QI", 0, 24) + bytes(2), length=24, direction=IN)
    assert guest.send(
        srb, transaction_id=number, completion_requested=True, ranges=[(24, 4092, [BUFFER_PFN, 1 << 40])]
    )
    [answer] = guest.answers()
    assert (answer.transaction_id, answer.srb_status) == (number, 0x06)
    assert guest.io.refusals.counts == {"not-ram": 1}
    assert guest.read(0, 1).good


def reserve(
    guest: ScsiGuest, action: int, key: int, new: int = 0, *, kind: int = 0, flags: int = 0
) -> Answer:
    data = struct.pack(">QQ4xB3x", key, new, flags)
    return guest.command(struct.pack(">BBBxxIB", 0x5F, action, kind, len(data), 0), write=data)


def reserved(guest: ScsiGuest, action: int) -> bytes:
    return guest.command(struct.pack(">BB5xHB", 0x5E, action, 255, 0), read=255).data


@pytest.mark.conformance(68)
def test_persistent_reservations_from_registering_to_clearing() -> None:
    guest = ready(memory_disk())
    assert reserved(guest, 0) == bytes(8)
    assert reserve(guest, 1, 7, kind=1).scsi_status == 0x18, "not registered"
    assert reserve(guest, 0, 9, 7).scsi_status == 0x18, "another key"
    assert reserve(guest, 0, 0, 7).good
    assert reserved(guest, 0) == struct.pack(">IIQ", 1, 8, 7)
    assert reserve(guest, 1, 7, kind=5).good
    assert reserve(guest, 1, 7, kind=5).good, "once more"
    assert reserve(guest, 1, 7, kind=3).scsi_status == 0x18, "another type"
    assert reserved(guest, 1) == struct.pack(">IIQ5xB2x", 1, 16, 7, 5)
    assert guest.write(0, bytes(512)).good, "the holder may write"
    assert reserve(guest, 2, 7, kind=3).condition == (5, 0x26, 4)
    assert reserve(guest, 4, 7, 7, kind=8).good
    assert reserved(guest, 1)[-3] == 8
    assert reserve(guest, 4, 7, 6, kind=8).scsi_status == 0x18
    state = guest.device.save()
    there = controller(memory_disk())
    there.restore(state)
    disks = there.units[0, 0], guest.device.units[0, 0]
    assert isinstance(disks[0], Disk)
    assert isinstance(disks[1], Disk)
    assert disks[0].reservations == disks[1].reservations
    assert reserve(guest, 2, 7, kind=8).good
    assert reserved(guest, 1) == struct.pack(">II", 2, 0)
    assert reserve(guest, 6, 0, 11).good, "whatever the key was"
    assert reserve(guest, 1, 11, kind=1).good
    assert reserve(guest, 3, 11).good
    assert reserved(guest, 0) == struct.pack(">II", 4, 0)
    assert reserved(guest, 1) == struct.pack(">II", 4, 0)


@pytest.mark.conformance(68)
def test_persistent_reservations_that_are_malformed() -> None:
    guest = ready(memory_disk())
    assert reserve(guest, 0, 0, 7).good
    for action, kind in ((1, 0), (1, 2), (1, 0x11), (2, 9), (7, 1), (31, 1)):
        assert reserve(guest, action, 7, kind=kind).condition == INVALID_FIELD
    assert reserve(guest, 0, 7, 9, flags=8).condition == (5, 0x26, 0)
    for length in (0, 8, 23, 25):
        cdb_out = struct.pack(">BBBxxIB", 0x5F, 0, 0, length, 0)
        assert guest.command(cdb_out, write=bytes(length)).condition == (5, 0x1A, 0)
    assert guest.command(struct.pack(">BB5xHB", 0x5E, 3, 255, 0), read=255).condition == INVALID_FIELD
    assert reserved(guest, 2) == struct.pack(">HBBBB2x", 8, 1, 0x80, 0xEA, 0x01)
    assert reserved(guest, 0) == struct.pack(">IIQ", 1, 8, 7)


@pytest.mark.conformance(68)
def test_a_registration_that_is_to_survive_a_loss_of_power() -> None:
    """Linux's reservation calls set APTPL with every registration (sd_pr_register)."""
    guest = ready(memory_disk())
    for action in (0, 6):
        assert reserve(guest, action, 0, 7, flags=1).good
        assert reserved(guest, 2)[3] == 0x81
        assert reserve(guest, 1, 7, kind=5, flags=1).good
        state = guest.device.save()
        there = controller(memory_disk())
        there.restore(state)
        disks = there.units[0, 0], guest.device.units[0, 0]
        assert isinstance(disks[0], Disk)
        assert isinstance(disks[1], Disk)
        assert disks[0].reservations == disks[1].reservations
        assert disks[0].reservations.through_power_loss
        assert reserve(guest, 0, 7, 7).good
        assert reserved(guest, 2)[3] == 0x80
        assert reserve(guest, 0, 7, 7, flags=1).good
        assert reserve(guest, 3, 7).good
        assert reserved(guest, 2)[3] == 0x80


# --- faults ---


def faulty(text: str, make: Callable[..., Disk] = memory_disk) -> ScsiGuest:
    return ready(make(faults=FaultPlan(parse_faults(text))))


def test_a_bad_block_fails_what_touches_it_and_says_where() -> None:
    guest = faulty("read-error@10-11;write-error@20")
    assert guest.read(8, 2).good
    answer = guest.read(8, 8)
    assert answer.condition == (3, 0x11, 0)
    assert (answer.sense[0], struct.unpack_from(">I", answer.sense, 3)) == (0xF0, (10,))
    assert guest.read(12, 8).good
    assert guest.read(20, 1).good
    assert guest.write(20, bytes(512)).condition == (3, 0x0C, 0)
    assert guest.write(10, bytes(512)).good
    assert guest.command(cdb(0x2F, 0, 100)).condition == (3, 0x11, 0)
    assert guest.command(cdb(0x41, 20, 1), write=bytes(512)).condition == (3, 0x0C, 0)
    assert guest.device.status()["units"]["0:0"]["faults_met"]["error"] == 4


def test_a_short_transfer_says_how_much_it_was() -> None:
    guest = faulty("short:0.5@*")
    answer = guest.read(0, 8)
    assert (answer.good, answer.transferred) == (True, 2048)
    assert guest.buffer(4096) == pattern(0, 4) + b"\xee" * 2048
    answer = guest.write(0, b"w" * 4096)
    assert (answer.good, answer.transferred) == (True, 2048)
    assert guest.read(3, 2).transferred == 512


def test_a_delay_holds_up_only_what_touches_it() -> None:
    guest = faulty("delay:2/read@8-")
    number = guest.start(cdb(0x28, 8, 1), read=512)
    assert guest.read(0, 1, at=8).good
    assert guest.write(8, b"n" * 512, at=16).good
    guest.advance(1.9)
    assert guest.answers() == []
    guest.advance(0.2)
    [answer] = guest.answers()
    assert (answer.transaction_id, answer.good) == (number, True)
    assert guest.buffer(512) == b"n" * 512


# --- anything agrees with an array ---


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_sequence_of_reads_and_writes_agrees_with_an_array(data: st.DataObject) -> None:
    disk = memory_disk(64)
    disk.backend.immediate = data.draw(st.booleans())
    disk = Disk(disk.backend, "model")
    guest = ready(disk)
    model = bytearray(contents(disk))
    for _ in range(data.draw(st.integers(1, 12))):
        lba = data.draw(st.integers(0, 63))
        blocks = data.draw(st.integers(1, 64 - lba))
        offset = data.draw(st.sampled_from([0, 4, 512, 4092]))
        kind = data.draw(st.sampled_from(["read", "write", "unmap", "same"]))
        span = slice(lba * 512, (lba + blocks) * 512)
        if kind == "read":
            opcode = data.draw(st.sampled_from([0x08, 0x28, 0xA8, 0x88]))
            assert (
                guest.command(cdb(opcode, lba, blocks), read=blocks * 512, offset=offset).data == model[span]
            )
        elif kind == "write":
            blob = bytes((data.draw(st.integers(0, 255)),)) * (blocks * 512)
            opcode = data.draw(st.sampled_from([0x0A, 0x2A, 0xAA, 0x8A]))
            assert guest.command(cdb(opcode, lba, blocks), write=blob, offset=offset).good
            model[span] = blob
        elif kind == "unmap":
            assert unmap(guest, unmap_list((lba, blocks))).good
            model[span] = bytes(blocks * 512)
        else:
            block = bytes((data.draw(st.integers(0, 3)),)) * 512
            assert guest.command(cdb(0x93, lba, blocks), write=block).good
            model[span] = block * blocks
    assert contents(disk)[:] == model


def test_the_contents_of_a_disc_too_large_for_their_table_end_at_its_last_address() -> None:
    disc = CdRom(NullBackend(1 << 44), "disc")
    guest = ScsiGuest(controller(disc))
    guest.open()
    guest.negotiate()
    answer = guest.command(bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0)), read=64)
    assert answer.good
    assert answer.data[2:4] == b"\x01\x01"
    assert answer.data[16:20] == b"\xff" * 4


def test_a_restored_reservation_belongs_to_its_disk_alone() -> None:
    """The values of a state are kept between its check and its restore; a guest that runs does not change them."""
    guest = ready(memory_disk())
    assert reserve(guest, 0, 0, 7).good
    state = guest.device.save()
    for key in (9, 11):
        there = controller(memory_disk())
        there.restore(state)
        disk = there.units[0, 0]
        assert isinstance(disk, Disk)
        assert disk.reservations.key == 7
        disk.reservations.key = key
