"""Version 1 of the saved state, written by hand: it loads in every later release.

The writer below knows the layout of version 1 by itself and is never changed. When a record gets a version 2, it
gets a writer of its own beside this one.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib

import pytest
from vmbus.saving import (
    ChannelSaver,
    ChannelState,
    OutgoingPacket,
    Restore,
    StateRefused,
    read_machine,
    save_machine,
)
from vmbus.saving.chunks import encode
from vmbus.wire.chunk import ChunkKind
from vmbus.wire.packet import GpaRange, TransferPages, TransferRange
from vmbus.wire.saved import (
    ChannelAxes,
    ChannelIdentity,
    SavedChannel,
    SavedCompletion,
    SavedGpadl,
    SavedMemory,
    SavedOpen,
    SavedPacket,
    SavedPages,
    SavedSection,
)

from tests.unit.saving.model_channel import MORE, OK, ModelChannel, restore

IDENTITY = (
    uuid.UUID("11223344-5566-7788-99aa-bbccddeeff00"),
    uuid.UUID("cafe0000-0000-0000-0000-00000000beef"),
)


CHANNEL_V1 = "ace4ae1e67d91d9aeb22a4b204cb9eb2d2e3c08d64a509a8f929a5d0388d2639"
MACHINE_V1 = "74d6233701516b7fe04d2b0c967c6296c227760ce51d6938758107b02f6f3e1b"


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def blob(data: bytes) -> bytes:
    return varint(len(data)) + data


def pages(*runs: tuple[int, int]) -> bytes:
    """Return the bytes of runs, each given as (difference to the end of the previous run, pages)."""
    found = varint(len(runs))
    for step, length in runs:
        found += varint(step * 2 if step >= 0 else -step * 2 - 1) + varint(length - 1)
    return found


def chunk(kind: int, index: int, record: bytes, *, save_id: int, last: bool = False) -> bytes:
    start = struct.pack("<4sBBHQIII", b"VMBc", 1, 1, kind, save_id, index, int(last), len(record))
    return start + struct.pack("<I", zlib.crc32(start + record)) + record


def identity_record() -> bytes:
    return IDENTITY[0].bytes_le + IDENTITY[1].bytes_le + struct.pack("<H", 3)


def packet_record(kind: int, transaction_id: int, payload: bytes, ranges: bytes, transfer: bytes) -> bytes:
    return struct.pack("<HHQ", kind, 1, transaction_id) + blob(payload) + ranges + transfer


def channel_v1() -> list[bytes]:
    """Return the chunks of a channel with at least one record of each kind."""
    header = identity_record() + struct.pack("<B", 1 | 2 | 4 | 8)
    header += struct.pack("<IIIIIII", 12, 0x200C, 0x11, 4096, 1 << 20, 64, 256)
    header += struct.pack("<HHHQ", 1000, 8, 16, 7)
    header += b"\x01" + struct.pack("<IIII", 12, 0xE1E10, 1, 4) + blob(b"user") + struct.pack("<H", 1)
    header += b"\x01" + struct.pack("<H", 44) + b"\x01" + struct.pack("<I", 0x2001)
    header += varint(2) + struct.pack("<IIII", 0xE1E10, 8, 0xE1E20, 7936)
    header += blob(b"ring-indices")
    # Two ranges: 5000 bytes from offset 100 in pages 0x1000 and 0x1001; 4097 bytes in page 9 twice.
    ranges = varint(2)
    ranges += struct.pack("<IH", 5000, 100) + pages((0x1000, 2))
    ranges += struct.pack("<IH", 4097, 0) + pages((9, 1), (-1, 1))
    none, no_transfer = varint(0), b"\0"
    transfer = b"\x01" + struct.pack("<H", 0xCAFE) + varint(1) + struct.pack("<II", 60, 1500)
    sent = packet_record(6, 1, b"sent", none, no_transfer)
    unsent = packet_record(6, 2, b"unsent", none, no_transfer)
    records = [
        (1, header),
        (2, blob(sent) + blob(b"note")),
        (4, struct.pack("<Q", 0xA0) + blob(b"before")),
        (3, blob(unsent) + blob(b"")),
        (4, struct.pack("<Q", 0xA1) + blob(b"completion")),
        (5, packet_record(9, 0xA2, b"c" * 200, ranges, no_transfer)),
        (5, packet_record(7, 0xA3, b"frames", none, transfer)),
        (6, blob(b"device state")),
    ]
    return [
        chunk(kind, index, record, save_id=0x0123456789ABCDEF, last=index + 1 == len(records))
        for index, (kind, record) in enumerate(records)
    ]


def machine_v1() -> bytes:
    """Return a machine's state with that channel, saved into two buffers."""
    parts = channel_v1()
    records = varint(2) + blob(b"".join(parts[:3])) + blob(b"".join(parts[3:]))
    data = b""
    for index, (kind, record) in enumerate(
        [
            (0x100, blob(b"vmbus-emulator 0.1.0")),
            (0x101, blob(b"hypervisor") + struct.pack("<H", 1) + blob(b"hypervisor state")),
            (0x102, blob(b"bus") + struct.pack("<H", 2) + blob(b"bus state")),
            (0x103, identity_record() + records),
        ]
    ):
        data += chunk(kind, index, record, save_id=99)
    return data + chunk(0x1FF, 4, struct.pack("<II", 4, len(data)), save_id=99, last=True)


