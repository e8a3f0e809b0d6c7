"""A whole machine's state: saving, reading, restoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.saving import (
    ChannelSaver,
    ChannelState,
    NtStatus,
    Reason,
    Restore,
    SavePacketResult,
    StateRefused,
    read_machine,
    refusal_stream,
    save_machine,
)
from vmbus.saving.chunks import encode
from vmbus.wire.chunk import ChunkKind, build_chunk
from vmbus.wire.saved import (
    SavedChannelRecords,
    SavedDevice,
    SavedEnd,
    SavedMachine,
    SavedRefusal,
    SavedSection,
)

from tests.unit.saving.model_channel import (
    OK,
    OVERFLOW,
    TOO_SMALL,
    ModelChannel,
    busy_channel,
    chunks,
    identity,
    new_process,
    request,
    split,
)

HYPERVISOR = SavedSection("hypervisor", 3, b"MSRs and message pages")
BUS = SavedSection("bus", 1, b"contact, offers, GPADLs")


class Target:
    """The bus section or the hypervisor section of a new process."""

    def __init__(self, says: str | None = None) -> None:
        self.says = says
        self.applied: list[SavedSection] = []
        self.seen: list[ChannelState] = []

    def check_restore(self, section: SavedSection, channels: Sequence[ChannelState]) -> str | None:
        self.seen = list(channels)
        return self.says

    def apply_restore(self, section: SavedSection) -> None:
        self.applied.append(section)


def fixed_saver() -> ChannelSaver:
    numbers = count(1)
    return ChannelSaver(save_ids=lambda: next(numbers))


def machine() -> list[ModelChannel]:
    idle = ModelChannel(identity(2))
    idle.start()
    idle.guest_opens()
    idle.pause()
    return [busy_channel(), idle, ModelChannel(identity(3))]


def new_machine(source: list[ModelChannel], saver: ChannelSaver) -> list[ModelChannel]:
    channels = [new_process(channel) for channel in source]
    for channel in channels:
        channel.saver = saver
    return channels


def saved(source: list[ModelChannel], buffer_size: int = 1 << 16) -> bytes:
    return save_machine(
        fixed_saver(), source, hypervisor=HYPERVISOR, bus=BUS, buffer_size=buffer_size, save_id=5
    ).data


def refused(data: bytes) -> StateRefused:
    with pytest.raises(StateRefused) as caught:
        read_machine(data)
    assert not caught.value.changed
    return caught.value


def stream(*parts: tuple[ChunkKind, object], end: SavedEnd | None = None) -> bytes:
    """Return a machine's state with ``parts`` between MACHINE and END."""
    data = b""
    for index, (kind, record) in enumerate([(ChunkKind.MACHINE, SavedMachine("test")), *parts]):
        data += encode(kind, record, save_id=1, index=index, last=False)
    end = end or SavedEnd(len(parts) + 1, len(data))
    return data + encode(ChunkKind.END, end, save_id=1, index=len(parts) + 1, last=True)


