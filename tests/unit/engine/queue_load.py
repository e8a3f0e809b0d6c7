"""``python -m tests.unit.engine.queue_load ENGINE DEVICE [SEED]``: queues with hostile servers, under a sanitizer.

Each round has a queue, requests in it and beside it, and a channel that is recalled, forgotten and given with all of
that under way, while other threads are the server, and close the queue when they like. Prints how many requests were
sent, and how many have ended, each of them once.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vmbus.machine.engine.layout import (
    MAX_SLOTS,
    QUEUE_MEMORY,
    QUEUE_RAM,
    QUEUE_SIZE,
    QUEUE_USED,
)
from vmbus.machine.engine.queue import EngineQueue
from vmbus.ports import SharedFile
from vmbus.wire.gateway import IdleState

from tests.unit.engine.engine_guest import BUFFERS, LIMIT, PAGE, RAM, EngineGuest
from tests.unit.fastpath.queue_server import BlockRequest, QueueServer

ROUNDS = 60
MAX_REQUESTS = 40
DEED_LIMIT = 0.5

Deed = Callable[[QueueServer, random.Random, Sequence[BlockRequest]], None]


def _honest(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    for one in requests:
        server.answer(one)


def _failing(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    for one in requests:
        server.answer(one, rng.randrange(256), rng.randrange(one.room + 1))


def _any_number(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    server.used(rng.getrandbits(32), 1)


def _near_number(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    """It may be that of a request in no queue, or of none."""
    for _ in requests:
        server.used(rng.randrange(2 * MAX_REQUESTS), rng.randrange(2))


def _last_numbers(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    server.used(MAX_SLOTS - rng.randrange(-2, 2), 1)


def _twice(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    for one in requests:
        server.answer(one)
        server.answer(requests[0])


def _too_long(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    for one in requests:
        server.answer(one, length=one.room + rng.choice([1, PAGE, 1 << 31, 0xFFFFFFFF - one.room]))


def _jump(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    for one in requests:
        server.write(one.status, b"\0")
        server.publish(server.index + rng.choice([1, len(requests), MAX_SLOTS, 0x8000, 0xFFFF]))


def _scribble(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    """Over all that is shared: descriptors, tables, both rings, statuses."""
    for _ in range(30):
        server.write(QUEUE_MEMORY + rng.randrange(QUEUE_SIZE - 64), rng.randbytes(64))
        server.write(QUEUE_MEMORY + QUEUE_USED + rng.randrange(PAGE), rng.randbytes(16))
        server.publish(rng.getrandbits(16))


def _noise(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    """Eventfds that are written, emptied and filled."""
    for fd in (server.layout.call_fd, server.layout.kick_fd):
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                if rng.random() < 0.4:
                    os.eventfd_read(fd)
                else:
                    os.eventfd_write(fd, rng.choice([1, 0xFFFFFFFFFFFFFFFE]))


def _silent(server: QueueServer, rng: random.Random, requests: Sequence[BlockRequest]) -> None:
    """It has taken them, and that is all."""


DEEDS: tuple[Deed, ...] = (
    *(_honest, _failing, _any_number, _near_number, _last_numbers, _twice, _too_long, _jump),
    *(_scribble, _noise, _silent),
)


class Round:
    """One queue, until everything that was sent has ended."""

    def __init__(self, guest: EngineGuest, rng: random.Random, deed: Deed) -> None:
        self.guest = guest
        self.rng = rng
        self.deed = deed
        self.queue = EngineQueue(guest.engine, SharedFile(guest.ram_fd, RAM, QUEUE_RAM))
        layout = self.queue.layout
        self.descriptors = [os.dup(each) for each in (layout.kick_fd, layout.call_fd)]
        kick, call = self.descriptors  # of its own, as those of another process
        self.server = QueueServer(replace(layout, kick_fd=kick, call_fd=call))
        self.closed = False
        self.served = threading.Event()
        self.first = guest.next_id
        self.broken: list[str] = []
        self.ended: list[int] = []
        """Ids of requests that were answered, or came back."""

    def run(self) -> int:
        """Return how many requests were sent."""
        guest, rng = self.guest, self.rng
        guest.answers.clear()
        guest.returned.clear()
        guest.ended = 0
        guest.idle = rng.choice([IdleState.RUNNING, IdleState.HALTED])
        number = self.queue.open(self.broken.append)
        assert number
        guest.use_queue(number)
        self._give()
        threads = [
            threading.Thread(target=self._serve, args=(random.Random(rng.random()),)),
            threading.Thread(target=self._close_some_time, args=(random.Random(rng.random()),)),
        ]
        for each in threads:
            each.start()
        for _ in range(rng.randrange(1, 4)):
            guest.send(*[self._order() for _ in range(rng.randrange(1, MAX_REQUESTS // 3))])
            for _ in range(rng.randrange(5)):
                self._look()
                if rng.random() < 0.3:
                    self._freeze()
        forgotten = self._forget() if rng.random() < 0.2 else set()
        for each in threads:
            each.join()
        wanted = set(range(self.first, guest.next_id))
        end = time.monotonic() + LIMIT
        while len(self.ended) + guest.ended < len(wanted):
            assert time.monotonic() < end, f"{self.deed.__name__}: {wanted - set(self.ended)} do not end"
            self._look()
        self._freeze()
        self._look()
        guest.recall()
        assert len(set(self.ended)) == len(self.ended), f"{self.deed.__name__}: ended twice"
        assert wanted - forgotten <= set(self.ended) <= wanted
        assert guest.engine.in_flight == 0
        assert guest.failures == []
        self.server.close()
        for fd in self.descriptors:
            os.close(fd)
        return len(wanted)

    def _order(self) -> bytes:
        at = self.rng.randrange(32)
        what = self.rng.choice([1, 2, 3, 3, 3, 3, 4])
        return self.guest.order(what, 0 if what == 1 else PAGE, at * PAGE, (BUFFERS + at) * PAGE)

    # --- the machine ---

    def _give(self) -> None:
        self.guest.left = 0
        self.guest.give()

    def _freeze(self) -> None:
        """As at a pause: with requests under way."""
        self.guest.recall()
        self._collect()
        self._give()

    def _forget(self) -> set[int]:
        """Close the channel, and open it again; return the ids of what nobody waits for any more."""
        guest = self.guest
        guest.recall()
        self._collect()
        taken = set(range(self.first, guest.next_id)) - set(self.ended)
        guest.engine.forget(0)
        self._give()
        return taken

    def _look(self) -> None:
        guest = self.guest
        guest.engine.dispatch()
        guest.interrupted()
        if guest.left:
            guest.recall()
            if self.closed or self.broken:
                guest.use_queue(0)
            self._give()
        self._collect()

    def _collect(self) -> None:
        guest = self.guest
        self.ended += [each.transaction_id for each in guest.handle()]
        for packets in (guest.answers, guest.returned):
            self.ended += [int.from_bytes(each[8:16], "little") for each in packets]
            packets.clear()

    # --- other threads ---

    def _serve(self, rng: random.Random) -> None:
        left = 3
        while left and not self.closed:
            if requests := self.server.come(MAX_SLOTS):
                rng.shuffle(requests)
                few = requests[: rng.randrange(len(requests))]
                _honest(self.server, rng, few)
                self.deed(self.server, rng, requests[len(few) :])
                self.served.set()
                if self.deed is _scribble:
                    return  # and cannot read any more what is there
                left -= 1

    def _close_some_time(self, rng: random.Random) -> None:
        """At any time, or after the deed."""
        if rng.random() < 0.8:
            self.served.wait(DEED_LIMIT)
        end = time.monotonic() + rng.random() * 0.02
        while time.monotonic() < end:
            self.queue.activity()
            self.queue.oldest()
            self.queue.overtaken()
        self.closed = True
        self.queue.close()
        assert self.queue.activity() == (0, 0)


def main(engine: str, device: str, seed: str = "1") -> None:
    for busy_waits in (True, False):
        rng = random.Random(int(seed) + busy_waits)
        with EngineGuest(Path(device), engine=engine, busy_waits=busy_waits) as guest:
            os.pwrite(guest.file, bytes(64 * PAGE), 0)
            sent = ended = 0
            for number in range(ROUNDS):
                one = Round(guest, rng, DEEDS[number % len(DEEDS)])
                sent += one.run()
                ended += len(one.ended) + guest.ended
            guest.engine.counts()
            print(sent, ended)


if __name__ == "__main__":
    main(*sys.argv[1:])
