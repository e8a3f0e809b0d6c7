"""The header of a message with a mark: another process sees all of it, or nothing."""

from __future__ import annotations

import mmap
import struct
import subprocess
import sys
from pathlib import Path

from vmbus.hypervisor.messages import fill_slot, mark_of, slot_is_free
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.ports import PAGE_SIZE
from vmbus.wire.synic import MESSAGE_SLOT, MESSAGE_SLOT_SIZE, MessageType

from tests.unit.hypervisor.scripted_guest import ScriptedGuest

STORES = 20_000
HEADERS = ((1, 17, 0, 0x1111), (0x80000010, 24, 1, 0xEEEE))
"""Type, size, flags, mark."""


class Recorded(MappedMemory):
    """Guest memory that knows its stores: (offset, bytes)."""

    stores: list[tuple[int, bytes]]

    def _store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.stores.append((offset, bytes(data)))
        super()._store(offset, data)

    def fence(self) -> None:
        self.stores.append((-1, b""))
        super().fence()


def mapped(path: Path, kind: type[MappedMemory] = MappedMemory) -> MappedMemory:
    """Return memory of one page in a file, which another process can map."""
    path.write_bytes(bytes(PAGE_SIZE))
    with path.open("r+b") as file:
        return kind(memoryview(mmap.mmap(file.fileno(), PAGE_SIZE)), [RamRegion(0, PAGE_SIZE, 0)])


def test_the_header_is_the_last_store_and_a_single_word(tmp_path: Path) -> None:
    memory = mapped(tmp_path / "ram", Recorded)
    assert isinstance(memory, Recorded)
    memory.stores = []
    page = memory.pages([0])
    fill_slot(page, 3, MessageType.CHANNEL, b"payload", memory, more=True, mark=0x1234)
    base = 3 * MESSAGE_SLOT_SIZE
    (body, data), fence, (header, word) = memory.stores
    assert (body, len(data)) == (base + 8, MESSAGE_SLOT_SIZE - 8)
    assert fence == (-1, b"")
    assert (header, word) == (base, struct.pack("<IBBH", MessageType.CHANNEL, 7, 1, 0x1234))
    assert mark_of(page, 3) == 0x1234


def test_a_slot_stays_free_and_unmarked_until_the_header_is_stored(running: ScriptedGuest) -> None:
    running.synic.gate = lambda: None
    running.synic.post_message(0, 2, b"one")
    page = running.synic.vps[0].simp.pages
    assert page is not None
    seen: list[tuple[bool, int]] = []
    ready = running.synic.ready()
    running.memory.at_fence = lambda: seen.append((slot_is_free(page, 2), mark_of(page, 2)))
    running.synic.deliver(ready)
    assert seen == [(True, 0)]
    assert (slot_is_free(page, 2), mark_of(page, 2)) == (False, 1)


LOOK = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
right, seen = {0, *map(int, sys.argv[2:])}, set()
words[READY] = 1
while words[READY] == 1:
    for _ in range(1000):
        seen.add(words[0])
sys.exit(len(seen - right))
"""
"""A guest that looks at the header until it is told to end, and counts what cannot be."""
READY = PAGE_SIZE // 8
"""A word behind the page of the slots."""


def test_another_process_sees_no_half_of_a_header(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(2 * PAGE_SIZE))
    with path.open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 2 * PAGE_SIZE))
    memory = MappedMemory(view, [RamRegion(0, 2 * PAGE_SIZE, 0)])
    words = view.cast("Q")
    page = memory.pages([0])
    right = [str(int.from_bytes(struct.pack("<IBBH", *each), "little")) for each in HEADERS]
    command = [sys.executable, "-c", LOOK.replace("READY", str(READY)), str(path), *right]
    with subprocess.Popen(command) as guest:
        while not words[READY]:
            assert guest.poll() is None
        for number in range(STORES):
            kind, size, flags, mark = HEADERS[number % 2]
            fill_slot(page, 0, kind, bytes(size), memory, more=bool(flags), mark=mark)
        words[READY] = 2
        assert guest.wait(30) == 0
    assert MESSAGE_SLOT.parse(page.read(0, MESSAGE_SLOT_SIZE)).message_type == HEADERS[1][0]
