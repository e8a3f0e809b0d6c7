"""The machine is killed while a guest writes: what the disk acknowledged is there, and the file system is whole.

A program in the guest says which records are safe (fsync has returned); emulator and QEMU are killed at a moment
that the seed chooses. On the host the file system's journal is replayed, then every record is looked at. A supervised
guest outlives its emulators until then, and loses as little.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from vmbus.machine.control import ask
from vmbus.provision.qemu import find_qemu

from tests.guest.matrix import full

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3600)]

MIB = 1 << 20
SLOTS = 256
SIZE = 4096
KILLS = 3
ORDINARY_KILLS = 2
"""The emulator, then QEMU; the third is one that the seed chooses."""
LIMIT = 180.0
SEED = int(os.environ.get("POWER_SEED", "1"))


def record(number: int) -> bytes:
    """As durable_writer.c makes it."""
    words = [(number * 0x9E3779B97F4A7C15 + at) & (1 << 64) - 1 for at in range(SIZE // 8)]
    words[0] = number
    return struct.pack(f"<{SIZE // 8}Q", *words)


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} (package e2fsprogs) is not installed")
    return found


def write_and_kill(
    image: Path,
    folder: Path,
    program: Path,
    options: str,
    first: int,
    records: list[int],
    who: str,
) -> int:
    """Boot, write from record ``first`` on, kill ``who`` after some records; the last that is safe.

    ``records``: how many after the boot or the kill before. All but the last kill are of a process that serves the
    guest, which another one takes over.
    """
    runtime = tempfile.mkdtemp(prefix="vmbus-")  # sockets want short names
    command = [
        *(sys.executable, "-m", "vmbus", "run", "--name", "durable", "--memory", "256M"),
        *("--serial", str(folder / "console.log"), "--load", "ext4", "--no-default-devices"),
        *(("--supervise",) if len(records) > 1 else ()),
        *("--device", f"scsi,image={image},{options}", "--add", f"{program}:/bin/durable_writer", "--"),
        "until [ -b /dev/sda ]; do usleep 20000; done; mount -t ext4 /dev/sda /mnt || exit 3; "
        f"exec durable_writer /mnt {first}",
    ]
    environment = {**os.environ, "XDG_RUNTIME_DIR": runtime}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        port = process.stdout.fileno()
        heard = b""
        others: list[int] = []
        after = records[0]
        left = records[1:]
        try:
            while True:
                ready, _, _ = select.select([port], [], [], LIMIT)
                assert ready, (heard[-200:], (folder / "console.log").read_text()[-2000:])
                if not (data := os.read(port, 65536)):
                    break
                heard += data
                assert b"failed" not in heard, heard
                if others or heard.count(b"\n") < after:
                    continue
                if left:
                    os.kill(server_of(Path(runtime)), signal.SIGKILL)
                    after = heard.count(b"\n") + left.pop(0)
                    continue
                others = children_of(process.pid)
                os.kill(process.pid if who == "emulator" else qemu_of(process.pid), signal.SIGKILL)
        finally:
            process.kill()
            shutil.rmtree(runtime)
    assert others, heard
    end = time.monotonic() + LIMIT
    while any(
        Path(f"/proc/{each}").exists() for each in others
    ):  # a daemon of the image has it until it ends
        assert time.monotonic() < end, f"processes {others} outlive their emulator"
        time.sleep(0.01)
    numbers = [int(line) for line in heard.split(b"\n")[:-1]]
    assert numbers == list(range(first, first + len(numbers)))
    return numbers[-1]


def children_of(process: int) -> list[int]:
    """Of all its threads, which may come and go."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (thread / "children").read_text().split())
    return found


def server_of(runtime: Path) -> int:
    """The process id of the worker that serves the guest."""
    found: int = ask(runtime / "vmbus" / "durable" / "control.sock", "status")["emulator"]["pid"]
    return found


def qemu_of(emulator: int) -> int:
    """The process id of its QEMU."""
    for child in children_of(emulator):
        if b"-plugin" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            return child
    raise AssertionError(f"process {emulator} has no QEMU")


def what_is_there(image: Path, folder: Path) -> Callable[[str], bytes]:
    """Replays the journal, checks the file system, and gives a way to read its files."""
    replayed = subprocess.run([tool("e2fsck"), "-p", image], capture_output=True, text=True)
    assert replayed.returncode in (0, 1), replayed.stdout + replayed.stderr
    checked = subprocess.run([tool("e2fsck"), "-fn", image], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = folder / "found"
    shutil.rmtree(found, ignore_errors=True)
    found.mkdir()
    subprocess.run([tool("debugfs"), "-R", f"rdump / {found}", image], check=True, capture_output=True)
    return lambda name: (found / name).read_bytes()


def qemu_img(*words: str | Path, allowed: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run([*find_qemu().qemu_img(), *map(str, words)], capture_output=True, text=True)
    assert done.returncode in allowed, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "kills", "taken_over"),
    [
        full("cache=none", ORDINARY_KILLS, 0, id="none"),
        pytest.param("cache=none,format=qcow2", ORDINARY_KILLS, 0, id="qcow2"),
        full("cache=none", KILLS, 0, id="none-again"),
        full("cache=none,format=qcow2", KILLS, 0, id="qcow2-again"),
        full("cache=writeback", KILLS, 0, id="writeback"),
        full("cache=directsync", KILLS, 0, id="directsync"),
        pytest.param("cache=none", 1, 3, id="taken-over"),
        full("cache=none", 5, 50, id="taken-over-none"),
        full("cache=writeback", 5, 50, id="taken-over-writeback"),
    ],
)
def test_what_was_acknowledged_is_there_after_a_kill(
    tmp_path: Path, guest_program: Callable[[str], Path], options: str, kills: int, taken_over: int
) -> None:
    """``taken_over``: emulators that are killed before the machine is, and whose guest goes on."""
    rng = random.Random(f"{SEED} {options}")
    raw = tmp_path / "disk.img"
    raw.touch()
    os.truncate(raw, 96 * MIB)
    subprocess.run([tool("mke2fs"), "-q", "-t", "ext4", raw], check=True)
    image = raw
    if "qcow2" in options:
        image = tmp_path / "disk.qcow2"
        qemu_img("convert", "-O", "qcow2", raw, image)
    first = 1
    safe: dict[int, int] = {}
    files: list[int] = []
    for attempt in range(kills):
        who = rng.choice(["emulator", "QEMU"]) if attempt > 1 else ["emulator", "QEMU"][attempt]
        records = [*(rng.randrange(1, 150) for _ in range(taken_over)), rng.randrange(1, 500)]
        last = write_and_kill(image, tmp_path, guest_program("durable_writer"), options, first, records, who)
        if image is not raw:
            qemu_img("check", image, allowed=(0, 3))  # clusters that nothing refers to are no damage
            qemu_img("convert", "-O", "raw", image, raw)
        read = what_is_there(raw, tmp_path)
        slots = read("slots")
        found = [int.from_bytes(slots[at : at + 8], "little") for at in range(0, len(slots), SIZE)]
        safe |= {number % SLOTS: number for number in range(first, last + 1)}
        for slot, number in safe.items():
            if found[slot] > number:  # one that was written after it, and not acknowledged
                continue
            assert slots[slot * SIZE :][:SIZE] == record(number), (
                f"record {number} is lost or damaged ({who})"
            )
        files += [number for number in range(first, last + 1) if number % 8 == 0]
        for number in files:
            assert read(f"file-{number}") == record(number), f"file {number} is lost or damaged ({who})"
        # numbers of files that were made and not acknowledged are not used again
        first = (max([last, *found]) // 8 + 2) * 8