class TestSaving:
    def test_everything_comes_back_in_a_new_process(self) -> None:
        source, saver = machine(), ChannelSaver()
        state = read_machine(saved(source))
        channels, hypervisor, bus = new_machine(source, saver), Target(), Target()
        Restore(saver, channels, hypervisor, bus).apply(state)
        assert [each.view() for each in channels] == [each.view() for each in source]
        assert (hypervisor.applied, bus.applied) == ([HYPERVISOR], [BUS])
        assert [each.channel.identity for each in bus.seen] == [identity(1), identity(2), identity(3)]

    @pytest.mark.parametrize("buffer_size", [0, 1, 7, 100, 157, 158, 400, 1 << 20])
    def test_any_buffer_size_restores_the_same(self, buffer_size: int) -> None:
        source, saver = machine(), ChannelSaver()
        channels = new_machine(source, saver)
        Restore(saver, channels, Target(), Target()).apply(read_machine(saved(source, buffer_size)))
        assert [each.view() for each in channels] == [each.view() for each in source]

    def test_statistics_tell_chunks_bytes_and_statuses(self) -> None:
        source = [busy_channel()]
        facts = save_machine(ChannelSaver(), source, buffer_size=160).channels[0]
        expected = chunks(busy_channel())
        assert facts.identity == identity(1)
        assert (facts.chunks, facts.size) == (len(expected), sum(map(len, expected)))
        assert facts.statuses[0] == OVERFLOW
        assert TOO_SMALL in facts.statuses
        assert facts.statuses[-1] == OK

    def test_idle_channel_is_small(self) -> None:
        idle = machine()[1]
        empty = len(save_machine(ChannelSaver(), []).data)
        assert len(save_machine(ChannelSaver(), [idle]).data) - empty < 512

    def test_thousand_requests_with_pages_fit(self) -> None:
        channel = ModelChannel()
        channel.start()
        channel.guest_opens()
        for number in range(1000):
            first = number * 999 % 262_144
            channel.guest_sends(request(number, b"c" * 64, tuple(range(first, first + 128))))
        channel.pause()
        assert len(save_machine(ChannelSaver(), [channel]).data) < 200_000

    def test_too_large_a_state_is_refused_with_its_size_and_the_source_continues(self) -> None:
        source = machine()
        before = [each.everything() for each in source]
        size = len(saved(source))
        for each in source:
            each.view_taken = False
        with pytest.raises(StateRefused, match=f"{size} bytes") as caught:
            save_machine(fixed_saver(), source, hypervisor=HYPERVISOR, bus=BUS, limit=size - 1)
        assert caught.value.reason == Reason.TOO_LARGE
        assert [each.everything() for each in source] == before
        assert len(save_machine(fixed_saver(), source, hypervisor=HYPERVISOR, bus=BUS, limit=size).data)

    def test_limit_is_one_mebibyte_by_default(self) -> None:
        channel = ModelChannel()
        channel.device.state = bytes(1 << 20)
        with pytest.raises(StateRefused) as caught:
            save_machine(ChannelSaver(), [channel])
        assert caught.value.reason == Reason.TOO_LARGE

    def test_channels_keep_their_view_until_they_are_started(self) -> None:
        source, saver = machine(), ChannelSaver()
        save_machine(saver, source)
        assert all(each.view_taken for each in source)
        for each in source:
            assert saver.start(each) == OK
        assert not any(each.view_taken for each in source)

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_one_channel_that_cannot_be_saved_leaves_all_as_they_were(self, failing: int) -> None:
        source, saver = machine(), ChannelSaver()
        source[failing].device.refuses_save = True
        before = [each.everything() for each in source]
        with pytest.raises(StateRefused, match=str(source[failing].identity)) as caught:
            save_machine(saver, source)
        assert caught.value.reason == Reason.DEVICE_FAILED
        assert [each.everything() for each in source] == before
        source[failing].device.refuses_save = False
        save_machine(saver, source)

    @pytest.mark.parametrize("status", [TOO_SMALL, OVERFLOW, NtStatus.STATUS_INSUFFICIENT_RESOURCES])
    def test_failing_packet_callback_does_not_loop(self, status: NtStatus) -> None:
        source = [ModelChannel(identity(3)), busy_channel()]
        source[1].device.save_script = [SavePacketResult(status, 0)]
        before = [each.everything() for each in source]
        with pytest.raises(StateRefused) as caught:
            save_machine(ChannelSaver(), source)
        assert (caught.value.reason, caught.value.status) == (Reason.DEVICE_FAILED, status)
        assert [each.everything() for each in source] == before

    def test_active_channel_is_refused(self) -> None:
        source, saver = machine(), ChannelSaver()
        source[1].start()
        with pytest.raises(StateRefused) as caught:
            save_machine(saver, source)
        assert caught.value.reason == Reason.WRONG_STATE

    def test_save_that_another_has_begun_is_not_ended(self) -> None:
        source, saver = machine(), ChannelSaver()
        saver.save_begin(source[2])
        with pytest.raises(StateRefused):
            save_machine(saver, source)
        assert saver.save_continue(source[2], bytearray(4096), 4096).status == OK


class TestRefusal:
    def test_reaches_the_target_with_its_reason(self) -> None:
        why = StateRefused(Reason.TOO_LARGE, "2000000 bytes of state, at most 1048576 can be carried")
        error = refused(refusal_stream(why))
        assert error.reason == Reason.REFUSED_AT_SOURCE
        assert "too-large: 2000000 bytes" in error.detail

    def test_reason_of_a_later_release_is_passed_on(self) -> None:
        data = stream((ChunkKind.REFUSAL, SavedRefusal("new-reason", "in the future")))
        assert "new-reason: in the future" in refused(data).detail


