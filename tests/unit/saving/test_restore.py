"""RestoreFromBuffer: docs/protocol/saving.md#silent-cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vmbus.saving import ChannelSaver, NtStatus, Reason
from vmbus.saving.chunks import encode
from vmbus.wire.chunk import ChunkFlags, ChunkKind, build_chunk
from vmbus.wire.saved import (
    RECORDS,
    ChannelAxes,
    SavedCompletion,
    SavedDevice,
    SavedGpadl,
    SavedOutgoing,
)

from tests.unit.saving.model_channel import (
    BAD,
    BAD_STATE,
    MORE,
    OK,
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
    return ChannelSaver(save_ids=lambda: 1)


SOURCE = busy_channel()
CHUNKS = chunks(SOURCE)
WHOLE = b"".join(CHUNKS)


def refused(
    data: bytes, *, after: bytes = b"", status: NtStatus = BAD, target: ModelChannel | None = None
) -> Reason:
    """Return why ``data`` is refused after ``after``; check that nothing changes and the right bytes are accepted."""
    saver = ChannelSaver()
    target = target or new_process(SOURCE)
    target.saver = saver
    if after:
        assert saver.restore_from_buffer(target, after) == MORE
    before = target.everything()
    assert saver.restore_from_buffer(target, data) == status
    assert target.everything() == before
    refusal = saver.refusal(target)
    assert refusal is not None
    assert saver.restore_from_buffer(target, WHOLE[len(after) :]) == OK
    assert target.view() == SOURCE.view()
    return refusal.reason


def built(*parts: tuple[ChunkKind, object], save_id: int = 1) -> bytes:
    return b"".join(
        encode(kind, record, save_id=save_id, index=index, last=index + 1 == len(parts))
        for index, (kind, record) in enumerate(parts)
    )


class TestRestoredChannel:
    def test_is_what_was_saved(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        assert restore(saver, target, [WHOLE]) == [OK]
        assert target.view() == SOURCE.view()
        assert target.paused and target.open

    def test_writes_nothing_into_guest_memory_before_it_is_started(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        restore(saver, target, [WHOLE])
        assert target.ring == SOURCE.ring

    # Row 47, for this library: each packet taken is handed to the device once, each answer is sent once.
    def test_does_what_it_had_taken_again_and_answers_each_once(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        restore(saver, target, [WHOLE])
        saver.start(target)
        given = [packet.transaction_id for packet in target.device.given]
        assert given == [0xA2, 0xA3, 0xA4]
        for number in given:
            target.finish(number)
        answers = []
        while target.ring.to_guest:
            packet = target.guest_reads()
            if isinstance(packet, SavedCompletion):
                answers.append(packet.transaction_id)
        assert answers == [0xA1, 0xA2, 0xA3, 0xA4]

    # Row 51, for this library.
    def test_keeps_the_order_of_its_queue_and_the_transaction_ids(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        restore(saver, target, [WHOLE])
        saver.start(target)
        sent, order = [], []
        while target.ring.to_guest:
            packet = target.guest_reads()
            order.append(packet.transaction_id)
            if not isinstance(packet, SavedCompletion):
                sent.append((packet.transaction_id, packet.payload))
                target.guest_completes(packet.transaction_id)
        assert order == [1, 2, 3, 4, 0xA1, 5]
        assert sent[3][1] == b"host 4, unsent"
        assert target.device.completed == [1, 2, 3, 4, 5]
        assert target.send(b"next") == 6

    def test_saves_the_same_again_before_and_after_it_is_started(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        restore(saver, target, [WHOLE])
        assert save(saver, target) == [WHOLE]
        saver.start(target)
        saver.pause(target)
        second = new_process(target)
        assert restore(saver, second, save(saver, target)) == [OK]
        assert second.view() == target.view()

    # Row 46, for this library.
    def test_that_was_never_opened_is_restored_closed(self, saver: ChannelSaver) -> None:
        channel = ModelChannel()
        target = new_process(channel)
        assert restore(saver, target, save(saver, channel)) == [OK]
        assert not target.open
        saver.start(target)
        target.guest_opens()
        target.guest_sends(request(1))
        assert [packet.transaction_id for packet in target.device.given] == [1]

    def test_without_a_restore_allows_a_restore(self, saver: ChannelSaver) -> None:
        channel = ModelChannel()
        assert saver.start(channel) == OK


class TestWhen:
    def test_open_or_active_channel_is_refused(self, saver: ChannelSaver) -> None:
        for paused in (True, False):
            target = ModelChannel()
            target.start()
            target.guest_opens()
            if paused:
                target.pause()
            before = target.everything()
            assert restore(saver, target, [WHOLE]) == [BAD_STATE]
            assert target.everything() == before

    def test_started_channel_that_is_not_open_yet_is_refused(self, saver: ChannelSaver) -> None:
        target = ModelChannel()
        target.start()
        assert restore(saver, target, [WHOLE]) == [BAD_STATE]

    def test_channel_that_is_being_saved_is_refused(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        saver.save_begin(target)
        assert restore(saver, target, [WHOLE]) == [BAD_STATE]
        saver.save_end(target)
        assert restore(saver, target, [WHOLE]) == [OK]

    def test_no_buffer_and_no_size(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        before = target.everything()
        assert saver.restore_from_buffer(target, None) == NtStatus.STATUS_INVALID_PARAMETER_2
        assert saver.restore_from_buffer(target, b"") == NtStatus.STATUS_INVALID_PARAMETER_3
        assert saver.restore_from_buffer(target, WHOLE, 0) == NtStatus.STATUS_INVALID_PARAMETER_3
        assert saver.restore_from_buffer(target, WHOLE, len(WHOLE) + 1) == NtStatus.STATUS_INVALID_PARAMETER_3
        assert target.everything() == before

    def test_size_bounds_the_buffer(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        target.saver = saver
        assert saver.restore_from_buffer(target, bytearray(WHOLE + b"rest"), len(WHOLE)) == OK

    def test_after_success_is_refused(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        assert restore(saver, target, [WHOLE, WHOLE]) == [OK, BAD_STATE]
        saver.start(target)
        assert restore(saver, target, [WHOLE]) == [BAD_STATE]

    def test_half_way_the_channel_may_not_be_started_or_saved(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        before = target.everything()
        assert restore(saver, target, [CHUNKS[0]]) == [MORE]
        assert saver.start(target) == BAD_STATE
        assert saver.save_begin(target) == BAD_STATE
        assert target.everything() == before
        assert restore(saver, target, [b"".join(CHUNKS[1:])]) == [OK]
        assert saver.start(target) == OK

    def test_disable_discards_what_had_come(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        assert restore(saver, target, CHUNKS[:3]) == [MORE] * 3
        assert saver.disable(target) == OK
        assert restore(saver, target, CHUNKS[3:4]) == [BAD]
        assert restore(saver, target, CHUNKS) == [MORE] * (len(CHUNKS) - 1) + [OK]

    def test_two_channels_at_once(self, saver: ChannelSaver) -> None:
        other = busy_channel(identity(2))
        one, two = new_process(SOURCE), new_process(other)
        for first, second in zip(CHUNKS, chunks(other), strict=True):
            status = [restore(saver, one, [first]), restore(saver, two, [second])]
        assert status == [[OK], [OK]]


class TestWholeChunks:
    @pytest.mark.conformance(54)
    def test_partial_chunk_at_the_end_of_a_buffer_refuses_all_of_it(self) -> None:
        assert refused(CHUNKS[0] + CHUNKS[1][:-1]) == Reason.TRUNCATED
        assert refused(CHUNKS[1] + CHUNKS[2][:10], after=CHUNKS[0]) == Reason.TRUNCATED

    @pytest.mark.conformance(54)
    def test_every_way_to_cut_whole_chunks_into_buffers_works(self, saver: ChannelSaver) -> None:
        for cut in range(1, len(CHUNKS)):
            target = new_process(SOURCE)
            assert restore(saver, target, [b"".join(CHUNKS[:cut]), b"".join(CHUNKS[cut:])]) == [MORE, OK]
            assert target.view() == SOURCE.view()

    def test_every_truncation_is_refused_or_waits_for_more(self) -> None:
        borders = {sum(map(len, CHUNKS[:number])) for number in range(1, len(CHUNKS))}
        for length in range(1, len(WHOLE)):
            saver, target = ChannelSaver(), new_process(SOURCE)
            before = target.everything() if length % 64 == 0 else None
            status = saver.restore_from_buffer(target, WHOLE[:length])
            assert status == (MORE if length in borders else BAD), length
            assert saver.start(target) == (BAD_STATE if length in borders else OK)
            if before is not None and status == BAD:
                fresh = new_process(SOURCE)
                fresh.start()
                assert target.everything() == fresh.everything()

    def test_every_damaged_byte_is_refused(self) -> None:
        saver, target = ChannelSaver(), new_process(SOURCE)
        target.saver = saver
        before = target.everything()
        for at in range(len(WHOLE)):
            for change in (0x01, 0x80, 0xFF):
                damaged = bytearray(WHOLE)
                damaged[at] ^= change
                assert saver.restore_from_buffer(target, damaged) == BAD, at
                assert saver.refusal(target) is not None
        assert target.everything() == before
        assert saver.restore_from_buffer(target, WHOLE) == OK


class TestForeignChunks:
    def test_out_of_order(self) -> None:
        assert refused(CHUNKS[1]) == Reason.OUT_OF_ORDER
        assert refused(CHUNKS[2], after=CHUNKS[0]) == Reason.OUT_OF_ORDER
        assert refused(CHUNKS[0] + CHUNKS[2] + CHUNKS[1]) == Reason.OUT_OF_ORDER
        assert refused(CHUNKS[-1], after=CHUNKS[0]) == Reason.OUT_OF_ORDER

    def test_repeated(self) -> None:
        assert refused(CHUNKS[0], after=CHUNKS[0]) == Reason.REPEATED
        assert refused(CHUNKS[0] + CHUNKS[0]) == Reason.REPEATED
        assert refused(CHUNKS[1] + CHUNKS[2] + CHUNKS[2], after=CHUNKS[0]) == Reason.REPEATED

    def test_of_another_channel(self) -> None:
        assert refused(b"".join(chunks(busy_channel(identity(2))))) == Reason.FOREIGN_CHANNEL
        assert refused(chunks(busy_channel(identity(1, subchannel=1)))[0]) == Reason.FOREIGN_CHANNEL

    def test_of_another_save(self) -> None:
        other = save(ChannelSaver(save_ids=lambda: 2), busy_channel(), 0)
        assert refused(other[1], after=CHUNKS[0]) == Reason.FOREIGN_SAVE
        assert refused(other[0], after=CHUNKS[0]) == Reason.FOREIGN_SAVE
        assert refused(CHUNKS[0] + other[1]) == Reason.FOREIGN_SAVE

    def test_trailing_bytes(self) -> None:
        assert refused(WHOLE + b"\0") == Reason.TRAILING_BYTES
        assert refused(WHOLE + CHUNKS[0]) == Reason.TRAILING_BYTES
        assert refused(CHUNKS[1] + b"??", after=CHUNKS[0]) == Reason.DAMAGED

    def test_of_a_machine(self) -> None:
        machine = build_chunk(ChunkKind.MACHINE, b"\1w", save_id=1, index=0, flags=1)
        assert refused(machine) == Reason.INCONSISTENT

    def test_without_a_header(self) -> None:
        assert refused(built((ChunkKind.DEVICE, SavedDevice(b"x")))) == Reason.INCONSISTENT
        skipped = build_chunk(0x7777, b"", save_id=1, index=0, flags=ChunkFlags.IGNORABLE | ChunkFlags.LAST)
        assert refused(skipped) == Reason.INCONSISTENT


class TestVersions:
    def with_chunk(self, *, index: int = 0, **changes: int) -> bytes:
        """Return all chunks, the one at ``index`` built with ``changes``."""
        record = CHUNKS[index][32:]
        fields = {"kind": 1 if index == 0 else 2, "version": 1, "flags": 0} | changes
        kind = fields.pop("kind")
        chunk = build_chunk(kind, record, save_id=1, index=index, **fields)
        return b"".join([*CHUNKS[:index], chunk, *CHUNKS[index + 1 :]])

    def test_builder_of_these_tests_is_right(self) -> None:
        assert self.with_chunk() == WHOLE
        assert self.with_chunk(index=1) == WHOLE

    def test_newer_record(self) -> None:
        for index in (0, 1):
            assert refused(self.with_chunk(index=index, version=2)) == Reason.TOO_NEW

    def test_newer_record_of_a_known_kind_is_not_skipped(self) -> None:
        data = self.with_chunk(index=1, version=9, flags=ChunkFlags.IGNORABLE)
        assert refused(data) == Reason.TOO_NEW

    def test_older_record_that_never_was(self) -> None:
        assert refused(self.with_chunk(index=1, version=0)) == Reason.TOO_OLD

    def test_newer_and_older_format(self) -> None:
        for version, reason in ((2, Reason.TOO_NEW), (255, Reason.TOO_NEW), (0, Reason.TOO_OLD)):
            data = bytearray(WHOLE)
            data[4] = version
            assert refused(bytes(data)) == reason

    def test_unknown_flag(self) -> None:
        assert refused(self.with_chunk(index=1, flags=4)) == Reason.TOO_NEW

    def test_unknown_kind(self) -> None:
        assert refused(self.with_chunk(index=1, kind=0x42)) == Reason.UNKNOWN_KIND

    def test_unknown_kind_that_may_be_skipped_is_skipped(self, saver: ChannelSaver) -> None:
        extra = build_chunk(0x42, b"of a later release", save_id=1, index=1, flags=2, version=7)
        shifted = [
            build_chunk(
                int.from_bytes(chunk[6:8], "little"),
                chunk[32:],
                save_id=1,
                index=index,
                flags=chunk[20],
            )
            for index, chunk in enumerate(CHUNKS[1:], 2)
        ]
        target = new_process(SOURCE)
        assert restore(saver, target, [CHUNKS[0] + extra, b"".join(shifted)]) == [MORE, OK]
        assert target.view() == SOURCE.view()

    def test_last_chunk_may_be_one_that_is_skipped(self, saver: ChannelSaver) -> None:
        channel = ModelChannel()
        (only,) = chunks(channel)
        first = build_chunk(1, only[32:], save_id=1, index=0)
        extra = build_chunk(0x42, b"", save_id=1, index=1, flags=3)
        assert restore(saver, new_process(channel), [first, extra]) == [MORE, OK]


class TestContradictions:
    HEADER = SOURCE.view().channel

    def refused(self, *parts: tuple[ChunkKind, object]) -> None:
        assert refused(built(*parts)) == Reason.INCONSISTENT

    def test_record_in_the_wrong_place(self) -> None:
        header = (ChunkKind.CHANNEL, self.HEADER)
        device = (ChunkKind.DEVICE, SavedDevice(b"x"))
        taken = (ChunkKind.TAKEN, request(1))
        completion = (ChunkKind.COMPLETION, SavedCompletion(1, b""))
        self.refused(header, header)
        self.refused(taken, header)
        self.refused(header, device, taken)
        self.refused(header, device, device)
        self.refused(header, taken, completion)

    def test_open_without_parameters_and_the_reverse(self) -> None:
        self.refused((ChunkKind.CHANNEL, replace(self.HEADER, open=None)))
        self.refused((ChunkKind.CHANNEL, replace(self.HEADER, axes=ChannelAxes.PAUSED)))

    def test_gpadls(self) -> None:
        self.refused((ChunkKind.CHANNEL, replace(self.HEADER, gpadls=())))
        twice = (SavedGpadl(0xE1E10, 8), SavedGpadl(0xE1E10, 8))
        self.refused((ChunkKind.CHANNEL, replace(self.HEADER, gpadls=twice)))

    def test_transactions_of_a_closed_channel(self) -> None:
        closed = replace(self.HEADER, open=None, axes=ChannelAxes.PAUSED, gpadls=())
        self.refused((ChunkKind.CHANNEL, closed), (ChunkKind.TAKEN, request(1)))

    def test_completion_of_a_closed_channel(self) -> None:
        closed = replace(self.HEADER, open=None, axes=ChannelAxes.PAUSED, gpadls=())
        self.refused((ChunkKind.CHANNEL, closed), (ChunkKind.COMPLETION, SavedCompletion(1, b"")))

    def test_packet_whose_library_state_is_none(self) -> None:
        bad = (ChunkKind.OUTSTANDING, SavedOutgoing(b"nonsense", b""))
        assert refused(built((ChunkKind.CHANNEL, self.HEADER), bad)) == Reason.DAMAGED

    def test_record_with_something_behind_it(self) -> None:
        record = RECORDS[ChunkKind.CHANNEL][1].build(self.HEADER) + b"\0"
        assert refused(build_chunk(1, record, save_id=1, index=0, flags=1)) == Reason.DAMAGED


class TestSaveDuringARestore:
    def test_is_refused_with_the_progress_of_the_restore(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        assert saver.restore_from_buffer(target, CHUNKS[0]) == MORE
        assert saver.save_begin(target) == NtStatus.STATUS_INVALID_DEVICE_STATE
        refusal = saver.refusal(target)
        assert refusal is not None and refusal.detail == "its restore is incomplete"


class TestWhatTheChannelSays:
    def test_no_is_a_refusal_that_changes_nothing(self) -> None:
        target = new_process(SOURCE)
        target.veto = "GPADL 0xe1e10 has 8 pages, the bus knows 16"
        saver = ChannelSaver()
        target.saver = saver
        before = target.everything()
        assert saver.restore_from_buffer(target, CHUNKS[0]) == MORE
        assert saver.restore_from_buffer(target, b"".join(CHUNKS[1:])) == BAD
        assert target.everything() == before
        refusal = saver.refusal(target)
        assert refusal is not None and "16" in refusal.detail and refusal.reason == Reason.NOT_ACCEPTED
        target.veto = None
        assert saver.restore_from_buffer(target, b"".join(CHUNKS[1:])) == OK

    def test_failing_in_spite_of_its_word_makes_it_unusable(self, saver: ChannelSaver) -> None:
        target = new_process(SOURCE)
        target.apply_fails = RuntimeError("a bug")
        assert restore(saver, target, [WHOLE]) == [NtStatus.STATUS_UNSUCCESSFUL]
        assert saver.start(target) == BAD_STATE
        assert saver.disable(target) == OK
