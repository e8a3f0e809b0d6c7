"""Steps of a long journey, drawn at random from a seed: ways to move, moves that do not happen, snapshots, stops.

Meanwhile the guest echoes packets and checks their bytes, answers heartbeats, and writes and reads a disk of which it
checks every word. After each step all three must have gone on, and all of the disk was read and compared.

A snapshot does not hold the disk, which is a raw image: it is saved with ``--without-disks``, and its image is copied
while the guest is stopped, and put back at the load, as the documentation tells users to do. So the disk goes back
together with the guest's memory of what it wrote, and the guest's check is as strict after a load as before.

The TSC of a QEMU that runs does not go back, so a guest that is loaded finds that its clock has jumped by the age of
the snapshot. From 21 s on Linux may take that for a stalled processor, and warn. So no snapshot is loaded that is
nearly that old: it is replaced by a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vmbus.cli import device as device_command
from vmbus.machine.migration import snapshots
from vmbus.machine.migration.drive import MigrationFailed, Outcome, arrived, migrate, receive
from vmbus.machine.migration.state_machine import Switchover
from vmbus.machine.qemu.qmp import Qmp

from tests.guest.harness import LOADED_MODULES, STORAGE_MODULES, Booted, nothing_lost
from tests.guest.test_boot import complaints
from tests.guest.test_scsi import ASKED_IN_VAIN
from tests.migration.growth import MIB, Sample, sample
from tests.migration.journey import Journey, journey
from tests.migration.load import LIMIT, Program, place, put, tcp_uri
from tests.migration.test_live import under_way
from tests.migration.test_refusals import deaf_listener

SAMPLE_EVERY = 50
"""Steps between two samples of what the emulators use."""
DISK = 4 * MIB
PASSES = 3
"""Of the disk after each step: one may have been reported late, one was under way, and one is wholly after it."""
ECHOES = 300
"""Requests after each step."""
SLOW, FAST = MIB, 1 << 30
"""Bytes per second: with the first one a migration is still under way when something is done to it."""
LONGEST_DELAY = 0.5
"""Seconds until a migration is cancelled that may be anywhere, or done, by then."""

MAX_AGE = 15.0
"""Seconds after which a snapshot is too old to be loaded: a stall is one of 21 s, and may have begun before it."""
LOAD_AFTER = 3
"""Steps after which a snapshot is loaded that was not before: it would soon be too old."""

SCRIPT = (
    "until [ -b /dev/sda ]; do usleep 100000; done; "
    "(checked_disk --device /dev/sda; echo failed: the disk) & "
    "while echo_client --count 3000 --generate 1500 --fill 20; do :; done; echo failed: the echoes"
)

Step = Callable[["MixedJourney"], Awaitable[None]]


@dataclass
class Kept:
    """A snapshot that can be loaded, and the disk at that time."""

    tag: str
    disk: bytes
    saved_at: float
    """Seconds of the monotonic clock."""
    steps: int = 0
    """Steps since then."""


@dataclass
class Figures:
    """What a run has done."""

    steps: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    pauses: dict[str, list[float]] = field(default_factory=dict)
    """Milliseconds for which guests stood still, by kind of step."""
    memory_bytes: int = 0
    """Sent by QEMU."""
    disk_bytes: int = 0
    """Read from the disk by the guest, and right."""
    requests: int = 0
    """Of the echo device; those that a snapshot took back count."""
    cancelled: int = 0
    samples: list[Sample] = field(default_factory=list)


class MixedJourney:
    """One guest under load, and what is done to it."""

    def __init__(self, guest: Journey, image: Path, rng: random.Random) -> None:
        self.guest = guest
        self.image = image
        self.rng = rng
        self.figures = Figures()
        self.kind = ""
        self.moves = 0
        """Migrations that took the guest somewhere else."""
        self.kept: Kept | None = None
        self.tags = 0
        self.lines = Counter[str]()
        """Reports of the guest, by their first word."""
        self.broken = 0
        """Lines that may be in pieces: a guest goes on printing in the middle of one when a snapshot is loaded."""

    # --- the guest's reports ---

    def read_reports(self) -> None:
        """Take every complete line of the guest's output, and check it."""
        output = self.guest.here.output
        end = output.rfind(b"\n") + 1
        text = bytes(output[:end]).decode(errors="replace")
        assert "failed" not in text, text
        del output[:end]
        for line in text.splitlines():
            try:
                report = json.loads(line)
                word = next(iter(report))
            except (ValueError, TypeError, StopIteration):
                assert self.broken, f"the guest printed {line!r}"
                self.broken -= 1
                continue
            assert word == "disk" or report.get("ok") is True, line
            self.lines[word] += 1
            if word == "disk":
                self.figures.disk_bytes += report["bytes"]

    async def reports(self, word: str, count: int) -> None:
        """Wait for ``count`` more reports."""
        self.read_reports()
        wanted = self.lines[word] + count

        def there() -> bool:
            self.read_reports()
            return self.lines[word] >= wanted

        await self.guest.here.until(there, f"{count} more reports of {word}")

    async def check(self, *, echoes: bool) -> None:
        """Check that all loads go on, and that nothing was lost. ``echoes``: also wait for a report of the echoes."""
        guest = self.guest
        await self.goes_on(ECHOES)
        await self.reports("disk", PASSES)
        await guest.here.more_beats()
        if echoes:
            await self.reports("cycle", 2)
        assert nothing_lost(guest.here), guest.here.channel("heartbeat")["details"]
        found = guest.here.status()
        for channel in found["channels"]:
            assert channel["refusals"] == channel["io"]["refusals"] == {}, channel
        assert found["bus"]["refusals"] == {}
        assert not found["stopped_because"] and not found["problems"], found
        for unit in self.units().values():
            assert not unit["errors"].keys() - ASKED_IN_VAIN, unit
        self.check_consoles()

    def units(self) -> dict[str, dict[str, Any]]:
        units: dict[str, dict[str, Any]] = self.guest.here.channel("scsi")["details"]["units"]
        return units

    def check_consoles(self) -> None:
        """Check what kernels said, and drop the consoles of the places that the guest has left."""
        for console in self.guest.folder.glob("console-*.log"):
            assert complaints(console.read_text(errors="replace")) == []
            if console != self.guest.here.console_path and not any(
                console == each.console_path for each in self.guest.sides()
            ):
                console.unlink()

    async def finds_a_wrong_block(self) -> None:
        """Spoil the disk: a check that finds nothing then would have shown nothing before."""
        here, word = self.guest.here, self.rng.randrange(DISK // 8) * 8
        here.failure_word = b""

        def spoiled() -> bool:  # the guest may write the block before it reads it
            with self.image.open("r+b") as image:
                image.seek(word)
                image.write(self.rng.randbytes(8))
            return b"failed: block" in here.output

        await here.until(spoiled, "the guest to find a wrong block")
        assert f"failed: block {word // 4096}," in here.output.decode(errors="replace")

    async def goes_on(self, count: int) -> None:
        """Wait for ``count`` more echo requests."""
        requests = int(self.guest.device("echo").status()["requests"])
        await self.guest.here.until(
            lambda: self.guest.device("echo").status()["requests"] >= requests + count, f"{count} more echoes"
        )
        self.figures.requests += count

    # --- moving ---

    def note(self, outcome: Outcome) -> None:
        assert outcome.report.statuses[-1] == "completed"
        self.moves += 1
        self.figures.memory_bytes += outcome.memory_bytes
        self.figures.pauses.setdefault(self.kind, []).append(outcome.downtime * 1e3)

    async def to(self, there: Booted, uri: str) -> None:
        self.note(await migrate(self.guest.host.migration, uri, timeout=LIMIT))
        await self.settle(there)

    async def settle(self, there: Booted) -> None:
        """The guest is there now, or will be in a moment."""
        await arrived(there.host.migration, timeout=LIMIT)
        self.read_reports()
        await self.guest.settle_at(there)

    async def move(self, *, share_memory: bool = False) -> None:
        """As ``vmbus migrate NAME`` does it."""
        self.note(await self.guest.here.guest.move(share_memory=share_memory, timeout=LIMIT))

    async def user(self, command: str) -> None:
        """A command on a monitor that is not the emulator's."""
        async with self.monitor() as monitor:
            await monitor.execute(command)

    @contextlib.asynccontextmanager
    async def monitor(self) -> AsyncIterator[Qmp]:
        monitor = await Qmp.connect(str(self.guest.here.guest.directory.user_qmp))
        try:
            yield monitor
        finally:
            await monitor.close()

    async def running(self) -> bool:
        return bool((await self.guest.host.qmp.execute("query-status"))["running"])

    @contextlib.asynccontextmanager
    async def slow_migration(self) -> AsyncIterator[Booted]:
        """A migration that is ``active``, and sends next to nothing; at the end it must have failed."""
        here = self.guest.host
        there = await self.guest.target()
        await put(here, {}, {"max-bandwidth": SLOW})
        moving = await under_way(self.guest, there)
        yield there
        with pytest.raises(MigrationFailed, match="continues here"):
            await moving
        await put(here, {}, {"max-bandwidth": FAST})
        await self.guest.leave(there)


# --- the kinds of steps ---


async def unix(journey: MixedJourney) -> None:
    there = await journey.guest.target()
    await journey.to(there, journey.guest.uri(there))


async def command(journey: MixedJourney) -> None:
    await journey.move()


async def shared_memory(journey: MixedJourney) -> None:
    await journey.move(share_memory=True)


async def tcp(journey: MixedJourney) -> None:
    there = await place(journey.guest, {})
    await journey.to(there, await tcp_uri(there))


async def multifd(journey: MixedJourney) -> None:
    there = await place(journey.guest, {"multifd": True}, {"multifd-channels": 2})
    await journey.to(there, await tcp_uri(there))
    await put(journey.guest.host, {"multifd": False})


async def file(journey: MixedJourney) -> None:
    guest = journey.guest
    path = guest.folder / "guest"
    try:
        journey.note(await migrate(guest.host.migration, f"file:{path}", timeout=LIMIT))
        there = await place(guest, {})
        await receive(there.host.migration, f"file:{path}")
        await journey.settle(there)
    finally:
        path.unlink(missing_ok=True)


async def stopped(journey: MixedJourney) -> None:
    """A guest that its user stopped moves, and stays stopped until its user resumes it."""
    await journey.user("stop")
    await unix(journey)
    assert not await journey.running()
    await journey.user("cont")


async def stopped_under_way(journey: MixedJourney) -> None:
    """The same, and the user stops it while its memory is sent."""
    guest = journey.guest
    there = await guest.target()
    await put(guest.host, {}, {"max-bandwidth": SLOW})
    moving = await under_way(guest, there)
    await journey.user("stop")
    await put(guest.host, {}, {"max-bandwidth": FAST})
    journey.note(await moving)
    await journey.settle(there)
    assert not await journey.running()
    await journey.user("cont")


async def plugged(journey: MixedJourney) -> None:
    """A second controller comes, moves along, and goes."""

    async def asked(**request: str) -> None:
        await device_command.answer(journey.guest.host, request)

    def state() -> str:
        found = [each for each in journey.guest.here.status()["channels"] if each.get("device") == "extra"]
        return str(found[0]["state"]) if found else ""

    await asked(action="add", line="scsi,format=memory,size=1M,controller=extra")
    await journey.guest.here.until(
        lambda: state() == "open", "an open channel of the controller that was added"
    )
    await journey.move()
    assert state() == "open"
    await asked(action="remove", device="extra")
    await journey.guest.here.until(lambda: not state(), "the end of its channel")


async def cancelled_in_setup(journey: MixedJourney) -> None:
    """QEMU has no connection yet; without a return path, for which it would wait."""
    guest = journey.guest
    coordinator = guest.host.migration
    await put(guest.host, {"return-path": False})
    with deaf_listener() as uri:
        before = coordinator.report
        async with journey.monitor() as monitor:
            await monitor.execute("migrate", {"uri": uri})
            await guest.here.migration(
                lambda: coordinator.report is not before and coordinator.report.status == "setup", "setup"
            )
            await monitor.execute("migrate_cancel")
    await guest.here.migration(lambda: coordinator.report.status == "cancelled", "cancelled")
    journey.figures.cancelled += 1


async def cancelled_when_active(journey: MixedJourney) -> None:
    async with journey.slow_migration():
        await journey.user("migrate_cancel")
    journey.figures.cancelled += 1


async def cancelled_when_ready(journey: MixedJourney) -> None:
    """The state is made, the guest stands, and QEMU waits in ``pre-switchover``."""
    guest = journey.guest
    coordinator = guest.host.migration
    there = await guest.target()
    coordinator.switchover = Switchover.OBSERVE
    moving = asyncio.ensure_future(migrate(coordinator, guest.uri(there), timeout=LIMIT))
    assert await coordinator.until_ready(LIMIT)
    await journey.user("migrate_cancel")
    with pytest.raises(MigrationFailed, match="continues here"):
        await moving
    coordinator.switchover = Switchover.OWN
    await guest.leave(there)
    journey.figures.cancelled += 1


async def cancelled_at_any_time(journey: MixedJourney) -> None:
    """After ``setup``; the guest may be at the target by then, or on its way (``device``)."""
    guest = journey.guest
    coordinator = guest.host.migration
    delay = journey.rng.uniform(0, LONGEST_DELAY)
    there = await guest.target()
    moving = await under_way(guest, there)
    await asyncio.sleep(delay)
    await journey.user("migrate_cancel")
    try:
        journey.note(await moving)
    except MigrationFailed:
        assert coordinator.report.statuses[-1] == "cancelled", coordinator.report
        await guest.leave(there)
        journey.figures.cancelled += 1
    else:
        await journey.settle(there)


async def refused(journey: MixedJourney) -> None:
    """The target has other devices."""
    guest = journey.guest
    there = await guest.target(devices=("shutdown",))
    with pytest.raises(MigrationFailed, match="continues here"):
        await migrate(guest.host.migration, guest.uri(there), timeout=LIMIT)
    assert "not-there" in there.host.migration.load_refused
    await guest.leave(there)


async def target_killed(journey: MixedJourney) -> None:
    async with journey.slow_migration() as there:
        there.guest.process.process.kill()


async def paused(journey: MixedJourney) -> None:
    """Its user stops the guest for a moment."""
    await journey.user("stop")
    await asyncio.sleep(journey.rng.uniform(0, 0.1))
    await journey.user("cont")


async def snapshot(journey: MixedJourney) -> None:
    """Save one; the next such step loads it, wherever the guest is by then, as often as chance wants.

    One that is too old is replaced, and the new one loaded when the guest has gone on a little.
    """
    guest = journey.guest
    qmp, coordinator = guest.host.qmp, guest.host.migration
    kept = journey.kept
    if kept is None:
        journey.kind = "snapshot saved"
        await save_snapshot(journey)
        return
    journey.kind = "snapshot loaded"
    if time.monotonic() - kept.saved_at > MAX_AGE:
        journey.kind = "snapshot replaced"
        await snapshots.delete(coordinator, kept.tag)
        kept = await save_snapshot(journey)
        await journey.goes_on(ECHOES)
    await qmp.execute("stop")
    journey.read_reports()
    await snapshots.load(coordinator, kept.tag, without_disks=True)
    with journey.image.open("r+b") as image:
        image.write(kept.disk)
        os.fsync(image.fileno())
    journey.broken = 2
    kept.steps = 0
    await qmp.execute("cont")
    if journey.rng.random() < 0.5:
        await journey.goes_on(1)
        await snapshots.delete(coordinator, kept.tag)
        journey.kept = None


async def save_snapshot(journey: MixedJourney) -> Kept:
    guest = journey.guest
    journey.tags += 1
    tag = f"snapshot-{journey.tags}"
    await guest.host.qmp.execute("stop")
    saved_at = time.monotonic()
    await snapshots.save(guest.host.migration, tag, without_disks=True)
    journey.kept = Kept(tag, journey.image.read_bytes(), saved_at)
    await guest.host.qmp.execute("cont")
    return journey.kept


WEIGHTS: dict[Step, int] = {
    command: 24,
    unix: 14,
    shared_memory: 16,
    tcp: 10,
    multifd: 6,
    file: 7,
    stopped: 5,
    stopped_under_way: 3,
    plugged: 2,
    cancelled_in_setup: 1,
    cancelled_when_active: 3,
    cancelled_when_ready: 4,
    cancelled_at_any_time: 6,
    refused: 1,
    target_killed: 1,
    snapshot: 5,
    paused: 3,
}
"""How often each kind of step comes, out of the sum of all: some nine of ten move the guest."""


@contextlib.asynccontextmanager
async def mixed_journey(
    folder: Path, program: Program, *, kernel: str, smp: int, rng: random.Random
) -> AsyncIterator[MixedJourney]:
    """Boot a guest with all its loads."""
    image = folder / "disk.img"
    image.touch()
    os.truncate(image, DISK)
    async with journey(
        folder,
        kernel=kernel,
        smp=smp,
        devices=("heartbeat,interval=0.05", "shutdown", "echo,monitor=off", f"scsi,image={image}"),
        add=[(program(name), f"/bin/{name}") for name in ("echo_client", "checked_disk")],
        load=(*LOADED_MODULES, *STORAGE_MODULES, "uio_hv_generic"),
        command=[SCRIPT],
        snapshots=True,
    ) as guest:
        guest.here.failure_word = b"failed"
        await guest.here.until(lambda: b"disk" in guest.here.output, "the first pass over the disk")
        yield MixedJourney(guest, image, rng)


def drawn(rng: random.Random) -> Iterator[Step]:
    """Draw steps without end."""
    while True:
        yield from rng.choices(list(WEIGHTS), list(WEIGHTS.values()))


def with_loads(journey: MixedJourney, steps: Iterable[Step]) -> Iterator[Step]:
    """Yield ``steps``, and between them the load of a snapshot that would soon be too old."""
    for step in steps:
        if journey.kept is not None and journey.kept.steps >= LOAD_AFTER:
            yield snapshot
        yield step


async def run(
    journey: MixedJourney,
    steps: Iterable[Step],
    moves: int,
    seconds: float,
    run_folder: Path,
    progress: Callable[[MixedJourney, int], None],
) -> None:
    """Do ``steps`` until the guest has moved ``moves`` times, or ``seconds`` are over."""
    end = time.monotonic() + seconds
    await journey.check(echoes=True)
    figures = journey.figures
    for number, step in enumerate(with_loads(journey, steps), 1):
        journey.kind = step.__name__.replace("_", " ")
        if journey.kept is not None:
            journey.kept.steps += 1
        begun = time.monotonic()
        try:
            await step(journey)
            await journey.check(echoes=number % 10 == 0)
        except BaseException as error:
            error.add_note(f"in step {number} ({journey.kind}), after {journey.moves} moves")
            raise
        figures.steps[journey.kind] += 1
        seconds_before = figures.seconds.get(journey.kind, 0.0)
        figures.seconds[journey.kind] = seconds_before + time.monotonic() - begun
        if number % SAMPLE_EVERY == 0:
            figures.samples.append(sample(number, journey.guest.here.guest.process.pid, run_folder))
        progress(journey, number)
        if journey.moves >= moves or time.monotonic() > end:
            break
    await journey.check(echoes=True)
