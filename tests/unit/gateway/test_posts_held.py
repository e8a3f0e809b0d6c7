"""The ring of posts under an emulator that keeps a journal: when room is freed, and where the next one goes on."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
from vmbus.machine.gateway.posts import PostRing
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import TrapKind, offset_of

HEAD, FIRST, TAIL, PROMISE = (
    offset_of(wire.POST_RING, name) // 8 for name in ("head", "first", "tail", "promise")
)


class Memory:
    """The shared ring, which outlives emulators."""

    def __init__(self) -> None:
        self.region = mmap.mmap(-1, wire.POST_RING_SIZE)
        self.quads = memoryview(self.region).cast("Q")

    def attach(self) -> PostRing:
        """Another emulator, as the gateway has it begin."""
        self.quads[PROMISE] = 0
        self.quads[FIRST] = self.quads[HEAD]
        ring = PostRing(self.region, self.quads, 0, 1, 1)
        ring.begin()
        return ring

    def post(self, payload: bytes) -> None:
        at = offset_of(wire.POST_RING, "entries") + self.quads[HEAD] % wire.POSTS * wire.POST_SIZE
        entry = {"kind": TrapKind.VMCALL, "vcpu": 0, "connection": 1, "size": len(payload)}
        self.region[at : at + wire.POST_SIZE] = wire.POST.build(
            {**entry, "payload": payload.ljust(wire.POST_PAYLOAD, b"\0")}
        )
        self.quads[HEAD] += 1


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.quads.release()
    made.region.close()


def payloads(ring: PostRing) -> list[bytes]:
    return [each.payload for each in ring.take()]


@pytest.mark.parametrize("hold", [False, True])
def test_room_is_free_when_posts_are_taken_or_when_they_are_released(memory: Memory, hold: bool) -> None:
    ring = memory.attach()
    ring.hold = hold
    memory.post(b"one")
    assert payloads(ring) == [b"one"]
    assert memory.quads[TAIL] == (0 if hold else 1)
    ring.release()
    assert memory.quads[TAIL] == 1


@pytest.mark.parametrize("handled", [0, 1, 2, 3])
def test_posts_that_were_not_handled_are_those_of_the_next_emulator(memory: Memory, handled: int) -> None:
    every = [b"one", b"two", b"three"]
    ring = memory.attach()
    ring.hold = True
    for each in every:
        memory.post(each)
    assert payloads(ring) == every
    after = memory.attach()
    after.begin_at(handled)
    assert payloads(after) == every[handled:]
    assert memory.quads[PROMISE] == 0


def test_what_was_freed_without_a_transaction_is_not_returned(memory: Memory) -> None:
    """Rounds that change nothing are not in the journal: by now their room may have other posts."""
    ring = memory.attach()
    for number in range(wire.POSTS + 2):
        memory.post(b"%d" % number)
        assert payloads(ring) == [b"%d" % number]
    memory.post(b"new")
    after = memory.attach()
    after.begin_at(1)
    assert payloads(after) == [b"new"]


@pytest.mark.parametrize("tail", [2, (1 << 64) - wire.POSTS])
def test_a_number_that_the_ring_cannot_have_is_not_believed(memory: Memory, tail: int) -> None:
    memory.post(b"one")
    ring = memory.attach()
    ring.begin_at(tail)
    assert payloads(ring) == [b"one"]
