"""A real channel end, with rings in memory, saved in one process and restored in another."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace

import pytest
from vmbus.bus.channel.gpadl import Gpadl
from vmbus.bus.channel.opening import OpenRequest
from vmbus.bus.channel.state import ChannelCounters
from vmbus.bus.channel.state import ChannelState as BusState
from vmbus.bus.io.channel_io import ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.io.state import IoState, PacketState
from vmbus.bus.offers import Offer
from vmbus.errors import DeviceError
from vmbus.saving import ChannelSaver, Reason, Restore, StateRefused, read_machine, save_machine
from vmbus.saving.device_channel import BusChannel, DeviceChannel
from vmbus.saving.state import OutgoingPacket
from vmbus.testing.fakes import FakeMemory, FakeTimers
from vmbus.testing.loopback import COMPLETION, FakeChannel, LoopbackGuest, guest_packet
from vmbus.testing.scripted import ScriptedGuest
from vmbus.wire.packet import Packet, TransferRange
from vmbus.wire.saved import ChannelAxes, SavedCompletion, SavedGpadl, SavedPacket, SavedTaken

from tests.unit.saving.model_channel import BAD_STATE, OK, save

INTERFACE, INSTANCE = uuid.UUID(int=0x77), uuid.UUID(int=0x88)


class Keeper(Device):
    """A device that keeps each request until :meth:`finish`, and saves the requests that it keeps."""

    name = "keeper"

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self.resumptions = 0
        self.io: ChannelIo | None = None
        self.broken: Exception | None = None

    def offer(self) -> Offer:
        return Offer(INTERFACE, INSTANCE, name=self.name)

    def opened(self, io: ChannelIo) -> None:
        self.io = io

    def packet(self, io: ChannelIo, packet: Packet) -> None:
        self.kept[packet.transaction_id] = packet.payload

    def completed(self, io: ChannelIo, packet: Packet) -> None:
        self.kept[-packet.transaction_id] = b"completed"

    def finish(self, io: ChannelIo, number: int) -> None:
        io.complete(number, self.kept.pop(number))

    def save(self) -> bytes:
        if self.broken is not None:
            raise self.broken
        return json.dumps({number: kept.hex() for number, kept in self.kept.items()}).encode()

    def restore(self, state: bytes) -> None:
        if self.broken is not None:
            raise self.broken
        self.kept = {int(number): bytes.fromhex(kept) for number, kept in json.loads(state).items()}

    def restored(self, io: ChannelIo) -> None:
        self.io = io
        self.resumptions += 1


class PacketKeeper(Keeper):
    """A :class:`Keeper` that saves its requests one by one, with their channel."""

    sent: dict[int, bytes]

    def save(self) -> bytes:
        return b"{}"

    def save_packets(self, io: ChannelIo) -> list[PacketState]:
        if self.broken is not None:
            raise self.broken
        kept = [PacketState(number, b"state of " + data) for number, data in self.kept.items() if number > 0]
        return [*kept, *(PacketState(each, data, from_guest=False) for each, data in self.sent.items())]

    def restore_packet(self, io: ChannelIo, packet: PacketState) -> None:
        if self.broken is not None:
            raise self.broken
        if packet.from_guest:
            self.kept[packet.transaction_id] = packet.state.removeprefix(b"state of ")
        else:
            self.sent[packet.transaction_id] = packet.state

    def closed(self, io: ChannelIo) -> None:
        self.kept, self.sent = {}, {}


class RestorableChannel(FakeChannel):
    """The bus's channel, equal in both processes."""

    def __init__(self, offer: Offer, like: FakeChannel) -> None:
        super().__init__(offer, like.incoming, like.outgoing)
        self.state = BusState.OPEN
        self.request: OpenRequest | None = OpenRequest(1, 0xE1E10, 0, 4)
        self.counters = ChannelCounters()
        self.lost = False
        self.paused = False
        self.connection_id = 0x2001
        self.is_open = True
        self.endpoint: ChannelIo | None = None

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def continue_endpoint(self) -> None:
        assert self.endpoint is not None
        self.endpoint.restored(self)


