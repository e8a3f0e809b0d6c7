"""The engine's thread: rings, requests, who owns a channel, signals, and what a successor finds."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmbus.machine.engine.layout import LINES_AHEAD, Owner
from vmbus.machine.engine.thread import BUSY_WAITS
from vmbus.wire.gateway import IdleState

from tests.unit.engine.engine_guest import (
    BUFFERS,
    FLAG,
    FLAGS_PAGE,
    HIGH,
    HOLE,
    OUT_PAGES,
    PAGE,
    EngineGuest,
    compile_device,
)

COMPLETION = 11


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture(params=[True, False], ids=["busy", "sleeping"])
def guest(device: Path, request: pytest.FixtureRequest) -> Iterator[EngineGuest]:
    with EngineGuest(device, busy_waits=request.param) as guest:
        yield guest


def ids(packets: list) -> list[int]:  # type: ignore[type-arg]
    return [each.transaction_id for each in packets]


def transaction_ids(answers: list[bytes]) -> list[int]:
    return [struct.unpack_from("<Q", each, 8)[0] for each in answers]


def test_plain_requests_are_answered_without_python(guest: EngineGuest) -> None:
    guest.give()
    guest.send(*[guest.order(1) for _ in range(10)])
    found = guest.receive(10)
    assert ids(found) == list(range(1, 11))
    assert {each.kind for each in found} == {COMPLETION}
    assert struct.unpack_from("<I", found[0].payload) == (1,)
    assert (guest.left, guest.answers, guest.returned) == (0, [], [])


def test_reads_reach_guest_memory_and_its_dirty_log(guest: EngineGuest) -> None:
    os.pwrite(guest.file, bytes(range(256)) * 16 * 8, 0)
    guest.memory.take_dirty()
    guest.give()
    guest.send(*[guest.read_order(number) for number in range(8)])
    assert sorted(ids(guest.receive(8))) == list(range(1, 9))
    for number in range(8):
        assert guest.memory.read((BUFFERS + number) * PAGE, PAGE) == bytes(range(256)) * 16
    dirty = set(guest.memory.take_dirty())
    assert {BUFFERS + number for number in range(8)} <= dirty
    assert {OUT_PAGES[0], OUT_PAGES[1], FLAGS_PAGE} <= dirty


def test_many_rounds_over_the_end_of_both_rings(guest: EngineGuest) -> None:
    os.pwrite(guest.file, os.urandom(32 * PAGE), 0)
    guest.give()
    received: list[int] = []
    for round_ in range(60):
        orders = [
            guest.read_order(number) if number % 3 else guest.order(1) for number in range(1 + round_ % 20)
        ]
        guest.send(*orders)
        received += ids(guest.receive(len(orders)))
    assert sorted(received) == list(range(1, guest.next_id))


def test_a_packet_that_is_not_plain_is_left_in_the_ring(guest: EngineGuest) -> None:
    guest.give()
    guest.send(guest.order(1), guest.order(7), guest.order(1))
    guest.dispatch(lambda: guest.left == 1)
    guest.recall()
    assert transaction_ids(guest.answers) == [1]
    assert guest.writer.pages.load_u32(4) == guest.indices[0]
    size = len(guest.order(1)) + 8
    assert guest.indices[0] == size
    guest.indices[0] += size  # Python has processed it
    guest.give()
    assert ids(guest.receive(1)) == [3]


def test_an_owner_that_fails_at_an_event_does_not_keep_the_events_behind_it(
    guest: EngineGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.give()
    guest.fill()
    guest.recall()
    waiting = guest.outstanding + len(guest.answers)
    assert waiting > 1
    again = len(guest.answers)
    take = guest.engine_answered

    def broken(answer: bytes) -> None:
        take(answer)
        raise MemoryError("no memory for the answer")

    monkeypatch.setattr(guest, "engine_answered", broken)
    guest.give()
    guest.recall()
    assert len(guest.answers) - again == len(guest.failures) > 1


@pytest.mark.parametrize("index", [0x10004, 0x7FFFFFF8, 12])
def test_a_damaged_ring_is_left(guest: EngineGuest, index: int) -> None:
    guest.give()
    guest.writer.pages.store_u32(0, index)
    guest.ring()
    guest.dispatch(lambda: guest.left == 1)
    guest.recall()
    assert guest.indices == [0, 0]


@pytest.mark.parametrize("length8", [0, 1, 0xFFFF, 600])
def test_a_damaged_packet_is_left(guest: EngineGuest, length8: int) -> None:
    packet = bytearray(guest.order(1))
    struct.pack_into("<H", packet, 4, length8)
    guest.give()
    guest.send(bytes(packet))
    guest.dispatch(lambda: guest.left == 1)
    guest.recall()
    assert guest.indices == [0, 0]


def test_a_failed_transfer_is_returned(guest: EngineGuest) -> None:
    guest.give()
    packet = guest.read_order(3)  # behind the end of the file
    guest.send(packet)
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [packet]
    guest.dispatch(lambda: guest.left == 1)
    guest.recall()
    assert guest.indices[0] == len(packet) + 8


def test_nothing_is_touched_after_a_recall(guest: EngineGuest) -> None:
    guest.give()
    guest.send(guest.order(1))
    guest.receive(1)
    guest.recall()
    before = guest.memory.read(0, 40 * PAGE)
    guest.send(guest.order(1))
    time.sleep(0.05)
    now = guest.memory.read(0, 40 * PAGE)
    assert [
        at for at in range(40 * PAGE) if before[at] != now[at] and at // PAGE in (*OUT_PAGES, FLAGS_PAGE)
    ] == []
    assert guest.indices[0] == len(guest.order(1)) + 8
    guest.give()
    assert ids(guest.receive(1)) == [2]


def test_answers_that_do_not_fit_wait_for_the_guest(guest: EngineGuest) -> None:
    guest.give()
    room = (len(OUT_PAGES) - 1) * PAGE
    count = 2 * room // 40
    sent = 0
    received: list[int] = []
    while sent < count:
        orders = [guest.order(1) for _ in range(50)]
        while guest.writer.raw_free() <= sum(len(each) + 8 for each in orders):
            guest.take_interrupt()
            received += ids(guest.handle())
        guest.send(*orders)
        sent += 50
        if sent == 400:
            time.sleep(0.05)  # the ring fills
    while len(received) < sent:
        guest.take_interrupt()
        received += ids(guest.handle())
    assert received == list(range(1, sent + 1))


def test_held_answers_are_passed_on_with_a_recall(guest: EngineGuest) -> None:
    guest.give()
    guest.fill()
    guest.recall()
    packets, _ = guest.reader.read()
    held = transaction_ids(guest.answers)
    taken = len(packets) + len(held)
    assert ids(packets) + held == list(range(1, taken + 1))
    assert len(held) > 0
    assert guest.indices[1] == guest.reader.pages.load_u32(0)


def test_what_is_under_way_at_a_recall_ends_as_an_event(guest: EngineGuest) -> None:
    os.pwrite(guest.file, bytes(64 * PAGE), 0)
    guest.give()
    orders = [guest.read_order(number) for number in range(64)]
    guest.send(*orders)
    guest.recall()
    packets, _ = guest.reader.read()
    taken = guest.indices[0] // (len(orders[0]) + 8)
    assert guest.outstanding == taken - len(packets)
    guest.dispatch(lambda: len(packets) + len(guest.answers) == taken)
    assert guest.engine.in_flight == 0


def test_requests_of_an_earlier_opening_are_not_answered(guest: EngineGuest) -> None:
    os.pwrite(guest.file, bytes(64 * PAGE), 0)
    guest.give()
    guest.send(*[guest.read_order(number) for number in range(64)])
    guest.recall()
    answered = len(guest.answers)
    packets, _ = guest.reader.read()
    taken = guest.indices[0] // (len(guest.order(1)) + 8)
    guest.engine.forget(0)
    guest.dispatch(lambda: len(packets) + answered + guest.ended == taken)
    assert len(guest.answers) == answered


@pytest.mark.parametrize(("place", "pfn"), [(BUFFERS, BUFFERS), (HOLE // PAGE + 7, HIGH // PAGE + 7)])
def test_pages_with_code_are_written_through_qemu_before_the_answer(
    guest: EngineGuest, place: int, pfn: int
) -> None:
    os.pwrite(guest.file, b"\x90" * PAGE, 0)
    guest.notes[pfn] = 1
    guest.give()
    guest.send(guest.order(2, 1000, 0, place * PAGE + 100))
    time.sleep(0.02)
    assert guest.reader.available() == 0
    guest.dispatch(lambda: bool(guest.through))
    assert guest.through == [(place * PAGE + 100, 1000)]
    assert not guest.notes[pfn]
    assert ids(guest.receive(1)) == [1]


def test_during_a_migration_every_range_is_reported_before_the_answer(guest: EngineGuest) -> None:
    os.pwrite(guest.file, bytes(PAGE), 0)
    guest.engine.report_ranges(True)
    guest.give()
    guest.send(guest.order(2, PAGE, 0, BUFFERS * PAGE + 100))
    time.sleep(0.02)
    assert guest.reader.available() == 0
    guest.dispatch(lambda: bool(guest.through))
    assert guest.through == [(BUFFERS * PAGE + 100, PAGE - 100), ((BUFFERS + 1) * PAGE, 100)]
    assert ids(guest.receive(1)) == [1]
    guest.engine.report_ranges(False)
    guest.send(guest.read_order(0))
    assert ids(guest.receive(1)) == [2]


# --- signals ---


def test_a_vcpu_that_polls_is_left_alone(guest: EngineGuest) -> None:
    guest.idle = IdleState.POLLING
    guest.give()
    guest.send(guest.order(1))
    assert ids(guest.receive(1)) == [1]
    assert guest.interrupts == 0
    assert guest.engine.lines == 0


def test_a_vcpu_that_halts_is_woken_by_qemu(guest: EngineGuest) -> None:
    guest.idle = IdleState.HALTED
    guest.give()
    guest.send(guest.order(1))
    assert ids(guest.receive(1)) == [1]
    assert guest.interrupts == guest.engine.lines == 1
    assert list(guest.words[1:5]) == [0, 0, 0, 0]
    assert guest.words[5] == 1


def test_where_others_need_the_processor_nothing_waits_for_a_vcpu_to_halt(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A yield there takes milliseconds, and the vCPU that is waited for gets no processor either."""
    monkeypatch.setitem(BUSY_WAITS, "gap", 0)  # each look of the thread at the clock finds one
    monkeypatch.setitem(BUSY_WAITS, "wait_for_halt", 10**12)
    with EngineGuest(device) as guest:
        guest.give()
        guest.send(guest.order(1))
        assert ids(guest.receive(1)) == [1]
        assert guest.engine.counts()[0]["gaps"]
        assert guest.interrupts == 1