class TestReading:
    def test_every_damaged_byte_is_refused(self) -> None:
        data = saved([busy_channel()])
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 0x40
            refused(bytes(damaged))

    def test_every_truncation_is_refused(self) -> None:
        data = saved([busy_channel()])
        for length in range(len(data)):
            refused(data[:length])

    def test_trailing_bytes_are_refused(self) -> None:
        data = saved(machine())
        assert refused(data + b"\0").reason == Reason.TRAILING_BYTES
        assert refused(data + data).reason == Reason.TRAILING_BYTES

    def test_reordered_and_removed_chunks_are_refused(self) -> None:
        parts = split(saved(machine()))
        assert refused(b"".join([parts[0], parts[2], parts[1], *parts[3:]])).reason == Reason.OUT_OF_ORDER
        for index in range(len(parts)):
            refused(b"".join(parts[:index] + parts[index + 1 :]))

    def test_mixture_of_two_states_is_refused(self) -> None:
        one = split(save_machine(ChannelSaver(), machine(), save_id=1).data)
        two = split(save_machine(ChannelSaver(), machine(), save_id=2).data)
        assert refused(b"".join([*one[:2], *two[2:]])).reason == Reason.FOREIGN_SAVE

    @settings(deadline=None)
    @given(st.binary(max_size=300))
    def test_any_bytes_are_refused(self, data: bytes) -> None:
        refused(data)

    def test_channel_chunks_alone_are_no_machine(self) -> None:
        assert refused(b"".join(chunks(busy_channel()))).reason == Reason.INCONSISTENT

    def test_parts_out_of_place_are_refused(self) -> None:
        records = SavedChannelRecords(identity(3), tuple(chunks(ModelChannel(identity(3)))))
        channel = (ChunkKind.CHANNEL_RECORDS, records)
        bus, hypervisor = (ChunkKind.BUS, BUS), (ChunkKind.HYPERVISOR, HYPERVISOR)
        read_machine(stream(hypervisor, bus, channel))
        for parts in (
            (channel, bus),
            (bus, hypervisor),
            (bus, bus),
            (hypervisor, hypervisor),
            (channel, channel),
            (bus, (ChunkKind.REFUSAL, SavedRefusal("a", "b"))),
            (bus, (ChunkKind.DEVICE, SavedDevice(b"x"))),
            (bus, (ChunkKind.MACHINE, SavedMachine("again"))),
        ):
            assert refused(stream(*parts)).reason == Reason.INCONSISTENT

    def test_end_that_counts_something_else_is_refused(self) -> None:
        for end in (SavedEnd(3, 100), SavedEnd(1, 0)):
            assert refused(stream((ChunkKind.BUS, BUS), end=end)).reason == Reason.INCONSISTENT

    def test_channel_under_another_name_is_refused(self) -> None:
        records = SavedChannelRecords(identity(4), tuple(chunks(ModelChannel(identity(3)))))
        assert refused(stream((ChunkKind.CHANNEL_RECORDS, records))).reason == Reason.FOREIGN_CHANNEL

    def test_channel_without_its_last_chunk_is_refused(self) -> None:
        records = SavedChannelRecords(identity(1), tuple(chunks(busy_channel())[:-1]))
        error = refused(stream((ChunkKind.CHANNEL_RECORDS, records)))
        assert error.reason == Reason.TRUNCATED
        assert str(identity(1)) in error.detail

    def test_unknown_part_that_may_be_skipped_is_skipped(self) -> None:
        first, second, _ = split(stream((ChunkKind.BUS, BUS)))
        extra = build_chunk(0x142, b"of a later release", save_id=1, index=2, flags=2, version=4)
        size = len(first + second + extra)
        end = encode(ChunkKind.END, SavedEnd(3, size), save_id=1, index=3, last=True)
        assert read_machine(first + second + extra + end).bus == BUS

    def test_newer_part_is_refused(self) -> None:
        first, *_ = split(stream())
        newer = build_chunk(ChunkKind.BUS, b"", save_id=1, index=1, version=2)
        assert refused(first + newer).reason == Reason.TOO_NEW


