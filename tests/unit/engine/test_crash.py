"""An engine that is killed at any moment: its successor answers every request exactly once."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from vmbus.bus.io.output import Output
from vmbus.bus.io.ring import OutgoingRing
from vmbus.bus.io.state import RingPositions
from vmbus.errors import MalformedError
from vmbus.machine.engine.build import LIBRARY
from vmbus.machine.engine.layout import MAGIC, MAX_CHANNELS, MAX_SLOTS, VERSION, Mirror, MirrorSlot, Owner
from vmbus.machine.engine.mirror import SlotState, later, recover
from vmbus.native import compiler
from vmbus.ports import FastLink
from vmbus.wire.packet import PacketType, build_packet

from tests.unit.engine.engine_guest import IN_PAGES, LIMIT, OUT_PAGES, PAGE, EngineGuest, compile_device

SIZES = ((len(IN_PAGES) - 1) * PAGE, (len(OUT_PAGES) - 1) * PAGE)
HERE = Path(__file__).parent
GENERATIONS = 150


class Mortal(EngineGuest):
    """A guest whose engine is in a process of its own; the memory is shared with it."""

    def live_and_die(self, step: int) -> None:
        """Run an engine in a child that ends at its ``step``; send requests and read answers until then."""
        ready, told = os.pipe()
        child = os.fork()
        if not child:
            try:
                ctypes.c_ulong.in_dll(ctypes.CDLL(self._library), "engine_die_at").value = step
                self.start_engine()
                self.give()
                os.write(told, b"1")
                while True:
                    time.sleep(1)
            finally:
                os._exit(1)
        try:
            os.close(told)
            os.read(ready, 1)  # nothing, if it ended while the channel was given
            end = time.monotonic() + LIMIT
            while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                assert time.monotonic() < end, "the engine does not come to that step"
                self.trade()
        finally:
            os.close(ready)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    chance = random.Random(1)

    def trade(self) -> None:
        """Send some requests, and read some answers."""
        packets = [
            self.read_order(number) if self.chance.randrange(2) else self.order(1)
            for number in range(self.chance.randrange(1, 20))
        ]
        if self.writer.write(*packets) is None:
            self.next_id -= len(packets)
        self.ring()
        os.eventfd_write(self.wake_fd, 1)
        if self.chance.randrange(3):
            self.seen += [each.transaction_id for each in self.reader.read(self.chance.randrange(1, 40))[0]]
        if self.reader.pages.load_u32(12):
            os.eventfd_write(self.wake_fd, 1)


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture(scope="session")
def mortal_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine, compiled so that it can end between any two of its stores."""
    folder = tmp_path_factory.mktemp("engine")
    files = LIBRARY.write_sources(folder)
    command = [compiler(), *LIBRARY.flags, "-DENGINE_STEPS", "-o", str(folder / "engine.so")]
    subprocess.run([*command, *map(str, files), str(HERE / "steps.c")], check=True)
    return folder / "engine.so"


def identity(packet: bytes) -> int:
    return int(struct.unpack_from("<Q", packet, 8)[0])


def in_the_ring(guest: Mortal, in_index: int) -> list[int]:
    """Ids of the requests that nobody has taken."""
    size = len(guest.order(1)) + 8
    guest.next_id -= 1
    at, end = in_index, guest.writer.pages.load_u32(0)
    ids = []
    while at != end:
        ids.append(
            struct.unpack(
                "<Q",
                b"".join(guest.writer.pages.read(PAGE + (at + 8 + each) % SIZES[0], 1) for each in range(8)),
            )[0]
        )
        at = (at + size) % SIZES[0]
    return ids


def test_every_request_is_answered_once_whenever_the_engine_dies(device: Path, mortal_engine: Path) -> None:
    with Mortal(device, engine=str(mortal_engine), start=False) as guest:
        live_on(guest)


