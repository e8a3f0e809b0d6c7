"""This disk against QEMU's own, in one guest, on one file, by turns.

    ours        --device scsi,image=FILE        (direct I/O)
    null        --device scsi,format=null       what guest and bus set: no data moves
    virtio-blk, virtio-scsi                     QEMU's, each with an iothread, io_uring and cache.direct=on
    ahci                                        QEMU's, io_uring and cache.direct=on

All five are in the guest at the same time and lead to the same file. A round measures every device in one cell,
one after another, in an order that turns; a ratio is that of two devices of one round, so that what the machine does
meanwhile is in both. The second guest has two vCPUs and two queues a device, and a job on each vCPU.

Rounds in which other work had the processors (:mod:`tests.bench.others`) are counted and left out, as long as others
are left. A few cells are measured again beside busy processes, of which the bench knows.

A cell's ratio is ours over the best of QEMU's in that round: 1 is as fast, more is faster. Beside it stands where the
time of a request goes: processor time of the guest's vCPUs, of QEMU's main loop and iothreads, and of the emulator.

With ``--qcow2`` the disks are ours and virtio-blk, on two copies of one qcow2: two processes cannot write to one.

    python -m tests.bench.storage [--qcow2] [--busy N] [--rounds N] [--seconds S] [--cell NAME ...] [--folder DIR]
                                  [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vmbus.provision.qemu import find_qemu

from tests.bench.linux import KERNEL, compile_program
from tests.bench.others import LIMIT, ProcessorTimes
from tests.bench.report import Result
from tests.bench.threads import ThreadTimes
from tests.guest.harness import LOADED_MODULES, Booted, boot
from tests.tools.flaky import busy

ROUNDS = 5
SECONDS = 0.8
"""Of each measurement."""
IMAGE_SIZE = 1 << 30

OWN = "ours"
NULL = "null"
QEMUS = ("virtio-blk", "virtio-scsi", "ahci")
DEVICES = (OWN, NULL, *QEMUS)
QCOW2_DEVICES = (OWN, NULL, QEMUS[0])
TRANSFER = 1024
"""KiB of one request: as much as QEMU's disks take."""

BOOT_LIMIT = 300.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A load: block size in bytes, requests in flight for each job, a job on each vCPU."""

    name: str
    block: int
    depth: int
    write: bool = False
    sequential: bool = False
    vcpus: int = 1
    aim: float = 1.0

    def arguments(self, seconds: float) -> str:
        """For ``disk_load``."""
        flags = f"--block {self.block} --depth {self.depth} --seconds {seconds} --jobs {self.vcpus}"
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
    Cell("read 4k depth 32, 2 queues", 4096, 32, vcpus=2, aim=1.25),
    Cell("write 4k depth 32, 2 queues", 4096, 32, write=True, vcpus=2, aim=1.25),
)


BUSY = 2
"""Busy processes beside which some cells are measured again."""
BUSY_CELLS = ("read 4k depth 1", "read 4k depth 32", "write 128k depth 4")
BUSY_AIM = 0.9


def beside_busy(cell: Cell, count: int) -> Cell:
    """Return ``cell`` beside that many busy processes."""
    return replace(cell, name=f"{cell.name}, {count} busy", aim=BUSY_AIM)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One device in one cell, once. Times are processor time, in microseconds a request."""

    requests: float
    """A second."""
    guest: float
    qemu: float
    """Its main loop and iothreads."""
    emulator: float
    others: float = 0.0
    """Share of all processors' time that other work had."""


Round = dict[str, Measurement]

_FIND = r"""
for disk in /sys/block/sd*; do
    place=$(basename $(readlink -f $disk/device)); path=$(readlink -f $disk)
    case $path in
        */ata*) ahci=${disk##*/};;
        */virtio*) virtio_scsi=${disk##*/};;
        *) case $place in *:0) ours=${disk##*/};; *) null=${disk##*/};; esac;;
    esac
done
for queue in /sys/block/[sv]d*/queue; do echo none >$queue/scheduler; done
echo '{"ready": 1}'
"""

_VARIABLES = {
    OWN: "$ours",
    NULL: "$null",
    "virtio-blk": "vda",
    "virtio-scsi": "$virtio_scsi",
    "ahci": "$ahci",
}


def qemu_qcow2(image: Path, queues: int) -> list[str]:
    """QEMU's options for virtio-blk on a qcow2."""
    cache = {"direct": True}
    file = {"driver": "file", "filename": str(image), "aio": "io_uring", "cache": cache}
    node = {"driver": "qcow2", "node-name": QEMUS[0], "file": file, "cache": cache}
    device = f"virtio-blk-pci,drive={QEMUS[0]},iothread=io-blk,num-queues={queues}"
    return ["-object", "iothread,id=io-blk", "-blockdev", json.dumps(node), "-device", device]


