"""The emulator's state is found in a snapshot of a qcow2 image, and no image makes more than a refusal of it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from vmbus.machine.migration.snapshot_state import read_state
from vmbus.machine.migration.vmstate import HELPER_ID
from vmbus.machine.qemu.qcow2 import CannotLook

CLUSTER = 1 << 16
DISK = 4 * CLUSTER
STATE = b"the state of a machine" * 1000
IN_STREAM = struct.pack(">I", len(HELPER_ID)) + HELPER_ID.encode() + struct.pack(">I", len(STATE)) + STATE


def image(stream: bytes, *, features: int = 0, entry: int = 0, name: bytes = b"good") -> bytearray:
    """An image with two snapshots, of which the second has ``stream`` as the machine's state."""
    clusters = -(-len(stream) // CLUSTER)
    l1, l2, table, data = 1, 2, 3, 4
    made = bytearray((data + clusters) * CLUSTER)
    struct.pack_into(
        ">4sIQIIQIIQQIIQQ",
        made,
        0,
        b"QFI\xfb",
        3,
        0,
        0,
        16,
        DISK,
        0,
        0,
        0,
        0,
        0,
        2,
        table * CLUSTER,
        features,
    )
    first = 1  # the disk needs one table, the machine's state begins at the next
    struct.pack_into(">QQ", made, l1 * CLUSTER, 0, l2 * CLUSTER | 1 << 63)
    assert first == 1
    for number in range(clusters):
        struct.pack_into(">Q", made, l2 * CLUSTER + 8 * number, (data + number) * CLUSTER | 1 << 63 | entry)
    at = table * CLUSTER
    for id_, each, size in ((b"1", b"other", 0), (b"2", name, len(stream))):
        head = struct.pack(">QIHHIIQII", l1 * CLUSTER, 2, len(id_), len(each), 0, 0, 0, size & 0xFFFFFFFF, 16)
        whole = head + struct.pack(">QQ", size, DISK) + id_ + each
        made[at : at + len(whole)] = whole
        at += -(-len(whole) // 8) * 8
    made[data * CLUSTER : data * CLUSTER + len(stream)] = stream
    return made


def found(folder: Path, content: bytes | bytearray, tag: str = "good") -> bytes | None:
    path = folder / "image"
    path.write_bytes(content)
    return read_state(path, tag)


@pytest.mark.parametrize("before", [0, 17, CLUSTER, 3 * CLUSTER - 9])
def test_the_state_is_found_behind_guest_memory(tmp_path: Path, before: int) -> None:
    stream = bytes(before) + IN_STREAM.replace(STATE, bytes(len(STATE))) + b"more" + IN_STREAM + b"the end"
    assert found(tmp_path, image(stream)) == STATE


def test_a_snapshot_without_the_emulators_state_has_none(tmp_path: Path) -> None:
    assert found(tmp_path, image(b"memory only")) is None
    assert found(tmp_path, image(IN_STREAM[:-1])) is None
    assert found(tmp_path, image(b""), "other") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"raw" * 1000,
        image(IN_STREAM, features=4),
        image(IN_STREAM, entry=1 << 62),
        image(IN_STREAM, name=b"another"),
    ],
)
def test_what_cannot_be_read_is_not_guessed(tmp_path: Path, content: bytes | bytearray) -> None:
    with pytest.raises(CannotLook):
        found(tmp_path, content)
    with pytest.raises(CannotLook):
        read_state(tmp_path / "nothing", "good")


def test_no_image_does_more_than_that(tmp_path: Path) -> None:
    seed = random.Random(20)
    good = image(IN_STREAM)
    for _ in range(2000):
        bad = bytearray(good)
        at = seed.choice(
            [seed.randrange(104), CLUSTER + seed.randrange(16), 3 * CLUSTER + seed.randrange(128)]
        )
        bad[at : at + 4] = seed.randbytes(4)
        try:
            state = found(tmp_path, bad)
        except CannotLook:
            continue
        assert state is None or len(state) <= 1 << 20
