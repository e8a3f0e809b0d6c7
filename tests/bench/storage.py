"""This disk against QEMU's own, in one guest, on one file, by turns.

    ours        --device scsi,image=FILE        (direct I/O)
    null        --device scsi,format=null       what guest and bus set: no data moves
    virtio-blk, virtio-scsi                     QEMU's, each with an iothread, io_uring and cache.direct=on
    ahci                                        QEMU's, io_uring and cache.direct=on

All five are in the guest at the same time and lead to the same file. A round measures every device in one cell,
one after another, in an order that turns; a ratio is that of two devices of one round, so that what the machine does
meanwhile is in both. The second guest has two vCPUs and two queues a device, and a job on each vCPU.

A cell's ratio is ours over the best of QEMU's in that round.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.linux import KERNEL, compile_program
from tests.bench.report import Result
from tests.guest.harness import LOADED_MODULES, boot

ROUNDS = 5
SECONDS = 1.0
"""Of each measurement."""
IMAGE_SIZE = 1 << 30

OWN = "ours"
LIMIT_SET = "null"
QEMUS = ("virtio-blk", "virtio-scsi", "ahci")
DEVICES = (OWN, LIMIT_SET, *QEMUS)

BOOT_LIMIT = 300.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A load: block size in bytes, requests in flight."""

    name: str
    block: int
    depth: int
    write: bool = False
    sequential: bool = False
    aim: float = 1.0

    def arguments(self, seconds: float, jobs: int) -> str:
        """For ``disk_load``."""
        flags = f"--block {self.block} --depth {self.depth} --seconds {seconds} --jobs {jobs}"
        return flags + (" --write" if self.write else "") + (" --sequential" if self.sequential else "")


CELLS = (
    Cell("read 4k depth 1", 4096, 1),
    Cell("write 4k depth 1", 4096, 1, write=True),
    Cell("read 4k depth 32", 4096, 32, aim=1.25),
    Cell("write 4k depth 32", 4096, 32, write=True, aim=1.25),
    Cell("read 128k depth 4", 128 << 10, 4, sequential=True),
    Cell("write 128k depth 4", 128 << 10, 4, write=True, sequential=True),
    Cell("read 1m depth 4", 1 << 20, 4, sequential=True),
    Cell("write 1m depth 4", 1 << 20, 4, write=True, sequential=True),
)
TWO_QUEUES = (
    Cell("read 4k depth 32", 4096, 32, aim=1.25),
    Cell("write 4k depth 32", 4096, 32, write=True, aim=1.25),
)

_FIND = r"""
for disk in /sys/block/sd*; do
    place=$(basename $(readlink -f $disk/device)); path=$(readlink -f $disk)
    case $path in
        */ata*) ahci=${disk##*/};;
        */virtio*) virtio_scsi=${disk##*/};;
        *) case $place in *:0) ours=${disk##*/};; *) null=${disk##*/};; esac;;
    esac
    [ -e $disk/queue/scheduler ] && echo none >$disk/queue/scheduler
done
"""

_VARIABLES = {
    OWN: "$ours",
    LIMIT_SET: "$null",
    "virtio-blk": "vda",
    "virtio-scsi": "$virtio_scsi",
    "ahci": "$ahci",
}


def qemu_disks(image: Path, queues: int) -> list[str]:
    """QEMU's options for its own devices on ``image``."""
    line = ["-object", "iothread,id=io-blk", "-object", "iothread,id=io-scsi"]
    for name in QEMUS:
        file = {"driver": "file", "filename": str(image), "aio": "io_uring", "locking": "off"}
        file |= {"cache": {"direct": True}}
        node = {"driver": "raw", "node-name": name, "file": file, "cache": {"direct": True}}
        line += ["-blockdev", json.dumps(node)]
    line += ["-device", f"virtio-blk-pci,drive=virtio-blk,iothread=io-blk,num-queues={queues},share-rw=on"]
    line += ["-device", f"virtio-scsi-pci,id=vscsi,iothread=io-scsi,num_queues={queues}"]
    line += ["-device", "scsi-hd,bus=vscsi.0,drive=virtio-scsi,share-rw=on"]
    line += ["-device", "ahci,id=sata", "-device", "ide-hd,bus=sata.0,drive=ahci,share-rw=on"]
    return line


