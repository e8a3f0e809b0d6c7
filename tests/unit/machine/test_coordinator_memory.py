"""Guest memory over migrations that somebody else begins and cancels, at any moment of the emulator's part.

QEMU is a model: it copies memory page by page, knows what the guest writes and what is written through its qtest
socket, and knows nothing of what the emulator stores in the mapping. The guest writes whatever is its own, at every
moment that it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from vmbus.bus.io.channel_io import ChannelDevice, ChannelIo
from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.errors import InternalError, QemuError
from vmbus.machine.gateway.traps import Unclaimed
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.machine.migration.carried_pages import CarriedPages, read
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.ports import MigrationPorts
from vmbus.machine.migration.side_channel import CarrierAddress, OutgoingCarrier
from vmbus.machine.migration.state_machine import Phase, Switchover
from vmbus.machine.qemu.qtest import MainLoopWaits
from vmbus.ports import PAGE_SIZE
from vmbus.saving import (
    ChannelSaver,
    Reason,
    Restore,
    SavedState,
    StateRefused,
    read_machine,
    save_machine,
)
from vmbus.saving.pages import MAX_CARRIED
from vmbus.wire.frame import build_frame
from vmbus.wire.gateway import GuestState
from vmbus.wire.saved import ChannelIdentity

PAGES = 512
THEIRS = range(60, 60 + 20)
MANY = range(256, 256 + MAX_CARRIED + 37)
SHARED = {16: 4, 24: 0, 40: 6, 41: 15 * 256, 42: 0, 0x33: 4095}
"""Pages that host and guest both write → the byte of each that is the host's."""
TURNS = 60
"""Turns of the event loop in which the emulator has done its part."""


