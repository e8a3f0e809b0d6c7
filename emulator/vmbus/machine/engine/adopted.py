"""Slots of requests that Python has taken over, until the journal has them: the mirror has them for so long.

    event ──take──▶ held ──record, then recorded──▶ released ──the engine has freed the slot──▶ forgotten

A successor finds such a request in the mirror, in the journal, or in both. What the journal says of a channel names
those that it has, by their numbers (:attr:`vmbus.ports.FastLink.adopted`), so that they count once.
"""

from __future__ import annotations

from collections.abc import Callable

_MASK32 = 0xFFFFFFFF


class AdoptedSlots:
    """Those of one engine.

    ``release`` frees a slot soon; ``freed`` returns how many releases have been carried out, modulo 2^32.
    """

    def __init__(self, release: Callable[[int], object], freed: Callable[[], int]) -> None:
        self.keeps = False
        """Whether there is a journal; without one a slot is released as soon as it is Python's."""
        self._release = release
        self._freed = freed
        self._count = 0
        """Releases so far, modulo 2^32, those of answers that go on to the guest included."""
        self._held: dict[int, list[tuple[int, int]]] = {}
        """Channel → slots, and numbers of their requests."""
        self._released: dict[int, list[tuple[int, int]]] = {}
        """Channel → the count of releases after that of a slot, and the number of its request."""

    def count_release(self) -> None:
        """Note that a slot is released by somebody else, before it is."""
        self._count = (self._count + 1) & _MASK32

    def take(self, channel: int, slot: int, number: int) -> None:
        """Take over the request with that number, which a slot has."""
        if self.keeps:
            self._held.setdefault(channel, []).append((slot, number))
        else:
            self.release(slot)

    def release(self, slot: int) -> None:
        """Release a slot that no journal has to have."""
        self.count_release()
        self._release(slot)

    def held(self, channel: int) -> int:
        """Return how many slots of a channel wait for the journal."""
        return len(self._held.get(channel, ()))

    def numbers(self, channel: int) -> tuple[int, ...]:
        """Return the numbers of a channel's requests that are Python's, and may be in the mirror."""
        freed = self._freed()
        left = [each for each in self._released.get(channel, ()) if 0 < (each[0] - freed) & _MASK32 < 1 << 31]
        if left:
            self._released[channel] = left
        else:
            self._released.pop(channel, None)
        return tuple([number for _, number in left] + [number for _, number in self._held.get(channel, ())])

    def recorded(self, channel: int) -> None:
        """Release the slots of a channel: the journal has their requests."""
        for slot, number in self._held.pop(channel, ()):
            self.release(slot)
            self._released.setdefault(channel, []).append((self._count, number))

    def forget(self, channel: int) -> None:
        """Release the slots of a channel whose opening is over."""
        self.recorded(channel)
        self._released.pop(channel, None)
