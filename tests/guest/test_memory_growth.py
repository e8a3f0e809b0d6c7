"""The worst packets of a real guest: its emulator occupies no more memory than the guest's budget, and serves on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from vmbus.bus.budget import GUEST_BYTES
from vmbus.wire.echo import ECHO_INSTANCE

from tests.guest.emulator import LIMIT, Emulator, asked
from tests.guest.waiting import reporting, until

pytestmark = pytest.mark.guest

MIB = 1 << 20
PACKETS = 100
SLACK = 96 * MIB
"""Bytes beyond the budget: one packet of each channel, copies of two rings, and what the allocator keeps."""
SCRIPT = (
    "cd /sys/bus/vmbus/drivers/hv_storvsc; until ls -d *-*-* >/dev/null 2>&1; do usleep 50000; done; "
    f"echo $(ls -d *-*-*) >unbind; until [ -e /sys/bus/vmbus/devices/{ECHO_INSTANCE} ]; do usleep 50000; done; "
    f"worst_packets {PACKETS}"
)


def private_bytes(process: int) -> int:
    """Return what a process has allocated and touched; guest memory, which it shares with QEMU, does not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.full
async def test_the_worst_packets_of_a_guest_occupy_no_more_than_its_budget(
    tmp_path: Path, guest_program: Callable[[str], Path]
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    emulator = Emulator.start(
        tmp_path,
        *("run", "--name", "worst", "--memory", "256M", "--device", "heartbeat,interval=0.2"),
        *("--device", f"scsi,image={image},transfer=1024", "--load", "uio_hv_generic"),
        *("--add", str(guest_program("worst_packets")), "--", SCRIPT),
    )
    try:
        with reporting(lambda: (emulator,)):
            await emulator.more_beats("worst")
            before = most = private_bytes(emulator.process.pid)
            await asked(tmp_path, "device", "add", "worst", "echo,monitor=off")
            memory: dict[str, int] = {}

            async def done() -> bool:
                nonlocal most
                if emulator.gone() == "":
                    most = max(most, private_bytes(emulator.process.pid))
                    memory.update((await emulator.status("worst")).get("bus", {}).get("memory", {}))
                return emulator.output.endswith("}\n")

            await until(done, "end of the worst packets", emulator, timeout=4 * LIMIT)
            report = json.loads(emulator.output)
            status, errors = await emulator.ended()
            assert status == 0, errors
    finally:
        await emulator.stop()
    assert report["ok"]
    assert report["bytes"] > 4 * (GUEST_BYTES + SLACK), "it would have been seen"
    assert report["stuck"] >= 2, "a guest that takes no answers is not served without end"
    assert memory["most"] < GUEST_BYTES + 8 * MIB
    assert most - before < GUEST_BYTES + SLACK, f"{most >> 20} MiB, {before >> 20} before; {memory}"
    assert memory["most"] > GUEST_BYTES // 2, "the budget was what bounded it"
