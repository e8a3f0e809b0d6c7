"""Synthetic interrupt controllers: one a virtual processor, 16 sources (SINTs) each.

Source: docs/protocol/discovery.md#synic-pages, docs/protocol/discovery.md#interrupts-to-the-guest.

What a SINT does with a message or an event:

    SynIC  SINT      page         message                        event
    -----  --------  -----------  -----------------------------  ------------------------------
    off    any       any          queued                         dropped
    on     masked    any          queued                         dropped
    on     unmasked  off/not RAM  queued                         dropped
    on     unmasked  in use       slot free: written, interrupt  flag set, interrupt if it was 0
                                  slot busy: pending flag,
                                  queued until EOM
    on     polling   in use       the same without interrupt     the same without interrupt

Queues are FIFO per (VP, SINT). Delivery is tried again on EOM of any processor (a crashing guest frees the slots of
all processors from one of them), when SCONTROL, SIMP or a SINT is written, and, only while a message waits behind a
busy slot, by a slow timer: the timer covers guests that free a slot without EOM.

An event flag that is already set is not signalled again: its interrupt was requested when it was set, and the guest
clears the flag before it reads the ring. This requires a fence between the store to the ring and the load of the
flag. When a SINT becomes able to deliver while flags or a message are present, the guest gets a new interrupt.

Nothing is written to the guest while ``paused``: messages are queued, events are deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet

from vmbus.errors import InternalError
from vmbus.hypervisor.messages import MAX_MARK, Message, claim_slot, fill_slot, mark_of, slot_is_free
from vmbus.hypervisor.msrs import GeneralProtection
from vmbus.hypervisor.overlay import PageOverlay
from vmbus.hypervisor.reference_time import ReferenceTime
from vmbus.hypervisor.vp_synic import SynicCounters, VpSynic
from vmbus.ports import GuestMemory, GuestPages, Interrupts, SignalTarget, TimerHandle, Timers
from vmbus.refusals import Refusals
from vmbus.wire.msr import SINT, SINT_COUNT, SINT_RESET
from vmbus.wire.synic import (
    EVENT_AREA_SIZE,
    EVENT_FLAG_COUNT,
    MESSAGE_PAYLOAD_MAX,
    TIMER_EXPIRED,
    MessageType,
    TimerExpired,
)

MAX_QUEUED_MESSAGES = 4096
"""Channel messages in the queues of one virtual processor, all its SINTs together; more are refused."""

MIN_POLL_INTERVAL = 0.005
"""Seconds until busy slots are polled for the first time; doubled after each poll that delivers nothing."""

MAX_POLL_INTERVAL = 0.16
"""Seconds between two polls at most."""

MIN_VECTOR = 16
"""The lowest vector that a local APIC accepts."""

_NO_FLAGS = bytes(EVENT_AREA_SIZE)


class SynicEvents:
    """Notifications of a :class:`Synic`; override those of interest.

    They are called in the middle of a trap: return soon, and do not call back into the partition.
    """

    def synic_changed(self, vp: int) -> None:
        """SCONTROL, SIMP, SIEFP or a SINT of ``vp`` was written."""

    def auto_eoi_changed(self, vp: int, vectors: AbstractSet[int]) -> None:
        """``vectors`` replaces the set of vectors of ``vp`` that the local APIC must end without an EOI."""


class Synic:
    """The controllers of a partition, and its event ports; implements :class:`vmbus.ports.Synic`."""

    def __init__(
        self,
        vp_count: int,
        memory: GuestMemory,
        interrupts: Interrupts,
        timers: Timers,
        time: ReferenceTime,
        events: SynicEvents,
        refusals: Refusals,
    ) -> None:
        self._memory = memory
        self._interrupts = interrupts
        self._timers = timers
        self._time = time
        self._events = events
        self._refusals = refusals
        self.vps = [
            VpSynic(
                index,
                PageOverlay(f"SIEFP of VP {index}", memory, refusals, zeroed=True),
                PageOverlay(f"SIMP of VP {index}", memory, refusals, zeroed=True),
            )
            for index in range(vp_count)
        ]
        self.counters = SynicCounters()
        self.event_ports: dict[int, Callable[[], None]] = {}
        self.paused = False
        self.gate: Callable[[], None] | None = None
        """Called in place of a delivery: messages are queued until :meth:`deliver`. For a host with a journal."""
        self._occupied: set[tuple[int, int]] = set()
        """(VP, SINT) whose queue is not empty."""
        self._busy: set[tuple[int, int]] = set()
        """(VP, SINT) whose queue waits behind a busy slot; a subset of ``_occupied``."""
        self._poll: TimerHandle | None = None
        self._poll_delay = MIN_POLL_INTERVAL

    # --- for the bus (vmbus.ports.Synic) ---

    @property
    def vp_count(self) -> int:
        """Number of virtual processors."""
        return len(self.vps)

    def post_message(self, vp: int, sint: int, payload: bytes) -> None:
        """Queue a channel message and deliver it if its slot is free.

        Raises :class:`InternalError` for more than 240 bytes. A processor or SINT that does not exist, and a
        message beyond ``MAX_QUEUED_MESSAGES``, are counted as refusals: a guest can cause all three.
        """
        if len(payload) > MESSAGE_PAYLOAD_MAX:
            raise InternalError(f"a message of {len(payload)} bytes does not fit a slot")
        if not self._exists(vp, sint):
            return
        synic = self.vps[vp]
        if synic.waiting >= MAX_QUEUED_MESSAGES:
            self._refusals.refuse("message-queue-full", f"VP {vp} SINT {sint}")
            return
        synic.waiting += 1
        self._queue(synic, sint, Message(MessageType.CHANNEL, bytes(payload)))

    def queued_messages(self, vp: int, sint: int) -> int:
        """Return how many channel messages wait for the slot, without the one in the slot."""
        if not self._exists(vp, sint):
            return 0
        return sum(1 for message in self.vps[vp].queues[sint] if message.timer is None)

    def discard_messages(self) -> None:
        """Drop the channel messages that are in no slot yet; messages of synthetic timers stay."""
        for synic in self.vps:
            for sint, queue in enumerate(synic.queues):
                kept = [message for message in queue if message.timer is not None]
                queue.clear()
                queue.extend(kept)
                self._note_queue(synic, sint)
            synic.waiting = 0

    def signal_event(self, vp: int, sint: int, flag: int) -> None:
        """Set an event flag, and interrupt the guest unless the flag is set already."""
        if not self._exists(vp, sint):
            return
        if not 0 <= flag < EVENT_FLAG_COUNT:
            self._refusals.refuse("event-flag-out-of-range", f"flag {flag}")
            return
        synic = self.vps[vp]
        if self.paused:
            synic.deferred_events.add((sint, flag))
            return
        page = synic.siefp.pages
        if page is None or not synic.can_signal(sint):
            self.counters.events_dropped += 1
            return
        bit = 1 << flag % 32
        if page.set_bits_u32(sint * EVENT_AREA_SIZE + flag // 32 * 4, bit) & bit:
            self.counters.events_already_set += 1
            return
        self.counters.events_signalled += 1
        self._interrupt(synic, sint)

    def event_target(self, vp: int, sint: int, flag: int) -> SignalTarget | None:
        """Return where compiled code sets an event flag and interrupts; ``None`` if it cannot at present.

        It is valid until SCONTROL, SIEFP or the SINT of ``vp`` is written, or the partition is paused.
        """
        if not 0 <= vp < len(self.vps) or not 0 <= flag < EVENT_FLAG_COUNT or self.paused:
            return None
        synic = self.vps[vp]
        page, source = synic.siefp.pages, synic.sints[sint]
        if page is None or not synic.can_signal(sint) or source.polling:
            return None
        address = page.address_u32(sint * EVENT_AREA_SIZE + flag // 32 * 4)
        return SignalTarget(vp, address, 1 << flag % 32, source.vector) if address else None

    def connect_event_port(self, connection_id: int, signalled: Callable[[], None]) -> None:
        """Let HvSignalEvent on ``connection_id`` call ``signalled``."""
        self.event_ports[connection_id] = signalled

    def disconnect_event_port(self, connection_id: int) -> None:
        """Make ``connection_id`` unknown; no effect if it is."""
        self.event_ports.pop(connection_id, None)

    def ring_event_port(self, connection_id: int) -> None:
        """Handle HvSignalEvent on ``connection_id`` after its processor has the status; an unknown id is refused."""
        signalled = self.event_ports.get(connection_id)
        if signalled is None:
            self._refusals.refuse("doorbell-unknown-connection", f"{connection_id:#x}")
            return
        self.counters.doorbells += 1
        signalled()

    # --- for synthetic timers ---

    def post_timer(self, vp: int, sint: int, timer: int, expiration: int, *, droppable: bool) -> None:
        """Queue the message of an expired timer, unless an earlier one of this timer is still queued.

        ``droppable``: drop the message if it cannot be delivered at once (lazy timers).
        """
        synic = self.vps[vp]
        if timer in synic.timers_waiting:
            return
        synic.timers_waiting.add(timer)
        self._queue(synic, sint, Message(MessageType.TIMER_EXPIRED, b"", timer, expiration))
        if droppable and not (self.gate is not None and self._has_room(synic, sint)):
            self.withdraw_timer(vp, timer)

    def withdraw_timer(self, vp: int, timer: int) -> None:
        """Drop the queued message of a timer that was stopped or written."""
        synic = self.vps[vp]
        if timer not in synic.timers_waiting:
            return
        synic.timers_waiting.discard(timer)
        for sint, queue in enumerate(synic.queues):
            kept = [message for message in queue if message.timer != timer]
            if len(kept) != len(queue):
                queue.clear()
                queue.extend(kept)
                self._note_queue(synic, sint)

    # --- registers ---

    def write_scontrol(self, vp: int, value: int) -> None:
        """Write SCONTROL of ``vp``."""
        synic = self.vps[vp]
        before = self._deliverable(synic)
        synic.scontrol = value
        self._changed(synic, before)

    def write_siefp(self, vp: int, value: int) -> None:
        """Write SIEFP of ``vp``."""
        synic = self.vps[vp]
        before = self._deliverable(synic)
        synic.siefp.write(value)
        self._changed(synic, before)

    def write_simp(self, vp: int, value: int) -> None:
        """Write SIMP of ``vp``."""
        synic = self.vps[vp]
        before = self._deliverable(synic)
        synic.simp.write(value)
        self._changed(synic, before)

    def write_sint(self, vp: int, sint: int, value: int) -> None:
        """Write SINT ``sint`` of ``vp``. Raises :class:`GeneralProtection` for an unmasked vector below 16."""
        parsed = SINT.parse(value)
        if parsed.vector < MIN_VECTOR and not parsed.masked:
            raise GeneralProtection("sint-vector", f"SINT{sint} of VP {vp}: vector {parsed.vector}")
        synic = self.vps[vp]
        before = self._deliverable(synic)
        synic.sint_values[sint] = value
        synic.sints[sint] = parsed
        self._note_auto_eoi(synic)
        self._changed(synic, before)

    def end_of_message(self, vp: int) -> None:
        """Write EOM on ``vp``: try delivery to the slots of all processors."""
        self.counters.end_of_message += 1
        self._deliver_all()

    # --- with a gate ---

    def ready(self) -> dict[tuple[int, int], int]:
        """Return each (VP, SINT) whose slot has room for the first message of its queue, with that message's mark."""
        found = {}
        for key in sorted(self._occupied):
            vp, sint = key
            synic = self.vps[vp]
            page = synic.simp.pages
            if self.paused or page is None or not synic.can_message(sint):
                continue
            if claim_slot(page, sint, self._memory):
                found[key] = mark_of(page, sint) % MAX_MARK + 1
            else:
                self._busy.add(key)
                self._start_poll()
        return found

    def deliver(self, ready: Mapping[tuple[int, int], int]) -> None:
        """Deliver the first message of each queue that :meth:`ready` has named, with its mark."""
        for (vp, sint), mark in ready.items():
            synic = self.vps[vp]
            page, queue = synic.simp.pages, synic.queues[sint]
            if page is None or not queue:
                raise InternalError(f"VP {vp}, SINT {sint}: nothing to deliver")
            self._deliver_first(synic, sint, page, mark)
            self._note_queue(synic, sint)
            if not queue:
                continue
            if claim_slot(page, sint, self._memory):  # the guest has taken it already
                self._deliver(synic, sint)
            else:  # with the pending flag: it writes EOM
                self._busy.add((vp, sint))
                self._start_poll()
        if not self._busy:
            self._stop_poll()

    def take_delivered(self, marks: Mapping[tuple[int, int], int]) -> None:
        """Drop from restored queues the messages that the process before has delivered with these marks."""
        for (vp, sint), mark in marks.items():
            if not (0 <= vp < len(self.vps) and 0 <= sint < SINT_COUNT):
                continue
            synic = self.vps[vp]
            page, queue = synic.simp.pages, synic.queues[sint]
            if page is not None and queue and mark_of(page, sint) == mark:
                self._payload(synic, queue.popleft())
                self._note_queue(synic, sint)

    # --- pause, reset, restore ---

    def pause(self) -> None:
        """Write nothing to the guest until :meth:`resume`."""
        self.paused = True
        self._stop_poll()

    def resume(self) -> None:
        """Deliver what was queued and deferred, and interrupt once more where flags or messages are present."""
        self.paused = False
        for synic in self.vps:
            for sint in range(SINT_COUNT):
                self._remind(synic, sint)
            deferred = sorted(synic.deferred_events)
            synic.deferred_events.clear()
            for sint, flag in deferred:
                self.signal_event(synic.index, sint, flag)
        self._deliver_all()

    def reset(self) -> None:
        """Return all controllers to the power-on state; event ports stay."""
        for synic in self.vps:
            synic.siefp.reset()
            synic.simp.reset()
            synic.scontrol = 0
            synic.sint_values = [SINT_RESET] * SINT_COUNT
            synic.sints = [SINT.parse(SINT_RESET)] * SINT_COUNT
            for queue in synic.queues:
                queue.clear()
            synic.waiting = 0
            synic.timers_waiting.clear()
            synic.deferred_events.clear()
            self._note_auto_eoi(synic)
        self._occupied.clear()
        self._busy.clear()
        self._stop_poll()

    def restored(self) -> None:
        """Derive the other fields from the registers and queues that were restored into ``vps``."""
        self._occupied.clear()
        self._busy.clear()
        for synic in self.vps:
            synic.sints = [SINT.parse(value) for value in synic.sint_values]
            synic.waiting = sum(m.timer is None for queue in synic.queues for m in queue)
            synic.timers_waiting = {m.timer for queue in synic.queues for m in queue if m.timer is not None}
            for sint in range(SINT_COUNT):
                self._note_queue(synic, sint)
            self._note_auto_eoi(synic)

    # --- private ---

    def _exists(self, vp: int, sint: int) -> bool:
        if 0 <= vp < len(self.vps) and 0 <= sint < SINT_COUNT:
            return True
        self._refusals.refuse("no-such-sint", f"VP {vp} SINT {sint}")
        return False

    def _queue(self, synic: VpSynic, sint: int, message: Message) -> None:
        synic.queues[sint].append(message)
        self._occupied.add((synic.index, sint))
        self._deliver(synic, sint)
        if (synic.index, sint) in self._busy:
            self.counters.messages_behind_busy_slot += 1

    def _deliver(self, synic: VpSynic, sint: int) -> None:
        """Move messages from the queue to the slot until the slot is busy or the queue is empty."""
        queue = synic.queues[sint]
        key = (synic.index, sint)
        self._busy.discard(key)
        page = synic.simp.pages
        if self.paused or page is None or not synic.can_message(sint):
            return
        if self.gate is not None:
            if queue:
                self.gate()
            return
        while queue:
            if not claim_slot(page, sint, self._memory):
                self._busy.add(key)
                self._start_poll()
                return
            self._deliver_first(synic, sint, page)
        self._occupied.discard(key)
        if not self._busy:
            self._stop_poll()

    def _deliver_first(self, synic: VpSynic, sint: int, page: GuestPages, mark: int = 0) -> None:
        queue = synic.queues[sint]
        message = queue.popleft()
        payload = self._payload(synic, message)
        fill_slot(page, sint, message.message_type, payload, self._memory, more=bool(queue), mark=mark)
        self.counters.messages_delivered += 1
        self._poll_delay = MIN_POLL_INTERVAL
        self._interrupt(synic, sint)

    def _has_room(self, synic: VpSynic, sint: int) -> bool:
        page = synic.simp.pages
        return page is not None and synic.can_message(sint) and slot_is_free(page, sint)

    def _payload(self, synic: VpSynic, message: Message) -> bytes:
        if message.timer is None:
            synic.waiting -= 1
            return message.payload
        synic.timers_waiting.discard(message.timer)
        return TIMER_EXPIRED.build(TimerExpired(message.timer, message.expiration, self._time.now()))

    def _deliver_all(self) -> None:
        for vp, sint in sorted(self._occupied):
            self._deliver(self.vps[vp], sint)

    def _interrupt(self, synic: VpSynic, sint: int) -> None:
        source = synic.sints[sint]
        if source.polling:
            return
        self.counters.interrupts += 1
        self._interrupts.request(synic.index, source.vector, auto_eoi=source.auto_eoi)

    def _deliverable(self, synic: VpSynic) -> list[tuple[bool, bool]]:
        return [(synic.can_message(sint), synic.can_signal(sint)) for sint in range(SINT_COUNT)]

    def _changed(self, synic: VpSynic, before: list[tuple[bool, bool]]) -> None:
        after = self._deliverable(synic)
        for sint in range(SINT_COUNT):
            if not self.paused and any(
                now and not then for now, then in zip(after[sint], before[sint], strict=True)
            ):
                self._remind(synic, sint)
            if synic.queues[sint]:
                self._deliver(synic, sint)
        self._events.synic_changed(synic.index)

    def _remind(self, synic: VpSynic, sint: int) -> None:
        """Interrupt if a message is in the slot of ``sint`` or one of its flags is set."""
        messages, flags = synic.simp.pages, synic.siefp.pages
        if (messages is not None and synic.can_message(sint) and not slot_is_free(messages, sint)) or (
            flags is not None
            and synic.can_signal(sint)
            and flags.read(sint * EVENT_AREA_SIZE, EVENT_AREA_SIZE) != _NO_FLAGS
        ):
            self._interrupt(synic, sint)

    def _note_queue(self, synic: VpSynic, sint: int) -> None:
        key = (synic.index, sint)
        if synic.queues[sint]:
            self._occupied.add(key)
        else:
            self._occupied.discard(key)
            self._busy.discard(key)

    def _note_auto_eoi(self, synic: VpSynic) -> None:
        vectors = frozenset(sint.vector for sint in synic.sints if sint.auto_eoi and not sint.masked)
        if vectors != synic.auto_eoi_vectors:
            synic.auto_eoi_vectors = vectors
            self._events.auto_eoi_changed(synic.index, vectors)

    def _start_poll(self) -> None:
        if self._poll is None and not self.paused:
            self._poll = self._timers.call_later(self._poll_delay, self._polled)

    def _stop_poll(self) -> None:
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None
        self._poll_delay = MIN_POLL_INTERVAL

    def _polled(self) -> None:
        self._poll = None
        if self.paused:
            return
        self.counters.polls += 1
        self._poll_delay = min(self._poll_delay * 2, MAX_POLL_INTERVAL)
        for vp, sint in sorted(self._busy):
            self._deliver(self.vps[vp], sint)
