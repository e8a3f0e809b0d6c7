"""One channel saved and restored by hand, while its guest's end stays as it is."""

from __future__ import annotations

import pytest
from vmbus.bus.io.state import IoState
from vmbus.errors import DeviceError
from vmbus.saving import NtStatus, Reason
from vmbus.saving.by_hand import Outcome, restore, save, whole_chunks
from vmbus.saving.dump import dump

from tests.unit.saving.model_channel import OK
from tests.unit.saving.test_device_channel import Process, fill

MORE = NtStatus.STATUS_MORE_PROCESSING_REQUIRED
OVERFLOW = NtStatus.STATUS_BUFFER_OVERFLOW
TOO_SMALL = NtStatus.STATUS_BUFFER_TOO_SMALL


@pytest.fixture
def paused() -> Process:
    """A channel with requests, answers and packets under way, paused."""
    process = Process()
    process.guest.open()
    fill(process)
    assert process.saver.pause(process.channel) == OK
    return process


def started(process: Process) -> list[int]:
    """Start, finish every request; return the ids of the completions that the guest gets."""
    assert process.saver.start(process.channel) == OK
    process.guest.run()
    for number in [each for each in process.device.kept if each > 0]:
        process.device.finish(process.io, number)
    ids: list[int] = []
    process.guest.run()
    while packets := process.guest.receive():
        ids += [each.transaction_id for each in packets if each.kind == 11]
        process.guest.run()
    return ids


def statuses(outcome: Outcome) -> list[NtStatus | None]:
    return [each.status for each in outcome.calls]


class TestSave:
    def test_every_call_is_reported_with_what_it_returned(self, paused: Process) -> None:
        outcome = save(paused.saver, paused.channel)
        names = [each.function for each in outcome.calls]
        assert names == ["VmbChannelSaveBegin", "VmbChannelSaveContinue", "VmbChannelSaveEnd"]
        assert statuses(outcome) == [OK, OK, None]
        assert outcome.calls[1].filled == len(outcome.data) > 0
        assert outcome.calls[1].required == 0
        assert outcome.refusal is None

    def test_small_buffer_grows_to_what_is_required_and_gives_the_same_chunks(self, paused: Process) -> None:
        paused.saver._save_ids = lambda: 7
        whole = save(paused.saver, paused.channel)
        parts = save(paused.saver, paused.channel, 0)
        assert parts.data == whole.data
        first, second = parts.calls[1:3]
        assert (first.status, first.size, first.filled) == (TOO_SMALL, 0, 0)
        assert (second.status, second.size) == (OVERFLOW, first.required)
        assert second.filled == first.required

    def test_active_channel_is_refused_by_save_begin(self, paused: Process) -> None:
        paused.saver.start(paused.channel)
        outcome = save(paused.saver, paused.channel)
        assert statuses(outcome) == [NtStatus.STATUS_INVALID_DEVICE_STATE]
        assert outcome.refusal is not None
        assert "pause it first" in outcome.refusal.detail
        assert outcome.data == b""

    def test_device_that_cannot_be_saved_is_refused_and_goes_on(self, paused: Process) -> None:
        paused.device.broken = DeviceError("in the middle of something")
        outcome = save(paused.saver, paused.channel)
        assert statuses(outcome) == [NtStatus.STATUS_UNSUCCESSFUL]
        paused.device.broken = None
        assert sorted(started(paused)) == [1, 2, 3]


