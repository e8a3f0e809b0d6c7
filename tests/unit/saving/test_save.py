"""SaveBegin, SaveContinue, SaveEnd: docs/protocol/saving.md#saving-a-channel."""

from __future__ import annotations

import copy
from itertools import count

import pytest
from vmbus.saving import ChannelSaver, NtStatus, Reason
from vmbus.saving.channel import SaveResult

from tests.unit.saving.model_channel import (
    BAD_STATE,
    MORE,
    OK,
    OVERFLOW,
    TOO_SMALL,
    ModelChannel,
    busy_channel,
    chunks,
    identity,
    new_process,
    request,
    restore,
    save,
)


@pytest.fixture
def saver() -> ChannelSaver:
    numbers = count(1)
    return ChannelSaver(save_ids=lambda: next(numbers))


def idle_channel() -> ModelChannel:
    channel = ModelChannel()
    channel.start()
    channel.guest_opens()
    channel.pause()
    return channel


class TestBegin:
    def test_active_channel_is_not_saved(self, saver: ChannelSaver) -> None:
        channel = ModelChannel()
        channel.start()
        channel.guest_opens()
        assert saver.save_begin(channel) == BAD_STATE
        assert not channel.view_taken
        refusal = saver.refusal(channel)
        assert refusal is not None and refusal.reason == Reason.WRONG_STATE

    def test_pause_makes_it_savable(self, saver: ChannelSaver) -> None:
        channel = ModelChannel()
        channel.start()
        channel.guest_opens()
        assert saver.pause(channel) == OK
        assert saver.save_begin(channel) == OK

    @pytest.mark.parametrize("state", ["never opened", "never started", "closed", "disabled"])
    def test_every_state_that_is_not_active_is_saved(self, saver: ChannelSaver, state: str) -> None:
        channel = ModelChannel()
        if state != "never started":
            channel.start()
        if state == "closed":
            channel.guest_opens()
            channel.guest_closes()
        if state == "disabled":
            channel.disable()
        assert save(saver, channel)

    def test_second_begin_fails_and_leaves_the_first_context_alone(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        expected = chunks(channel)
        assert saver.save_begin(channel) == OK
        buffer = bytearray(len(expected[0]))
        assert saver.save_continue(channel, buffer, len(buffer)).status == OVERFLOW
        assert saver.save_begin(channel) == BAD_STATE
        rest = bytearray(1 << 16)
        status, filled, _ = saver.save_continue(channel, rest, len(rest))
        assert (status, bytes(rest[:filled])) == (OK, b"".join(expected[1:]))

    def test_client_channel_has_no_save(self, saver: ChannelSaver) -> None:
        channel = ModelChannel(is_server=False)
        assert saver.save_begin(channel) == NtStatus.STATUS_INVALID_PARAMETER_1
        assert saver.restore_from_buffer(channel, b"x") == NtStatus.STATUS_INVALID_PARAMETER_1

    def test_device_that_cannot_be_saved_now_fails_begin(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        channel.device.refuses_save = True
        before = channel.everything()
        assert saver.save_begin(channel) == NtStatus.STATUS_UNSUCCESSFUL
        assert channel.everything() == before
        refusal = saver.refusal(channel)
        assert refusal is not None and refusal.reason == Reason.DEVICE_FAILED
        channel.device.refuses_save = False
        assert saver.save_begin(channel) == OK


@pytest.mark.conformance(54)
class TestContinue:
    def test_without_begin_both_outputs_are_zero(self, saver: ChannelSaver) -> None:
        assert saver.save_continue(busy_channel(), bytearray(10), 10) == SaveResult(BAD_STATE, 0, 0)

    @pytest.mark.parametrize("buffer", [None, bytearray()])
    def test_size_zero_is_a_size_probe(self, saver: ChannelSaver, buffer: bytearray | None) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        need = len(chunks(busy_channel())[0])
        for _ in range(3):
            assert saver.save_continue(channel, buffer, 0) == (TOO_SMALL, 0, need)

    def test_no_buffer_with_a_size_is_refused(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        assert saver.save_continue(channel, None, 100) == (NtStatus.STATUS_INVALID_PARAMETER_2, 0, 0)

    @pytest.mark.parametrize("size", [-1, 11])
    def test_size_that_the_buffer_has_not_is_refused(self, saver: ChannelSaver, size: int) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(10), size).status == NtStatus.STATUS_INVALID_PARAMETER_3

    def test_buffer_that_cannot_be_written_is_refused(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        result = saver.save_continue(channel, memoryview(bytes(1000)), 1000)
        assert result.status == NtStatus.STATUS_INVALID_PARAMETER_2

    def test_too_small_writes_nothing_and_answers_the_same_when_repeated(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        need = len(chunks(busy_channel())[0])
        saver.save_begin(channel)
        buffer = bytearray(b"\xee" * (need - 1))
        for _ in range(3):
            assert saver.save_continue(channel, buffer, len(buffer)) == (TOO_SMALL, 0, need)
        assert buffer == b"\xee" * (need - 1)

    def test_too_small_in_the_middle_leaves_the_cursor(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        expected = chunks(channel)
        saver.save_begin(channel)
        first = bytearray(len(expected[0]))
        assert saver.save_continue(channel, first, len(first)) == (OVERFLOW, len(first), len(expected[1]))
        for size in range(len(expected[1])):
            assert saver.save_continue(channel, bytearray(size), size) == (TOO_SMALL, 0, len(expected[1]))
        second = bytearray(len(expected[1]))
        status, filled, required = saver.save_continue(channel, second, len(second))
        assert (status, bytes(second[:filled]), required) == (OVERFLOW, expected[1], len(expected[2]))

    def test_several_chunks_fit_but_not_all(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        expected = chunks(channel)
        saver.save_begin(channel)
        whole = len(expected[0] + expected[1] + expected[2])
        buffer = bytearray(b"\xee" * (whole + len(expected[3]) - 1))
        assert saver.save_continue(channel, buffer, len(buffer)) == (OVERFLOW, whole, len(expected[3]))
        assert buffer[whole:] == b"\xee" * (len(buffer) - whole)

    def test_exactly_full_with_the_last_chunk_is_success(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        expected = b"".join(chunks(channel))
        saver.save_begin(channel)
        buffer = bytearray(len(expected))
        assert saver.save_continue(channel, buffer, len(buffer)) == (OK, len(expected), 0)
        assert buffer == expected

    def test_exactly_full_with_chunks_left_is_overflow(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        expected = chunks(channel)
        saver.save_begin(channel)
        size = len(expected[0]) + len(expected[1])
        assert saver.save_continue(channel, bytearray(size), size) == (OVERFLOW, size, len(expected[2]))

    def test_after_success_it_is_success_again(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(1 << 16), 1 << 16).status == OK
        assert saver.save_continue(channel, bytearray(10), 10) == (OK, 0, 0)
        assert saver.save_continue(channel, None, 0) == (OK, 0, 0)

    def test_nothing_in_flight_is_still_one_chunk(self, saver: ChannelSaver) -> None:
        channel = idle_channel()
        saver.save_begin(channel)
        status, filled, required = saver.save_continue(channel, bytearray(4096), 4096)
        assert (status, required) == (OK, 0)
        assert filled > 0

    def test_only_the_given_size_of_a_larger_buffer_is_used(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        expected = chunks(channel)
        saver.save_begin(channel)
        buffer = bytearray(b"\xee" * 4096)
        assert saver.save_continue(channel, buffer, len(expected[0])).bytes_filled == len(expected[0])
        assert buffer[len(expected[0]) :] == b"\xee" * (4096 - len(expected[0]))

    def test_buffer_may_be_a_view_of_other_items_than_bytes(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        words = memoryview(bytearray(8192)).cast("I")
        assert saver.save_continue(channel, words, 8192).status == OK

    def test_one_packet_larger_than_any_buffer_tells_its_size(self, saver: ChannelSaver) -> None:
        channel = ModelChannel()
        channel.start()
        channel.guest_opens()
        channel.guest_sends(request(1, b"z" * 100_000))
        channel.pause()
        saver.save_begin(channel)
        buffer = bytearray(4096)
        assert saver.save_continue(channel, buffer, 4096).status == OVERFLOW
        status, filled, required = saver.save_continue(channel, buffer, 4096)
        assert (status, filled) == (TOO_SMALL, 0)
        assert required > 100_000
        assert saver.save_continue(channel, bytearray(required), required).status == OK

    def test_every_buffer_size_gives_the_same_bytes(self) -> None:
        channel = busy_channel()
        whole = b"".join(chunks(channel))
        for size in range(len(whole) + 2):
            records = save(ChannelSaver(save_ids=lambda: 1), channel, size)
            assert b"".join(records) == whole, size


class TestEnd:
    def test_end_before_success_leaves_the_channel_unaffected(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        before = channel.everything()
        saver.save_begin(channel)
        saver.save_continue(channel, bytearray(200), 200)
        saver.save_end(channel)
        assert channel.everything() == before
        assert saver.save_continue(channel, bytearray(200), 200).status == BAD_STATE

    def test_end_without_begin_is_logged_and_harmless(
        self, saver: ChannelSaver, caplog: pytest.LogCaptureFixture
    ) -> None:
        channel = busy_channel()
        before = channel.everything()
        with caplog.at_level("INFO"):
            saver.save_end(channel)
        assert "SaveEnd without a save in progress" in caplog.text
        assert channel.everything() == before

    def test_second_end_is_harmless(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        save(saver, channel)
        before = channel.everything()
        saver.save_end(channel)
        assert channel.everything() == before

    def test_start_after_end_continues_as_if_nothing_was_saved(self, saver: ChannelSaver) -> None:
        channel, twin = busy_channel(), busy_channel()
        save(saver, channel)
        saver.start(channel)
        twin.start()
        assert channel.everything() == twin.everything()

    def test_start_after_an_aborted_save(self, saver: ChannelSaver) -> None:
        channel, twin = busy_channel(), busy_channel()
        saver.save_begin(channel)
        saver.save_end(channel)
        saver.start(channel)
        twin.start()
        assert channel.everything() == twin.everything()

    def test_start_during_a_save_is_refused(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        assert saver.start(channel) == BAD_STATE
        assert channel.paused
        assert saver.save_continue(channel, bytearray(1 << 16), 1 << 16).status == OK

    def test_save_abort_run_save(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        saver.save_continue(channel, bytearray(300), 300)
        saver.save_end(channel)
        saver.start(channel)
        channel.guest_reads()
        channel.guest_sends(request(0xB1))
        saver.pause(channel)
        expected = channel.view()
        target = new_process(channel)
        assert restore(saver, target, save(saver, channel)) == [OK]
        assert target.view() == expected

    def test_work_that_ends_between_save_and_start_waits(self) -> None:
        saver, channel = ChannelSaver(save_ids=lambda: 1), busy_channel()
        ring = copy.deepcopy(channel.ring)
        records = save(saver, channel)
        view = channel.view()
        channel.finish(0xA2)
        assert (channel.ring, channel.view()) == (ring, view)
        assert save(saver, channel) == records
        saver.start(channel)
        assert [each.transaction_id for each in channel.completions] == [0xA1, 0xA2]

    def test_cancel_of_a_complete_save_drops_the_view_without_starting(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        before = channel.everything()
        save(saver, channel)
        saver.save_cancel(channel)
        assert channel.everything() == before

    def test_two_saves_without_a_change_are_equal_but_for_the_save_id(self) -> None:
        channel = busy_channel()
        assert chunks(channel) == chunks(channel)
        saver = ChannelSaver()
        assert save(saver, channel, 0) != save(saver, channel, 0)

    def test_aborting_a_second_save_keeps_what_the_first_froze(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        save(saver, channel)
        saver.save_begin(channel)
        saver.save_end(channel)
        assert channel.view_taken
        assert saver.start(channel) == OK
        assert not channel.view_taken


class TestStateChangeDuringASave:
    @pytest.mark.parametrize("change", ["guest_closes", "disable", "start", "pause"])
    def test_next_continue_fails_until_end(self, saver: ChannelSaver, change: str) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        saver.save_continue(channel, bytearray(300), 300)
        getattr(channel, change)()
        buffer = bytearray(1 << 16)
        for _ in range(2):
            assert saver.save_continue(channel, buffer, len(buffer)) == (BAD_STATE, 0, 0)
        assert buffer == bytes(1 << 16)
        assert saver.save_begin(channel) == BAD_STATE
        saver.save_end(channel)
        assert not channel.view_taken

    def test_revocation_through_the_saver(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        saver.save_begin(channel)
        assert saver.disable(channel) == OK
        assert saver.save_continue(channel, bytearray(300), 300).status == BAD_STATE
        saver.save_end(channel)
        assert save(saver, channel)


class TestTwoChannels:
    def test_are_independent(self, saver: ChannelSaver) -> None:
        one, two = busy_channel(identity(1)), busy_channel(identity(2))
        expected = {1: b"".join(chunks(one)[1:]), 2: b"".join(chunks(two)[1:])}
        assert len(expected[1]) == len(expected[2])
        assert saver.save_begin(one) == saver.save_begin(two) == OK
        small = bytearray(300)
        assert saver.save_continue(one, small, 300).status == OVERFLOW
        saver.save_end(two)
        assert saver.save_continue(one, bytearray(1 << 16), 1 << 16).status == OK
        assert saver.save_continue(two, small, 300).status == BAD_STATE

    def test_each_save_run_has_an_id_of_its_own(self) -> None:
        saver = ChannelSaver()
        one, two = busy_channel(identity(1)), busy_channel(identity(2))
        ids = {record[8:16] for record in save(saver, one) + save(saver, two) + save(saver, one)}
        assert len(ids) == 3


def test_recommended_loop_restores_with_more_and_then_success(saver: ChannelSaver) -> None:
    channel = busy_channel()
    records = save(saver, channel, 400)
    assert len(records) > 3
    target = new_process(channel)
    assert restore(saver, target, records) == [MORE] * (len(records) - 1) + [OK]
    assert target.view() == channel.view()