STATE = ChannelState(
    SavedChannel(
        ChannelIdentity(*IDENTITY, 3),
        ChannelAxes.ENABLED | ChannelAxes.OPEN | ChannelAxes.PAUSED | ChannelAxes.INPUT_PAUSED,
        relid=12,
        connection_id=0x200C,
        offer_flags=0x11,
        max_packet_size=4096,
        max_external_data=1 << 20,
        max_external_chain=64,
        transaction_quota=256,
        interrupt_latency=1000,
        mmio_megabytes=8,
        mmio_megabytes_optional=16,
        next_transaction_id=7,
        open=SavedOpen(12, 0xE1E10, 1, 4, b"user", 1, 44, 0x2001),
        gpadls=(SavedGpadl(0xE1E10, 8), SavedGpadl(0xE1E20, 7936)),
        failure="ring-indices",
    ),
    outstanding=(OutgoingPacket(SavedPacket(6, 1, 1, b"sent"), b"note"),),
    queue=(
        SavedCompletion(0xA0, b"before"),
        OutgoingPacket(SavedPacket(6, 1, 2, b"unsent")),
        SavedCompletion(0xA1, b"completion"),
    ),
    taken=(
        SavedPacket(
            9,
            1,
            0xA2,
            b"c" * 200,
            (GpaRange(5000, 100, (0x1000, 0x1001)), GpaRange(4097, 0, (9, 9))),
        ),
        SavedPacket(7, 1, 0xA3, b"frames", (), TransferPages(0xCAFE, (TransferRange(60, 1500),))),
    ),
    device=b"device state",
)


def test_version_1_of_a_channel_is_read() -> None:
    state = read_machine(machine_v1())
    assert state.channels[0].state == STATE
    assert state.hypervisor == SavedSection("hypervisor", 1, b"hypervisor state")
    assert state.bus == SavedSection("bus", 2, b"bus state")
    assert state.writer == "vmbus-emulator 0.1.0"


def test_version_1_of_a_channel_is_restored_and_written_again_byte_for_byte() -> None:
    saver = ChannelSaver(save_ids=lambda: 0x0123456789ABCDEF)
    channel = ModelChannel(STATE.channel.identity)
    assert restore(saver, channel, channel_v1()) == [MORE] * 7 + [OK]
    assert channel.device.restored == [1, 2]
    channel.view = lambda: STATE  # type: ignore[method-assign]
    channel.device.notes = {1: b"note"}
    again = save_machine(saver, [channel]).data
    assert b"".join(channel_v1()) in again


def test_written_files_are_the_ones_that_were_released() -> None:
    # If this fails, the layout was changed: revert the change. A new layout needs a new version.
    assert hashlib.sha256(b"".join(channel_v1())).hexdigest() == CHANNEL_V1
    assert hashlib.sha256(machine_v1()).hexdigest() == MACHINE_V1


MEMORY = SavedMemory(IDENTITY[1], 0x10302, 77, 1 << 28, (5, 6, 7, 900), 3, 64, bytes(range(32)))


def memory_record() -> bytes:
    places = struct.pack("<QQQ", 0x10302, 77, 1 << 28) + pages((5, 3), (892, 1))
    return IDENTITY[1].bytes_le + places + varint(3) + varint(64) + blob(bytes(range(32)))


