"""Posts: traps that the gateway has answered by itself, in a ring from which the emulator takes them.

docs/gateway.md#posts has the protocol: what may be posted, in which order it is handled, and how a promise ends.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import NamedTuple

from vmbus.errors import GatewayError
from vmbus.machine.memory import VIDEO_MEMORY, RamRegion
from vmbus.wire import gateway as wire
from vmbus.wire.gateway import RamRange, TrapKind, offset_of

_MASK64 = (1 << 64) - 1
_KINDS = {int(kind): kind for kind in (TrapKind.WRMSR, TrapKind.VMCALL)}


def ram_ranges(regions: Iterable[RamRegion]) -> list[RamRange]:
    """Return the addresses at which the gateway, and this process, read the same RAM."""
    parts = []
    for region in regions:
        parts.append((region.gpa, min(region.end, VIDEO_MEMORY.start)))
        parts.append((max(region.gpa, VIDEO_MEMORY.stop), region.end))
    return [RamRange(start, end - start) for start, end in parts if start < end]


class Post(NamedTuple):
    """A trap that has its answer: a WRMSR whose value does not matter, or an HvPostMessage (VMCALL)."""

    vcpu: int
    kind: TrapKind
    connection_id: int
    payload: bytes


class PostRing:
    """The ring, at ``offset`` of the shared memory; ``quads``: that memory as 64-bit words."""

    def __init__(self, region: mmap.mmap, quads: memoryview, offset: int, vcpus_max: int, owner: int) -> None:
        self._region = region
        self._quads = quads
        self._vcpus_max = vcpus_max
        self._owner = owner
        self.head_at, self._first_at, self._tail_at, self._promise_at = (
            (offset + offset_of(wire.POST_RING, name)) // 8 for name in ("head", "first", "tail", "promise")
        )
        self._entries_at = offset + offset_of(wire.POST_RING, "entries")
        self.hold = False
        """Whether the room of posts is freed by :meth:`release`, and not when they are taken: with a journal."""
        self.tail = 0
        """Number of posts that were taken; there are more if the word at ``head_at`` differs."""

    def begin(self) -> None:
        """Begin to use the ring, where this attachment stands.

        Posts from before it are skipped: what they refer to has ended with the emulator that promised; but see
        :meth:`begin_at`. The tail in the ring stays where that emulator has left it.
        """
        quads = self._quads
        head, first, tail = quads[self.head_at], quads[self._first_at], quads[self._tail_at]
        self.tail = tail if head - tail & _MASK64 <= head - first & _MASK64 else first
        quads[self._promise_at] = 0

    def begin_at(self, tail: int) -> None:
        """Begin to use the ring behind the posts of which a journal says that they were handled, or behind more.

        Posts of before this attachment are returned: the state that they refer to goes on here.
        """
        quads = self._quads
        head, stored = quads[self.head_at], quads[self._tail_at]
        waiting = min(head - stored & _MASK64, head - tail & _MASK64)
        self.tail = head - waiting & _MASK64 if waiting <= wire.POSTS else head
        self.withdraw()

    def release(self) -> None:
        """Free the room of all posts that were taken."""
        self._quads[self._tail_at] = self.tail

    @property
    def waiting(self) -> bool:
        """Whether :meth:`take` would return something."""
        return bool(self._quads[self.head_at] != self.tail)

    def take(self) -> list[Post]:
        """Return the posts since the last call, in their order.

        Raises :class:`~vmbus.errors.GatewayError` for a ring that QEMU has damaged.
        """
        head = self._quads[self.head_at]
        if head == self.tail:
            return []
        count = head - self.tail & _MASK64
        if count > wire.POSTS:
            raise GatewayError(f"the trap gateway has posted {count} traps, and its ring holds {wire.POSTS}")
        found: list[Post] = []
        for number in range(self.tail, self.tail + count):
            at = self._entries_at + number % wire.POSTS * wire.POST_SIZE
            kind, vcpu, connection_id, size, payload = wire.POST_STRUCT.unpack_from(self._region, at)
            known = _KINDS.get(kind)
            if known is None or vcpu >= self._vcpus_max or size > wire.POST_PAYLOAD:
                raise GatewayError(f"the trap gateway posted kind {kind} of vCPU {vcpu} with {size} bytes")
            found.append(Post(vcpu, known, connection_id, payload[:size]))
        self.tail = head
        if not self.hold:
            self.release()
        return found

    def promise(self, messages: int) -> None:
        """Let the gateway post, but no message once that many posts wait.

        Whatever is posted in this way is handled, also after the promise was changed.
        """
        limit = self.tail + min(messages, wire.POSTS) & 0xFFFFFFFF
        self._quads[self._tail_at] = self.tail  # an emulator that was replaced may have stored its own late
        self._quads[self._promise_at] = limit << 32 | self._owner

    def withdraw(self) -> None:
        """Let the gateway post nothing."""
        self._quads[self._tail_at] = self.tail
        self._quads[self._promise_at] = 0
