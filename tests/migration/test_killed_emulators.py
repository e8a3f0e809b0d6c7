"""Emulators that are killed at random moments while their guest works: the next one goes on, and nothing is lost.

The guest writes to a disk and reads it again, sends itself packets through the echo device, and answers heartbeats;
it says so on its console. Everything that it reads has a checksum.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.harness import LOADED_MODULES, STORAGE_MODULES
from tests.guest.matrix import full
from tests.guest.waiting import until
from tests.migration.journey import machine
from tests.migration.own_qemu import OwnQemu, own_qemu, travellers
from tests.migration.test_deaths import listening

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3600)]

SEED = int(os.environ.get("KILL_SEED", "1"))
LONGEST = 1.5
"""Seconds that an emulator lives at most."""

WORK = """
exec > /dev/console 2>&1
while :; do
    echo_client --count 400 --generate 200 --fill 5 --timeout 100 > /tmp/echo || { cat /tmp/echo; echo bad-echo; }
    echo echo-round
done &
i=0
while :; do
    i=$((i+1))
    at=$((i % 8 * 16))
    dd if=/dev/urandom of=/tmp/block bs=64k count=16 2>/dev/null
    dd if=/tmp/block of=/dev/sda bs=64k seek=$at conv=fsync 2>/dev/null || echo bad-write
    echo 3 > /proc/sys/vm/drop_caches
    there=$(dd if=/dev/sda bs=64k skip=$at count=16 2>/dev/null | md5sum)
    [ "$there" = "$(md5sum < /tmp/block)" ] || echo bad-read
    echo disk-round
