"""Begin, continue, end, start, pause and restore in any order while a guest runs: no packet is lost or duplicated."""

from __future__ import annotations

import copy

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vmbus.saving import ChannelSaver
from vmbus.wire.saved import SavedCompletion

from tests.unit.saving.model_channel import (
    BAD,
    BAD_STATE,
    MORE,
    OK,
    OVERFLOW,
    TOO_SMALL,
    ModelChannel,
    chunks,
    new_process,
    request,
)


class AnyOrder(RuleBasedStateMachine):
    """``expected``: the remaining chunks of the save in progress; ``records``: a complete save."""

    def __init__(self) -> None:
        super().__init__()
        self.saver = ChannelSaver(save_ids=lambda: 1)
        self.channel = ModelChannel()
        self.channel.start()
        self.channel.guest_opens()
        self.saving = False
        self.expected: list[bytes] = []
        self.filled: list[bytes] = []
        self.records: list[bytes] | None = None
        self.asked: list[int] = []
        self.answers: list[int] = []
        self.sent: list[int] = []
        self.arrived: list[int] = []

    # --- the guest, which runs while no view is taken ---

    def guest_runs(self) -> bool:
        return not self.channel.view_taken

    @precondition(guest_runs)
    @rule()
    def guest_sends(self) -> None:
        number = 1000 + len(self.asked)
        self.asked.append(number)
        self.channel.guest_sends(request(number, pfns=(number, number + 1)))

    @precondition(lambda self: self.guest_runs() and self.channel.ring.to_guest)
    @rule(completes=st.booleans())
    def guest_reads(self, completes: bool) -> None:
        packet = self.channel.guest_reads()
        if isinstance(packet, SavedCompletion):
            self.answers.append(packet.transaction_id)
            return
        self.arrived.append(packet.transaction_id)
        if completes:
            self.channel.guest_completes(packet.transaction_id)

    # --- the device, whose work ends at any time ---

    @rule(size=st.integers(0, 50))
    def device_sends(self, size: int) -> None:
        if not self.channel.view_taken:
            self.sent.append(self.channel.send(bytes(size), note=bytes(size)))

    @precondition(lambda self: self.channel.taken and not self.channel.view_taken)
    @rule(data=st.data())
    def device_finishes(self, data: st.DataObject) -> None:
        self.channel.finish(data.draw(st.sampled_from(self.channel.taken)).transaction_id)

    # --- the source ---

    @rule()
    def pause(self) -> None:
        was = self.channel.paused
        assert self.saver.pause(self.channel) == OK
        assert self.channel.paused
        if not was and self.saving:
            raise AssertionError("a channel that is being saved was not paused")

    @rule()
    def start(self) -> None:
        status = self.saver.start(self.channel)
        assert status == (BAD_STATE if self.saving else OK)
        if status == OK:
            self.records = None

    @rule()
    def begin(self) -> None:
        active = not self.channel.paused
        status = self.saver.save_begin(self.channel)
        assert status == (BAD_STATE if self.saving or active else OK)
        if status == OK:
            self.saving, self.filled = True, []
            self.expected = chunks(self.channel)

    @rule(size=st.one_of(st.integers(0, 300), st.just(1 << 16)))
    def continues(self, size: int) -> None:
        buffer = bytearray(size)
        status, filled, required = self.saver.save_continue(self.channel, buffer, size)
        if not self.saving:
            assert (status, filled, required) == (BAD_STATE, 0, 0)
            return
        fitting, used = 0, 0
        while fitting < len(self.expected) and used + len(self.expected[fitting]) <= size:
            used += len(self.expected[fitting])
            fitting += 1
        assert bytes(buffer[:filled]) == b"".join(self.expected[:fitting])
        assert not any(buffer[filled:])
        self.expected = self.expected[fitting:]
        if filled:
            self.filled.append(bytes(buffer[:filled]))
        if not self.expected:
            assert (status, required) == (OK, 0)
        else:
            assert (status, required) == (OVERFLOW if fitting else TOO_SMALL, len(self.expected[0]))

    @rule()
    def end(self) -> None:
        self.saver.save_end(self.channel)
        if self.saving:
            self.saving = False
            if not self.expected:
                self.records = self.filled

    @rule()
    def cancel(self) -> None:
        self.saver.save_cancel(self.channel)
        if not self.saving or self.records is None:
            self.records = None
        self.saving = False

    # --- the target ---

    @rule(data=st.binary(min_size=1, max_size=8))
    def restore_of_anything_into_a_running_channel_is_refused(self, data: bytes) -> None:
        before = self.channel.everything()
        assert self.saver.restore_from_buffer(self.channel, data) in (BAD, BAD_STATE)
        assert self.channel.everything() == before

    @precondition(lambda self: self.records is not None and not self.saving)
    @rule(gives_up_after=st.none() | st.integers(0, 3))
    def migrate(self, gives_up_after: int | None) -> None:
        records = self.records or []
        target, saver = new_process(self.channel), ChannelSaver(save_ids=lambda: 1)
        target.saver = saver
        for number, record in enumerate(records):
            if gives_up_after == number:
                assert saver.start(target) == (BAD_STATE if number else OK)
                return
            last = number + 1 == len(records)
            assert saver.restore_from_buffer(target, record) == (OK if last else MORE)
        assert target.view() == self.channel.view()
        assert target.device.notes == {
            number: self.channel.device.notes[number]
            for number in [*self.channel.outstanding, *(each.transaction_id for each in self.channel.unsent)]
        }
        self.channel, self.saver, self.records = target, saver, None

    # --- invariants ---

    @invariant()
    def nothing_is_doubled_or_overtaken(self) -> None:
        assert len(set(self.answers)) == len(self.answers)
        assert self.arrived == self.sent[: len(self.arrived)]

    def teardown(self) -> None:
        """After any sequence the channel can be started, and every packet is answered and arrives once."""
        self.saver.save_end(self.channel)
        assert self.saver.start(self.channel) == OK
        for taken in copy.copy(self.channel.taken):
            self.channel.finish(taken.transaction_id)
        while self.channel.ring.to_guest:
            packet = self.channel.guest_reads()
            if isinstance(packet, SavedCompletion):
                self.answers.append(packet.transaction_id)
            else:
                self.arrived.append(packet.transaction_id)
        assert sorted(self.answers) == self.asked
        assert self.arrived == self.sent


AnyOrder.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=60)
TestAnyOrder = AnyOrder.TestCase