class Process:
    """A device, its channel's end and a saver, on new or on given guest memory."""

    def __init__(self, memory: FakeMemory | None = None, *, device: Keeper | None = None) -> None:
        self.device = device or Keeper()
        self.timers = FakeTimers()
        self.guest = LoopbackGuest(self.device, memory=memory, timers=self.timers, ring_pages=1)
        self.io = self.guest.io
        self.bus_channel = RestorableChannel(self.device.offer(), self.guest.channel)
        self.bus_channel.gpadls[0xE1E10] = Gpadl(0xE1E10, ())
        self.guest.channel = self.bus_channel
        self.saver = ChannelSaver()
        self.bus_channel.endpoint = self.io
        self.channel = DeviceChannel(self.saver, self.bus_channel, self.io)

    @property
    def sent(self) -> dict[int, bytes]:
        """What a :class:`PacketKeeper` knows of the packets that it sent."""
        assert isinstance(self.device, PacketKeeper)
        return self.device.sent

    @sent.setter
    def sent(self, sent: dict[int, bytes]) -> None:
        assert isinstance(self.device, PacketKeeper)
        self.device.sent = sent

    def resume(self) -> None:
        """Continue after a restore: first the bus, when guest memory is complete, then the saver."""
        self.io.restored(self.bus_channel)
        assert self.saver.start(self.channel) == OK
        self.guest.run()


@pytest.fixture
def source() -> Process:
    process = Process()
    process.guest.open()
    return process


def moved(source: Process) -> Process:
    """Save, and restore in a new process with a copy of guest memory, without resuming it."""
    source.saver.pause(source.channel)
    data = save_machine(source.saver, [source.channel]).data
    memory = FakeMemory(4 << 20)
    memory.write(0, source.guest.memory.read(0, 4 << 20))
    target = Process(memory)
    target.saver.pause(target.channel)
    Restore(target.saver, [target.channel]).apply(read_machine(data))
    return target


def fill(source: Process) -> None:
    """Send requests that the device keeps, and output until the ring is full."""
    for number in range(1, 4):
        source.guest.send(b"request%d" % number, transaction_id=number, completion_requested=True)
    source.io.send(b"want an answer", transaction_id=100, completion_requested=True)
    for number in range(12):
        source.io.send(bytes([number]) * 400, transaction_id=0)
    source.io.send(b"want one too", transaction_id=101, completion_requested=True)
    source.device.finish(source.io, 2)
    source.io.send(b"frames", transfer_set=5, transfer_ranges=[TransferRange(60, 1500)])
    source.guest.run()
    assert source.io.backlog


class TestMove:
    def test_requests_are_answered_once_and_what_was_sent_arrives_in_order(self, source: Process) -> None:
        fill(source)
        twin = Process()
        twin.guest.open()
        fill(twin)
        target = moved(source)
        target.resume()
        for process in (target, twin):
            for number in (3, 1):
                process.device.finish(process.io, number)
            process.guest.run()
        received: list[tuple[object, ...]] = []
        expected: list[tuple[object, ...]] = []
        for process, into in ((target, received), (twin, expected)):
            while packets := process.guest.receive():
                into += [(p.kind, p.flags, p.transaction_id, p.payload, p.extension) for p in packets]
                process.guest.run()
        assert received == expected
        assert len(received) == 1 + 12 + 1 + 1 + 1 + 2
        assert [number for kind, _, number, _, _ in received if kind == 11] == [2, 3, 1]

    def test_a_guest_that_completes_what_it_has_not_seen_can_be_moved(self) -> None:
        class Talkative(Keeper):
            def packet(self, io: ChannelIo, packet: Packet) -> None:
                for _ in range(12):
                    io.send(bytes(400))
                io.send(b"want an answer", transaction_id=101, completion_requested=True)

        source = Process(device=Talkative())
        source.guest.open()
        source.guest.put(
            guest_packet(b"request"), guest_packet(b"guessed", kind=COMPLETION, transaction_id=101)
        )
        assert source.device.kept[-101] == b"completed"
        assert source.io.backlog
        target = moved(source)
        target.resume()
        assert target.io.backlog

    def test_completions_of_the_guest_are_awaited_in_the_new_process(self, source: Process) -> None:
        source.io.send(b"want an answer", transaction_id=100, completion_requested=True)
        source.guest.run()
        target = moved(source)
        target.resume()
        target.guest.send(kind=11, transaction_id=100)
        assert target.device.kept == {-100: b"completed"}
        assert target.io.refusals.total == 0

    def test_packet_that_was_in_the_ring_is_taken_in_the_new_process_only(self, source: Process) -> None:
        source.saver.pause(source.channel)
        source.guest.send(b"in ring.", transaction_id=9, completion_requested=True)
        assert source.device.kept == {}
        target = moved(source)
        assert target.device.kept == {}
        target.resume()
        assert target.device.kept == {9: b"in ring."}
        assert source.device.kept == {}

    def test_restore_touches_no_guest_memory_before_it_is_complete(self, source: Process) -> None:
        fill(source)
        target = moved(source)
        target.guest.run()
        assert target.guest.memory.read(0, 4 << 20) == source.guest.memory.read(0, 4 << 20)
        assert target.device.resumptions == 0
        target.resume()
        assert target.device.resumptions == 1

    def test_guest_is_signalled_once_the_channel_runs(self, source: Process) -> None:
        target = moved(source)
        assert target.guest.interrupts == 0
        target.resume()
        assert target.guest.interrupts == 1

    def test_same_state_again_from_the_new_process(self, source: Process) -> None:
        fill(source)
        view = source.channel
        target = moved(source)
        assert target.channel.take_view() == view.take_view()
        target.channel.drop_view()
        target.resume()
        target.saver.pause(target.channel)
        (again,) = read_machine(save_machine(target.saver, [target.channel]).data).channels
        assert again.state == target.channel.take_view()

    def test_channel_continues_after_a_cancelled_migration(self, source: Process) -> None:
        fill(source)
        moved(source)
        assert source.saver.start(source.channel) == OK
        source.guest.run()
        source.device.finish(source.io, 1)
        answers = []
        while packets := source.guest.receive():
            answers += [p.transaction_id for p in packets if p.kind == 11]
            source.guest.run()
        assert answers == [2, 1]

    def test_failed_channel_stays_failed(self, source: Process) -> None:
        source.io.fail("guest-broke-it")
        target = moved(source)
        target.resume()
        assert (target.io.state, target.io.failure) == (IoState.FAILED, "guest-broke-it")
        assert target.device.resumptions == 0

    def test_held_channel_stays_held(self, source: Process) -> None:
        source.io.pause_input()
        source.guest.send(b"waits...", transaction_id=1, completion_requested=True)
        target = moved(source)
        target.resume()
        assert target.device.kept == {}
        target.io.resume_input()
        target.guest.run()
        assert target.device.kept == {1: b"waits..."}