def live_on(guest: Mortal) -> None:
    os.pwrite(guest.file, bytes(64 * PAGE), 0)
    redone = rewritten = 0
    for generation in range(GENERATIONS):
        guest.live_and_die(1 + guest.chance.randrange(300))
        positions, packets, answers = RingPositions(*guest.indices), [], []
        header = guest.mirror.header
        if header.magic:  # else it ended before it had a mirror
            # What a journal would say: it was written before the channel was given.
            found = recover(guest.mirror, FastLink(header.epoch, 0, 0, 0, False, ()))
            positions = found.positions or positions
            waiting = Output(found.answers)
            ring = OutgoingRing(guest.memory.pages(OUT_PAGES), guest.memory)
            waiting.forget_written(ring.written_since(positions.write))
            packets, answers = list(found.packets), waiting.packets
        unread = guest.reader.read()[0]
        guest.seen += [each.transaction_id for each in unread]
        redo, held = [identity(each) for each in packets], [identity(each) for each in answers]
        untaken = in_the_ring(guest, positions.read)
        everything = sorted([*guest.seen, *redo, *held, *untaken])
        assert everything == list(range(1, guest.next_id)), f"generation {generation}"
        redone += len(redo)
        rewritten += len(held)
        # The successor: it answers what was taken, then goes on in another process.
        guest.reader.pages.store_u32(12, 0)
        ring = OutgoingRing(guest.memory.pages(OUT_PAGES), guest.memory)
        for number in (*held, *redo):
            packet = build_packet(PacketType.COMPLETION, struct.pack("<QQ", 1, 0), transaction_id=number)
            assert ring.write([packet])[0] == 1
            guest.seen += [each.transaction_id for each in guest.reader.read()[0]]
        guest.writer.pages.store_u32(4, positions.read)
        guest.indices = [positions.read, guest.reader.pages.load_u32(0)]
    assert redone > 0
    assert rewritten > 0, "no engine died with answers that its guest did not have"
    assert sorted(guest.seen) == sorted(set(guest.seen))


# --- a mirror, and what a journal says of it ---

EPOCH, OPENING, GIVES = 7, 3, 2
BEFORE = FastLink(EPOCH, 0, OPENING, GIVES - 1, False, ())
"""Of a channel that was given since."""
GIVEN = FastLink(EPOCH, 0, OPENING, GIVES, True, ())
RECALLED = FastLink(EPOCH, 0, OPENING, GIVES, False, ())


@pytest.fixture
def mirror() -> Mirror:
    mirror = Mirror()
    header, record = mirror.header, mirror.channel[0]
    header.magic, header.version, header.epoch = MAGIC, VERSION, EPOCH
    header.channels, header.slots = MAX_CHANNELS, MAX_SLOTS
    record.owner, record.opening, record.gives = Owner.ENGINE, OPENING, GIVES
    record.taken = 5 << 32 | 80
    record.answered = 3 << 32 | 120
    return mirror


def put(mirror: Mirror, at: int, state: int, number: int, size: int = 32) -> MirrorSlot:
    slot: MirrorSlot = mirror.slot[at]
    slot.state, slot.opening = state, OPENING
    slot.taken_number = slot.done_number = number
    slot.size = slot.answer_size = size
    struct.pack_into("<Q", slot.packet, 8, number)
    struct.pack_into("<Q", slot.answer, 8, number)
    return slot


def ids(found: Sequence[bytes]) -> list[int]:
    return [identity(each) for each in found]


@pytest.mark.parametrize(("link", "written"), [(BEFORE, True), (GIVEN, False)])
def test_slots_are_taken_in_order_and_void_ones_are_not(
    mirror: Mirror, link: FastLink, written: bool
) -> None:
    put(mirror, 9, SlotState.TAKEN, 5)
    put(mirror, 4, SlotState.PYTHON, 3)
    put(mirror, 7, SlotState.TAKEN, 6)
    put(mirror, 1, SlotState.DONE, 3)
    put(mirror, 2, SlotState.DONE, 5)
    put(mirror, 3, SlotState.DONE, 4)
    put(mirror, 5, SlotState.TAKEN, 4).opening = OPENING + 1
    put(mirror, 6, SlotState.TAKEN, 4).channel = 1
    found = recover(mirror, link)
    assert (found.positions, found.queue_written) == (RingPositions(80, 120), written)
    assert (ids(found.packets), ids(found.answers)) == ([3, 5], [4, 5])