def test_no_vector_is_left_behind(guest: EngineGuest) -> None:
    guest.give()
    guest.send(guest.order(1))
    end = time.monotonic() + 10
    while not guest.memory.pages([FLAGS_PAGE]).load_u32(0) & 1 << FLAG:
        assert time.monotonic() < end
    guest.recall()
    assert list(guest.words[1:5]) == [0, 0, 0, 0]
    assert ids(guest.receive(1)) == [1]


def test_a_flag_that_is_set_is_not_signalled_again(guest: EngineGuest) -> None:
    guest.memory.pages([FLAGS_PAGE]).store_u32(0, 1 << FLAG | 1)
    guest.give()
    guest.send(guest.order(1))
    end = time.monotonic() + 10
    while not guest.reader.available():
        assert time.monotonic() < end
    time.sleep(0.01)
    assert guest.engine.lines == 0
    assert guest.memory.pages([FLAGS_PAGE]).load_u32(0) == 1 << FLAG | 1


def test_an_idle_engine_sleeps(guest: EngineGuest) -> None:
    guest.give()
    guest.send(guest.order(1))
    guest.receive(1)
    before = guest.engine.counts()[0]["passes"]
    time.sleep(0.3)
    assert guest.writer.pages.load_u32(8) == 0, "it does not want to be woken, so it does not sleep"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    time.sleep(0.3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - used < 0.1
    assert guest.engine.counts()[0]["passes"] > before


# --- the mirror ---


def test_the_mirror_says_how_far_the_rings_are(guest: EngineGuest) -> None:
    guest.give()
    guest.send(*[guest.order(1) for _ in range(5)])
    guest.receive(5)
    channel = guest.mirror.channel[0]
    assert channel.owner == Owner.ENGINE
    size = len(guest.order(1)) + 8
    assert channel.taken == 5 << 32 | 5 * size
    assert channel.answered == 5 << 32 | 5 * 40
    assert channel.gives == 1
    assert all(slot.state == 0 for slot in guest.mirror.slot)
    guest.recall()
    assert channel.owner == Owner.PYTHON


def test_the_mirror_has_the_answers_that_the_guest_does_not_have(guest: EngineGuest) -> None:
    guest.give()
    guest.fill()
    channel = guest.mirror.channel[0]
    taken, answered = channel.taken >> 32, channel.answered >> 32
    assert answered < taken
    held = sorted((slot.done_number, bytes(slot.answer[8:16])) for slot in guest.mirror.slot if slot.state)
    assert [number for number, _ in held] == list(range(answered + 1, taken + 1))
    assert [struct.unpack("<Q", each)[0] for _, each in held] == list(range(answered + 1, taken + 1))


# --- QEMU's socket, which Python writes to as well ---


def test_no_line_is_written_while_python_writes(guest: EngineGuest) -> None:
    guest.idle = IdleState.HALTED
    guest.engine.lock_lines()
    guest.give()
    guest.send(guest.order(1))
    end = time.monotonic() + 10
    while not guest.reader.available():
        assert time.monotonic() < end
    time.sleep(0.02)
    assert guest.engine.lines == 0
    guest.engine.unlock_lines()
    assert ids(guest.receive(1)) == [1]
    assert guest.interrupts == guest.engine.lines == 1


def test_no_more_is_sent_than_qemu_has_room_for_answers(guest: EngineGuest) -> None:
    told: list[int] = []
    guest.engine.lines_due = lambda: told.append(guest.engine.lines)
    guest.engine.allow_lines(unanswered=0)
    guest.idle = IdleState.HALTED
    guest.give()
    for _ in range(LINES_AHEAD):
        guest.send(guest.order(1))
        guest.receive(1)
    guest.send(guest.order(1))
    # An answer is in the ring before its interrupt is asked for.
    guest.dispatch(lambda: bool(told) and guest.engine.lines == LINES_AHEAD)
    time.sleep(0.02)
    assert guest.engine.lines == LINES_AHEAD
    guest.dispatch(lambda: len(told) > 1)  # it asks again as long as it has to
    guest.engine.allow_lines(unanswered=LINES_AHEAD)  # QEMU has answered nothing yet
    assert guest.engine.lines == LINES_AHEAD
    guest.engine.allow_lines(unanswered=0)
    assert len(guest.receive(1)) == 1
    assert guest.engine.lines == LINES_AHEAD + 1


def test_an_engine_that_got_other_doorbells_is_woken_by_them_and_not_by_those_of_before(
    guest: EngineGuest,
) -> None:
    """As of an emulator that has taken the gateway over from another process."""
    at = ctypes.addressof(guest.words)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    guest.words[7] = 0
    guest.engine.use_doorbells(other, at + 60)
    guest.give()
    deadline = time.monotonic() + 30
    while not guest.words[7] >> 32:  # it sleeps, and says so at the new address
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not guest.words[7] & 0xFFFFFFFF
    guest.send(guest.order(1))  # which looks at the word of before, and so wakes nobody
    os.eventfd_write(other, 1)
    assert ids(guest.receive(1)) == [1]
    os.close(other)


def _sleeps(guest: EngineGuest, *, elsewhere: bool) -> None:
    """Wait until the engine says, at one of two addresses, that it sleeps; nothing is at the other one."""
    deadline = time.monotonic() + 30
    shift = 32 if elsewhere else 0
    while not guest.words[7] >> shift & 0xFFFFFFFF:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not guest.words[7] >> (32 - shift) & 0xFFFFFFFF


def test_an_engine_that_has_left_its_word_stores_nothing_there_and_can_return(guest: EngineGuest) -> None:
    """As of an emulator whose guest goes to another process, and stays after all."""
    at = ctypes.addressof(guest.words)
    _sleeps(guest, elsewhere=False)
    guest.engine.use_waiting(at + 60)
    guest.words[7] = guest.words[7] & ~0xFFFFFFFF | 0x5A5A  # the next process's, from now on
    for _ in range(20):
        guest.engine.counts()  # it wakes, and sleeps again
    deadline = time.monotonic() + 30
    while not guest.words[7] >> 32:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert guest.words[7] & 0xFFFFFFFF == 0x5A5A
    guest.words[7] &= ~0xFFFFFFFF
    guest.engine.use_waiting(at + 56)
    guest.give()
    _sleeps(guest, elsewhere=False)
    guest.send(guest.order(1))
    assert ids(guest.receive(1)) == [1]