class TestRestore:
    @pytest.mark.parametrize("size", [0, 300, 1 << 16])
    def test_guest_loses_nothing(self, paused: Process, size: int) -> None:
        state = save(paused.saver, paused.channel).data
        outcome = restore(paused.saver, paused.channel, state, size)
        assert outcome.refusal is None
        assert [each for each in statuses(outcome) if each is not MORE] == [OK]
        assert paused.io.state is IoState.CLOSED
        assert sorted(started(paused)) == [1, 2, 3]
        assert paused.device.resumptions == 1
        assert paused.io.refusals.total == 0

    def test_again_and_again_without_a_start(self, paused: Process) -> None:
        for _ in range(3):
            state = save(paused.saver, paused.channel).data
            assert restore(paused.saver, paused.channel, state).refusal is None
        assert sorted(started(paused)) == [1, 2, 3]

    def test_it_can_be_paused_and_saved_again_afterwards(self, paused: Process) -> None:
        for _ in range(2):
            state = save(paused.saver, paused.channel).data
            assert restore(paused.saver, paused.channel, state).refusal is None
            assert paused.saver.start(paused.channel) == OK
            paused.guest.run()
            assert paused.saver.pause(paused.channel) == OK
        assert sorted(started(paused)) == [1, 2, 3]

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (lambda state: b"", Reason.TRUNCATED),
            (lambda state: state[:-1], Reason.TRUNCATED),
            (lambda state: state[:-2] + bytes([state[-2] ^ 1]) + state[-1:], Reason.DAMAGED),
            (lambda state: state + b"x", Reason.TRAILING_BYTES),
            (lambda state: b"no chunks at all", Reason.DAMAGED),
        ],
    )
    def test_what_is_refused_leaves_the_channel_as_it_was(
        self, paused: Process, damage: object, reason: Reason
    ) -> None:
        assert callable(damage)
        outcome = restore(paused.saver, paused.channel, damage(save(paused.saver, paused.channel).data), 300)
        assert outcome.refusal is not None
        assert outcome.refusal.reason is reason
        assert not outcome.refusal.changed
        assert sorted(started(paused)) == [1, 2, 3]

    def test_state_from_before_the_channel_ran_is_refused(self, paused: Process) -> None:
        state = save(paused.saver, paused.channel).data
        paused.saver.start(paused.channel)
        paused.device.finish(paused.io, 3)
        paused.saver.pause(paused.channel)
        outcome = restore(paused.saver, paused.channel, state)
        assert outcome.refusal is not None
        assert outcome.refusal.reason is Reason.NOT_ACCEPTED
        assert "has run since" in outcome.refusal.detail
        assert sorted(started(paused)) == [1, 2, 3]

    def test_active_channel_is_refused(self, paused: Process) -> None:
        state = save(paused.saver, paused.channel).data
        paused.saver.start(paused.channel)
        outcome = restore(paused.saver, paused.channel, state)
        assert outcome.refusal is not None
        assert outcome.refusal.status is NtStatus.STATUS_INVALID_DEVICE_STATE
        assert sorted(started(paused)) == [1, 2, 3]

    def test_channel_that_cannot_get_its_state_back_says_so(self, paused: Process) -> None:
        state = save(paused.saver, paused.channel).data
        original = type(paused.device).restore
        paused.device.restore = lambda state: original(paused.device, b"")  # type: ignore[method-assign]
        outcome = restore(paused.saver, paused.channel, state)
        assert outcome.refusal is not None
        assert outcome.refusal.changed
        assert "lost its state" in outcome.refusal.detail


def test_a_guest_that_closes_a_restored_channel_is_not_continued(paused: Process) -> None:
    state = save(paused.saver, paused.channel).data
    assert restore(paused.saver, paused.channel, state).refusal is None
    paused.bus_channel.is_open = False
    paused.io.closed(paused.bus_channel)
    assert paused.saver.start(paused.channel) == OK
    assert paused.io.state is IoState.CLOSED
    assert paused.device.resumptions == 0


def test_a_paused_channel_can_be_closed_and_opened_and_stays_paused(paused: Process) -> None:
    paused.guest.close()
    paused.device.kept.clear()
    paused.guest.open()
    assert (paused.io.state, paused.channel.paused) == (IoState.PAUSED, True)
    paused.guest.send(b"waits...", transaction_id=5, completion_requested=True)
    assert paused.device.kept == {}
    state = save(paused.saver, paused.channel).data
    assert restore(paused.saver, paused.channel, state).refusal is None
    assert started(paused) == [5]


def test_a_channel_that_is_paused_before_its_first_open_begins_paused() -> None:
    process = Process()
    assert process.saver.pause(process.channel) == OK
    process.guest.open()
    process.guest.send(b"waits...", transaction_id=5, completion_requested=True)
    assert (process.io.state, process.device.kept) == (IoState.PAUSED, {})
    assert started(process) == [5]


def test_buffers_have_whole_chunks(paused: Process) -> None:
    state = save(paused.saver, paused.channel).data
    buffers = list(whole_chunks(state, 700))
    assert b"".join(buffers) == state
    assert len(buffers) > 2
    assert list(whole_chunks(state, len(state))) == [state]
    assert len(list(whole_chunks(state, 0))) > len(buffers)
    assert list(whole_chunks(b"", 10)) == []


def test_dump_names_every_chunk_and_prints_no_raw_byte(paused: Process) -> None:
    paused.io.fail("\x1b]52;c;evil\x07")
    process = Process()
    process.guest.open()
    fill(process)
    process.saver.pause(process.channel)
    text = "\n".join(dump(save(process.saver, process.channel).data))
    for kind in ("CHANNEL", "OUTSTANDING", "UNSENT", "COMPLETION", "TAKEN", "DEVICE"):
        assert f": {kind} version " in text
    assert "axes: ENABLED|OPEN|PAUSED" in text
    text = "\n".join(dump(save(paused.saver, paused.channel).data))
    assert "failure: '\\x1b]52;c;evil\\x07'" in text
    assert all(each.isprintable() for each in text.replace("\n", ""))
    assert "is missing" in "\n".join(dump(b""))
