"""The heartbeat: shows whether the guest is alive, and measures round trips.

Source: docs/protocol/devices.md#heartbeat. Every ``interval`` the guest gets a sequence number, and returns it plus
one.

    | contact | event                                  | then  |
    | unknown | an answer                              | alive |
    | alive   | MISSED_BEATS intervals without answer  | lost  |
    | lost    | an answer                              | alive |
    | any     | the guest closes the channel           | unknown |

While a beat is unanswered no other one is sent, so the ring of a guest that hangs does not fill up.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import construct as c
from vmbus.api import Help, Histogram, Record, SavedState, TimerHandle
from vmbus.wire.ic import (
    HEARTBEAT_INSTANCE,
    HEARTBEAT_INTERFACE,
    HEARTBEAT_MIN_BODY,
    ApplicationState,
    HeartbeatBody,
    IcHeader,
    IcMessageType,
    IcStatus,
    IcVersion,
    build_heartbeat,
    parse_heartbeat,
)

from vmbus_devices.ic import IC_SAVED_BYTES, IntegrationComponent

_logger = logging.getLogger(__name__)

DEFAULT_INTERVAL = 2.0
"""Seconds, as on Hyper-V. With interval=0, also the time after which an unanswered beat counts as missed."""
MISSED_BEATS = 3


class Contact(enum.Enum):
    """The state of the guest, as far as its answers show."""

    UNKNOWN = "unknown"
    ALIVE = "alive"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class HeartbeatSaved:
    """What the heartbeat keeps over a restore, besides what every component keeps."""

    sequence: int
    sent: int
    answers: int
    application_state: int


HEARTBEAT_SAVED = SavedState(
    Record(
        HeartbeatSaved,
        "sequence" / c.Int64ul,
        "sent" / c.Int64ul,
        "answers" / c.Int64ul,
        "application_state" / c.Int32ul,
    )
)


class Heartbeat(IntegrationComponent):
    """Checks at intervals whether the guest answers."""

    name = "heartbeat"
    interface_id = HEARTBEAT_INTERFACE
    instance_id = HEARTBEAT_INSTANCE
    message_type = IcMessageType.HEARTBEAT
    message_versions = (IcVersion(1, 0), IcVersion(3, 0))
    min_body = HEARTBEAT_MIN_BODY

    def __init__(
        self,
        *,
        interval: Annotated[
            float,
            Help(
                "seconds between two beats; 0: send the next as soon as one is answered", least=0, most=86400
            ),
        ] = DEFAULT_INTERVAL,
        clock: Callable[[], float] = time.perf_counter,
        contact_changed: Callable[[Contact], None] | None = None,
    ) -> None:
        """``clock``: seconds, for round trips. ``contact_changed`` is called with the new state of contact."""
        super().__init__()
        self.interval = interval
        self.contact = Contact.UNKNOWN
        self.contact_changed = contact_changed
        self.sequence = 0
        """Sequence number of the next beat."""
        self.sent = 0
        self.answers = 0
        self.missed = 0
        """Consecutive intervals without an answer."""
        self.missed_total = 0
        self.odd_answers = 0
        """Answers with a status, or with another sequence than the one sent plus one."""
        self.application_state = int(ApplicationState.UNKNOWN)
        self.round_trips = Histogram()
        self._clock = clock
        self._sent_at: float | None = None
        self._answers_at_tick = 0
        self._tick_timer: TimerHandle | None = None

    def ready(self) -> None:
        """Send the first beat."""
        self._beat()
        self._arm()

    def ready_again(self) -> None:
        """Continue after a restore; the round trip of a beat under way is not measured."""
        self._sent_at = None
        if not self.pending:
            self._beat()
        self._arm()

    def answered(self, header: IcHeader, body: bytes) -> None:
        """Count the answer: the guest is alive."""
        self.answers += 1
        if self._sent_at is not None:
            self.round_trips.add(self._clock() - self._sent_at)
        if header.status == IcStatus.OK:
            answer = parse_heartbeat(body)
            self.application_state = answer.application_state
            self.odd_answers += answer.sequence != self.sequence
        else:
            self.odd_answers += 1
        self.missed = 0
        self._contact(Contact.ALIVE)
        if not self.interval:
            self._beat()

    def unanswered(self) -> None:
        """Count a refused answer as a missed beat."""
        self._miss()

    def disconnected(self, pending: bool) -> None:
        """Set the contact to unknown."""
        self._disarm()
        self.missed = 0
        self._contact(Contact.UNKNOWN)

    def stop(self) -> None:
        """Send no more beats."""
        self._disarm()
        super().stop()

    def status(self) -> dict[str, Any]:
        """Return contact, counters, and round-trip times."""
        try:
            application = ApplicationState(self.application_state).name.lower()
        except ValueError:
            application = str(self.application_state)
        return super().status() | {
            "contact": self.contact.value,
            "sequence": self.sequence,
            "sent": self.sent,
            "answers": self.answers,
            "missed": self.missed_total,
            "odd_answers": self.odd_answers,
            "application_state": application,
            "round_trip": self.round_trips.status(),
        }

    def save(self) -> bytes:
        """Return versions, sequence and counters."""
        own = HeartbeatSaved(self.sequence, self.sent, self.answers, self.application_state)
        return super().save() + HEARTBEAT_SAVED.save(own)

    def restore(self, state: bytes) -> None:
        """Restore what :meth:`save` returned."""
        own = HEARTBEAT_SAVED.load(state[IC_SAVED_BYTES:], self.name)
        super().restore(state[:IC_SAVED_BYTES])
        self.sequence, self.sent, self.answers = own.sequence, own.sent, own.answers
        self.application_state = own.application_state

    def _beat(self) -> None:
        body = build_heartbeat(HeartbeatBody(self.sequence))
        self.sequence = (self.sequence + 1) & 0xFFFF_FFFF_FFFF_FFFF
        self.sent += 1
        self._sent_at = self._clock()
        self.request(body)

    def _tick(self) -> None:
        if not self.pending:
            self._beat()
        elif self.answers == self._answers_at_tick:
            self._miss()
        self._arm()

    def _miss(self) -> None:
        self.missed += 1
        self.missed_total += 1
        if self.missed >= MISSED_BEATS:
            self._contact(Contact.LOST)

    def _contact(self, contact: Contact) -> None:
        if contact is self.contact:
            return
        if contact is Contact.LOST:
            _logger.warning("%s: lost contact: %d beats unanswered", self.name, self.missed)
        elif self.contact is Contact.LOST and contact is Contact.ALIVE:
            _logger.warning("%s: the guest answers again", self.name)
        self.contact = contact
        if self.contact_changed is not None:
            self.contact_changed(contact)

    def _arm(self) -> None:
        self._disarm()
        self._answers_at_tick = self.answers
        self._tick_timer = self.environment.timers.call_later(self.interval or DEFAULT_INTERVAL, self._tick)

    def _disarm(self) -> None:
        if self._tick_timer is not None:
            self._tick_timer.cancel()
            self._tick_timer = None
