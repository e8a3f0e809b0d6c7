"""Reads and writes of a disk that a server has: through a queue, and back to Python where the server fails."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmbus.machine.engine.layout import MAX_QUEUES, QUEUE_RAM
from vmbus.machine.engine.queue import EngineQueue
from vmbus.ports import SharedFile

from tests.unit.engine.engine_guest import BUFFERS, PAGE, RAM, compile_device
from tests.unit.fastpath.queue_server import BlockRequest, QueueServer
from tests.unit.fastpath.test_engine_storage import BLOCK, Disk, request

IO_ERROR = 1
BROKEN = {
    "more answers than requests": lambda server, one: server.publish(2),
    "an index that goes back": lambda server, one: server.publish(0xFFFF),
    "no such slot": lambda server, one: server.used(1 << 16, 1),
    "a slot beyond the queue": lambda server, one: server.used(0xFFFFFFFF, 1),
    "a slot without a request": lambda server, one: server.used(one.slot + 1, 1),
    "more than there was room for": lambda server, one: server.answer(one, length=one.room + 1),
}


class QueuedDisk(Disk):
    """A disk whose server is the test."""

    def __init__(self, device: Path, *, busy_waits: bool) -> None:
        super().__init__(device, busy_waits=busy_waits)
        self.broken: list[str] = []
        self.queue = self.new_queue()
        self.server = QueueServer(self.queue.layout)
        self.use(self.queue)

    def new_queue(self) -> EngineQueue:
        return EngineQueue(self.guest.engine, SharedFile(self.guest.ram_fd, RAM, QUEUE_RAM))

    def use(self, queue: EngineQueue) -> None:
        self.unit.queue = queue.open(self.broken.append)
        assert self.unit.queue
        self.path.change_unit(self.number, self.unit)

    def close(self) -> None:
        self.queue.close()
        self.server.close()
        super().close()


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


@pytest.fixture(params=[True, False], ids=["busy", "sleeping"])
def disk(device: Path, request: pytest.FixtureRequest) -> Iterator[QueuedDisk]:
    disk = QueuedDisk(device, busy_waits=request.param)
    yield disk
    disk.close()


def read(number: int, lba: int, blocks: int, place: int) -> bytes:
    return request(number, write=False, lba=lba, blocks=blocks, place=place)


def test_data_moves_between_the_server_and_guest_memory(disk: QueuedDisk) -> None:
    guest, server = disk.guest, disk.server
    written = os.urandom(3 * PAGE)
    guest.memory.write(BUFFERS * PAGE + 1000, written)
    guest.give()
    guest.send(request(1, write=True, lba=40, blocks=24, place=BUFFERS, inside=1000))
    (one,) = server.take()
    assert (one.write, one.offset) == (True, 40 * BLOCK)
    server.move(one, disk.file)
    server.answer(one)
    guest.receive(1)
    assert os.pread(disk.file, len(written), 40 * BLOCK) == written
    guest.memory.take_dirty()
    guest.send(read(2, 40, 24, BUFFERS + 10))
    (one,) = server.take()
    server.move(one, disk.file)
    server.answer(one)
    assert [each.transaction_id for each in guest.receive(1)] == [2]
    assert guest.memory.read((BUFFERS + 10) * PAGE, len(written)) == written
    assert set(range(BUFFERS + 10, BUFFERS + 13)) <= set(guest.memory.take_dirty())
    assert (guest.left, guest.returned, disk.broken) == (0, [], [])
    counts = disk.path.counts(disk.number)
    assert (counts.reads, counts.writes, counts.bytes_read) == (1, 1, 3 * PAGE)
    assert disk.queue.activity() == (2, 0)


def test_many_requests_in_any_order_and_over_the_end_of_the_ring(disk: QueuedDisk) -> None:
    guest, server = disk.guest, disk.server
    content = os.urandom(64 * PAGE)
    os.pwrite(disk.file, content, 0)
    guest.give()
    number = 1
    for round_ in range(37):
        pages = range(round_, round_ + 28)
        guest.send(*[read(number + at, page * 8, 8, BUFFERS + page) for at, page in enumerate(pages)])
        number += len(pages)
        requests = server.take(len(pages))
        for one in reversed(requests):
            server.move(one, disk.file)
            server.answer(one)
        assert len(guest.receive(len(pages))) == len(pages)
    assert server.seen > server.layout.entries
    assert guest.memory.read(BUFFERS * PAGE, len(content)) == content
    assert disk.path.depth(disk.number) == 0


@pytest.mark.parametrize("status", [IO_ERROR, 2, 0xFF])
def test_a_request_that_fails_is_returned(disk: QueuedDisk, status: int) -> None:
    guest = disk.guest
    packet = read(1, 4, 8, BUFFERS)
    guest.give()
    guest.send(packet)
    (one,) = disk.server.take()
    disk.server.answer(one, status)
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [packet]
    guest.recall()
    assert BUFFERS in guest.memory.take_dirty()  # some of it may have been stored
    assert (disk.path.depth(disk.number), disk.path.counts(disk.number).reads) == (0, 0)


def test_a_read_that_ends_early_is_returned(disk: QueuedDisk) -> None:
    guest = disk.guest
    guest.give()
    guest.send(read(1, 4, 8, BUFFERS))
    (one,) = disk.server.take()
    disk.server.answer(one, length=one.room - 1)
    guest.dispatch(lambda: bool(guest.returned))
    assert not disk.broken


def test_a_write_with_fua_is_left_to_python_where_the_server_has_a_cache(disk: QueuedDisk) -> None:
    guest = disk.guest
    packet = bytearray(request(1, write=True, lba=0, blocks=8, place=BUFFERS))
    packet[packet.index(0x2A, 60) + 1] |= 8
    guest.give()
    guest.send(bytes(packet))
    (one,) = disk.server.take()
    disk.server.answer(one)
    guest.receive(1)
    guest.recall()
    disk.unit.leaves_fua = True
    disk.path.change_unit(disk.number, disk.unit)
    guest.give()
    guest.send(bytes(packet))
    guest.dispatch(lambda: guest.left == 1)
    assert disk.queue.activity() == (1, 0)


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_a_server_that_breaks_the_rules_loses_the_queue(
    disk: QueuedDisk, harm: Callable[[QueueServer, object], None]
) -> None:
    guest = disk.guest
    packet = read(1, 4, 8, BUFFERS)
    guest.give()
    guest.send(packet)
    (one,) = disk.server.take()
    harm(disk.server, one)
    guest.dispatch(lambda: bool(disk.broken))
    assert len(disk.broken) == 1
    assert not guest.returned  # it may still be done
    guest.send(read(2, 4, 8, BUFFERS))
    guest.dispatch(lambda: guest.left == 1)  # what comes now is Python's
    disk.queue.close()
    guest.dispatch(lambda: bool(guest.returned))
    assert guest.returned == [packet]
    guest.recall()
    assert disk.path.depth(disk.number) == 0


def test_a_server_cannot_answer_for_another_one(disk: QueuedDisk) -> None:
    guest = disk.guest
    guest.give()
    guest.send(read(1, 4, 8, BUFFERS))
    (one,) = disk.server.take()
    guest.recall()
    second = disk.new_queue()
    liar = QueueServer(second.layout)
    disk.use(second)
    guest.give()
    guest.send(read(2, 4, 8, BUFFERS))
    liar.take()
    liar.used(one.slot, one.room)
    guest.dispatch(lambda: bool(disk.broken))
    assert (disk.queue.activity(), second.activity()) == ((0, 1), (0, 1))
    disk.server.answer(one)
    guest.dispatch(lambda: disk.queue.activity() == (1, 0))
    second.close()
    guest.dispatch(lambda: guest.returned == [read(2, 4, 8, BUFFERS)])
    liar.close()


def test_an_answer_counts_once(disk: QueuedDisk) -> None:
    guest = disk.guest
    guest.give()
    guest.send(read(1, 0, 8, BUFFERS), read(2, 8, 8, BUFFERS + 1))
    first, second = disk.server.take(2)
    disk.server.answer(first)
    disk.server.answer(first)
    guest.dispatch(lambda: bool(disk.broken))
    disk.queue.close()
    guest.dispatch(lambda: bool(guest.returned))
    assert len(guest.returned) == 1
    assert len(guest.receive(1)) == 1
    assert second.slot != first.slot


def test_what_a_dead_server_did_not_answer_is_returned_and_what_it_did_is_answered(disk: QueuedDisk) -> None:
    guest = disk.guest
    packets = [read(1 + number, number * 8, 8, BUFFERS + number) for number in range(20)]
    guest.give()
    guest.send(*packets)
    requests = disk.server.take(20)
    for one in requests[:7]:
        disk.server.move(one, disk.file)
        disk.server.answer(one)
    threading.Thread(target=disk.queue.close).start()
    guest.dispatch(lambda: len(guest.returned) == 13)
    guest.recall()
    assert sorted(guest.returned) == sorted(packets[7:])
    seen = {each.transaction_id for each in guest.handle()} | {
        int.from_bytes(each[8:16], "little") for each in guest.answers
    }
    assert seen == set(range(1, 8))
    assert disk.path.depth(disk.number) == 0


def test_a_dead_server_s_requests_come_back_in_their_order(disk: QueuedDisk) -> None:
    guest, server = disk.guest, disk.server
    guest.give()
    guest.send(read(1, 0, 8, BUFFERS), read(2, 8, 8, BUFFERS), read(3, 16, 8, BUFFERS))
    requests = server.take(3)
    for one in requests[1::-1]:
        server.answer(one)
    guest.receive(2)
    packets = [read(4 + number, 0, 8, BUFFERS) for number in range(3)]  # their slots are not in this order
    guest.send(*packets)
    server.take(3)
    disk.queue.close()
    guest.dispatch(lambda: len(guest.returned) == 4)
    assert guest.returned == [read(3, 16, 8, BUFFERS), *packets]


def test_the_oldest_request_and_since_when_it_is_overtaken(disk: QueuedDisk) -> None:
    guest, server, queue = disk.guest, disk.server, disk.queue

    def answer(one: BlockRequest) -> None:
        server.answer(one)
        guest.receive(1)

    def taken(number: int) -> tuple[BlockRequest, float]:
        before = time.monotonic()
        guest.send(read(number, 8 * number, 8, BUFFERS))
        (one,) = server.take()
        return one, before

    assert (queue.oldest(), queue.overtaken()) == (None, None)
    guest.give()
    first, before_first = taken(1)
    second, _ = taken(2)
    third, _ = taken(3)
    fourth, before_fourth = taken(4)
    oldest = queue.oldest()
    assert oldest is not None
    assert before_first <= oldest <= time.monotonic()
    assert queue.overtaken() is None  # it waits behind nobody
    answer(second)
    since = queue.overtaken()
    assert since is not None
    assert oldest < since <= time.monotonic()
    answer(third)
    assert (queue.oldest(), queue.overtaken()) == (oldest, since)
    fifth, _ = taken(5)
    answer(first)
    assert queue.overtaken() is None  # the fourth has waited long, but behind others
    oldest = queue.oldest()
    assert oldest is not None
    assert before_fourth <= oldest <= time.monotonic()
    answer(fifth)
    since = queue.overtaken()
    assert since is not None
    assert since > oldest
    answer(fourth)
    assert (queue.oldest(), queue.overtaken()) == (None, None)


def test_a_closed_queue_is_not_taken_for_its_successor(disk: QueuedDisk) -> None:
    """It has the same place in the engine."""
    guest = disk.guest
    number = disk.unit.queue
    disk.queue.close()
    second = disk.new_queue()
    disk.use(second)
    guest.give()
    guest.send(read(1, 0, 8, BUFFERS))
    guest.dispatch(lambda: second.activity() == (0, 1))
    assert guest.engine.queue_activity(number) == (0, 0)
    assert guest.engine.queue_times(number) == (0, 0)
    second.close()


def test_a_request_for_a_queue_that_is_gone_is_left_to_python(disk: QueuedDisk) -> None:
    guest = disk.guest
    disk.queue.close()
    second = disk.new_queue()
    assert second.open(disk.broken.append) != disk.unit.queue
    guest.give()
    guest.send(read(1, 0, 8, BUFFERS))
    guest.dispatch(lambda: guest.left == 1)
    assert second.activity() == (0, 0)
    second.close()


def test_there_are_so_many_queues_and_no_more(disk: QueuedDisk) -> None:
    queues = [disk.new_queue() for _ in range(MAX_QUEUES)]
    numbers = [each.open(disk.broken.append) for each in queues]
    assert numbers[-1] == 0
    assert len({*numbers, disk.unit.queue}) == MAX_QUEUES + 1
    for each in queues:
        each.close()
    again = disk.new_queue()
    assert again.open(disk.broken.append) not in numbers
    again.close()


def test_there_is_no_queue_without_descriptors(disk: QueuedDisk) -> None:
    """One whose eventfds the engine has not would never tell its server of a request."""
    queue = disk.new_queue()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    for free in (0, 1):
        spare = [os.dup(disk.file) for _ in range(3)]
        for each in spare[:free]:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, before[1]))
        try:
            found = queue.open(disk.broken.append)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for each in spare[free:]:
                os.close(each)
        assert found == 0
        lowest = os.dup(disk.file)
        os.close(lowest)
        assert lowest == spare[0]  # none is left open
    queue.close()


def test_the_server_cannot_make_the_memory_of_the_queue_smaller(disk: QueuedDisk) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(disk.queue.layout.files[1].fd, 0)


def test_an_eventfd_that_blocks_stops_no_other_disk(disk: QueuedDisk) -> None:
    """The server shares the eventfds with the engine: it can fill one, and have writes to it block."""
    guest = disk.guest
    layout = disk.queue.layout
    for each in (layout.kick_fd, layout.call_fd):
        os.set_blocking(each, True)
        os.eventfd_write(each, 0xFFFFFFFFFFFFFFFE)
    guest.give()
    guest.send(*[read(1 + number, number * 8, 8, BUFFERS + number) for number in range(8)])
    while disk.queue.activity() != (0, 8):
        pass
    guest.recall()  # the engine does what it is asked
    guest.give()
    os.eventfd_read(layout.kick_fd)
    os.eventfd_read(layout.call_fd)
    for one in disk.server.take(8):
        disk.server.answer(one)
    assert len(guest.receive(8)) == 8