def orders(devices: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of devices in each round."""
    for turn in range(rounds):
        first = turn % len(devices)
        order = [*devices[first:], *devices[:first]]
        yield order[::-1] if turn % 2 else order


async def measure(
    cells: Sequence[Cell],
    *,
    smp: int = 1,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    devices: Sequence[str] = DEVICES,
) -> dict[str, list[dict[str, float]]]:
    """Cell → of each round, device → requests a second."""
    script = [_FIND]
    for cell in cells:
        for order in orders(devices, rounds):
            for device in order:
                where = _VARIABLES[device]
                script.append(f"disk_load --device /dev/{where} {cell.arguments(seconds, smp)}")
    script.append("echo measured")
    plan = [(cell, order) for cell in cells for order in orders(devices, rounds)]
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-") as folder:
        image = Path(folder) / "disk.img"
        fill(image, IMAGE_SIZE)
        async with boot(
            Path(folder),
            kernel=KERNEL,
            smp=smp,
            command=["\n".join(script)],
            devices=(
                f"scsi,image={image},lun=0,queues={smp}",
                f"scsi,format=null,size={IMAGE_SIZE >> 20}M,lun=1,queues={smp}",
            ),
            add=[(compile_program("disk_load", Path(folder)), "/bin/disk_load")],
            load=(*LOADED_MODULES, "hv_storvsc", "sd_mod", "virtio_blk", "virtio_scsi", "ahci"),
            extra=qemu_disks(image, smp),
        ) as guest:
            limit = BOOT_LIMIT + 3 * seconds * len(plan) * len(devices)
            await guest.says("measured", limit)
            lines = [json.loads(line) for line in guest.output.decode().splitlines() if line.startswith("{")]
    found: dict[str, list[dict[str, float]]] = {cell.name: [] for cell in cells}
    answers = iter(lines)
    for cell, order in plan:
        found[cell.name].append({device: next(answers)["iops"] for device in order})
    return found


def fill(image: Path, size: int) -> None:
    """Every block is there: a file with holes would be faster to read and slower to write."""
    with image.open("wb") as file:
        block = bytes(range(256)) * (1 << 12)
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is cached is in direct I/O's way


def run() -> Result:
    """See above."""
    return asyncio.run(_run())


async def _run() -> Result:
    result = Result(
        "Storage: requests a second over the best of QEMU's own disks, same guest, same file, by turns"
    )
    found = await measure(CELLS)
    found |= {f"{name}, 2 queues": rounds for name, rounds in (await measure(TWO_QUEUES, smp=2)).items()}
    aims = {cell.name: cell.aim for cell in CELLS}
    aims |= {f"{cell.name}, 2 queues": cell.aim for cell in TWO_QUEUES}
    names = [*QEMUS, LIMIT_SET]
    columns = " ".join(f"{f'/ {name}':>14}" for name in names)
    result.notes.append(f"{'ours':27} {'iops':>7} {'/ best of QEMU':>24} {columns}")
    for name, rounds in found.items():
        best = [each[OWN] / max(each[device] for device in QEMUS) for each in rounds]
        result.ratio(name, best)
        ratios = [statistics.median(each[OWN] / each[device] for each in rounds) for device in names]
        own = statistics.median(each[OWN] for each in rounds)
        columns = " ".join(f"{ratio:14.2f}" for ratio in ratios)
        spread = f"{statistics.median(best):.2f} ({min(best):.2f}-{max(best):.2f})"
        missed = "" if statistics.median(best) >= aims[name] else f"   (aim: {aims[name]})"
        result.notes.append(f"{name:27} {own:7.0f} {spread:>24} {columns}{missed}")
    return result


def main() -> None:
    """For tuning: ``python -m tests.bench.storage CELL ROUNDS DEVICE ...``."""


if __name__ == "__main__":
    main()