def test_memory_of_version_1_is_read_and_written_again_byte_for_byte() -> None:
    parts = [(0x100, blob(b"w")), (0x104, memory_record())]
    data = b"".join(chunk(kind, index, record, save_id=1) for index, (kind, record) in enumerate(parts))
    data += chunk(0x1FF, 2, struct.pack("<II", 2, len(data)), save_id=1, last=True)
    assert read_machine(data).memory == MEMORY
    saver = ChannelSaver()
    again = encode(ChunkKind.MEMORY, MEMORY, save_id=1, index=1, last=False)
    assert again == chunk(0x104, 1, memory_record(), save_id=1)
    assert read_machine(save_machine(saver, [], memory=MEMORY).data).memory == MEMORY
    assert read_machine(machine_v1()).memory is None


PAGES = (
    SavedPages((5, 6, 0x100000), (b"one", b"", b"\0two" + bytes(4091) + b"!")),
    SavedPages((0x100002,), (b"last",)),
)
PAGES_V1 = "ac05aabf1da13475b94e7fa94fe2a8c42c1d908d2062ff7eb241ac431b6f7d70"


def pages_v1() -> bytes:
    """Return a machine's state with pages of guest memory in two chunks, behind its other records."""
    first = (
        pages((5, 2), (0xFFFF9, 1))
        + varint(3)
        + blob(b"one")
        + blob(b"")
        + blob(b"\0two" + bytes(4091) + b"!")
    )
    second = pages((0x100002, 1)) + varint(1) + blob(b"last")
    parts = [
        (0x100, blob(b"w")),
        (0x102, blob(b"bus") + struct.pack("<H", 2) + blob(b"bus state")),
        (0x103, identity_record() + varint(1) + blob(b"".join(channel_v1()))),
        (0x105, first),
        (0x105, second),
    ]
    data = b"".join(chunk(kind, index, record, save_id=1) for index, (kind, record) in enumerate(parts))
    return data + chunk(0x1FF, 5, struct.pack("<II", 5, len(data)), save_id=1, last=True)


def test_pages_of_version_1_are_read_and_written_again_byte_for_byte() -> None:
    assert hashlib.sha256(pages_v1()).hexdigest() == PAGES_V1
    state = read_machine(pages_v1())
    assert state.pages == PAGES
    assert state.channels[0].state == STATE
    assert encode(ChunkKind.PAGES, PAGES[0], save_id=1, index=3, last=False) in pages_v1()
    again = save_machine(ChannelSaver(), [], pages=PAGES)
    assert again.pages == (5, 6, 0x100000, 0x100002)
    assert read_machine(again.data).pages == PAGES
    assert read_machine(machine_v1()).pages == ()


@pytest.mark.parametrize("kinds", [(0x104, 0x104), (0x104, 0x102), (0x104, 0x101)])
def test_memory_comes_once_and_after_the_other_parts(kinds: tuple[int, int]) -> None:
    section = blob(b"bus") + struct.pack("<H", 2) + blob(b"")
    data = chunk(0x100, 0, blob(b"w"), save_id=1)
    for index, kind in enumerate(kinds, 1):
        data += chunk(kind, index, memory_record() if kind == 0x104 else section, save_id=1)
    data += chunk(0x1FF, 3, struct.pack("<II", 3, len(data)), save_id=1, last=True)
    with pytest.raises(StateRefused, match="inconsistent"):
        read_machine(data)


def test_refusal_of_version_1_is_read() -> None:
    first = chunk(0x100, 0, blob(b"w"), save_id=1)
    refusal = chunk(0x1FE, 1, blob(b"too-large") + blob("größer".encode()), save_id=1)
    data = first + refusal
    data += chunk(0x1FF, 2, struct.pack("<II", 2, len(data)), save_id=1, last=True)
    with pytest.raises(StateRefused, match="größer"):
        read_machine(data)


def test_encode_writes_what_the_hand_writes() -> None:
    built = encode(ChunkKind.CHANNEL, STATE.channel, save_id=0x0123456789ABCDEF, index=0, last=False)
    assert built == channel_v1()[0]


def test_restore_of_a_version_1_machine() -> None:
    class Part:
        def check_restore(self, section: SavedSection, channels: object) -> None:
            return None

        def apply_restore(self, section: SavedSection) -> None:
            return None

    saver = ChannelSaver()
    channel = ModelChannel(STATE.channel.identity)
    channel.saver = saver
    Restore(saver, [channel], Part(), Part()).apply(read_machine(machine_v1()))
    assert channel.taken == list(STATE.taken)