def test_numbers_are_in_order_where_they_wrap(mirror: Mirror) -> None:
    mirror.channel[0].taken = 1 << 32 | 80
    mirror.channel[0].answered = 0xFFFFFFFE << 32 | 120
    for at, number in enumerate((1, 0xFFFFFFFF, 0)):
        put(mirror, at, SlotState.TAKEN, number)
        put(mirror, 3 + at, SlotState.DONE, number)
    found = recover(mirror, GIVEN)
    assert ids(found.packets) == ids(found.answers) == [0xFFFFFFFF, 0, 1]


def test_what_the_journal_has_is_not_taken_from_the_mirror(mirror: Mirror) -> None:
    put(mirror, 0, SlotState.PYTHON, 3)
    put(mirror, 1, SlotState.TAKEN, 4)
    put(mirror, 2, SlotState.PYTHON, 5)
    found = recover(mirror, RECALLED._replace(adopted=(3, 5, 77)))
    assert (found.positions, found.queue_written, ids(found.packets)) == (None, False, [4])


@pytest.mark.parametrize(
    "link",
    [
        RECALLED._replace(epoch=EPOCH - 1),
        RECALLED._replace(channel=MAX_CHANNELS),
        RECALLED._replace(gives=GIVES + 1),
        RECALLED._replace(gives=GIVES - 2),
        GIVEN._replace(gives=GIVES - 1),
        GIVEN._replace(opening=OPENING - 1),
        BEFORE._replace(opening=OPENING + 1),
    ],
)
def test_a_mirror_of_another_engine_or_another_time_is_refused(mirror: Mirror, link: FastLink) -> None:
    for right in (BEFORE, GIVEN, RECALLED):
        recover(mirror, right)
    with pytest.raises(MalformedError):
        recover(mirror, link)


@pytest.mark.parametrize("place", ["magic", "version", "channels", "slots"])
def test_a_mirror_of_another_form_is_refused(mirror: Mirror, place: str) -> None:
    setattr(mirror.header, place, getattr(mirror.header, place) + 1)
    with pytest.raises(MalformedError):
        recover(mirror, RECALLED)


@pytest.mark.parametrize("place", ["taken", "answered"])
def test_impossible_indices_are_refused(mirror: Mirror, place: str) -> None:
    setattr(mirror.channel[0], place, 3 << 32 | 81)
    with pytest.raises(MalformedError):
        recover(mirror, GIVEN)
    assert recover(mirror, RECALLED).positions is None


@pytest.mark.parametrize("size", [0, 8, 0xFFFFFFFF, 4360])
@pytest.mark.parametrize("state", [SlotState.TAKEN, SlotState.DONE])
def test_impossible_sizes_are_refused(mirror: Mirror, state: SlotState, size: int) -> None:
    put(mirror, 0, state, 4, size)
    with pytest.raises(MalformedError):
        recover(mirror, GIVEN)


def test_impossible_slots_are_refused(mirror: Mirror) -> None:
    slot = put(mirror, 0, 9, 4)
    with pytest.raises(MalformedError):
        recover(mirror, GIVEN)
    slot.state = SlotState.TAKEN
    twin = put(mirror, 1, SlotState.TAKEN, 4)
    with pytest.raises(MalformedError):
        recover(mirror, GIVEN)
    twin.state = SlotState.DONE
    assert ids(recover(mirror, GIVEN).answers) == [4]
    with pytest.raises(MalformedError):  # the engine passes on all answers when it loses the rings
        recover(mirror, RECALLED)


def test_sequence_numbers_wrap() -> None:
    assert later(0, 0xFFFFFFFF)
    assert not later(0xFFFFFFFF, 0)
    assert not later(7, 7)