done
"""


class Console:
    """What the guest of ``qemu`` has said."""

    def __init__(self, qemu: OwnQemu) -> None:
        self._qemu = qemu
        self._path = qemu.directory.path / "console.log"

    def count(self, word: str) -> int:
        return self._path.read_text(errors="replace").count(word)

    async def more(self, *words: str) -> None:
        """Wait until the guest has said each word twice more: the work between them was begun and ended here."""
        before = {word: self.count(word) for word in words}
        await until(
            lambda: all(self.count(word) >= before[word] + 2 for word in words),
            " and ".join(words),
            self._qemu,
            self._qemu.emulators[-1],
            timeout=LIMIT,
        )

    def complaints(self) -> list[str]:
        """Return the lines that name a fault."""
        wrong = re.compile(r"bad-|BUG:|Oops|Call Trace|I/O error|hv_.*([Ff]ail|[Ee]rror)|blocked for more")
        return [line for line in self._path.read_text(errors="replace").splitlines() if wrong.search(line)]


async def compiled_code_serves(emulator: Emulator, qemu: OwnQemu) -> None:
    """Wait until compiled code has done more requests of the disk."""

    async def done() -> int:
        channels = (await emulator.status("a")).get("channels", ())
        disks = [each["details"].get("units") for each in channels if each["device"] == "scsi"]
        return sum(units["0:0"]["compiled"] for units in disks if units)

    before = await done()

    async def more() -> bool:
        return await done() > before

    await until(more, "requests of compiled code", emulator, qemu, timeout=LIMIT)


async def kill(emulator: Emulator, folder: Path) -> None:
    """Kill it, and remove what it has left in the folder of run directories."""
    emulator.process.send_signal(signal.SIGKILL)
    await emulator.killed()
    shutil.rmtree(folder / "vmbus")


async def kill_worker(emulator: Emulator, folder: Path) -> None:
    """Kill the process that serves the guest after a reload; the one that was started ends then."""
    os.kill((await emulator.status("a"))["emulator"]["pid"], signal.SIGKILL)
    await emulator.ended()
    shutil.rmtree(folder / "vmbus", ignore_errors=True)


@pytest.mark.parametrize(
    ("kernel", "smp", "kills"),
    [
        ("debian-6.12", 2, 12),
        full("debian-6.12", 1, 100),
        full("debian-6.1", 2, 100),
        full("debian-backports", 2, 100),
    ],
)
async def test_a_guest_outlives_emulators_that_are_killed(
    tmp_path: Path, guest_program: Callable[[str], Path], kernel: str, smp: int, kills: int
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 << 20))
    options = machine(
        tmp_path,
        kernel=kernel,
        smp=smp,
        load=(*LOADED_MODULES, *STORAGE_MODULES, "uio_hv_generic"),
        add=[(guest_program("echo_client"), "/bin/echo_client")],
        command=["sh", "-c", WORK],
    )
    # uio_hv_generic of 6.1 refuses a channel that is signalled by hypercall.
    echo = f"echo,monitor={'on' if kernel == 'debian-6.1' else 'off'}"
    devices = ("--device", f"scsi,image={image}", "--device", echo)
    chance = random.Random(SEED)
    async with own_qemu(tmp_path / "a", options) as qemu:
        console = Console(qemu)
        for number in range(kills):
            emulator = qemu.attach("--journal", *devices)
            await qemu.attached()
            if not number:  # it boots under the first one, which is killed when it works
                await console.more("disk-round", "echo-round")
            if number % 4 == 0:
                await compiled_code_serves(emulator, qemu)
            reloaded = number % 4 == 1
            if reloaded:  # another process serves it, with an engine of its own
                await asked(tmp_path, "reload", "a")
                await compiled_code_serves(emulator, qemu)
            await asyncio.sleep(chance.uniform(0, LONGEST))
            assert emulator.gone() == ""
            if reloaded:
                await kill_worker(emulator, tmp_path)
            else:
                await kill(emulator, tmp_path)
            assert qemu.gone() == ""
        emulator = qemu.attach(*devices)
        await qemu.attached()
        await console.more("disk-round", "echo-round")
        await emulator.more_beats("a", qemu)
        assert console.complaints() == []


async def test_a_guest_that_is_stopped_stays_so_and_a_reloaded_one_is_taken_over_as_well(
    tmp_path: Path,
) -> None:
    async with own_qemu(tmp_path / "a", machine(tmp_path)) as qemu:
        emulator = qemu.attach("--journal")
        await qemu.attached()
        await emulator.more_beats("a", qemu)
        await qemu.qmp.execute("stop")
        await kill(emulator, tmp_path)
        emulator = qemu.attach()
        await qemu.attached()
        assert await qemu.status() == "paused"
        await qemu.qmp.execute("cont")
        await emulator.more_beats("a", qemu)

        # The process that serves it now is another one, and keeps the journal on.
        await asked(tmp_path, "reload", "a")
        await emulator.more_beats("a", qemu)
        os.kill((await emulator.status("a"))["emulator"]["pid"], signal.SIGKILL)
        status, errors = await emulator.ended()
        assert (status, "ended unexpectedly" in errors) == (1, True), errors
        emulator = qemu.attach()
        await qemu.attached()
        await emulator.more_beats("a", qemu)

        # One that is ended in order leaves its guest to the next one as well.
        await emulator.stop()
        shutil.rmtree(tmp_path / "vmbus", ignore_errors=True)
        emulator = qemu.attach()
        await qemu.attached()
        await emulator.more_beats("a", qemu)

        # It can be reset while nobody serves it, and boots then.
        await kill(emulator, tmp_path)
        await qemu.qmp.execute("system_reset")
        emulator = qemu.attach()
        await qemu.attached()
        await emulator.more_beats("a", qemu)


@pytest.mark.parametrize("moment", ["ready", full("active"), full("setup"), full("pre-switchover")])
async def test_a_guest_whose_emulator_dies_in_a_migration_goes_on_at_its_source(
    tmp_path: Path, moment: str
) -> None:
    here, incoming = travellers(machine(tmp_path))
    async with own_qemu(tmp_path / "a", here) as source, listening(tmp_path, incoming):
        emulator = source.attach("--journal", dies=moment)
        await source.attached()
        await emulator.more_beats("a")
        await source.send(f"unix:{tmp_path}/migration.sock")
        await emulator.killed()
        shutil.rmtree(tmp_path / "vmbus")
        emulator = source.attach()
        await source.attached()
        await emulator.more_beats("a", source)
        assert await source.status() == "running"


async def test_a_disk_that_could_not_be_taken_over_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    async with own_qemu(tmp_path / "a", machine(tmp_path)) as qemu:
        for line in (f"scsi,image={image},readonly=on", "scsi,format=memory,size=1M"):
            status, errors = await qemu.attach("--journal", "--device", line).ended()
            assert (status, "guest with --journal" in errors) == (1, True), errors