class Qemu:
    """QEMU and the guest in it; also its monitor, its qtest socket, its gateway and the host's service."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.ram = bytearray(b"\1" * (PAGES * PAGE_SIZE))
        self.memory = MappedMemory(memoryview(self.ram), [RamRegion(0, len(self.ram), 0)])
        self.dirty = set(range(PAGES))
        self.sent = bytearray(len(self.ram))
        self.status = "none"
        self.runs = True
        self.stopped_before = False
        self.moments = 0
        self.cancel_at = cancel_at
        self.marks = 0
        self.lost = 0
        self.saved = b""
        self.order: list[str] = []
        """Commands for a migration in the pause, and when the state was written."""
        self.work_done = asyncio.Event()
        self.work_done.set()
        self.guest = GuestState.ENGAGED
        self.state = State(self)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self.waits = MainLoopWaits()
        ports = MigrationPorts(
            qmp=self,
            qtest=self,
            memory=self.memory,
            gateway=self,
            workers=Workers(self),
            service=self,
            dbus_address="unix:path=/nowhere",
        )
        self.coordinator = Coordinator(ports, self.state)

    # --- the guest ---

    def moment(self) -> None:
        """Let something happen between any two steps of the emulator."""
        self.moments += 1
        if self.moments == self.cancel_at:
            self.cancel()
        if self.runs:
            for page in (*THEIRS, *SHARED):
                self.guest_writes(page)

    def guest_writes(self, page: int) -> None:
        """Write every byte of a page but the host's."""
        start = page * PAGE_SIZE
        kept = self.ram[start + SHARED[page]] if page in SHARED else None
        self.ram[start : start + PAGE_SIZE] = bytes([self.moments & 0xFF]) * PAGE_SIZE
        if kept is not None:
            self.ram[start + SHARED[page]] = kept
        self.dirty.add(page)

    # --- migrations ---

    def send_event(self, name: str, **data: object) -> None:
        self._loop.call_soon(self.coordinator.event, name, data)

    def begin(self) -> None:
        self.dirty = set(range(PAGES))
        self._become("setup")

    def copy(self) -> None:
        self._become("active")
        self._pass()

    def pause(self) -> None:
        self.runs = False
        if not self.stopped_before:
            self.send_event("STOP")
        self._become("pre-switchover")

    def cancel(self) -> None:
        if self.status in ("pre-switchover", "active", "setup"):
            self._become("cancelled")
            if not self.stopped_before:
                self.runs = True
                self.send_event("RESUME")

    def _become(self, status: str) -> None:
        self.status = status
        self.send_event("MIGRATION", status=status)

    def _pass(self) -> None:
        for page in self.dirty:
            part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            self.sent[part] = self.ram[part]
        self.dirty = set()

    def run_state(self) -> str:
        if self.runs:
            return "running"
        return "finish-migrate" if self.status in ("pre-switchover", "device") else "paused"

    # --- the monitor ---

    connected = True

    async def execute(self, command: str, arguments: object = None) -> Any:
        await asyncio.sleep(0)
        self.moment()
        answer: object = {}
        if command == "query-migrate":
            answer = {"status": self.status}
        elif command == "query-status":
            answer = {"status": self.run_state()}
        elif command == "query-migrate-capabilities":
            answer = [{"capability": "return-path", "state": True}]
        elif command == "query-uuid":
            answer = {"UUID": str(UUID(int=1))}
        elif command == "migrate_cancel":
            self.cancel()
        elif command == "migrate-continue":
            if self.status != "pre-switchover":
                raise QemuError("not in the right state")
            self.order.append(command)
            self._become("device")
            self._pass()
            self.saved = await self.coordinator.save()
            self._become("completed")
        await asyncio.sleep(0)
        self.moment()
        return answer

    async def cont(self) -> None:
        raise InternalError("no guest is resumed by a command here")

    async def hand_over(self, descriptor: int, name: str) -> None:
        raise InternalError("no descriptor is passed here")

    async def lend(self, descriptors: Sequence[int]) -> int:
        raise InternalError("no descriptor is passed here")

    # --- the qtest socket ---

    def mark(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        for gpa, value in bytes_there:
            self.moment()
            page = gpa // PAGE_SIZE
            if self.runs and SHARED.get(page) != gpa % PAGE_SIZE:
                self.lost += self.ram[gpa] != value
            self.ram[gpa] = value
            self.dirty.add(page)
            self.marks += 1
        self.moment()

    async def marked(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        await asyncio.sleep(0)
        self.mark(bytes_there)
        await asyncio.sleep(0)

    async def settled(self) -> None:
        await asyncio.sleep(0)
        self.moment()

    def settle(self) -> None:
        self.moment()

    loading = contextlib.nullcontext

    # --- the gateway and the service ---

    def unclaimed(self) -> list[Unclaimed]:
        return []

    def carried(self) -> list[Unclaimed]:
        return []

    def carry(self, unclaimed: Iterable[Unclaimed]) -> None: ...

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def serve_gateway(self) -> None: ...

    def look_at_gateway(self) -> None: ...

    def reset(self) -> None: ...

    def report_missing_devices(self, channels: Sequence[ChannelIdentity]) -> None:
        raise InternalError("no guest arrives here")

    def report_lost_channels(self, lost: Mapping[str, str]) -> None:
        raise InternalError("no guest is taken over here")

    def channel_end(self, device: ChannelDevice) -> ChannelIo:
        raise InternalError("there are no channels here")

    async def quiet(self) -> None:
        for _ in range(TURNS):
            self.moment()
            await asyncio.sleep(0)
        assert not (self._tasks and self.work_done.is_set())
        if self.status in ("cancelled", "completed"):
            assert self.memory.filled is None, "buffers are marked early only while a migration is under way"


class Workers:
    """Devices' work, which ends when ``settled`` is set."""

    engines = None

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu

    async def settle(self, timeout: float) -> bool:
        self.qemu.moment()
        await self.qemu.work_done.wait()
        self.qemu.moment()
        return True


class State:
    """A host without channels; ``refuses``: why it cannot be saved."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu
        self.refuses = ""
        self.small = True
        self.begun = False
        self.refused_late = ""
        self.bound: list[str] = []

    def pause_channels(self) -> None:
        self.qemu.moment()

    pause = resume = reset = pause_channels

    def names(self) -> dict[ChannelIdentity, str]:
        return {}

    def unclaimed_answers(self) -> int:
        return 0

    def owned_bytes(self) -> Mapping[int, int]:
        return SHARED

    def begin_save(self) -> bool:
        if self.refuses:
            raise StateRefused(Reason.DEVICE_FAILED, self.refuses)
        self.qemu.moment()
        self.begun = True
        return self.small

    def abandon_save(self) -> None:
        self.begun = False

    def save(self, buffer_size: int, *, memory_stays: bool, pages: Sequence[int], limit: int) -> SavedState:
        assert self.begun
        self.begun = False
        self.qemu.order.append("written")
        if self.refused_late:
            raise StateRefused(Reason.DEVICE_FAILED, self.refused_late)
        self.qemu.moment()
        found = read(self.qemu.memory, pages)
        self.qemu.moment()
        return save_machine(ChannelSaver(), [], pages=found, limit=limit)

    def restore(self, data: bytes, *, allow_missing: bool = False) -> None:
        raise InternalError("no guest arrives here")

    def release_devices(self) -> None:
        self.qemu.moment()

    def bound_to_process(self) -> list[str]:
        return self.bound

    def outside_snapshots(self) -> list[str]:
        return []

    def snapshot_disks(self) -> Mapping[str, SnapshotDisk]:
        return {}

    check = check_fits = restore

    def check_memory(self, data: bytes) -> None:
        raise InternalError("no guest arrives here")


async def until_the_pause(qemu: Qemu, theirs: Sequence[int] = THEIRS) -> None:
    """A migration whose guest's devices answer it while memory is copied."""
    await copied(qemu, theirs)
    qemu.pause()


async def copied(qemu: Qemu, theirs: Sequence[int] = THEIRS) -> None:
    """The same, as far as QEMU has copied all memory once."""
    qemu.begin()
    await qemu.quiet()
    qemu.copy()
    await asyncio.sleep(0)
    for page in (*theirs, *SHARED):
        qemu.memory.write(page * PAGE_SIZE + 2048, b"from the host")


def arrives(qemu: Qemu) -> bytes:
    """What the target has in its memory."""
    assert qemu.coordinator.phase is Phase.LEFT
    state = read_machine(qemu.saved)
    target = MappedMemory(memoryview(qemu.sent), [RamRegion(0, len(qemu.sent), 0)])
    Restore(ChannelSaver(), [], memory=CarriedPages(target)).apply(state)
    return bytes(qemu.sent)


async def test_the_target_has_every_byte_and_nothing_of_the_guests_own_was_written_back() -> None:
    qemu = Qemu()
    await until_the_pause(qemu)
    before = bytes(qemu.ram)
    await qemu.quiet()
    assert arrives(qemu) == bytes(qemu.ram) == before
    assert qemu.marks == qemu.coordinator.report.pages_marked == len(SHARED)
    assert qemu.coordinator.report.pages_carried == len(THEIRS)


async def test_a_small_state_is_written_while_qemu_sends_the_rest_of_memory() -> None:
    qemu = Qemu()
    await until_the_pause(qemu)
    await qemu.quiet()
    assert qemu.order == ["migrate-continue", "written"]
    assert arrives(qemu) == bytes(qemu.ram)


@pytest.mark.parametrize("why", ["large", "many pages", "another program continues"])
async def test_a_state_that_is_needed_or_may_not_fit_is_written_before(why: str) -> None:
    qemu = Qemu()
    qemu.state.small = why != "large"
    if why == "another program continues":
        qemu.coordinator.switchover = Switchover.OBSERVE
    await until_the_pause(qemu, MANY if why == "many pages" else THEIRS)
    await qemu.quiet()
    assert qemu.order[:1] == ["written"]
    assert qemu.coordinator.phase is (Phase.READY if why == "another program continues" else Phase.LEFT)


async def test_a_state_that_is_refused_when_it_is_written_is_refused_to_qemu_in_the_same_words() -> None:
    """The target cannot load it, so that QEMU goes on with the guest here."""
    qemu = Qemu()
    qemu.state.refused_late = "a disk in the middle of something"
    await until_the_pause(qemu)
    await qemu.quiet()
    assert qemu.order == ["migrate-continue", "written"]
    with pytest.raises(StateRefused, match="a disk in the middle of something"):
        read_machine(qemu.saved)
    assert "a disk in the middle of something" in qemu.coordinator.report.refusal
    assert not qemu.coordinator.handed_over


@pytest.mark.parametrize("when", ["before it begins", "while memory is sent"])
async def test_a_guest_that_has_written_to_a_disk_in_memory_stays(when: str) -> None:
    """Where it goes there would be an empty one."""
    qemu = Qemu()
    if when == "before it begins":
        qemu.state.bound = ["scsi/0:0"]
    qemu.begin()
    qemu.copy()
    await qemu.quiet()
    qemu.state.bound = ["scsi/0:0"]
    if when == "before it begins":
        assert qemu.status == "cancelled"  # and no memory was copied in vain
    else:
        qemu.pause()
        await qemu.quiet()
    assert "would be lost with this emulator: scsi/0:0" in qemu.coordinator.report.refusal
    assert qemu.coordinator.phase is Phase.IDLE
    assert qemu.runs


async def test_pages_beyond_what_a_state_carries_are_marked() -> None:
    qemu = Qemu()
    await until_the_pause(qemu, MANY)
    await qemu.quiet()
    assert arrives(qemu) == bytes(qemu.ram)
    assert qemu.marks == len(SHARED) + 37
    assert qemu.coordinator.report.pages_carried == MAX_CARRIED


async def cancelled_at(moment: int, *, small: bool) -> Qemu:
    """Cancelled then, if QEMU still lets itself be cancelled; the next migration loses nothing either way.

    ``small``: whether the state is, so that it is written when QEMU was told to continue.
    """
    qemu = Qemu()
    qemu.state.small = small
    await until_the_pause(qemu)
    qemu.cancel_at = qemu.moments + moment
    await qemu.quiet()
    if qemu.status == "cancelled":
        assert qemu.coordinator.phase is Phase.IDLE
        assert not qemu.coordinator.ready
        await until_the_pause(qemu)
        await qemu.quiet()
        assert arrives(qemu) == bytes(qemu.ram)
        qemu.status = "cancelled"
    return qemu


@pytest.mark.parametrize("small", [False, True])
async def test_whoever_cancels_at_any_moment_loses_no_byte_of_the_guests(small: bool) -> None:
    moment, last = 0, "cancelled"
    while last == "cancelled":
        moment += 1
        qemu = await cancelled_at(moment, small=small)
        last = qemu.status
        assert qemu.lost == 0, moment
        assert not qemu.state.begun, "no view is left"
        assert qemu.coordinator.report.pages_carried == len(THEIRS)
    assert moment > 2 * len(SHARED)


async def test_bytes_would_be_lost_if_these_pages_were_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model above is good for."""
    monkeypatch.setitem(globals(), "read", lambda memory, pages: [])
    assert sum([(await cancelled_at(moment, small=False)).lost for moment in range(1, 40)])


async def test_a_guest_that_cannot_be_saved_loses_nothing_when_it_can() -> None:
    qemu = Qemu()
    state = qemu.state
    state.refuses = "a disk in the middle of something"
    await until_the_pause(qemu)
    await qemu.quiet()
    assert qemu.status == "cancelled"
    assert qemu.marks == qemu.coordinator.report.pages_carried == 0
    state.refuses = ""
    await until_the_pause(qemu)
    await qemu.quiet()
    assert arrives(qemu) == bytes(qemu.ram)


async def test_a_migration_that_begins_before_the_last_one_is_wound_up_loses_nothing() -> None:
    """A device has much to do: its work for the one ends when the next one has copied memory."""
    qemu = Qemu()
    qemu.work_done.clear()
    await until_the_pause(qemu)
    await qemu.quiet()
    qemu.cancel()
    await qemu.quiet()
    await copied(qemu)
    qemu.runs = False  # or it would tell QEMU of the page itself
    qemu.work_done.set()
    await qemu.quiet()
    qemu.pause()
    await qemu.quiet()
    assert arrives(qemu) == bytes(qemu.ram)


@pytest.mark.parametrize("why", ["cancelled", "refused"])
async def test_a_guest_that_was_stopped_before_can_leave_at_the_second_attempt(why: str) -> None:
    qemu = Qemu()
    qemu.runs, qemu.stopped_before = False, True
    state = qemu.state
    if why == "refused":
        state.refuses = "a disk in the middle of something"
    else:
        qemu.coordinator.switchover = Switchover.OBSERVE
    await until_the_pause(qemu)
    await qemu.quiet()
    qemu.cancel()
    await qemu.quiet()
    assert qemu.status == "cancelled"
    assert qemu.coordinator.phase is Phase.IDLE
    assert not qemu.coordinator.ready
    state.refuses, qemu.coordinator.switchover = "", Switchover.OWN
    await until_the_pause(qemu)
    await qemu.quiet()
    assert arrives(qemu) == bytes(qemu.ram)


async def test_a_guest_that_is_reset_in_the_pause_does_not_leave_with_the_state_of_before() -> None:
    """Its reset may be executed when QEMU has paused it; what is saved afterwards is right again."""
    qemu = Qemu()
    qemu.coordinator.switchover = Switchover.OBSERVE
    await until_the_pause(qemu)
    await qemu.quiet()
    assert qemu.coordinator.ready
    qemu.send_event("RESET")
    await qemu.quiet()
    assert (qemu.status, qemu.coordinator.phase) == ("cancelled", Phase.IDLE)
    await until_the_pause(qemu)
    await qemu.quiet()
    assert qemu.coordinator.ready


async def test_a_refused_migration_does_not_point_to_the_state_of_the_side_channel() -> None:
    """The target may have it, although its confirmation was lost: it would run the guest, as this side does."""
    qemu = Qemu()
    machine = qemu.coordinator._machine
    qemu.coordinator.side_channel.reference = b"reference"
    machine.good = True
    machine.saved(machine.report, b"state")
    assert await qemu.coordinator.save() == b"reference"
    machine.report.refusal = "the target did not confirm that it has the state"
    with pytest.raises(StateRefused, match="did not confirm"):
        read_machine(await qemu.coordinator.save())


async def test_no_state_is_checked_when_the_guest_is_here(tmp_path: Path) -> None:
    """Its sub-channels would be offered to a guest that runs, and rescinded at once."""
    qemu = Qemu()
    address = CarrierAddress("unix", tmp_path / "c")
    qemu.coordinator.expect()
    await qemu.coordinator.listen(address)
    source = await OutgoingCarrier.open(address, UUID(int=1))
    qemu.send_event("RESUME")
    await qemu.quiet()
    frame = build_frame(machine=UUID(int=1), migration=UUID(int=2), ran=True, writer="one", state=b"state")
    with pytest.raises(StateRefused, match="no guest is expected here: the guest is idle"):
        await source.deliver(frame)
    await source.close()
    await qemu.coordinator.close()


class Busy(Qemu):
    """A QEMU whose main loop executes what comes over the qtest socket only after it has cancelled and resumed."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[tuple[int, int]] = []
        self.posted = asyncio.Event()
        self.executed = asyncio.Event()

    async def marked(self, bytes_there: Sequence[tuple[int, int]]) -> None:
        self.queued += bytes_there
        self.posted.set()
        await self.executed.wait()

    def settle(self) -> None:
        self.mark(self.queued)
        self.queued.clear()
        self.executed.set()


async def test_a_ring_that_goes_on_is_not_marked_with_what_it_had_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write index that goes back makes the guest read the whole ring again, without end."""
    qemu = Busy()
    host_resumed = asyncio.Event()

    def resume() -> None:
        for page, offset in SHARED.items():
            qemu.memory.write(page * PAGE_SIZE + offset, b"\x77")
        host_resumed.set()

    monkeypatch.setattr(qemu.state, "resume", resume)
    await until_the_pause(qemu)
    await asyncio.wait_for(qemu.posted.wait(), 10)
    qemu.cancel()
    await asyncio.wait_for(host_resumed.wait(), 10)
    qemu.settle()
    await qemu.quiet()
    assert {qemu.ram[page * PAGE_SIZE + offset] for page, offset in SHARED.items()} == {0x77}