def qemu_disks(image: Path, queues: int) -> list[str]:
    """QEMU's options for its own devices on ``image``."""
    line = ["-object", "iothread,id=io-blk", "-object", "iothread,id=io-scsi"]
    for name in QEMUS:
        file: dict[str, object] = {
            "driver": "file",
            "filename": str(image),
            "aio": "io_uring",
            "locking": "off",
        }
        file |= {"cache": {"direct": True}}
        node = {"driver": "raw", "node-name": name, "file": file, "cache": {"direct": True}}
        line += ["-blockdev", json.dumps(node)]
    line += ["-device", f"virtio-blk-pci,drive=virtio-blk,iothread=io-blk,num-queues={queues},share-rw=on"]
    line += ["-device", f"virtio-scsi-pci,id=vscsi,iothread=io-scsi,num_queues={queues}"]
    line += ["-device", "scsi-hd,bus=vscsi.0,drive=virtio-scsi,share-rw=on"]
    line += ["-device", "ahci,id=sata", "-device", "ide-hd,bus=sata.0,drive=ahci,share-rw=on"]
    return line


def orders(rounds: int, devices: Sequence[str] = DEVICES) -> Iterator[list[str]]:
    """The order of devices in each round."""
    for turn in range(rounds):
        first = turn % len(devices)
        order = [*devices[first:], *devices[:first]]
        yield order[::-1] if turn % 2 else order


async def measure(
    cells: Sequence[Cell],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    folder: Path | None = None,
    qcow2: bool = False,
) -> dict[str, list[Round]]:
    """Cell → its rounds, for cells of equal ``vcpus``; ``folder``: of the image, by default of temporary files."""
    [vcpus] = {cell.vcpus for cell in cells}
    devices = QCOW2_DEVICES if qcow2 else DEVICES
    plan = [(cell, order) for cell in cells for order in orders(rounds, devices)]
    steps = [(cell, device) for cell, order in plan for device in order]
    script = [_FIND]
    script += [
        f"disk_load --device /dev/{_VARIABLES[device]} {cell.arguments(seconds)}" for cell, device in steps
    ]
    with tempfile.TemporaryDirectory(prefix="vmbus-bench-", dir=folder) as scratch:
        image = Path(scratch) / "disk.img"
        fill(image, IMAGE_SIZE)
        options = f"queues={vcpus},transfer={TRANSFER}"
        qemus = qemu_disks(image, vcpus)
        if qcow2:
            ours, theirs = Path(scratch) / "ours.qcow2", Path(scratch) / "theirs.qcow2"
            for copy in (ours, theirs):
                line = [*find_qemu().qemu_img(), "convert", "-t", "none", "-O", "qcow2", image, copy]
                converter = await asyncio.create_subprocess_exec(*map(str, line))
                if await converter.wait():
                    raise AssertionError(f"{line} failed")
            image.unlink()
            image, options = ours, options + ",format=qcow2"
            qemus = qemu_qcow2(theirs, vcpus)
        async with boot(
            Path(scratch),
            kernel=KERNEL,
            smp=vcpus,
            command=["\n".join([*script, "sleep 600"])],
            devices=(
                f"scsi,image={image},lun=0,{options}",
                f"scsi,format=null,size={IMAGE_SIZE >> 20}M,lun=1",
            ),
            add=[(compile_program("disk_load", Path(scratch)), "/bin/disk_load")],
            load=(*LOADED_MODULES, "hv_storvsc", "sd_mod", "virtio_blk", "virtio_scsi", "ahci"),
            extra=qemus,
        ) as guest:
            await guest.until(lambda: len(reports(guest)) > 0, "the guest's disks", timeout=BOOT_LIMIT)
            taken = []
            for number in range(1, len(steps) + 1):
                before, all_before = ThreadTimes.now(guest.guest.process.pid), ProcessorTimes.now()
                await guest.until(
                    lambda: len(reports(guest)) > number, f"{steps[number - 1]}", timeout=60 + 5 * seconds
                )
                report = reports(guest)[number]
                if report["failed"]:
                    raise AssertionError(f"{steps[number - 1]}: {report}")
                spent = ThreadTimes.now(guest.guest.process.pid) - before
                share = 1e6 / report["requests"]
                taken.append(
                    Measurement(
                        report["iops"],
                        spent.vcpus * share,
                        spent.qemu * share,
                        spent.emulator * share,
                        ProcessorTimes.now().others_since(all_before),
                    )
                )
    found: dict[str, list[Round]] = {cell.name: [] for cell in cells}
    answers = iter(taken)
    for cell, order in plan:
        found[cell.name].append({device: next(answers) for device in order})
    return found


def reports(guest: Booted) -> list[dict[str, float]]:
    """What the guest has printed so far: whole lines of JSON."""
    lines = guest.output.decode().split("\n")[:-1]
    return [json.loads(line) for line in lines if line.startswith("{")]


def fill(image: Path, size: int) -> None:
    """Every block is there: a file with holes would be faster to read and slower to write."""
    with image.open("wb") as file:
        block = bytes(range(256)) * (1 << 12)
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is cached is in direct I/O's way


