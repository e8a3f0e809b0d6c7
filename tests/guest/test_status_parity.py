"""What ``vmbus status`` shows of a disk does not depend on who moved its packets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.guest.harness import LOADED_MODULES, boot

pytestmark = pytest.mark.guest

MIB = 1 << 20
LOAD = (
    "until grep -q sda /proc/partitions; do usleep 100000; done; "
    "for size in 4k 64k 256k; do "
    "dd if=/dev/sda of=/dev/null bs=$size count=16 iflag=direct 2>/dev/null || exit 1; "
    "dd if=/dev/zero of=/dev/sda bs=$size count=16 seek=8 oflag=direct conv=fsync 2>/dev/null || exit 2; done; "
    "dd if=/dev/sda of=/dev/null bs=4k count=4 skip=2046 iflag=direct 2>/dev/null; true"
)
"""Shell: reads, writes and flushes of fixed sizes, past all caches."""


DEPENDS_ON_SPEED = {"doorbells", "interrupts", "turns", "looks_hit", "latency", "most_queue_depth", "image"}
DEPENDS_ON_WAY = {"compiled"}


def counted(report: Any) -> Any:
    """``report`` without what depends on speed or on the way, or names the image."""
    if not isinstance(report, dict):
        return report
    left_out = DEPENDS_ON_SPEED | DEPENDS_ON_WAY
    return {key: counted(value) for key, value in report.items() if key not in left_out}


async def figures(folder: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is shown of the disk's channel after ``LOAD``, with ``VMBUS_FASTPATH=way``."""
    folder = folder / (way or "engine")
    folder.mkdir()
    image = folder / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    monkeypatch.setenv("VMBUS_FASTPATH", way)
    async with boot(
        folder,
        devices=[f"scsi,image={image}"],
        load=(*LOADED_MODULES, "hv_storvsc", "sd_mod"),
        command=[LOAD],
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        return guest.channel("scsi")


async def test_the_engine_counts_what_python_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await figures(tmp_path, "", monkeypatch)
    python = await figures(tmp_path, "off", monkeypatch)
    assert counted(engine) == counted(python)
    unit = engine["details"]["units"]["0:0"]
    assert unit["compiled"] > 60
    assert python["details"]["units"]["0:0"]["compiled"] == 0
    assert unit["latency"]["count"] == unit["requests"] > 90
    # The bus counts what the engine heard and sent, too: only the first doorbell or interrupt may be the bus's alone.
    for kind in ("doorbells", "interrupts"):
        assert 0 <= engine[kind] - engine["io"][kind] <= 1, (kind, engine)
        assert engine["io"][kind] > 50