class TestView:
    def test_queue_keeps_packets_and_completions_in_one_order(self, source: Process) -> None:
        source.saver.pause(source.channel)
        source.io.send(b"first", transaction_id=1, completion_requested=True)
        fill_one(source)
        state = source.channel.take_view()
        kinds = [type(each) for each in state.queue]
        assert kinds == [OutgoingPacket, SavedCompletion, OutgoingPacket]
        assert state.outstanding == ()

    def test_repeated_transaction_ids_are_counted(self, source: Process) -> None:
        for _ in range(3):
            source.guest.send(b"same id.", transaction_id=7, completion_requested=True)
        source.io.send(b"a", transaction_id=0, completion_requested=True)
        source.io.send(b"b", transaction_id=0, completion_requested=True)
        source.guest.run()
        target = moved(source)
        state = target.channel.take_view()
        assert [packet.transaction_id for packet in state.taken_packets()] == [7, 7, 7]
        assert [each.packet.transaction_id for each in state.outstanding] == [0, 0]

    def test_work_that_ends_after_the_view_is_not_in_it(self, source: Process) -> None:
        source.guest.send(b"request1", transaction_id=1, completion_requested=True)
        source.saver.pause(source.channel)
        assert source.saver.save_begin(source.channel) == OK
        before = source.channel.take_view()
        source.device.finish(source.io, 1)
        source.guest.run()
        assert source.channel.take_view() == before
        assert source.guest.receive() == []
        source.saver.save_end(source.channel)
        assert source.channel.take_view() != before


def fill_one(source: Process) -> None:
    source.io._held._owed.add(5)
    source.io.complete(5, b"done")
    source.io.send(b"second")


class TestWhen:
    def test_active_channel_is_not_saved(self, source: Process) -> None:
        assert source.saver.save_begin(source.channel) == BAD_STATE

    def test_open_channel_takes_no_restore(self, source: Process) -> None:
        source.saver.pause(source.channel)
        records = save(source.saver, source.channel)
        source.saver.save_cancel(source.channel)
        assert source.saver.restore_from_buffer(source.channel, records[0]) == BAD_STATE

    def test_close_during_a_save_ends_it(self, source: Process) -> None:
        source.saver.pause(source.channel)
        source.saver.save_begin(source.channel)
        source.guest.close()
        assert source.saver.save_continue(source.channel, bytearray(4096), 4096).status == BAD_STATE
        source.saver.save_end(source.channel)

    def test_restore_can_be_discarded(self, source: Process) -> None:
        fill(source)
        target = moved(source)
        target.saver.disable(target.channel)
        target.bus_channel.is_open = False
        assert target.channel.take_view().queue == ()


