"""A disk under load over migrations: what was written is what is read, wherever the guest was in between."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.guest.harness import LOADED_MODULES
from tests.guest.test_boot import complaints
from tests.migration.journey import journey

pytestmark = pytest.mark.guest

SCRIPT = """
until [ -b /dev/sda ]; do usleep 100000; done
i=0
while :; do
  i=$((i+1))
  dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
  dd if=/tmp/data of=/dev/sda bs=64k oflag=direct 2>/dev/null || { echo "failed: write $i"; exit 1; }
  written=$(md5sum < /tmp/data)
  read=$(dd if=/dev/sda bs=128k count=32 iflag=direct 2>/dev/null | md5sum)
  [ "$written" = "$read" ] || { echo "failed: round $i, $written, $read"; exit 1; }
  echo "round $i"
done
"""


@pytest.mark.full  # test_fio.py verifies every block over migrations
@pytest.mark.parametrize("moves", [2, 4])
async def test_what_was_written_is_read_over_migrations(tmp_path: Path, moves: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(32 << 20))

    async with journey(
        tmp_path,
        smp=2,  # with a sub-channel
        devices=("heartbeat,interval=0.1", "shutdown", f"scsi,image={image}"),
        load=(*LOADED_MODULES, "hv_storvsc", "sd_mod"),
        command=[SCRIPT],
    ) as guest:
        output = guest.here.output
        await guest.here.says("round 2")
        for _ in range(moves):
            await guest.move()
            rounds = output.count(b"round")
            await guest.here.until(
                lambda: output.count(b"round") > rounds + 1 or b"failed" in output,
                "two more rounds",
            )
        assert b"failed" not in output, output
        found = guest.here.status()
        disks = [channel for channel in found["channels"] if channel["device"] == "scsi"]
        assert [channel["subchannel"] for channel in disks] == [0, 1]
        assert all(channel["state"] == "open" for channel in disks)
        assert all(channel["refusals"] == {} for channel in found["channels"])
        assert complaints(guest.here.console()) == []


MIN_MOVES, MAX_MOVES = 3, 20
MIN_EARLY = 1000
"""Pages that a disk was read into while memory was sent: with fewer the comparison below says little."""
READING = """
until [ -b /dev/sda ]; do usleep 100000; done
while :; do
  echo 3 > /proc/sys/vm/drop_caches
  echo "round $(md5sum < /dev/sda)"
  echo "again $(md5sum < /dev/sda)"
done
"""


async def test_what_was_read_is_marked_before_the_guest_is_told_of_it(tmp_path: Path) -> None:
    """Pages that a disk was read into while memory was sent: the second look finds them in the guest's cache."""
    image = tmp_path / "disk.img"
    content = random.Random(1).randbytes(32 << 20)
    image.write_bytes(content)
    right = hashlib.md5(content, usedforsecurity=False).hexdigest()

    async with journey(
        tmp_path,
        devices=("heartbeat,interval=0.1", "shutdown", f"scsi,image={image}"),
        load=(*LOADED_MODULES, "hv_storvsc", "sd_mod"),
        command=[READING],
    ) as guest:
        output = guest.here.output
        await guest.here.says("again")
        early = pause = moves = 0
        while moves < MIN_MOVES or early <= MIN_EARLY:  # how much is read during a move is a matter of speed
            assert moves < MAX_MOVES, f"{early} pages were marked early in {moves} moves"
            moves += 1
            report = (await guest.move()).report
            early += report.pages_marked_early
            pause += report.pages_marked
            looks = output.count(b"again")
            await guest.here.until(lambda: output.count(b"again") > looks + 1, "two more looks")
        looked = [line.split()[1] for line in output.decode().splitlines()[:-1] if line.endswith("-")]
        assert set(looked) == {right}
        assert pause < early / 4  # rings, SynIC, and small answers
        assert complaints(guest.here.console()) == []
