"""Stores a real guest's state for ``test_stored_states``: ``python -m tests.unit.machine.write_stored_state NAME``.

Run once for each format that is released, and never for a name that is there: a stored state loads for ever.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from vmbus.machine.migration import snapshots

from tests.guest.harness import LOADED_MODULES, STORAGE_MODULES
from tests.migration.journey import journey

FOLDER = Path(__file__).parent / "stored_states"
PROGRAMS = Path(__file__).parents[2] / "guest" / "programs"
DEVICES = (
    "heartbeat,interval=0.01",
    "shutdown",
    "timesync",
    "echo,monitor=off",
    "scsi,format=memory,size=64M",
)
LOAD = (
    "echo started; (while :; do dd if=/dev/sda of=/dev/null bs=4k count=4000 2>/dev/null; done) & "
    "while echo_client --count 10000 --generate 5000 --fill 20; do :; done"
)


async def write(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        client = Path(folder) / "echo_client"
        subprocess.run(["cc", "-static", "-O2", "-o", client, PROGRAMS / "echo_client.c"], check=True)  # noqa: ASYNC221
        async with journey(
            Path(folder),
            devices=DEVICES,
            add=[(client, "/bin/echo_client")],
            load=(*LOADED_MODULES, *STORAGE_MODULES, "uio_hv_generic"),
            command=[LOAD],
            snapshots=True,
        ) as guest:
            await guest.here.says("started")
            echo = guest.device("echo")
            await guest.here.until(lambda: echo.status()["requests"] > 5000, "echoes")
            kept: list[bytes] = []
            coordinator = guest.host.migration
            save = coordinator.save

            async def keep() -> bytes:
                kept.append(await save())
                return kept[-1]

            coordinator.save = keep  # type: ignore[method-assign]
            await snapshots.save(guest.host.migration, name, without_disks=True)
            facts = guest.host.facts
            regions = [asdict(region) for region in facts.ram_regions]
            described = {"devices": DEVICES, "regions": regions, "vcpus": facts.vcpus}
    (FOLDER / f"{name}.bin").write_bytes(kept[0])
    (FOLDER / f"{name}.json").write_text(json.dumps(described, indent=1) + "\n")


def main() -> None:
    if len(sys.argv) != 2 or (FOLDER / f"{sys.argv[1]}.bin").exists():
        sys.exit(__doc__)
    asyncio.run(write(sys.argv[1]))


if __name__ == "__main__":
    main()