class TestRefusals:
    def refused(self, source: Process, target: Process) -> StateRefused:
        source.saver.pause(source.channel)
        data = save_machine(source.saver, [source.channel]).data
        target.saver.pause(target.channel)
        with pytest.raises(StateRefused) as caught:
            Restore(target.saver, [target.channel]).apply(read_machine(data))
        assert target.io.state is IoState.CLOSED
        return caught.value

    def test_device_that_cannot_be_saved(self, source: Process) -> None:
        source.saver.pause(source.channel)
        for error in (DeviceError("a tape is moving"), RuntimeError("a tape is moving")):
            source.device.broken = error
            with pytest.raises(StateRefused, match="a tape is moving"):
                save_machine(source.saver, [source.channel])
        source.device.broken = None
        save_machine(source.saver, [source.channel])

    def test_device_that_refuses_its_state(self, source: Process) -> None:
        target = Process()
        target.device.broken = DeviceError("written by a later release")
        error = self.refused(source, target)
        assert (error.reason, error.changed) == (Reason.DEVICE_FAILED, True)
        assert "later release" in error.detail
        assert target.saver.start(target.channel) == BAD_STATE

    def test_device_that_takes_shorter_packets_now(self, source: Process) -> None:
        target = Process()
        target.device.max_packet = 2048  # type: ignore[misc]
        error = self.refused(source, target)
        assert (error.reason, error.changed) == (Reason.NOT_ACCEPTED, False)

    def test_offer_of_another_kind(self, source: Process) -> None:
        target = Process()
        target.bus_channel.offer = replace(target.bus_channel.offer, mmio_megabytes=8)
        assert self.refused(source, target).reason == Reason.NOT_ACCEPTED

    def test_packets_that_no_host_sends(self, source: Process) -> None:
        fill(source)
        source.saver.pause(source.channel)
        state = source.channel.take_view()
        first = next(each for each in state.queue if isinstance(each, OutgoingPacket))
        target = Process()
        for kind in (7, 9, 11, 99):
            bad = replace(first, packet=replace(first.packet, kind=kind))
            assert target.channel.check_restore(replace(state, queue=(bad,))) is not None
        huge = replace(first, packet=replace(first.packet, payload=bytes(1 << 20)))
        assert target.channel.check_restore(replace(state, queue=(huge,))) is not None
        assert target.channel.check_restore(state) is None


class TestOnARealBus:
    @pytest.fixture
    def guest(self) -> ScriptedGuest:
        guest = ScriptedGuest.on_fakes()
        self.device = Keeper()
        self.device.start(DeviceEnvironment(guest.memory, guest.timers, guest.timers.now))
        self.io = ChannelIo(self.device, guest.timers, poll_window=0.0)
        real = guest.bus.offer(self.device.offer(), self.io)
        self.bus_channel: BusChannel = real
        self.saver = ChannelSaver()
        self.bus_channel.endpoint = self.io
        self.channel = DeviceChannel(self.saver, real, self.io)
        guest.connect()
        return guest

    def test_open_parameters_and_gpadls_are_there_as_a_cross_check(self, guest: ScriptedGuest) -> None:
        relid = self.bus_channel.relid or 0
        gpadl = guest.open_channel(relid, vp=2)
        extra = guest.share(relid, 100)
        self.saver.pause(self.channel)
        header = self.channel.take_view().channel
        assert header.axes == ChannelAxes.ENABLED | ChannelAxes.OPEN | ChannelAxes.PAUSED
        assert (header.relid, header.connection_id) == (relid, 0x2000 | relid)
        assert header.open is not None
        assert (header.open.open_id, header.open.ring_gpadl, header.open.target_vp) == (relid, gpadl, 2)
        assert (header.open.downstream_offset, header.open.user_data) == (4, b"")
        assert header.gpadls == (SavedGpadl(gpadl, 8), SavedGpadl(extra, 100))

    def test_channel_that_is_offered_and_not_open(self, guest: ScriptedGuest) -> None:
        assert self.saver.save_begin(self.channel) == OK
        header = self.channel.take_view().channel
        assert header.axes == ChannelAxes.ENABLED
        assert header.open is None

    def test_idle_channel_is_small(self, guest: ScriptedGuest) -> None:
        guest.open_channel(self.bus_channel.relid or 0)
        self.saver.pause(self.channel)
        empty = len(save_machine(self.saver, []).data)
        assert len(save_machine(self.saver, [self.channel]).data) - empty < 512

    @pytest.mark.parametrize("leaves", ["close", "unload"])
    def test_guest_that_leaves_ends_the_save(self, guest: ScriptedGuest, leaves: str) -> None:
        relid = self.bus_channel.relid or 0
        guest.open_channel(relid)
        self.saver.pause(self.channel)
        assert self.saver.save_begin(self.channel) == OK
        if leaves == "close":
            guest.close(relid)
        else:
            guest.unload()
        assert self.saver.save_continue(self.channel, bytearray(4096), 4096).status == BAD_STATE
        self.saver.save_end(self.channel)
        assert self.saver.start(self.channel) == OK

    def test_closed_channel_is_restored_closed_and_can_be_opened(self, guest: ScriptedGuest) -> None:
        self.saver.pause(self.channel)
        records = save(self.saver, self.channel)
        other = ScriptedGuest.on_fakes()
        device = Keeper()
        device.start(DeviceEnvironment(other.memory, other.timers, other.timers.now))
        io = ChannelIo(device, other.timers, poll_window=0.0)
        saver = ChannelSaver()
        channel = DeviceChannel(saver, other.bus.offer(device.offer(), io), io)
        saver.pause(channel)
        assert [saver.restore_from_buffer(channel, each) for each in records] == [OK]
        assert saver.start(channel) == OK
        other.connect()
        other.open_channel(1)
        assert io.state is IoState.RUNNING


