"""A disk under load over migrations: what was written is what is read, wherever the guest was in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.guest.harness import LOADED_MODULES
from tests.guest.test_boot import complaints
from tests.migration.journey import journey

pytestmark = pytest.mark.guest

SCRIPT = """
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


def test_what_was_written_is_read_over_migrations(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(32 << 20))

    async def story() -> None:
        async with journey(
            tmp_path,
            smp=2,  # with a sub-channel
            devices=("heartbeat,interval=0.1", "shutdown", f"scsi,image={image}"),
            load=(*LOADED_MODULES, "hv_storvsc", "sd_mod"),
            command=[SCRIPT],
        ) as guest:
            output = guest.here.output
            await guest.here.says("round 2")
            for _ in range(4):
                await guest.move()
                rounds = output.count(b"round")
                await guest.here.until(
                    lambda rounds=rounds: output.count(b"round") > rounds + 1 or b"failed" in output,
                    "two more rounds",
                )
            assert b"failed" not in output, output
            found = guest.here.status()
            disks = [channel for channel in found["channels"] if channel["device"] == "scsi"]
            assert [channel["subchannel"] for channel in disks] == [0, 1]
            assert all(channel["state"] == "open" for channel in disks)
            assert all(channel["refusals"] == {} for channel in found["channels"])
            assert complaints(guest.here.console()) == []

    asyncio.run(story())