async def measure_all(
    cells: Sequence[Cell],
    rounds: int,
    seconds: float,
    folder: Path | None,
    *,
    qcow2: bool = False,
    busy_processes: int = 0,
) -> dict[str, list[Round]]:
    """Each guest in turn."""
    found: dict[str, list[Round]] = {}
    for vcpus in sorted({cell.vcpus for cell in cells}):
        chosen = [cell for cell in cells if cell.vcpus == vcpus]
        with busy(busy_processes, apart=True):
            found |= await measure(chosen, rounds=rounds, seconds=seconds, folder=folder, qcow2=qcow2)
    return found


def undisturbed(rounds: Sequence[Round]) -> list[Round]:
    """Return the rounds in which nobody else had the processors; all of them, if there is none."""
    kept = [each for each in rounds if max(device.others for device in each.values()) <= LIMIT]
    return kept or list(rounds)


def over_the_best(round_: Round) -> float:
    """Ours over the best of QEMU's."""
    return round_[OWN].requests / max(round_[device].requests for device in QEMUS if device in round_)


def report(found: dict[str, list[Round]]) -> Result:
    """The tables."""
    result = Result("Storage: ours over QEMU's disks, same guest, same file, by turns (more is faster)")
    aims = {cell.name: cell.aim for cell in CELLS}
    left_out = {name: len(rounds) - len(undisturbed(rounds)) for name, rounds in found.items()}
    most = {
        name: max(device.others for each in undisturbed(rounds) for device in each.values())
        for name, rounds in found.items()
    }
    found = {name: undisturbed(rounds) for name, rounds in found.items()}
    devices = {device for rounds in found.values() for each in rounds for device in each}
    others = [device for device in (*QEMUS, NULL) if device in devices]
    head = " ".join(f"{device:>11}" for device in others)
    result.notes.append(f"{'':28} {'a second':>8} {'/ best of QEMU':>18} {head}   aim")
    for name, rounds in found.items():
        best = [over_the_best(each) for each in rounds]
        result.ratio(name, best)
        spread = f"{statistics.median(best):.2f} ({min(best):.2f}-{max(best):.2f})"
        ratios = " ".join(
            f"{statistics.median(each[OWN].requests / each[device].requests for each in rounds):11.2f}"
            for device in others
        )
        own = statistics.median(each[OWN].requests for each in rounds)
        result.notes.append(f"{name:28} {own:8.0f} {spread:>18} {ratios}   {aims.get(name, BUSY_AIM):.2f}")
    if out := sum(left_out.values()):
        result.notes.append(
            f"{out} rounds left out: others had more than {LIMIT:.0%} of the processors in them"
        )
    if disturbed := [name for name, share in most.items() if share > LIMIT]:
        result.notes.append(f"others had more in every round of: {'; '.join(disturbed)}")
    result.notes.append("")
    result.notes.append(f"{'processor time, us a request':28} {'guest':>8} {'QEMU':>8} {'emulator':>9}")
    for name, rounds in found.items():
        for device in (OWN, NULL, QEMUS[0]):
            means = [
                statistics.median(getattr(each[device], part) for each in rounds)
                for part in ("guest", "qemu", "emulator")
            ]
            result.notes.append(f"{name + ', ' + device:40} " + " ".join(f"{mean:8.1f}" for mean in means))
    return result


def run() -> Result:
    """All cells, for ``make bench``."""
    found = asyncio.run(measure_all(CELLS, ROUNDS, SECONDS, None))
    again = [beside_busy(cell, BUSY) for cell in CELLS if cell.name in BUSY_CELLS]
    found |= asyncio.run(measure_all(again, ROUNDS, SECONDS, None, busy_processes=BUSY))
    return report(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; with ``--json`` the last line is one object."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.storage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of each measurement (default: {SECONDS})"
    )
    parser.add_argument("--cell", action="append", default=[], help="only cells whose name begins so")
    parser.add_argument(
        "--folder", type=Path, help="where the image is made (default: where temporary files go)"
    )
    parser.add_argument(
        "--json", action="store_true", help="all figures as one JSON object, on the last line"
    )
    parser.add_argument("--qcow2", action="store_true", help="on a qcow2, ours through qemu-storage-daemon")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="beside N busy processes (default: none)"
    )
    options = parser.parse_args(arguments)
    cells = [cell for cell in CELLS if not options.cell or any(map(cell.name.startswith, options.cell))]
    if not cells:
        parser.error(f"no cell is called so; there are {', '.join(cell.name for cell in CELLS)}")
    if options.busy:
        cells = [beside_busy(cell, options.busy) for cell in cells]
    found = asyncio.run(
        measure_all(
            cells,
            options.rounds,
            options.seconds,
            options.folder,
            qcow2=options.qcow2,
            busy_processes=options.busy,
        )
    )
    result = report(found)
    print(result.text(), flush=True)
    if options.json:
        print(json.dumps(result.json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