class TestRestoring:
    def refused(self, restore: Restore, data: bytes, reason: Reason) -> StateRefused:
        before = [each.everything() for each in restore.channels if isinstance(each, ModelChannel)]
        with pytest.raises(StateRefused) as caught:
            restore.apply(read_machine(data))
        assert caught.value.reason == reason
        assert not caught.value.changed
        assert [each.everything() for each in restore.channels if isinstance(each, ModelChannel)] == before
        return caught.value

    def test_device_that_is_not_there_is_refused_before_anything_changes(self) -> None:
        source, saver = machine(), ChannelSaver()
        channels, hypervisor, bus = new_machine(source, saver)[:2], Target(), Target()
        error = self.refused(Restore(saver, channels, hypervisor, bus), saved(source), Reason.NOT_THERE)
        assert str(identity(3)) in error.detail
        assert hypervisor.applied == bus.applied == []

    # Row 50, for this library.
    def test_channel_that_was_added_since_is_left_as_it_is(self) -> None:
        source, saver = machine(), ChannelSaver()
        added = ModelChannel(identity(77))
        before = added.everything()
        Restore(saver, [*new_machine(source, saver), added], Target(), Target()).apply(
            read_machine(saved(source))
        )
        assert added.everything() == before
        assert saver.start(added) == OK

    # Row 52, for this library: the section's own message about version and features is passed on.
    @pytest.mark.parametrize("says", ["version 6.0 is more than 5.3", "feature flags 0x40 are not supported"])
    @pytest.mark.parametrize("part", ["bus", "hypervisor"])
    def test_section_that_is_not_accepted_refuses_all(self, says: str, part: str) -> None:
        source, saver = machine(), ChannelSaver()
        targets = {"bus": Target(), "hypervisor": Target()} | {part: Target(says)}
        restore = Restore(saver, new_machine(source, saver), targets["hypervisor"], targets["bus"])
        assert says in self.refused(restore, saved(source), Reason.NOT_ACCEPTED).detail
        assert targets["bus"].applied == targets["hypervisor"].applied == []

    def test_section_without_a_part_is_refused(self) -> None:
        source, saver = machine(), ChannelSaver()
        self.refused(Restore(saver, new_machine(source, saver), Target()), saved(source), Reason.NOT_THERE)

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_channel_that_is_not_accepted_leaves_all_unchanged(self, failing: int) -> None:
        source, saver = machine(), ChannelSaver()
        channels = new_machine(source, saver)
        channels[failing].veto = "no such disk"
        restore = Restore(saver, channels, Target(), Target())
        error = self.refused(restore, saved(source), Reason.NOT_ACCEPTED)
        assert "no such disk" in error.detail and str(channels[failing].identity) in error.detail
        channels[failing].veto = None
        restore.apply(read_machine(saved(source)))

    def test_channel_that_is_active_or_half_restored_is_refused(self) -> None:
        source, saver = machine(), ChannelSaver()
        channels = new_machine(source, saver)
        channels[2].start()
        data = saved(source)
        self.refused(Restore(saver, channels, Target(), Target()), data, Reason.WRONG_STATE)
        channels[2].pause()
        saver.restore_from_buffer(channels[0], chunks(source[0])[0])
        self.refused(Restore(saver, channels, Target(), Target()), data, Reason.WRONG_STATE)

    def test_callback_that_fails_is_reported_as_a_change(self) -> None:
        source, saver = machine(), ChannelSaver()
        channels = new_machine(source, saver)
        channels[0].device.restore_script = [NtStatus.STATUS_INSUFFICIENT_RESOURCES]
        with pytest.raises(StateRefused) as caught:
            Restore(saver, channels, Target(), Target()).apply(read_machine(saved(source)))
        assert caught.value.changed
        assert caught.value.reason == Reason.DEVICE_FAILED

    # Row 46, for this library.
    def test_machine_without_a_connection(self) -> None:
        source, saver = [ModelChannel(identity(1)), ModelChannel(identity(2))], ChannelSaver()
        channels = new_machine(source, saver)
        data = save_machine(ChannelSaver(), source).data
        Restore(saver, channels).apply(read_machine(data))
        assert not any(each.open for each in channels)

    def test_restored_state_is_saved_again_for_a_third_process(self) -> None:
        source, saver = machine(), fixed_saver()
        data = saved(source)
        for _ in range(2):
            source, saver = new_machine(source, fixed_saver()), fixed_saver()
            for each in source:
                each.saver = saver
            Restore(saver, source, Target(), Target()).apply(read_machine(data))
            again = save_machine(saver, source, hypervisor=HYPERVISOR, bus=BUS, save_id=5).data
            assert read_machine(again) == replace(read_machine(data), writer=read_machine(again).writer)
            data = again


def test_a_reason_that_is_no_unicode_or_too_long_still_refuses() -> None:
    """It may name a file of any bytes. Without a refusal, a stream has nothing that tells the target to fail."""
    error = refused(
        refusal_stream(StateRefused(Reason.NOT_ACCEPTED, "cannot write /a\udcff/b" + "x" * (2 << 20)))
    )
    assert error.reason is Reason.REFUSED_AT_SOURCE
    assert error.detail.startswith("not-accepted: cannot write /a\\udcff/bxx")
    assert len(error.detail) < 5000
