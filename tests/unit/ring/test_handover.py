"""The rings of a channel between Python and a thread of compiled code: who has them when, and what is not lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.handover import MAX_KEPT
from vmbus.ports import FastLink, GivenChannel, RecalledChannel, SignalTarget
from vmbus.testing.fakes import FakePages
from vmbus.testing.loopback import COMPLETION, FakeChannel, LoopbackGuest, guest_packet
from vmbus.wire.packet import Packet

from tests.unit.ring.recorder import Recorder, ids, ignore, numbered

NOTHING = RecalledChannel(0, 0, False, 0, 0, 0, 0, 0, 0, 0)


class Thread:
    """Compiled code that only has rings: what it would report is set by the test."""

    def __init__(self, io: ChannelIo) -> None:
        self.io = io
        self.log: list[str] = []
        self.given: GivenChannel | None = None
        self.left = False
        self.done = 0
        """Packets that it says it took."""
        self.looks: list[Callable[[], None]] = []
        """What the next looks pass on, one each."""
        self.outstanding = 0
        self.keeps = False
        """Whether it keeps what a successor needs."""
        self.gives = 0

    @property
    def link(self) -> FastLink | None:
        return FastLink(1, 0, 0, self.gives, self.given is not None, ()) if self.keeps else None

    def recorded(self) -> None:
        self.log.append("recorded")

    def give(self, channel: GivenChannel) -> bool:
        assert self.given is None
        self.given = channel
        self.gives += 1
        self.log.append("give")
        return True

    def recall(self) -> RecalledChannel:
        assert self.given is not None
        given, self.given = self.given, None
        self.log.append("recall")
        left, self.left = self.left, False
        return replace(
            NOTHING,
            read_index=given.incoming.index,
            write_index=given.outgoing.index,
            was_left=left,
            packets_in=self.done,
        )

    def look(self) -> None:
        if self.looks:
            self.looks.pop(0)()

    def leave(self) -> None:
        """The next packet is one for Python."""
        self.left = True
        self.io.fast_left(self)

    def answer(self, number: int) -> Callable[[], None]:
        packet = guest_packet(kind=COMPLETION, transaction_id=number)
        return lambda: self.io.fast_answered(self, packet)

    def close(self) -> None:
        assert self.given is None
        self.log.append("close")


class Fast(Recorder):
    """A device whose channels have such compiled code."""

    threads: dict[ChannelIo, Thread]
    ready = True

    def opened(self, io: ChannelIo) -> None:
        super().opened(io)
        self.threads = {io: Thread(io)}
        io.fast = self.threads[io]

    def fast_ready(self, io: ChannelIo) -> bool:
        return self.ready


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Fast:
    monkeypatch.setattr(FakeChannel, "signal_target", lambda self: SignalTarget(0, 4096, 1, 0x40))
    monkeypatch.setattr(FakePages, "address_u32", lambda self, offset: 1 + offset)
    return Fast()


def test_an_idle_channel_is_given_and_one_packet_is_taken_for_each_that_is_left(device: Fast) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        assert thread.log == ["give"]
        thread.done = 5
        guest.writer.write(*numbered(3))
        thread.leave()
        guest.run()
        assert ids(device.packets) == [0]
        assert thread.log == ["give", "recall", "give"]
        assert thread.given is not None
        assert thread.given.incoming.index == 32
        guest.io.complete(0)
        guest.run()  # a turn that is no reason to take packets
        assert ids(guest.receive()) == [0]
        assert ids(device.packets) == [0]
        assert thread.log == ["give", "recall", "give", "recall", "give"]
        assert guest.io.counters.packets_in == 1 + 2 * 5


def test_nothing_is_written_while_the_thread_has_the_rings(device: Fast) -> None:
    device.react = ignore
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        guest.writer.write(*numbered(1))
        thread.leave()
        guest.run()
        guest.io.complete(0)
        guest.io.flush()
        assert guest.receive() == []
        guest.run()
        assert ids(guest.receive()) == [0]


@pytest.mark.parametrize("looks", [1, 2])
def test_an_answer_that_comes_while_the_channel_is_given_is_sent(device: Fast, looks: int) -> None:
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        guest.writer.write(*numbered(1))
        thread.looks = [lambda: None] * (looks - 1) + [thread.answer(77)]
        thread.leave()
        guest.run()
        assert 77 in ids(guest.receive())
        assert thread.given is not None


def test_a_pause_recalls_and_keeps_the_answers_that_the_guest_has_not_got(device: Fast) -> None:
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        guest.io.pause()
        assert thread.given is None
        thread.answer(5)()
        guest.run()
        assert guest.receive() == []
        assert len(guest.io.save().output) == 1
        guest.io.resume()
        guest.run()
        assert ids(guest.receive()) == [5]
        assert thread.given is not None


def test_a_close_recalls_and_writes_nothing(device: Fast) -> None:
    guest = LoopbackGuest(device)
    guest.open()
    thread = device.threads[guest.io]
    thread.looks = [thread.answer(5)]
    before = bytes(guest.memory.ram)
    guest.io.closed(guest.channel)
    assert thread.log == ["give", "recall", "close"]
    assert bytes(guest.memory.ram) == before
    assert guest.io.counters.dropped == 1


def test_a_channel_that_fails_is_recalled(device: Fast) -> None:
    with LoopbackGuest(device) as guest:
        guest.io.fail("a-reason")
        assert device.threads[guest.io].given is None


def test_another_target_of_interrupts_recalls_and_gives_again(device: Fast) -> None:
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        guest.io.retargeted(guest.channel, 1)
        assert thread.given is None
        guest.run()
        assert thread.given is not None


def test_a_device_that_is_not_ready_keeps_its_channel(device: Fast) -> None:
    device.ready = False
    with LoopbackGuest(device) as guest:
        guest.put(*numbered(3))
        assert ids(device.packets) == [0, 1, 2]
        assert device.threads[guest.io].log == []


def test_a_channel_that_is_always_left_is_given_less_and_less(device: Fast) -> None:
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        for number in range(4 * MAX_KEPT):
            guest.writer.write(guest_packet(transaction_id=number))
            if thread.given is not None:
                thread.leave()
                guest.run()
            else:
                guest.doorbell()
            guest.receive()
        assert len(device.packets) == 4 * MAX_KEPT
        assert thread.log.count("give") < 15


def test_a_packet_that_is_returned_while_the_ring_is_left_is_answered(device: Fast) -> None:
    def react(io: ChannelIo, packet: Packet) -> None:
        io.answer(packet)

    device.react = react
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        packet = guest_packet(transaction_id=9, completion_requested=True)
        guest.io.fast_returned(thread, packet)
        guest.run()
        assert ids(guest.receive()) == [9]
        assert thread.given is not None


# --- with a journal ---


@pytest.fixture
def recorded(device: Fast) -> Iterator[tuple[LoopbackGuest, Thread]]:
    """A guest whose channel is recorded in the log of the thread, which has the rings."""
    with LoopbackGuest(device) as guest:
        thread = device.threads[guest.io]
        thread.keeps = True
        guest.io._record_change = lambda io: thread.log.append("record")
        guest.io.recall()
        guest.run()
        assert thread.given is not None
        thread.log.clear()
        yield guest, thread


def test_a_channel_that_was_recalled_for_nothing_is_recorded_before_it_is_given(
    recorded: tuple[LoopbackGuest, Thread],
) -> None:
    guest, thread = recorded
    guest.io.recall()
    guest.run()
    assert thread.log == ["recall", "record", "recorded", "give"]


def test_it_is_recorded_once_where_something_was_done(recorded: tuple[LoopbackGuest, Thread]) -> None:
    guest, thread = recorded
    guest.writer.write(*numbered(1))
    thread.leave()
    guest.run()
    assert thread.log == ["recall", "record", "recorded", "give"]


def test_answers_are_the_threads_until_they_are_recorded(recorded: tuple[LoopbackGuest, Thread]) -> None:
    guest, thread = recorded
    thread.looks = [thread.answer(5)]
    guest.io.recall()
    assert thread.log == ["recall"]
    guest.run()
    assert thread.log == ["recall", "record", "recorded", "give"]
    assert ids(guest.receive()) == [5]


@pytest.mark.parametrize("end", [lambda io: io.fail("a-reason"), lambda io: (io.pause(), io.detach())])
def test_what_is_dropped_with_the_channel_is_recorded(
    recorded: tuple[LoopbackGuest, Thread], end: Callable[[ChannelIo], object]
) -> None:
    guest, thread = recorded
    thread.looks = [thread.answer(5)]
    end(guest.io)
    assert thread.log[:3] == ["recall", "record", "recorded"]