class TestPackets:
    """``Device.save_packets`` and ``restore_packet``: the packet callbacks of the contract, in production."""

    @pytest.fixture
    def source(self) -> Process:
        process = Process(device=PacketKeeper())
        process.guest.open()
        fill(process)
        process.sent = {100: b"sent and not completed", 101: b"waits for room"}
        return process

    def there(self, source: Process) -> tuple[Process, bytes]:
        source.saver.pause(source.channel)
        data = save_machine(source.saver, [source.channel]).data
        memory = FakeMemory(4 << 20)
        memory.write(0, source.guest.memory.read(0, 4 << 20))
        target = Process(memory, device=PacketKeeper())
        target.sent = {}
        target.saver.pause(target.channel)
        return target, data

    def test_each_packet_is_saved_with_its_channel_and_given_back(self, source: Process) -> None:
        target, data = self.there(source)
        state = read_machine(data).channels[0].state
        assert [each.device for each in state.taken if isinstance(each, SavedTaken)] == [
            b"state of request1",
            b"state of request3",
        ]
        sent = [each.device for each in state.outgoing() if each.device]
        assert sent == [b"sent and not completed", b"waits for room"]
        Restore(target.saver, [target.channel]).apply(read_machine(data))
        assert target.device.kept == {1: b"request1", 3: b"request3"}
        assert target.sent == source.sent
        target.resume()
        for number in (3, 1):
            target.device.finish(target.io, number)

    def test_packet_without_state_is_written_as_earlier_releases_read_it(self, source: Process) -> None:
        source.device.kept = {3: b"request3"}
        _, data = self.there(source)
        first, second = read_machine(data).channels[0].state.taken
        assert isinstance(first, SavedPacket)
        assert isinstance(second, SavedTaken)

    def test_same_id_twice_keeps_its_order(self) -> None:
        source = Process(device=PacketKeeper())
        source.guest.open()
        source.sent = {}
        device = source.device
        device.save_packets = lambda io: [PacketState(7, b"first"), PacketState(7, b"second")]  # type: ignore[method-assign]
        for _ in range(3):
            source.guest.send(b"same id.", transaction_id=7, completion_requested=True)
        source.saver.pause(source.channel)
        taken = source.channel.take_view().taken
        states = [each.device if isinstance(each, SavedTaken) else b"" for each in taken]
        assert states == [b"first", b"second", b""]

    @pytest.mark.parametrize("error", [DeviceError("in the middle of something"), ValueError("a bug")])
    def test_device_that_fails_to_save_a_packet_refuses_the_save(
        self, source: Process, error: Exception
    ) -> None:
        source.device.broken = error
        with pytest.raises(StateRefused, match=r"in the middle|a bug") as caught:
            self.there(source)
        assert caught.value.reason is Reason.DEVICE_FAILED

    def test_device_that_refuses_a_packet_is_told_that_the_restore_is_given_up(self, source: Process) -> None:
        target, data = self.there(source)
        target.device.kept, target.device.broken = {99: b"of an earlier packet"}, DeviceError("too new")
        with pytest.raises(StateRefused, match="too new") as caught:
            Restore(target.saver, [target.channel]).apply(read_machine(data))
        assert caught.value.changed
        target.saver.disable(target.channel)
        assert target.device.kept == {}

    def test_device_that_saves_no_packets_refuses_them(self, source: Process) -> None:
        target, data = self.there(source)
        target.device.__class__ = Keeper
        with pytest.raises(StateRefused, match="saves no packets, but the stream has 17 bytes"):
            Restore(target.saver, [target.channel]).apply(read_machine(data))
