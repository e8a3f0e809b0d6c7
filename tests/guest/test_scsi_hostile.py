"""A guest that misuses its storage controller: the request or the channel fails, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.harness import DEFAULT_DEVICES, LOADED_MODULES, boot, nothing_lost
from tests.guest.test_boot import complaints
from tests.guest.test_scsi import WAIT, units

pytestmark = pytest.mark.guest

MIB = 1 << 20
EPOCHS, REQUESTS, SEED = 32, 200, 1

SCRIPT = f"""
{WAIT.format("sda")}
cd /sys/bus/vmbus/drivers
name=$(basename $(ls -d hv_storvsc/*-*-*))
echo $name >hv_storvsc/unbind
storvsc_fuzz {EPOCHS} {REQUESTS} {SEED} || exit 1
echo $name >uio_hv_generic/unbind
echo $name >hv_storvsc/bind
{WAIT.format("sd")}
disk=/dev/$(awk '/sd/ {{print $4}}' /proc/partitions)
dd if=/dev/urandom of=/root/f bs=64k count=32 2>/dev/null
dd if=/root/f of=$disk bs=64k oflag=direct 2>/dev/null || exit 2
dd if=$disk of=/root/g bs=64k count=32 iflag=direct 2>/dev/null || exit 3
cmp /root/f /root/g || exit 4
"""


async def test_a_channel_that_is_misused_fails_alone_and_works_again(
    tmp_path: Path, guest_program: Callable[[str], Path]
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(16 * MIB))

    async with boot(
        tmp_path,
        smp=2,
        devices=(*DEFAULT_DEVICES, f"scsi,image={image}"),
        load=(*LOADED_MODULES, "hv_storvsc", "sd_mod", "uio_hv_generic"),
        add=[(guest_program("storvsc_fuzz"), "/bin/storvsc_fuzz")],
        command=[SCRIPT],
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        report = json.loads(guest.output.decode().splitlines()[-1])
        assert report["ok"]
        assert sum(report[each] for each in ("good", "checked", "invalid", "other")) == EPOCHS * REQUESTS
        assert min(report["good"], report["checked"], report["invalid"]) > EPOCHS
        found = guest.channel("scsi")
        assert found["opens"] == EPOCHS + 2
        assert found["io"]["state"] == "running"
        assert {"not-ram", "storvsp-unknown-operation"} <= set(found["io"]["refusals"])
        assert "device-error" not in found["io"]["refusals"]
        assert units(guest)["0:0"]["queue_depth"] == 0
        assert nothing_lost(guest)
        assert complaints(guest.console()) == []
        for channel in guest.status()["channels"]:
            assert channel["state"] == "open"
            if channel["device"] != "scsi":
                assert channel["refusals"] == channel["io"]["refusals"] == {}
