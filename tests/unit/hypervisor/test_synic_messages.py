"""Delivery of messages into slots (docs/protocol/discovery.md#message-delivery)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from vmbus.errors import InternalError
from vmbus.hypervisor.synic import MAX_POLL_INTERVAL, MAX_QUEUED_MESSAGES, MIN_POLL_INTERVAL
from vmbus.ports import PAGE_SIZE
from vmbus.wire.msr import Msr
from vmbus.wire.synic import MESSAGE_SLOT, MESSAGE_SLOT_STRUCT, MessageSlot

from tests.unit.hypervisor.scripted_guest import AUTO_EOI, MASKED, NOT_RAM, POLLING, VECTOR, ScriptedGuest


def test_message_into_a_free_slot(running: ScriptedGuest) -> None:
    running.synic.post_message(1, 2, b"offer")
    slot = running.slot(1)
    assert (slot.message_type, slot.payload_size, slot.flags, slot.sender) == (1, 5, 0, 0)
    assert slot.payload == b"offer".ljust(240, b"\0")
    assert running.vectors() == [(1, VECTOR)]
    assert running.slot(0).message_type == 0


def test_longest_message_fits_and_a_longer_one_is_our_bug(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, bytes(range(240)))
    assert running.take_message() == bytes(range(240))
    with pytest.raises(InternalError):
        running.synic.post_message(0, 2, bytes(241))


@pytest.mark.conformance(83)
def test_message_to_a_busy_slot_is_announced_and_delivered_after_eom(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"first")
    assert running.vectors() == [(0, VECTOR)]
    running.synic.post_message(0, 2, b"second")
    assert running.vectors() == []
    assert running.slot().flags == 1
    assert running.slot().payload.startswith(b"first")
    assert running.synic.queued_messages(0, 2) == 1
    assert running.free_slot()
    assert running.slot().message_type == 0
    running.eom()
    assert running.vectors() == [(0, VECTOR)]
    assert running.take_message() == b"second"
    assert running.synic.queued_messages(0, 2) == 0


def test_pending_flag_tells_whether_more_messages_follow(running: ScriptedGuest) -> None:
    for text in (b"a", b"b", b"c"):
        running.synic.post_message(0, 2, text)
    seen = []
    while running.slot().message_type:
        seen.append((running.slot().payload[:1], running.slot().flags))
        if running.free_slot():
            running.eom()
    assert seen == [(b"a", 1), (b"b", 1), (b"c", 0)]


def test_slot_freed_between_the_two_looks_is_filled_at_once(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"first")
    running.vectors()
    # The guest frees the slot after the host saw it busy and before it can see the pending flag: it writes no EOM.
    running.memory.at_fence = lambda: running.memory.write(running.slot_address(), bytes(4))
    running.synic.post_message(0, 2, b"second")
    assert running.vectors() == [(0, VECTOR)]
    assert running.take_message() == b"second"


def test_eom_on_any_processor_looks_at_the_slots_of_all(running: ScriptedGuest) -> None:
    running.synic.post_message(1, 2, b"first")
    running.synic.post_message(1, 2, b"second")
    running.free_slot(1)
    running.eom(vp=0)
    assert running.slot(1).payload.startswith(b"second")


def test_eom_with_nothing_queued_is_legal_and_reads_zero(running: ScriptedGuest) -> None:
    running.eom()
    assert running.rd(Msr.EOM) == 0
    assert running.vectors() == []


def test_type_word_is_written_last(running: ScriptedGuest) -> None:
    seen: list[MessageSlot] = []
    running.memory.at_fence = lambda: seen.append(running.slot())
    running.synic.post_message(0, 2, b"payload")
    assert seen[0].message_type == 0
    assert seen[0].payload.startswith(b"payload")


@pytest.mark.conformance(85)
@pytest.mark.parametrize("flags", [0, AUTO_EOI])
@pytest.mark.parametrize("sint", range(16))
@pytest.mark.parametrize("poster", [0, 1])
def test_every_sint_interrupts_once_for_a_message_from_any_processor(
    sint: int, flags: int, poster: int
) -> None:
    guest = ScriptedGuest(vps=2)
    guest.enable_hypercalls()
    guest.enable_synic(1, sint=sint, flags=flags, vector=0x60 + sint)

    def loop_back(vp: int, connection: int, payload: bytes) -> None:
        guest.synic.post_message(1, sint, payload)

    guest.partition.connect_message_port(7, loop_back)
    assert guest.post(b"ping", connection=7, vp=poster) == 0
    assert guest.interrupts.requests == [(1, 0x60 + sint, bool(flags))]
    assert guest.take_message(1, sint) == b"ping"
    guest.eom(1)
    assert guest.rd(Msr.EOM, 1) == 0
    assert len(guest.interrupts.requests) == 1


def test_polling_sint_stores_without_interrupt(guest: ScriptedGuest) -> None:
    guest.enable_synic(flags=POLLING)
    guest.synic.post_message(0, 2, b"quiet")
    assert guest.vectors() == []
    assert guest.take_message() == b"quiet"


@pytest.mark.parametrize(
    ("msr", "off", "on"),
    [
        (Msr.SCONTROL, 0, 1),
        (Msr.SINT0 + 2, MASKED | VECTOR, VECTOR),
        (Msr.SIMP, 0, None),
    ],
)
def test_message_waits_until_the_sint_can_take_it(
    guest: ScriptedGuest, msr: int, off: int, on: int | None
) -> None:
    guest.enable_synic()
    enabled = guest.rd(msr) if on is None else on
    old_page = guest.slot_address()
    guest.wr(msr, off)
    guest.synic.post_message(0, 2, b"patience")
    assert guest.vectors() == []
    assert guest.memory.read(old_page, 256) == bytes(256)
    assert guest.synic.queued_messages(0, 2) == 1
    guest.timers.advance(10)
    assert guest.partition.synic.counters.polls == 0
    guest.wr(msr, enabled)
    assert guest.vectors() == [(0, VECTOR)]
    assert guest.take_message() == b"patience"


def test_message_page_outside_ram_is_accepted_and_takes_nothing(guest: ScriptedGuest) -> None:
    guest.enable_synic()
    guest.wr(Msr.SIMP, NOT_RAM | 1)
    assert guest.rd(Msr.SIMP) == NOT_RAM | 1
    guest.synic.post_message(0, 2, b"lost for now")
    assert guest.vectors() == []
    assert guest.partition.refusals.counts == {"page-not-ram": 1}
    guest.wr(Msr.SIMP, guest.page() | 1)
    assert guest.take_message() == b"lost for now"


def test_a_new_page_is_zeroed_when_it_is_enabled(guest: ScriptedGuest) -> None:
    guest.enable_synic()
    for msr in (Msr.SIMP, Msr.SIEFP):
        assert guest.memory.read(guest.rd(msr) & ~0xFFF, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_the_same_page_enabled_again_keeps_its_content(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"still here")
    value = running.rd(Msr.SIMP)
    running.wr(Msr.SIMP, value & ~1)
    running.vectors()
    running.wr(Msr.SIMP, value)
    assert running.vectors() == [(0, VECTOR)]
    assert running.take_message() == b"still here"


def test_moving_to_another_page_zeroes_it_and_leaves_the_old_one(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"old page")
    old = running.slot_address()
    running.wr(Msr.SIMP, running.page() | 1)
    assert running.slot().message_type == 0
    assert running.memory.read(old + 16, 8) == b"old page"


def test_disabled_pages_are_never_written_again(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    pages = [running.rd(msr) & ~0xFFF for msr in (Msr.SIMP, Msr.SIEFP)]
    running.wr(Msr.SINT0 + 2, MASKED | VECTOR)
    running.wr(Msr.SIMP, 0)
    running.wr(Msr.SIEFP, 0)
    running.wr(Msr.SCONTROL, 0)
    for page in pages:
        running.memory.write(page, bytes(PAGE_SIZE))
    running.synic.post_message(0, 2, b"3")
    running.synic.signal_event(0, 2, 9)
    running.eom()
    running.timers.advance(10)
    for page in pages:
        assert running.memory.read(page, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_discarding_forgets_what_is_in_no_slot(running: ScriptedGuest) -> None:
    for text in (b"in the slot", b"queued", b"queued too"):
        running.synic.post_message(0, 2, text)
    running.synic.discard_messages()
    assert running.synic.queued_messages(0, 2) == 0
    running.synic.post_message(0, 2, b"unload response")
    assert running.take_message() == b"in the slot"
    assert running.take_message() == b"unload response"
    assert running.take_message() is None


def test_queue_of_a_processor_is_bounded(running: ScriptedGuest) -> None:
    for number in range(MAX_QUEUED_MESSAGES + 10):
        running.synic.post_message(0, 2 + number % 2, b"flood")
    synic = running.synic.vps[0]
    assert sum(map(len, synic.queues)) == MAX_QUEUED_MESSAGES
    assert running.partition.refusals.counts["message-queue-full"] == 9
    running.synic.discard_messages()
    running.synic.post_message(0, 2, b"fits again")
    assert running.synic.queued_messages(0, 2) == 1


@pytest.mark.parametrize(("vp", "sint"), [(2, 2), (-1, 2), (0, 16), (0, -1)])
def test_a_sint_that_does_not_exist_is_refused(running: ScriptedGuest, vp: int, sint: int) -> None:
    running.synic.post_message(vp, sint, b"")
    running.synic.signal_event(vp, sint, 1)
    assert running.synic.queued_messages(vp, sint) == 0
    assert running.partition.refusals.counts == {"no-such-sint": 3}


# --- guests that free a slot without EOM ---


def test_slot_freed_without_eom_is_found_by_the_slow_poll(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    running.free_slot()
    running.timers.advance(MIN_POLL_INTERVAL)
    assert running.slot().payload.startswith(b"2")


def test_poll_slows_down_and_stops_with_the_last_message(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"1")
    running.synic.post_message(0, 2, b"2")
    running.timers.advance(60)
    polls = running.synic.counters.polls
    assert 0 < polls < 60 / MAX_POLL_INTERVAL + 10
    running.take_message()
    running.timers.advance(60)
    assert running.synic.counters.polls == polls


def test_nothing_is_polled_while_nothing_waits(running: ScriptedGuest) -> None:
    running.synic.post_message(0, 2, b"alone")
    running.timers.advance(60)
    assert running.synic.counters.polls == 0


# --- order ---


class MessageOrder(RuleBasedStateMachine):
    """Messages arrive complete and in order under any interleaving of host and guest."""

    def __init__(self) -> None:
        super().__init__()
        self.guest = ScriptedGuest(vps=2)
        for vp in (0, 1):
            self.guest.enable_synic(vp)
        self.posted: dict[int, list[bytes]] = {0: [], 1: []}
        self.taken: dict[int, list[bytes]] = {0: [], 1: []}
        self.number = 0

    def free(self, vp: int) -> bool:
        slot = self.guest.slot(vp)
        if slot.message_type == 0:
            return False
        self.taken[vp].append(slot.payload[: slot.payload_size])
        return self.guest.free_slot(vp)

    vps = st.sampled_from([0, 1])

    @rule(vp=vps)
    def post(self, vp: int) -> None:
        self.number += 1
        payload = b"%d" % self.number
        self.posted[vp].append(payload)
        self.guest.synic.post_message(vp, 2, payload)

    @rule(vp=vps)
    def take_properly(self, vp: int) -> None:
        if self.free(vp):
            self.guest.eom(vp)

    @rule(vp=vps)
    def free_and_forget_eom(self, vp: int) -> None:
        self.free(vp)

    @rule(vp=vps)
    def free_while_the_host_looks(self, vp: int) -> None:
        def act() -> None:
            self.free(vp)

        self.guest.memory.at_fence = act
        self.post(vp)
        self.guest.memory.at_fence = None

    @rule(vp=vps)
    def spurious_eom(self, vp: int) -> None:
        self.guest.eom(vp)

    @rule(vp=vps, masked=st.booleans())
    def mask(self, vp: int, masked: bool) -> None:
        self.guest.wr(Msr.SINT0 + 2, VECTOR | (MASKED if masked else 0), vp)

    @rule(vp=vps, enabled=st.booleans())
    def switch(self, vp: int, enabled: bool) -> None:
        self.guest.wr(Msr.SCONTROL, int(enabled), vp)

    @rule()
    def time_passes(self) -> None:
        self.guest.timers.advance(0.01)

    @rule()
    def pause_and_resume(self) -> None:
        self.guest.partition.pause()
        self.post(0)
        self.guest.partition.resume()

    @rule()
    def migrate(self) -> None:
        self.guest.partition.pause()
        state = self.guest.partition.save()
        self.guest.move_to(self.guest.make_partition())
        self.guest.partition.restore(state)
        self.post(1)
        self.guest.partition.resume()

    @invariant()
    def order_is_kept(self) -> None:
        for vp, taken in self.taken.items():
            assert taken == self.posted[vp][: len(taken)]

    def teardown(self) -> None:
        for vp in (0, 1):
            self.mask(vp, False)
            self.switch(vp, True)
            while self.guest.slot(vp).message_type:
                self.take_properly(vp)
                self.guest.timers.advance(1)
            assert self.taken[vp] == self.posted[vp]


TestMessageOrder = MessageOrder.TestCase
TestMessageOrder.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_slot_struct_is_the_declaration() -> None:
    slot = MessageSlot(0x80000010, 3, 1, 0x1122334455667788, b"abc".ljust(240, b"\0"))
    packed = MESSAGE_SLOT_STRUCT.pack(
        slot.message_type, slot.payload_size, slot.flags, slot.sender, slot.payload
    )
    assert packed == MESSAGE_SLOT.build(slot)
    assert len(packed) == 256
