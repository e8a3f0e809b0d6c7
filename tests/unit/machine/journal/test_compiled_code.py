"""What compiled code has left beside a journal, and a channel that the journal has: merged, or refused as a whole."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
from pathlib import Path

import pytest
from vmbus.bus.io.state import RingPositions
from vmbus.machine.engine.layout import MAGIC, MAX_CHANNELS, MAX_SLOTS, VERSION, Mirror
from vmbus.machine.engine.mirror import SlotState
from vmbus.machine.journal.areas import MIRROR_AREA, areas
from vmbus.machine.journal.recovery import RecoveredGuest, recover
from vmbus.machine.journal.store import Journal
from vmbus.machine.journal.values import CHANNEL_VALUE, ChannelValue, Link, identity_of, is_channel
from vmbus.saving.state import OutgoingPacket
from vmbus.testing.loopback import COMPLETION, guest_packet
from vmbus.wire.packet import COMPLETION_REQUESTED, PacketType
from vmbus.wire.saved import SavedCompletion

from tests.unit.machine.journal.test_found import Recorded
from tests.unit.machine.test_host_state import host

LINK = Link(5, 2, 1, 1, 1, ())
"""Of a channel that compiled code has."""


class Left:
    """A memory with the journal of a host, and a mirror with one request that is taken and one that is done."""

    def __init__(self, values: dict[bytes, bytes]) -> None:
        self.memory = mmap.mmap(-1, 4 * MIRROR_AREA)
        store, beside = areas(self.memory)
        assert beside is not None
        self.mirror = Mirror.from_buffer(beside)
        header, record = self.mirror.header, self.mirror.channel[LINK.channel]
        header.magic, header.version, header.epoch = MAGIC, VERSION, LINK.epoch
        header.channels, header.slots = MAX_CHANNELS, MAX_SLOTS
        record.opening, record.gives = LINK.opening, LINK.gives
        record.taken, record.answered = 2 << 32 | 80, 0 << 32 | 160
        self.slot(0, SlotState.TAKEN, 2, packet=guest_packet(b"again", transaction_id=22, flags=1))
        self.slot(1, SlotState.DONE, 1, answer=guest_packet(b"answer", kind=COMPLETION, transaction_id=21))
        self.journal = Journal.create(store)
        self.key = next(filter(is_channel, values))
        self.value = CHANNEL_VALUE.parse(values[self.key])
        self.journal.commit({**values})
        self.say(LINK)

    def slot(self, at: int, state: int, number: int, *, packet: bytes = b"", answer: bytes = b"") -> None:
        slot = self.mirror.slot[at]
        slot.channel, slot.opening, slot.taken_number, slot.done_number = (
            LINK.channel,
            LINK.opening,
            number,
            number,
        )
        slot.size, slot.answer_size = len(packet), len(answer)
        ctypes.memmove(slot.packet, packet, len(packet))
        ctypes.memmove(slot.answer, answer, len(answer))
        slot.state = state

    def say(self, *links: Link, is_open: int = 1) -> None:
        """Have the journal say this of the channel."""
        value: ChannelValue = dataclasses.replace(self.value, is_open=is_open, read=8, write=16, links=links)
        self.journal.commit({self.key: CHANNEL_VALUE.build(value)})

    def found(self) -> tuple[RecoveredGuest, RingPositions]:
        guest = recover(self.memory)
        [positions] = guest.positions.values()
        return guest, positions


@pytest.fixture
async def left(recorded: Recorded) -> Left:
    return Left(dict(recorded[1].values))


def queue_of(guest: RecoveredGuest) -> list[tuple[int, bytes]]:
    [channel] = guest.state.channels
    found: list[tuple[int, bytes]] = []
    for each in channel.state.queue:
        assert isinstance(each, SavedCompletion | OutgoingPacket)
        assert isinstance(each, SavedCompletion)
        found.append((each.transaction_id, each.payload))
    return found


async def test_a_channel_of_compiled_code_goes_on_where_that_was(left: Left) -> None:
    guest, positions = left.found()
    assert positions == RingPositions(80, 160)
    assert queue_of(guest) == [(21, b"answer\0\0")]
    [[again]] = guest.again.values()
    assert (again.kind, again.transaction_id, again.payload) == (PacketType.IN_BAND, 22, b"again\0\0\0")
    assert again.flags & COMPLETION_REQUESTED


async def test_one_that_was_python_s_goes_on_where_the_journal_was(left: Left) -> None:
    left.mirror.slot[1].state = SlotState.FREE
    left.say(dataclasses.replace(LINK, given=0))
    guest, positions = left.found()
    assert positions == RingPositions(8, 16)
    assert [packet.transaction_id for packets in guest.again.values() for packet in packets] == [22]
    left.say(dataclasses.replace(LINK, given=0, adopted=(2,)))
    assert list(left.found()[0].again.values()) == [()]


async def test_without_compiled_code_the_mirror_is_nobody_s(left: Left) -> None:
    left.say()
    guest, positions = left.found()
    assert (positions, queue_of(guest), list(guest.again.values())) == (RingPositions(8, 16), [], [()])


PACKETS = {
    "no packet": bytes(16),
    "a part of one": guest_packet(b"1" * 16, flags=1)[:24],
    "a completion": guest_packet(kind=COMPLETION, flags=1),
    "one that wants no answer": guest_packet(b"1"),
}


def assert_lost(left: Left) -> None:
    """The channel is, and nothing else of the guest."""
    guest = recover(left.memory)
    assert (guest.state.channels, dict(guest.positions), dict(guest.again)) == ((), {}, {})
    [reason] = guest.lost.values()
    assert reason


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)
async def test_what_compiled_code_does_not_take_costs_its_channel(left: Left, packet: bytes) -> None:
    left.slot(0, SlotState.TAKEN, 2, packet=packet)
    assert_lost(left)


@pytest.mark.parametrize("answer", [bytes(24), guest_packet(b"in band")], ids=["no packet", "no completion"])
async def test_what_is_no_answer_costs_its_channel(left: Left, answer: bytes) -> None:
    left.slot(1, SlotState.DONE, 1, answer=answer)
    assert_lost(left)


async def test_a_mirror_of_another_engine_costs_the_channel(left: Left) -> None:
    left.mirror.header.epoch += 1
    assert_lost(left)


async def test_a_journal_without_a_mirror_that_it_names_loses_the_channel(recorded: Recorded) -> None:
    memory, journal, _ = recorded
    key = next(filter(is_channel, journal.values))
    value = CHANNEL_VALUE.parse(journal.values[key])
    journal.commit({key: CHANNEL_VALUE.build(dataclasses.replace(value, is_open=1, links=(LINK,)))})
    assert "there is none" in recover(memory).lost[identity_of(key)]


async def test_a_device_without_compiled_code_loses_its_packets_and_channel(
    left: Left, tmp_path: Path
) -> None:
    guest, _ = left.found()
    (tmp_path / "next").mkdir()
    with host(tmp_path / "next", "echo") as here:
        here.state.restore_recovered(guest.state, guest.positions, guest.again, guest.lost)
        [channel] = here.bus.channels
        assert channel.lost
        [problem] = here.problems.sentences
        assert "no compiled code" in problem


def test_the_parts_of_the_memory_do_not_overlap() -> None:
    memory = bytearray(3 * MIRROR_AREA)
    journal, beside = areas(memoryview(memory))
    assert beside is not None
    assert (len(journal), len(beside)) == (2 * MIRROR_AREA, MIRROR_AREA)
    beside[0] = 7
    assert memory[2 * MIRROR_AREA] == 7
    assert ctypes.sizeof(Mirror) <= MIRROR_AREA
    journal, beside = areas(memoryview(bytearray(2 * MIRROR_AREA - 4096)))
    assert (len(journal), beside) == (2 * MIRROR_AREA - 4096, None)
