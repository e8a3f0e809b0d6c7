"""Messages on their way to the guest.

Source: docs/protocol/discovery.md#message-delivery, docs/protocol/messages.md#unload.

    running --pause--> paused --resume, by all that paused it--> running

While the outbox is paused (the guest sent PAUSE, or the bus is paused for saving) messages wait here instead of in
the SynIC's queues, in order. UNLOAD and a new contact drop every message that is not in a slot of the guest yet,
except answers to clients of reserved channels, which outlive a connection.
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
    """A message and where it goes; a ``lasting`` one outlives the connection."""

    target: Target
    payload: bytes
    lasting: bool = False


class Outbox:
    """Posts messages to the SynIC in order, and keeps those that are not delivered yet."""

    def __init__(self, synic: Synic) -> None:
        self._synic = synic
        self._paused_by: set[str] = set()
        self._waiting: deque[Outgoing] = deque()
        self._posted: dict[Target, deque[Outgoing]] = {}

    def post(self, message: Outgoing) -> None:
        """Send a message; while paused, keep it."""
        if self._paused_by:
            self._waiting.append(message)
            return
        target = message.target
        posted = self._posted.setdefault(target, deque())
        self._synic.post_message(target.vp, target.sint, message.payload)
        posted.append(message)
        self._forget_delivered(target)

    def pause(self, by: str) -> None:
        """Send nothing until :meth:`resume` was called by each name that has paused."""
        self._paused_by.add(by)

    def resume(self, by: str) -> None:
        """Undo :meth:`pause`; no effect if ``by`` has not paused."""
        self._paused_by.discard(by)
        if not self._paused_by:
            waiting, self._waiting = self._waiting, deque()
            for message in waiting:
                self.post(message)

    def undelivered(self, target: Target) -> int:
        """Return how many messages wait for the slot of ``target``, here or in the SynIC."""
        here = sum(1 for message in self._waiting if message.target == target) if self._waiting else 0
        return here + self._synic.queued_messages(target.vp, target.sint)

    @property
    def lasting(self) -> int:
        """How many lasting messages wait, here or in the SynIC, for the slots of all targets together."""
        count = sum(message.lasting for message in self._waiting)
        for target in tuple(self._posted):
            self._forget_delivered(target)
            count += sum(message.lasting for message in self._posted.get(target, ()))
        return count

    @property
    def waiting(self) -> tuple[Outgoing, ...]:
        """The messages that wait here, in order."""
        return tuple(self._waiting)

    def restore(self, messages: Iterable[Outgoing]) -> None:
        """Post the messages of a saved state, before any other one."""
        for message in messages:
            self.post(message)

    def drop(self) -> None:
        """Forget all messages that are in no slot yet, but the lasting ones, which go to the end of their queue."""
        lasting = []
        for target in list(self._posted):
            self._forget_delivered(target)
            lasting += [message for message in self._posted.get(target, ()) if message.lasting]
        lasting += [message for message in self._waiting if message.lasting]
        self._synic.discard_messages()
        self.clear()
        for message in lasting:
            self.post(message)

    def clear(self) -> None:
        """Forget everything, as at a machine reset; the SynIC's own queues are left alone."""
        self._posted.clear()
        self._waiting.clear()

    def _forget_delivered(self, target: Target) -> None:
        posted = self._posted[target]
        waiting = self._synic.queued_messages(target.vp, target.sint)
        while len(posted) > waiting:
            posted.popleft()
        if not posted:
            del self._posted[target]
