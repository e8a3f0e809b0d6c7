"""Disks are saved, put back and deleted with the machine: all of them, or none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError, InternalError, QemuError
from vmbus.machine.migration import snapshot_disks, snapshots
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.snapshot_disks import NotBegun, SnapshotFailed, name_on_disk
from vmbus.machine.migration.state_machine import Phase


class Disk:
    """A disk in memory; ``fails``: names of methods that fail."""

    def __init__(self, *fails: str) -> None:
        self.size = 512
        self.content = "new"
        self.kept: dict[str, tuple[str, int]] = {}
        self.fails = set(fails)
        self.hold: threading.Event | None = None

    def _check(self, what: str) -> None:
        if self.hold is not None:
            assert self.hold.wait(60)
        if what in self.fails:
            raise DeviceError(f"no {what}")

    def snapshots(self) -> Sequence[DiskSnapshot]:
        self._check("list")
        return [DiskSnapshot(name, size) for name, (_, size) in self.kept.items()]

    def save_snapshot(self, name: str) -> None:
        self._check("save")
        self.kept[name] = (self.content, self.size)

    def load_snapshot(self, name: str, *, keep: str | None = None) -> None:
        self._check("load" if keep else "undo")
        if keep:
            self.kept[keep] = (self.content, self.size)
        self.content = self.kept[name][0]
        if keep:
            self._check("all of load")

    def delete_snapshot(self, name: str) -> None:
        self._check("delete")
        del self.kept[name]


def saved(*fails: str) -> Disk:
    disk = Disk(*fails)
    disk.kept["one"] = ("old", 512)
    return disk


def test_the_name_is_that_of_one_moment_and_fits() -> None:
    assert name_on_disk("before", 1700000000, 5) == "vmbus-before@1700000000.000000005"
    names = {name_on_disk("é" * 127, second, 0) for second in range(2)}
    assert len(names) == 2
    assert all(250 < len(name.encode()) <= 255 for name in names)


async def test_all_disks_are_saved_or_none() -> None:
    good, bad = Disk(), Disk("save")
    with pytest.raises(SnapshotFailed, match="the disk b cannot be saved: no save"):
        await snapshot_disks.save({"a": good, "b": bad}, "one")
    assert good.kept == {}
    good.fails = {"delete"}
    with pytest.raises(SnapshotFailed, match="the disk a still has the snapshot one: no delete"):
        await snapshot_disks.save({"a": good, "b": bad}, "one")
    bad.fails = set()
    good.kept = {}
    await snapshot_disks.save({"a": good, "b": bad}, "one")
    assert set(good.kept) == set(bad.kept) == {"one"}


async def test_disks_that_do_not_fit_are_found_before() -> None:
    disks = {"a": saved(), "b": Disk()}
    with pytest.raises(SnapshotFailed, match=r"snapshot tag does not hold the disk b: .*--without-disks"):
        await snapshot_disks.check(disks, "one", "tag", without_disks=False)
    assert list(await snapshot_disks.check(disks, "one", "tag", without_disks=True)) == ["a"]
    disks["a"].size = 1024
    with pytest.raises(
        SnapshotFailed, match="a was resized since snapshot tag: it has 1024 bytes, and had 512"
    ):
        await snapshot_disks.check(disks, "one", "tag", without_disks=True)
    disks["b"].fails = {"list"}
    with pytest.raises(SnapshotFailed, match="b cannot be checked: no list; nothing was changed"):
        await snapshot_disks.check(disks, "one", "tag", without_disks=True)


async def test_disks_go_back_only_with_the_machine() -> None:
    first, second = saved(), saved()
    disks = {"a": first, "b": second}
    with pytest.raises(NotBegun, match="QEMU") as caught:
        async with snapshot_disks.put_back(disks, "one"):
            assert first.content == second.content == "old"
            raise NotBegun("QEMU")
    assert caught.value.disks_stay
    assert caught.value.__cause__ is None
    assert first.content == second.content == "new"
    second.fails = {"load"}
    with pytest.raises(NotBegun, match="b cannot be put back: no load"):
        async with snapshot_disks.put_back(disks, "one"):
            raise InternalError("it was not put back")
    assert (first.content, list(first.kept)) == ("new", ["one"])
    second.fails = {"all of load"}
    with pytest.raises(NotBegun, match="b cannot be put back: no all of load"):
        async with snapshot_disks.put_back(disks, "one"):
            raise InternalError("it was not put back")
    assert (second.content, list(second.kept)) == ("new", ["one"])
    second.fails = set()
    async with snapshot_disks.put_back(disks, "one"):
        pass
    assert (first.content, list(first.kept)) == ("old", ["one"])


async def test_a_disk_that_cannot_be_undone_is_named() -> None:
    disk = saved("undo")
    with pytest.raises(
        SnapshotFailed, match=r"QEMU; the disk a is not as before, .*vmbus-before@\w+: no undo"
    ) as e:
        async with snapshot_disks.put_back({"a": disk}, "one"):
            raise SnapshotFailed("QEMU")
    assert not e.value.disks_stay
    [kept] = set(disk.kept) - {"one"}
    assert disk.kept[kept] == ("new", 512)
    disk = saved("load", "list")
    with pytest.raises(NotBegun, match=r"no load; the disk a is not as before, .*: no list") as caught:
        async with snapshot_disks.put_back({"a": disk}, "one"):
            raise InternalError("it was not put back")
    assert not caught.value.disks_stay


async def test_the_emulator_ends_while_disks_change() -> None:
    """What is under way in a thread ends, and is undone."""

    async def save(disk: Disk) -> None:
        await snapshot_disks.save({"a": disk}, "one")

    async def load(disk: Disk) -> None:
        async with snapshot_disks.put_back({"a": disk}, "one"):
            raise InternalError("it was cancelled before")

    for disk, work in ((Disk(), save), (saved(), load)):
        before = dict(disk.kept)
        disk.hold = threading.Event()
        task = asyncio.ensure_future(work(disk))
        for _ in range(2):  # it has begun
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        disk.hold.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (disk.content, disk.kept) == ("new", before)


async def test_a_snapshot_is_deleted_from_every_disk_that_has_it() -> None:
    first, second, other = saved(), saved("delete"), Disk()
    disks = {"a": first, "b": second, "c": other}
    assert await snapshot_disks.holding(disks, ["one", "two"]) == {"one": ["a", "b"], "two": []}
    with pytest.raises(
        SnapshotFailed, match="b still has its part of snapshot tag: no delete; the snapshot stays"
    ):
        await snapshot_disks.delete(disks, ["one", "two"], "tag")
    assert first.kept == {}
    second.fails = set()
    await snapshot_disks.delete(disks, ["one", "two"], "tag")
    assert second.kept == {}


async def test_a_disk_that_cannot_be_read_is_listed_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    assert await snapshot_disks.holding({"a": Disk("list")}, ["one"]) == {"one": []}
    assert "a: no list" in caplog.text


# --- together with the machine ---


class Qemu:
    """A QEMU that saves, loads and deletes snapshots, and fails when told."""

    def __init__(self, disks: dict[str, Disk]) -> None:
        self.disks = disks
        self.tags: list[str] = []
        self.running = True
        self.fails: set[str] = set()
        self.jobs: list[dict[str, str]] = []
        self.resumed_by_another = False
        self.handed_over = True
        self.at_the_stop: Phase | None = None
        self.at_the_settle = False
        self.host_resumed = 0
        self.coordinator = cast("Coordinator", self)
        self.phase = Phase.IDLE
        self.command = ""
        self.load_refused = ""
        self.report = SimpleNamespace(refusal="")
        self.ports = SimpleNamespace(
            dbus_address="unix:path=bus",
            qmp=self,
            workers=SimpleNamespace(settle=self._settle),
            qtest=SimpleNamespace(settled=self._nothing),
        )
        self.state = SimpleNamespace(
            outside_snapshots=list,
            snapshot_disks=lambda: self.disks,
            pause_channels=lambda: None,
            resume=self._resume_host,
        )

    async def _settle(self, timeout: float) -> bool:
        self.running = self.running or self.at_the_settle
        return True

    def _resume_host(self) -> None:
        self.host_resumed += 1

    async def _nothing(self) -> None:
        pass

    async def begin_snapshot(self) -> None:
        self.phase = Phase.SNAPSHOT

    def end_snapshot(self) -> None:
        if self.phase is Phase.SNAPSHOT:
            self.phase = Phase.IDLE

    def expect_instead(self, *, allow_missing_devices: bool) -> None:
        self.phase = Phase.INCOMING

    def expect_no_more(self, phase: Phase) -> None:
        self.phase = phase

    def abandon(self) -> None:
        self.phase = Phase.LOST

    async def cont(self) -> None:
        self.running = True
        if self.phase is not Phase.MIGRATING:
            self.phase = Phase.IDLE

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        if command == "query-status":
            return {"running": self.running}
        if command == "stop":
            self.running = False
            self.phase = self.at_the_stop or self.phase
        if command == "query-named-block-nodes":
            return [self._node()]
        if command == "query-jobs":
            return self.jobs
        if command.startswith("snapshot-") and arguments is not None:
            return self._begin(command, arguments)
        return []

    def _node(self) -> dict[str, Any]:
        there = [
            {"id": str(at + 1), "name": tag, "vm-state-size": 1, "date-sec": at, "date-nsec": 7}
            for at, tag in enumerate(self.tags)
        ]
        return {
            "drv": "qcow2",
            "ro": False,
            "node-name": "vmbus-snapshots",
            "file": "s",
            "image": {"filename": "s", "snapshots": there},
        }

    def _begin(self, command: str, arguments: dict[str, Any]) -> None:
        if f"{command} begin" in self.fails:
            raise QemuError("not now")
        job = {"id": arguments["job-id"], "status": "concluded"}
        if command in self.fails:
            job["error"] = "no space"
        elif command == "snapshot-save":
            self.tags.append(arguments["tag"])
            if self.resumed_by_another:
                self.phase = Phase.IDLE
        elif command == "snapshot-delete":
            self.tags.remove(arguments["tag"])
        else:
            assert all(disk.content == "old" for disk in self.disks.values())
            self.phase = Phase.LOADED
        self.jobs = [job]


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> Qemu:
    async def nothing(*arguments: object, **options: object) -> None:
        pass

    monkeypatch.setattr(snapshots, "_check_capabilities", nothing)
    monkeypatch.setattr(snapshots, "_check_fits", nothing)
    return Qemu({"a": Disk(), "b": Disk()})


async def save_old(qemu: Qemu) -> None:
    """A snapshot ``tag`` of disks that had "old"."""
    for disk in qemu.disks.values():
        disk.content = "old"
    await snapshots.save(qemu.coordinator, "tag")
    for disk in qemu.disks.values():
        disk.content = "new"


async def test_a_snapshot_has_machine_and_disks(qemu: Qemu) -> None:
    await save_old(qemu)
    assert qemu.running
    [found] = await snapshots.listed(qemu.coordinator)
    assert found.disks == ("a", "b")
    await snapshots.load(qemu.coordinator, "tag")
    assert qemu.running
    assert {disk.content for disk in qemu.disks.values()} == {"old"}
    assert all(len(disk.kept) == 1 for disk in qemu.disks.values())
    await snapshots.delete(qemu.coordinator, "tag")
    assert qemu.tags == []
    assert all(disk.kept == {} for disk in qemu.disks.values())


async def test_a_disk_that_cannot_be_saved_leaves_no_snapshot(qemu: Qemu) -> None:
    qemu.disks["b"].fails = {"save"}
    with pytest.raises(SnapshotFailed, match="b cannot be saved: no save; nothing was saved"):
        await snapshots.save(qemu.coordinator, "tag")
    assert (qemu.running, qemu.tags, qemu.disks["a"].kept) == (True, [], {})
    qemu.fails = {"snapshot-delete"}
    with pytest.raises(
        SnapshotFailed, match="of snapshot tag, which cannot be loaded, there is still the machine"
    ):
        await snapshots.save(qemu.coordinator, "tag")
    with pytest.raises(SnapshotFailed, match="does not hold the disk a, b"):
        await snapshots.load(qemu.coordinator, "tag")
    assert qemu.running


async def test_a_machine_that_cannot_be_saved_leaves_the_disks_alone(qemu: Qemu) -> None:
    qemu.fails = {"snapshot-save"}
    with pytest.raises(SnapshotFailed, match="no space"):
        await snapshots.save(qemu.coordinator, "tag")
    assert qemu.running
    assert all(disk.kept == {} for disk in qemu.disks.values())


async def test_a_guest_that_another_program_resumed_has_no_snapshot(qemu: Qemu) -> None:
    qemu.resumed_by_another = True
    with pytest.raises(SnapshotFailed, match=r"another program resumed the guest .*nothing was saved"):
        await snapshots.save(qemu.coordinator, "tag")
    assert qemu.tags == []
    assert all(disk.kept == {} for disk in qemu.disks.values())


@pytest.mark.parametrize("disks", [0, 2])
async def test_a_snapshot_without_the_emulators_state_does_not_stay(qemu: Qemu, disks: int) -> None:
    """QEMU reports success all the same: its user would hear only at the load that there is no snapshot."""
    qemu.disks = dict(list(qemu.disks.items())[:disks])
    qemu.handed_over = False
    with pytest.raises(SnapshotFailed, match=r"without the emulator's state: .*nothing was saved"):
        await snapshots.save(qemu.coordinator, "tag")
    assert (qemu.running, qemu.tags) == (True, [])
    assert all(disk.kept == {} for disk in qemu.disks.values())


@pytest.mark.parametrize(
    ("fails", "phase", "message"),
    [
        ("snapshot-load begin", Phase.IDLE, "not now; nothing was changed"),
        ("snapshot-load", Phase.LOST, "no space; the guest stays stopped"),
    ],
)
async def test_a_load_that_fails_leaves_the_disks_as_they_were(
    qemu: Qemu, fails: str, phase: Phase, message: str
) -> None:
    await save_old(qemu)
    qemu.fails = {fails}
    with pytest.raises(SnapshotFailed, match=message):
        await snapshots.load(qemu.coordinator, "tag")
    assert {disk.content for disk in qemu.disks.values()} == {"new"}
    assert all(len(disk.kept) == 1 for disk in qemu.disks.values())
    assert (qemu.phase, qemu.running) == (phase, phase is Phase.IDLE)


async def test_a_guest_does_not_run_on_a_disk_of_another_moment(qemu: Qemu) -> None:
    await save_old(qemu)
    qemu.fails = {"snapshot-load begin"}
    qemu.disks["b"].fails = {"undo"}
    with pytest.raises(
        SnapshotFailed, match=r"b is not as before.*stays stopped until its disks fit its memory"
    ):
        await snapshots.load(qemu.coordinator, "tag")
    assert not qemu.running


async def test_a_disk_that_keeps_its_part_keeps_the_snapshot(qemu: Qemu) -> None:
    await save_old(qemu)
    qemu.disks["b"].fails = {"delete"}
    with pytest.raises(SnapshotFailed, match="b still has its part of snapshot tag"):
        await snapshots.delete(qemu.coordinator, "tag")
    assert qemu.tags == ["tag"]
    with pytest.raises(SnapshotFailed, match="does not hold the disk a"):
        await snapshots.load(qemu.coordinator, "tag")
    qemu.disks["b"].fails = set()
    await snapshots.delete(qemu.coordinator, "tag")
    assert qemu.tags == []


async def test_two_commands_do_not_meet_at_one_guest(qemu: Qemu) -> None:
    """The second would resume the guest while the first one puts its disks back."""
    await save_old(qemu)
    held = threading.Event()
    qemu.disks["a"].hold = held
    load = asyncio.ensure_future(snapshots.load(qemu.coordinator, "tag"))
    await asyncio.sleep(0)  # it has begun, and changed nothing yet
    for second in (
        snapshots.save(qemu.coordinator, "other"),
        snapshots.load(qemu.coordinator, "tag"),
        snapshots.delete(qemu.coordinator, "tag"),
    ):
        with pytest.raises(SnapshotFailed, match=r"vmbus snapshot load` is under way.*try again"):
            await second
    held.set()
    await load
    assert (qemu.tags, qemu.command) == (["tag"], "")
    await snapshots.delete(qemu.coordinator, "tag")


@pytest.mark.parametrize("command", ["save", "load"])
async def test_a_migration_of_another_program_is_not_taken_for_a_snapshot(qemu: Qemu, command: str) -> None:
    """It has begun while the snapshot was checked: QEMU would wait in its pause for ever, or send a changed guest."""
    await save_old(qemu)
    qemu.at_the_stop = Phase.MIGRATING
    with pytest.raises(SnapshotFailed, match=r"the guest is migrating by now; nothing was"):
        if command == "save":
            await snapshots.save(qemu.coordinator, "other")
        else:
            await snapshots.load(qemu.coordinator, "tag")
    assert (qemu.phase, qemu.running, qemu.tags) == (Phase.MIGRATING, True, ["tag"])
    assert {disk.content for disk in qemu.disks.values()} == {"new"}


async def test_a_guest_that_runs_again_is_not_given_up(qemu: Qemu) -> None:
    """Another program resumed it while its devices' work ended: its host must run as well, whatever follows."""
    await save_old(qemu)
    qemu.at_the_settle = True
    with pytest.raises(SnapshotFailed, match="another program resumed the guest before it was given up"):
        await snapshots.load(qemu.coordinator, "tag")
    assert (qemu.phase, qemu.running, qemu.host_resumed) == (Phase.IDLE, True, 1)
    assert {disk.content for disk in qemu.disks.values()} == {"new"}
