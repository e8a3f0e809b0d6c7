"""SavePacket, RestorePacket and VmbPacketRestore: docs/protocol/saving.md#packet-callbacks."""

from __future__ import annotations

import copy

import pytest
from vmbus.saving import ChannelSaver, NtStatus, Packet, Reason, SavePacketResult
from vmbus.saving.packets import MAX_PACKET_BLOB, SAVE_PACKET_RETRIES
from vmbus.wire.saved import SavedPacket

from tests.unit.saving.model_channel import (
    BAD_STATE,
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

RESOURCES = NtStatus.STATUS_INSUFFICIENT_RESOURCES


@pytest.fixture
def saver() -> ChannelSaver:
    return ChannelSaver(save_ids=lambda: 1)


def one_packet(note: bytes = b"note") -> ModelChannel:
    channel = ModelChannel()
    channel.start()
    channel.guest_opens()
    channel.send(b"to guest", note=note)
    channel.pause()
    return channel


class TestSavePacket:
    def test_is_called_with_no_room_first(self, saver: ChannelSaver) -> None:
        channel = one_packet(b"")
        save(saver, channel)
        assert channel.device.save_calls == [0]

    def test_is_called_again_with_what_it_asked_for(self, saver: ChannelSaver) -> None:
        channel = one_packet(b"n" * 77)
        save(saver, channel)
        assert channel.device.save_calls == [0, 77]

    def test_runs_for_unsent_and_outstanding_packets_in_order_and_for_no_other(
        self, saver: ChannelSaver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channel = busy_channel()
        seen = []
        answer = channel.device.save_packet

        def remembers(of: ModelChannel, packet: SavedPacket, buffer: memoryview) -> SavePacketResult:
            seen.append(packet.transaction_id)
            return answer(of, packet, buffer)

        monkeypatch.setattr(channel.device, "save_packet", remembers)
        save(saver, channel)
        assert list(dict.fromkeys(seen)) == [1, 2, 3, 4, 5]

    def test_may_ask_for_more_again_up_to_three_times(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        channel.device.save_script = [SavePacketResult(TOO_SMALL, 10 * n) for n in range(1, 5)]
        channel.device.notes[1] = b"n" * 33
        save(saver, channel)
        assert channel.device.save_calls == [0, 10, 20, 30, 40]
        assert SAVE_PACKET_RETRIES == 3

    def test_fourth_retry_is_not_made_and_the_cursor_stays(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        expected = b"".join(chunks(one_packet()))
        channel.device.save_script = [SavePacketResult(TOO_SMALL, 10 * n) for n in range(1, 6)]
        saver.save_begin(channel)
        buffer = bytearray(b"\xee" * 4096)
        assert saver.save_continue(channel, buffer, 4096) == (TOO_SMALL, 0, 0)
        assert buffer == b"\xee" * 4096
        assert channel.device.save_calls == [0, 10, 20, 30, 40]
        status, filled, _ = saver.save_continue(channel, buffer, 4096)
        assert (status, bytes(buffer[:filled])) == (OK, expected)

    def test_another_failure_is_returned_and_end_aborts(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        before = channel.everything()
        channel.device.save_script = [SavePacketResult(RESOURCES, 0)]
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(4096), 4096) == (RESOURCES, 0, 0)
        refusal = saver.refusal(channel)
        assert refusal is not None and refusal.reason == Reason.DEVICE_FAILED
        saver.save_end(channel)
        assert channel.everything() == before

    def test_failure_after_chunks_that_fit_leaves_the_buffer_alone(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        channel.device.save_script = [SavePacketResult(OK, 0), SavePacketResult(RESOURCES, 0)]
        saver.save_begin(channel)
        buffer = bytearray(4096)
        assert saver.save_continue(channel, buffer, 4096) == (RESOURCES, 0, 0)
        assert buffer == bytes(4096)

    def test_is_not_called_again_for_a_chunk_that_did_not_fit(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        saver.save_begin(channel)
        header = len(chunks(one_packet())[0])
        assert saver.save_continue(channel, bytearray(header), header).status == OVERFLOW
        for _ in range(5):
            assert saver.save_continue(channel, None, 0).status == TOO_SMALL
        assert channel.device.save_calls == [0, 4]

    @pytest.mark.parametrize("needed", [1, -1, MAX_PACKET_BLOB])
    def test_success_with_more_bytes_than_there_are_is_a_failure(
        self, saver: ChannelSaver, needed: int
    ) -> None:
        channel = one_packet()
        channel.device.save_script = [SavePacketResult(OK, needed)]
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(999), 999).status == NtStatus.STATUS_UNSUCCESSFUL

    def test_wish_for_too_much_is_a_failure(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        channel.device.save_script = [SavePacketResult(RESOURCES, MAX_PACKET_BLOB + 1)]
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(999), 999).status == RESOURCES
        assert channel.device.save_calls == [0]

    def test_that_raises_has_failed(self, saver: ChannelSaver, caplog: pytest.LogCaptureFixture) -> None:
        def raises() -> SavePacketResult:
            raise RuntimeError("a third party's device")

        channel = one_packet()
        channel.device.save_script = [raises]
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(999), 999).status == NtStatus.STATUS_UNSUCCESSFUL
        assert "third party" in caplog.text

    def test_that_is_not_registered_saves_the_packet_without_a_blob(self, saver: ChannelSaver) -> None:
        bare = ModelChannel(callbacks=False)
        bare.start()
        bare.guest_opens()
        bare.send(b"to guest", note=b"note")
        bare.pause()
        target = new_process(bare)
        assert restore(saver, target, save(saver, bare)) == [OK]
        assert target.device.notes == {1: b""}

    def test_may_not_call_the_saver(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        statuses: list[NtStatus] = []

        def calls_back() -> SavePacketResult:
            statuses.append(saver.save_begin(channel))
            statuses.append(saver.save_continue(channel, bytearray(9), 9).status)
            statuses.append(saver.restore_from_buffer(channel, b"x"))
            statuses.append(saver.start(channel))
            statuses.append(saver.pause(channel))
            statuses.append(saver.disable(channel))
            saver.save_end(channel)
            saver.save_cancel(channel)
            return SavePacketResult(OK, 0)

        channel.device.save_script = [calls_back]
        saver.save_begin(channel)
        assert saver.save_continue(channel, bytearray(999), 999).status == OK
        assert statuses == [BAD_STATE] * 6

    def test_that_changes_the_channel_ends_the_save(self, saver: ChannelSaver) -> None:
        channel = one_packet()

        def closes() -> SavePacketResult:
            channel.guest_closes()
            return SavePacketResult(OK, 0)

        channel.device.save_script = [closes]
        saver.save_begin(channel)
        buffer = bytearray(999)
        assert saver.save_continue(channel, buffer, 999) == (BAD_STATE, 0, 0)
        assert buffer == bytes(999)


class TestRestorePacket:
    def test_runs_once_a_packet_in_the_order_of_the_save_with_its_blob(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        target = new_process(channel)
        assert restore(saver, target, save(saver, channel)) == [OK]
        assert target.device.restored == [1, 2, 3, 4, 5]
        assert target.device.notes == {1: b"note one", 2: b"", 3: b"", 4: b"n" * 300, 5: b""}

    def test_not_registered_and_packets_saved_is_not_supported(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        target = new_process(channel, callbacks=False)
        before = target.everything()
        assert restore(saver, target, save(saver, channel)) == [NtStatus.STATUS_NOT_SUPPORTED]
        assert target.everything() == before
        refusal = saver.refusal(target)
        assert refusal is not None and refusal.reason == Reason.NO_RESTORE_CALLBACK

    def test_not_registered_and_no_packets_saved_is_fine(self, saver: ChannelSaver) -> None:
        channel = ModelChannel(callbacks=False)
        channel.start()
        channel.guest_opens()
        channel.guest_sends(request(0xA1))
        channel.pause()
        assert restore(saver, new_process(channel, callbacks=False), save(saver, channel)) == [OK]

    def test_failure_is_returned_and_the_channel_unusable_until_disabled(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        records = save(saver, channel)
        target = new_process(channel)
        target.device.restore_script = [OK, RESOURCES]
        ring = copy.deepcopy(target.ring)
        assert restore(saver, target, records) == [RESOURCES]
        refusal = saver.refusal(target)
        assert refusal is not None and refusal.reason == Reason.DEVICE_FAILED
        assert saver.start(target) == BAD_STATE
        assert saver.save_begin(target) == BAD_STATE
        assert restore(saver, target, records) == [BAD_STATE]
        assert target.ring == ring
        assert saver.disable(target) == OK
        assert restore(saver, target, records) == [OK]

    def test_success_without_a_restored_packet_is_a_failure(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        target = new_process(channel)
        target.on_restore_packet = lambda *_: OK
        assert restore(saver, target, save(saver, channel)) == [NtStatus.STATUS_UNSUCCESSFUL]
        assert saver.start(target) == BAD_STATE

    def test_that_raises_breaks_only_its_channel(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        target = new_process(channel)
        records = save(saver, channel)
        target.saver = None
        assert saver.restore_from_buffer(target, records[0]) == NtStatus.STATUS_UNSUCCESSFUL
        assert saver.start(target) == BAD_STATE
        assert restore(saver, new_process(channel), records) == [OK]

    def test_runs_only_when_every_chunk_has_come(self, saver: ChannelSaver) -> None:
        channel = busy_channel()
        target = new_process(channel)
        target.saver = saver
        *first, last = save(saver, channel, 0)
        for record in first:
            assert saver.restore_from_buffer(target, record) == NtStatus.STATUS_MORE_PROCESSING_REQUIRED
        assert target.device.restored == []
        assert saver.restore_from_buffer(target, last) == OK
        assert target.device.restored == [1, 2, 3, 4, 5]


class TestVmbPacketRestore:
    def answers(self, saver: ChannelSaver, scenario: str) -> list[NtStatus]:
        """Return the results of the calls that a RestorePacket callback makes in ``scenario``."""
        channel = one_packet()
        target = new_process(channel)
        found: list[NtStatus] = []

        def callback(of: ModelChannel, library: bytes, saved: bytes) -> NtStatus:
            packet = saver.packet_allocate(of)
            if scenario == "another channel's packet":
                found.append(saver.packet_restore(Packet(ModelChannel(identity(9))), library))
            if scenario == "other bytes":
                found.append(saver.packet_restore(packet, library + b"\0"))
                found.append(saver.packet_restore(packet, b""))
            found.append(saver.packet_restore(packet, bytearray(library)))
            if scenario == "twice":
                found.append(saver.packet_restore(packet, library))
                found.append(saver.packet_restore(saver.packet_allocate(of), library))
            return OK

        target.on_restore_packet = callback
        assert restore(saver, target, save(saver, channel)) == [OK]
        return found

    def test_fills_a_fresh_packet(self, saver: ChannelSaver) -> None:
        assert self.answers(saver, "") == [OK]

    def test_of_a_used_packet_is_refused(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        target = new_process(channel)
        found: list[NtStatus] = []

        def callback(of: ModelChannel, library: bytes, saved: bytes) -> NtStatus:
            packet = saver.packet_allocate(of)
            packet.state = request(1)
            found.append(saver.packet_restore(packet, library))
            return OK

        target.on_restore_packet = callback
        restore(saver, target, save(saver, channel))
        assert found == [NtStatus.STATUS_INVALID_PARAMETER_1]

    def test_of_a_second_packet_is_refused(self, saver: ChannelSaver) -> None:
        assert self.answers(saver, "twice") == [OK, BAD_STATE, BAD_STATE]

    def test_with_other_bytes_is_refused(self, saver: ChannelSaver) -> None:
        bad = NtStatus.STATUS_INVALID_PARAMETER_2
        assert self.answers(saver, "other bytes") == [bad, bad, OK]

    def test_with_another_channels_packet_is_refused(self, saver: ChannelSaver) -> None:
        assert self.answers(saver, "another channel's packet") == [BAD_STATE, OK]

    def test_outside_of_a_callback_is_refused(self, saver: ChannelSaver) -> None:
        channel = one_packet()
        assert saver.packet_restore(saver.packet_allocate(channel), b"") == BAD_STATE
