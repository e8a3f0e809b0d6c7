"""The protocol of the storage channel: the handshake, sub-channels, hot plugging, resets, closing, saving."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.bus.budget import SAVED_FIRST_BYTES, SAVED_PACKET_BYTES, MemoryBudget
from vmbus.bus.io.held import OUTPUT_ALWAYS
from vmbus.bus.io.state import IoState
from vmbus.devices.registry import Registry
from vmbus.errors import DeviceError, RingError, UsageError
from vmbus.testing.loopback import GPA_DIRECT, IN_BAND, gpa_direct_extension, guest_packet
from vmbus.wire.storvsp import SCSI_INTERFACE
from vmbus_devices.scsi import Scsi
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.faults import FaultPlan, parse_faults
from vmbus_devices.scsi.saved import parse_state

from tests.unit.scsi.scsi_guest import (
    BEGIN,
    CREATE,
    END,
    ENUMERATE,
    EXECUTE,
    INVALID_DEVICE_STATE,
    INVALID_PARAMETER,
    PROPERTIES,
    RESET_ADAPTER,
    RESET_BUS,
    RESET_LUN,
    REVISION_MISMATCH,
    SUCCESS,
    VERSION,
    ScsiGuest,
    controller,
    memory_disk,
)

TEST_UNIT_READY = bytes(6)
MODE_SENSE_6 = bytes((0x1A, 0, 0x08, 0, 192, 0))
MODE_SENSE_10 = struct.pack(">BBBBxxxHB", 0x5A, 0, 0x08, 0, 192, 0)
REPORT_LUNS = struct.pack(">BBBBBBIBB", 0xA0, 0, 0, 0, 0, 0, 4096, 0, 0)


def inquiry(length: int = 36) -> bytes:
    return struct.pack(">BBBHB", 0x12, 0, 0, length, 0)


def slow_disk(**options: Any) -> Disk:
    """A disk whose work goes to threads."""
    disk = memory_disk(**options)
    disk.backend.immediate = False
    return disk


# --- handshake ---


@pytest.mark.conformance(61)
@pytest.mark.parametrize("operation", [EXECUTE, RESET_LUN, RESET_BUS, END, VERSION, PROPERTIES, CREATE, 12])
def test_a_packet_before_begin_is_refused_and_changes_nothing(operation: int) -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        assert guest.status(operation) == INVALID_DEVICE_STATE
        guest.negotiate()


@pytest.mark.conformance(62)
def test_begin_when_ready_is_refused_and_the_channel_stays_ready() -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        guest.negotiate()
        assert guest.status(BEGIN) == INVALID_DEVICE_STATE
        assert guest.command(TEST_UNIT_READY).good


@pytest.mark.conformance(63)
def test_answers_are_as_long_as_requests_and_no_longer_than_64_bytes() -> None:
    with ScsiGuest(controller()) as guest:
        assert guest.status(BEGIN, size=12) == SUCCESS
        for length, expected in ((48, 48), (50, 56), (56, 56), (64, 64), (72, 64)):
            answer = guest.vstor(VERSION, struct.pack("<HH", 0xFFFF, 0), size=length)
            assert answer is not None
            assert len(answer.payload) == expected
            assert struct.unpack_from("<I", answer.payload, 8) == (REVISION_MISMATCH,)


@pytest.mark.parametrize("version", [0x0200, 0x0402, 0x0501, 0x0600, 0x0602])
def test_every_version_from_windows_server_2008_to_10_is_agreed_to(version: int) -> None:
    with ScsiGuest(controller(memory_disk()), offers=True) as guest:
        properties = guest.negotiate(version)
        most, flags, transfer = struct.unpack_from("<4xH2xII", properties)
        assert (most, flags, transfer) == (7 if version >= 0x0501 else 0, int(version >= 0x0501), 256 << 10)
        size = 64 if version >= 0x0501 else 48
        answer = guest.command(TEST_UNIT_READY, size=size)
        assert answer.good
        assert answer.length == size
        guest.device.attach(memory_disk(serial="more"))
        guest.run()
        [notice] = guest.receive()
        assert len(notice.payload) == size


def test_a_guest_goes_down_until_its_version_is_taken() -> None:
    with ScsiGuest(controller(version="5.1")) as guest:
        guest.status(BEGIN)
        for version in (0x0602, 0x0600, 0x0700, 0x0503, 0):
            assert guest.status(VERSION, struct.pack("<HH", version, 0)) == REVISION_MISMATCH
        assert guest.status(VERSION, struct.pack("<HH", 0x0501, 0)) == SUCCESS
        assert guest.status(VERSION, struct.pack("<HH", 0x0501, 0)) == INVALID_DEVICE_STATE


def test_opening_again_begins_anew() -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        guest.negotiate()
        guest.close()
        guest.open()
        assert guest.status(EXECUTE) == INVALID_DEVICE_STATE
        guest.negotiate()
        assert guest.read(3, 1).data == struct.pack("<Q", 3) * 64


@pytest.mark.conformance(65)
@pytest.mark.parametrize("operation", [0, 1, 2, 11, 14, 15, 0xFFFFFFFF])
def test_an_unknown_operation_stops_the_channel_and_touches_no_guest_memory(operation: int) -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        guest.negotiate()
        ranges = [(4096, 0, [600])]
        assert guest.vstor(operation, ranges=ranges) is None
        assert guest.io.state is IoState.FAILED
        assert guest.io.refusals.counts == {"storvsp-unknown-operation": 1}
        assert guest.memory.stored == []
        assert not any(guest.memory.read(600 * 4096, 4096))


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        ({"operation": BEGIN, "completion_requested": False}, "storvsp-no-completion-wanted"),
        ({"operation": BEGIN, "size": 8}, "storvsp-short-packet"),
        ({"operation": EXECUTE, "size": 40}, "storvsp-short-request"),
    ],
)
def test_packets_that_no_driver_sends_stop_the_channel(packet: dict[str, Any], reason: str) -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        guest.negotiate()
        assert guest.vstor(**packet) is None
        assert guest.io.failure == reason


# --- sub-channels ---


@pytest.mark.conformance(64)
def test_more_subchannels_than_announced_are_refused() -> None:
    with ScsiGuest(controller(queues=4), offers=True) as guest:
        guest.negotiate()
        assert guest.status(CREATE, struct.pack("<H", 4)) == INVALID_PARAMETER
        assert guest.offers.offered == []
        assert guest.status(CREATE, struct.pack("<H", 3)) == SUCCESS
        assert [offer.subchannel_index for offer, _ in guest.offers.offered] == [1, 2, 3]
        assert guest.status(CREATE, struct.pack("<H", 1)) == INVALID_DEVICE_STATE


@pytest.mark.conformance(64)
def test_without_multi_channel_no_subchannel_is_granted() -> None:
    for options in ({"offers": False}, {"offers": True, "version": "4.2"}):
        offers = bool(options.pop("offers"))
        with ScsiGuest(controller(**options), offers=offers) as guest:
            guest.negotiate(0x0402)
            assert guest.status(CREATE, struct.pack("<H", 1)) == INVALID_PARAMETER


@pytest.mark.conformance(67)
def test_a_command_on_a_subchannel_before_the_end_of_the_handshake_waits() -> None:
    with ScsiGuest(controller(memory_disk()), offers=True) as guest:
        guest.status(BEGIN)
        guest.status(VERSION, struct.pack("<HH", 0x0602, 0))
        guest.vstor(PROPERTIES)
        assert guest.status(CREATE, struct.pack("<H", 1)) == SUCCESS
        sub = guest.open_subchannel(1)
        sub.put(guest_packet(guest.srb(TEST_UNIT_READY), transaction_id=77, completion_requested=True))
        assert sub.answers() == []
        assert guest.status(END) == SUCCESS
        guest.run()
        [answer] = sub.answers()
        assert (answer.transaction_id, answer.good) == (77, True)


def test_a_command_is_answered_on_the_channel_that_it_came_from() -> None:
    with ScsiGuest(controller(slow_disk()), offers=True) as guest:
        guest.negotiate()
        guest.status(CREATE, struct.pack("<H", 2))
        subs = [guest.open_subchannel(1), guest.open_subchannel(2)]
        cdb = struct.pack(">BBIBHB", 0x28, 0, 5, 0, 1, 0)
        extension = gpa_direct_extension([(512, 0, [700])])
        for number, sub in enumerate(subs):
            sub.put(
                guest_packet(
                    guest.srb(cdb, length=512, direction=1),
                    kind=GPA_DIRECT,
                    transaction_id=100 + number,
                    completion_requested=True,
                    extension=extension,
                )
            )
        guest.run()
        assert [[each.transaction_id for each in sub.answers()] for sub in subs] == [[100], [101]]
        assert guest.receive() == []
        sub = subs[0]
        sub.put(guest_packet(struct.pack("<III", BEGIN, 1, 0).ljust(64, b"\0"), completion_requested=True))
        [answer] = sub.answers()
        assert answer.status == INVALID_DEVICE_STATE


# --- units ---


@pytest.mark.conformance(66)
def test_a_disk_comes_and_goes_while_the_guest_runs() -> None:
    device = controller()
    with ScsiGuest(device) as guest:
        guest.negotiate()
        assert guest.command(REPORT_LUNS, read=4096).data == bytes(8)
        missing = guest.read(0, 1)
        assert (missing.srb_status, missing.status) == (0x20, 0xC00000C0)
        for count in range(1, 5):
            device.attach(memory_disk(serial=f"disk{count}"))
            guest.run()
            [notice] = guest.receive()
            assert (notice.kind, notice.flags, notice.transaction_id) == (6, 0, 0)
            assert struct.unpack_from("<III", notice.payload) == (ENUMERATE, 0, 0)
            data = guest.command(REPORT_LUNS, read=4096).data
            assert len(data) == 8 * (count + 1)
            assert data == struct.pack(">II", 8 * count, 0) + b"".join(
                bytes((0, n)) + bytes(6) for n in range(count)
            )
        device.detach(0, 2)
        guest.run()
        assert len(guest.receive()) == 1
        assert guest.command(TEST_UNIT_READY, address=(0, 0, 2)).srb_status == 0x20
        assert guest.command(REPORT_LUNS, read=4096).transferred == 8 * 4


@pytest.mark.conformance(66)
def test_what_is_said_about_units_that_are_not_there() -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        guest.negotiate()
        there = guest.command(inquiry(), read=36)
        assert there.data[0] == 0
        for address in ((0, 0, 1), (0, 1, 0), (3, 0, 0)):
            answer = guest.command(inquiry(), read=36, address=address)
            assert answer.good
            assert answer.address == address
            assert answer.data == bytes((0x7F, 0, 0, 0, 31)) + bytes(31)
            units = 1 if address[:2] == (0, 0) else 0
            assert guest.command(REPORT_LUNS, read=256, address=address).transferred == 8 + 8 * units
        assert guest.command(TEST_UNIT_READY, address=(0, 0, 1)).srb_status == 0x20
        assert guest.command(TEST_UNIT_READY, address=(1, 0, 0)).srb_status == 0x21


@pytest.mark.conformance(68)
def test_a_new_and_a_resized_disk_tell_so_once() -> None:
    device = controller()
    with ScsiGuest(device) as guest:
        guest.negotiate()
        disk = memory_disk()
        device.attach(disk)
        guest.run()
        guest.receive()
        assert guest.command(inquiry(), read=36).good, "INQUIRY goes through"
        assert guest.command(TEST_UNIT_READY).condition == (6, 0x29, 1)
        assert guest.command(TEST_UNIT_READY).good
        assert not device.resize(0, 0)
        disk.backend.size //= 2
        assert device.resize(0, 0)
        guest.run()
        assert len(guest.receive()) == 1
        assert guest.command(REPORT_LUNS, read=256).good, "REPORT LUNS goes through"
        assert guest.read(0, 1).condition == (6, 0x2A, 9)
        assert guest.read(0, 1).good
        assert guest.read(disk.blocks, 1).condition == (5, 0x21, 0)


@pytest.mark.parametrize("mode_sense", [MODE_SENSE_6, MODE_SENSE_10])
def test_the_new_size_is_not_reported_where_linux_does_not_look(mode_sense: bytes) -> None:
    device = controller()
    with ScsiGuest(device) as guest:
        guest.negotiate()
        disk = memory_disk()
        device.attach(disk)
        guest.run()
        guest.receive()
        assert guest.command(mode_sense, read=192).good, "Linux would take a failure for success"
        assert guest.command(TEST_UNIT_READY).condition == (6, 0x29, 1)
        disk.backend.size //= 2
        assert device.resize(0, 0)
        guest.run()
        guest.receive()
        assert guest.command(mode_sense, read=192).good
        assert guest.command(TEST_UNIT_READY).condition == (6, 0x2A, 9)


def unread() -> tuple[ScsiGuest, MemoryBudget]:
    """A guest that does not read its answers, and whose saved state has no room for more."""
    budget = MemoryBudget()
    guest = ScsiGuest(controller(slow_disk()), budget=budget, ring_pages=1)
    guest.open()
    guest.negotiate()
    guest.workers.paused = True
    payload = guest.srb(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0), length=512, direction=1)
    for number in range(100, 250):
        guest.send(payload, transaction_id=number, completion_requested=True, ranges=[(512, 0, [600])])
    guest.workers.release()
    guest.run()
    assert guest.io.backlog > OUTPUT_ALWAYS
    budget.count_saved_packets(SAVED_PACKET_BYTES + SAVED_FIRST_BYTES)
    return guest, budget


def notices(guest: ScsiGuest) -> list[int]:
    received = []
    while packets := guest.receive():
        received += packets
        guest.run()
    return [struct.unpack_from("<I", each.payload)[0] for each in received if each.kind == IN_BAND]


def test_a_guest_that_does_not_read_is_notified_of_a_new_disk_when_it_does() -> None:
    guest, budget = unread()
    assert guest.device.attach(memory_disk(serial="new")) == 1
    budget.count_saved_packets(-SAVED_PACKET_BYTES - SAVED_FIRST_BYTES)
    assert notices(guest) == [ENUMERATE]
    assert guest.io.failure == ""


@pytest.mark.parametrize("added", [True, False])
def test_a_guest_that_moves_before_it_has_read_is_notified_where_it_continues(added: bool) -> None:
    guest, _ = unread()
    if added:
        guest.device.attach(memory_disk(serial="new"))
    guest.io.pause()
    device_state, io_state = guest.device.save(), guest.io.save()
    units = [slow_disk(), memory_disk(serial="new")] if added else [slow_disk()]
    there = ScsiGuest(controller(*units), ring_pages=1)
    there.memory.ram[:] = guest.memory.ram
    there.io.restore(io_state)
    there.device.restore(device_state)
    there.io.restored(there.channel)
    there.run()
    assert notices(there) == ([ENUMERATE] if added else [])
    assert not parse_state("scsi", there.device.save()).enumeration_due


def test_a_disk_that_is_removed_is_closed_when_its_commands_have_ended() -> None:
    disk = slow_disk()
    device = controller(disk)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        closed: list[bool] = []
        disk.backend.close = lambda: closed.append(True)  # type: ignore[method-assign]
        guest.workers.paused = True
        guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), read=4096)
        device.detach(0, 0)
        guest.run()
        assert closed == []
        guest.workers.release()
        guest.run()
        assert closed == [True]
        assert [answer.good for answer in guest.answers()] == [True]


def test_a_device_that_stops_closes_its_images_when_the_last_transfer_has_ended() -> None:
    busy, idle = slow_disk(), memory_disk(serial="idle")
    closed: list[str] = []
    for disk in (busy, idle):
        disk.backend.close = lambda serial=disk.identity.serial: closed.append(serial)  # type: ignore[method-assign, misc]
    device = controller(busy, idle)
    guest = ScsiGuest(device)
    guest.open()
    guest.negotiate()
    guest.workers.paused = True
    guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), read=4096)
    guest.close()
    device.stop()
    assert closed == ["idle"]
    guest.workers.release()
    guest.run()
    assert closed == ["idle", "disk"]
    assert not guest.channel.closing


def test_a_command_that_the_host_fails_at_does_not_keep_its_channel_open() -> None:
    disk = memory_disk()
    device = controller(disk)
    guest = ScsiGuest(device)
    guest.open()
    guest.negotiate()

    def exhausted(*_: object) -> None:
        raise MemoryError("no memory for the answer")

    disk._commands[0x28] = exhausted
    guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), read=4096)
    assert guest.io.failure == "device-error"
    assert device.status()["in_flight"] == disk.statistics.depth == 0
    guest.close()
    assert not guest.channel.closing
    guest.open()
    guest.negotiate()
    assert guest.command(TEST_UNIT_READY).good


def test_a_delayed_command_that_the_host_fails_at_does_not_keep_its_channel_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = memory_disk(faults=FaultPlan(parse_faults("delay:1@*")))
    device = controller(disk)
    guest = ScsiGuest(device)
    guest.open()
    guest.negotiate()
    guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), read=4096)

    def exhausted(*_: object) -> None:
        raise MemoryError("no memory for the data")

    monkeypatch.setattr(disk, "_move", exhausted)
    guest.advance(1)
    assert guest.io.failure == "device-error"
    guest.close()
    assert not guest.channel.closing
    assert disk.statistics.depth == 0


def test_targets_and_places() -> None:
    device = controller()
    device.attach(memory_disk(), 1, 63)
    assert device.attach(memory_disk(), 1) == 0
    with pytest.raises(UsageError, match="target 1 LUN 63 is taken"):
        device.attach(memory_disk(), 1, 63)
    with pytest.raises(UsageError, match="no target 0 LUN 5"):
        device.detach(0, 5)
    with ScsiGuest(device) as guest:
        guest.negotiate()
        data = guest.command(REPORT_LUNS, read=256, address=(0, 1, 0)).data
        assert [data[8 * n + 1] for n in range(1, len(data) // 8)] == [0, 63]


# --- resets, closing ---


@pytest.mark.parametrize("operation", [RESET_LUN, RESET_ADAPTER, RESET_BUS])
def test_a_reset_is_answered_when_no_command_is_left(operation: int) -> None:
    with ScsiGuest(controller(slow_disk())) as guest:
        guest.negotiate()
        assert guest.status(operation) == SUCCESS
        guest.workers.paused = True
        number = guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), read=4096)
        assert guest.vstor(operation) is None
        guest.workers.release()
        guest.run()
        first, second = guest.receive()
        assert first.transaction_id == number
        assert struct.unpack_from("<III", second.payload) == (1, 0, 0)


def test_a_reset_aborts_what_only_waits_and_gives_up_on_what_hangs() -> None:
    plan = FaultPlan(parse_faults("delay:60@8-15"))
    with ScsiGuest(controller(slow_disk(faults=plan))) as guest:
        guest.negotiate()
        waits = guest.start(struct.pack(">BBIBHB", 0x28, 0, 8, 0, 1, 0), read=512)
        guest.workers.paused = True
        guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 1, 0), read=512)
        assert guest.answers() == []
        guest.next_id += 1
        reset = struct.pack("<III", RESET_BUS, 1, 0).ljust(64, b"\0")
        assert guest.send(reset, transaction_id=guest.next_id, completion_requested=True)
        [aborted] = guest.answers()
        assert (aborted.transaction_id, aborted.srb_status) == (waits, 2)
        assert guest.device.status()["in_flight"] == 1
        guest.advance(5)
        [answer] = guest.receive()
        assert answer.transaction_id == guest.next_id
        guest.advance(100)
        guest.workers.release()
        guest.run()
        assert guest.device.status()["in_flight"] == 0


def test_a_channel_is_closed_when_its_last_command_has_ended() -> None:
    with ScsiGuest(controller(slow_disk())) as guest:
        guest.negotiate()
        guest.workers.paused = True
        for lba in (0, 8):
            guest.start(struct.pack(">BBIBHB", 0x28, 0, lba, 0, 8, 0), read=4096, at=lba)
        guest.close()
        assert guest.channel.closing
        guest.workers.release(1)
        guest.run()
        assert guest.channel.closing
        guest.workers.release()
        guest.run()
        assert not guest.channel.closing
        assert guest.memory.stored, "what was stored is known"
        guest.open()
        guest.negotiate()
        assert guest.receive() == []
        assert guest.command(TEST_UNIT_READY).good
    assert not guest.channel.closing


def test_a_command_that_a_fault_holds_up_does_not_hold_up_a_close() -> None:
    with ScsiGuest(controller(slow_disk(faults=FaultPlan(parse_faults("delay:60@*"))))) as guest:
        guest.negotiate()
        guest.start(struct.pack(">BBIBHB", 0x28, 0, 0, 0, 8, 0), read=4096)
        guest.close()
        assert not guest.channel.closing
        guest.advance(100)


def test_completions_of_one_batch_are_one_interrupt() -> None:
    with ScsiGuest(controller(slow_disk())) as guest:
        guest.negotiate()
        guest.workers.paused = True
        for lba in range(16):
            guest.start(struct.pack(">BBIBHB", 0x28, 0, lba, 0, 1, 0), read=512, at=lba)
        before = guest.interrupts
        guest.workers.release()
        guest.run()
        assert guest.interrupts == before + 1
        assert len(guest.answers()) == 16
        status = guest.device.status()["units"]["0:0"]
        assert (status["reads"], status["bytes_read"], status["most_queue_depth"]) == (16, 16 * 512, 16)
        assert status["queue_depth"] == 0


# --- saving ---


def test_a_command_in_a_thread_is_not_settled_and_one_that_a_fault_holds_up_is() -> None:
    with ScsiGuest(controller(slow_disk(faults=FaultPlan(parse_faults("delay:5@100-"))))) as guest:
        guest.negotiate()
        assert guest.device.settled(guest.io)
        guest.workers.paused = True
        guest.start(struct.pack(">BBIBHB", 0x28, 0, 8, 0, 1, 0), read=512)
        assert not guest.device.settled(guest.io)
        guest.io.pause()
        guest.workers.release()
        guest.run()
        assert guest.device.settled(guest.io)
        guest.io.resume()
        guest.start(struct.pack(">BBIBHB", 0x28, 0, 100, 0, 1, 0), read=512)
        assert guest.io.status()["owed"] == 1
        assert guest.device.settled(guest.io)


def test_a_saved_controller_goes_on_elsewhere_and_waiting_commands_are_done_there() -> None:
    def made() -> Scsi:
        return controller(slow_disk(faults=FaultPlan(parse_faults("delay:5@100-"))))

    with ScsiGuest(made()) as guest:
        guest.negotiate(0x0600)
        number = guest.start(struct.pack(">BBIBHB", 0x28, 0, 100, 0, 1, 0), read=512)
        guest.io.pause()
        device_state, io_state = guest.device.save(), guest.io.save()
        [packet] = guest.device.save_packets(guest.io)
        assert (packet.transaction_id, packet.from_guest) == (number, True)
        there = ScsiGuest(made())
        there.memory.ram[:] = guest.memory.ram
        there.io.restore(io_state)
        there.device.restore(device_state)
        there.device.restore_packet(there.io, packet)
        there.io.restored(there.channel)
        there.next_id = guest.next_id
        there.run()
        assert there.answers() == []
        there.advance(6)
        [answer] = there.answers()
        assert (answer.transaction_id, answer.good) == (number, True)
        assert there.buffer(512) == struct.pack("<Q", 100) * 64
        assert there.status(BEGIN) == INVALID_DEVICE_STATE, "still ready"
        assert str(there.device.handshake.version) == "6.0"
        guest.io.resume()
        guest.advance(6)
        assert [each.transaction_id for each in guest.answers()] == [number], (
            "after a failed migration the source continues"
        )


def test_restored_commands_of_a_channel_that_cannot_continue_are_not_those_of_its_next_opening() -> None:
    with ScsiGuest(controller(memory_disk(faults=FaultPlan(parse_faults("delay:5@100-"))))) as guest:
        guest.negotiate()
        guest.start(struct.pack(">BBIBHB", 0x28, 0, 100, 0, 1, 0), read=512)
        guest.io.pause()
        device_state, io_state = guest.device.save(), guest.io.save()
        [packet] = guest.device.save_packets(guest.io)
        there = ScsiGuest(controller(memory_disk()))
        there.io.restore(io_state)
        there.device.restore(device_state)
        there.device.restore_packet(there.io, packet)
        there.channel.incoming.store_u32(0, 0xFFFFFFFF)
        with pytest.raises(RingError):
            there.io.restored(there.channel)
        there.open()
        there.negotiate()
        assert there.device.save_packets(there.io) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: controller(), "target 0 LUN 0 is missing"),
        (lambda: controller(memory_disk(serial="other")), "another serial"),
        (lambda: controller(memory_disk(64)), "another number of blocks"),
        (lambda: controller(memory_disk(), version="5.1"), "protocol 6.2"),
        (lambda: controller(memory_disk(), transfer=64), "transfer="),
    ],
)
def test_a_state_that_does_not_fit_is_refused(other: Any, message: str) -> None:
    with ScsiGuest(controller(memory_disk())) as guest:
        guest.negotiate()
        state = guest.device.save()
        with pytest.raises(DeviceError, match=message):
            other().restore(state)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_state_is_refused_or_taken_but_nothing_else(data: st.DataObject) -> None:
    with ScsiGuest(controller(memory_disk(8))) as guest:
        guest.negotiate()
        state = bytearray(guest.device.save())
    for _ in range(data.draw(st.integers(1, 4))):
        state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(state)))
    for each in (bytes(state), bytes(state[:cut])):
        with contextlib.suppress(DeviceError):
            controller(memory_disk(8)).restore(each)


# --- from the command line ---


def test_lines_that_name_one_controller_share_it() -> None:
    first, second = Registry().create_all(
        [
            "scsi,format=memory,size=1M",
            "scsi,format=null,size=2M,lun=5,serial=mine",
            "scsi,format=memory,size=1M,target=1",
            "scsi,format=memory,size=1M,controller=other",
            "scsi,format=memory,size=1M,controller=other",
        ]
    )
    assert isinstance(first, Scsi)
    assert isinstance(second, Scsi)
    assert {place: unit.identity.serial for place, unit in first.units.items()} == {
        (0, 0): "scsi-0-0",
        (0, 5): "mine",
        (1, 0): "scsi-1-0",
    }
    assert {place: unit.identity.serial for place, unit in second.units.items()} == {
        (0, 0): "other-0-0",
        (0, 1): "other-0-1",
    }
    assert first.offer().interface_id == SCSI_INTERFACE
    assert first.offer().instance_id != second.offer().instance_id
    assert (first.name, second.name) == ("scsi", "other")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["scsi,format=null,lun=1", "scsi,format=null,lun=1"], "LUN 1 is taken"),
        (
            ["scsi,format=null,queues=4", "scsi,format=null,queues=2"],
            "queues=2, but controller scsi has queues=4",
        ),
        (["scsi,format=null,image=x"], "uses no image"),
        (["scsi,image=/nowhere/at/all"], "cannot open the image"),
        (["scsi,format=null,size=many"], "many.*as in 20G"),
        (["scsi,format=null,block=1024"], "512 or 4096"),
        (["scsi,format=null,fault=smoke@1"], "KIND@FIRST-LAST"),
        (["scsi,format=null,version=7"], "one of 2.0"),
        (["scsi,format=null,serial=a b"], "without blanks"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(lines: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as found:
        Registry().create_all(lines)
    assert found.type.__name__ in ("UsageError", "UserError")


# --- anything ---


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_every_command_is_answered_once_whatever_it_is(data: st.DataObject) -> None:
    device = controller(memory_disk(256), slow_disk(blocks=64, serial="b"))
    with ScsiGuest(device) as guest:
        guest.negotiate()
        sent = []
        for _ in range(data.draw(st.integers(1, 6))):
            guest.next_id += 1
            cdb = data.draw(st.binary(min_size=16, max_size=16))
            if data.draw(st.booleans()):
                known = sorted(device.units[0, 0]._commands)
                cdb = bytes((data.draw(st.sampled_from(known)),)) + cdb[1:]
            if data.draw(st.booleans()):
                cdb = cdb[:1] + bytes(7) + cdb[8:9] + bytes(7)
            length = data.draw(st.integers(0, 70000))
            ranges = []
            if data.draw(st.booleans()):
                offset = data.draw(st.integers(0, 4095))
                count = (offset + max(length, 1) + 4095) // 4096
                first = data.draw(st.sampled_from([600, 2040, 1 << 40]))
                ranges = [(max(length, 1), offset, range(first, first + count))]
            payload = guest.srb(
                cdb,
                length=data.draw(st.sampled_from([length, 0, 0xFFFFFFFF])),
                direction=data.draw(st.integers(0, 3)),
                address=(
                    data.draw(st.integers(0, 1)),
                    data.draw(st.integers(0, 2)),
                    data.draw(st.integers(0, 2)),
                ),
                cdb_length=data.draw(st.sampled_from([16, 6, 255])),
                size=data.draw(st.sampled_from([48, 64])),
            )
            if guest.send(payload, transaction_id=guest.next_id, completion_requested=True, ranges=ranges):
                sent.append(guest.next_id)
        guest.advance(1)
        assert sorted(each.transaction_id for each in guest.answers()) == sorted(sent)
        assert guest.io.state is IoState.RUNNING
        assert device.status()["in_flight"] == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 16), st.binary(max_size=80), st.booleans()), max_size=8))
def test_any_packets_cost_the_channel_at_most(packets: list[tuple[int, bytes, bool]]) -> None:
    with ScsiGuest(controller(memory_disk(8)), offers=True) as guest:
        for number, (operation, body, wanted) in enumerate(packets):
            guest.send(
                struct.pack("<I", operation) + body, transaction_id=number, completion_requested=wanted
            )
            guest.receive()
        guest.close()
        guest.open()
        guest.negotiate()
