"""Messages on their way to the guest.

Source: docs/protocol/discovery.md#message-delivery, docs/protocol/messages.md#unload.

    flowing --hold--> held --release--> flowing

While held (the guest sent PAUSE, or the bus is paused for saving) messages wait here instead of in the SynIC's
queues, in order. UNLOAD and a new contact drop everything that the guest has not got in a slot, except answers
to clients of reserved channels, which outlive a connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from vmbus.ports import Synic


@dataclass(frozen=True, slots=True)
class Target:
    """Where a message goes: a virtual processor and one of its 16 SINTs."""

    vp: int
    sint: int


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message and where it goes; ``lasting`` ones outlive the connection."""

    target: Target
    payload: bytes
    lasting: bool = False


class Outbox:
    """Posts to the SynIC in order, and knows what was not delivered yet."""

    def __init__(self, synic: Synic) -> None:
        self._synic = synic
        self._holders: set[str] = set()
        self._held: deque[Outgoing] = deque()
        self._posted: dict[Target, deque[Outgoing]] = {}

    def post(self, message: Outgoing) -> None:
        """Send, or keep until released."""
        if self._holders:
            self._held.append(message)
            return
        target = message.target
        posted = self._posted.setdefault(target, deque())
        self._synic.post_message(target.vp, target.sint, message.payload)
        posted.append(message)
        self._forget_delivered(target)

    def hold(self, holder: str) -> None:
        """Send nothing until every holder released."""
        self._holders.add(holder)

    def release(self, holder: str) -> None:
        """Undo :meth:`hold`; no effect if ``holder`` holds nothing."""
        self._holders.discard(holder)
        if not self._holders:
            held, self._held = self._held, deque()
            for message in held:
                self.post(message)

    def undelivered(self, target: Target) -> int:
        """Messages that wait for the slot of ``target``, here or in the SynIC."""
        held = sum(1 for message in self._held if message.target == target) if self._held else 0
        return held + self._synic.queued_messages(target.vp, target.sint)

    @property
    def held(self) -> tuple[Outgoing, ...]:
        """What waits here, in order."""
        return tuple(self._held)

    def put_back(self, messages: Iterable[Outgoing]) -> None:
        """Restore: these come before all that is sent from now on."""
        for message in messages:
            self.post(message)

    def drop(self) -> None:
        """Forget all that the guest has not got, but the lasting ones (which go to the end of their queue)."""
        lasting = []
        for target in list(self._posted):
            self._forget_delivered(target)
            lasting += [message for message in self._posted.get(target, ()) if message.lasting]
        lasting += [message for message in self._held if message.lasting]
        self._synic.discard_messages()
        self.clear()
        for message in lasting:
            self.post(message)

    def clear(self) -> None:
        """Forget everything, as at a machine reset; the SynIC's own queues are left alone."""
        self._posted.clear()
        self._held.clear()

    def _forget_delivered(self, target: Target) -> None:
        posted = self._posted[target]
        waiting = self._synic.queued_messages(target.vp, target.sint)
        while len(posted) > waiting:
            posted.popleft()
        if not posted:
            del self._posted[target]
