"""The bound on the emulator's own memory: it counts what the process takes, and no guest RAM; children have none."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest
from vmbus.cli.options import allowance
from vmbus.sandbox import memory

_SCRIPT = """
import mmap, resource, subprocess, sys
from vmbus.machine.qemu.child import in_child
from vmbus.sandbox import memory

bound = memory.limit(64 << 20)
assert 2 * memory.private_memory() <= bound <= 2 * memory.private_memory() + (65 << 20)
mmap.mmap(-1, 512 << 20, mmap.MAP_SHARED)  # guest RAM
try:
    bytearray(512 << 20)
except MemoryError:
    print("refused")
try:
    mmap.mmap(-1, 512 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a disk in memory
except OSError as error:
    print(error.strerror)
bytearray(16 << 20)
with in_child(None) as prepare:
    subprocess.run(["/bin/sh", "-c", "ulimit -d"], preexec_fn=prepare, check=True)
"""


def test_what_the_emulator_takes_is_bounded_and_guest_ram_is_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["refused", "Cannot allocate memory", "unlimited"]


def test_the_option_takes_a_size_or_off() -> None:
    assert allowance("4G") == 4 << 30
    assert allowance("off") is None
    with pytest.raises(argparse.ArgumentTypeError, match="at least 256M, or off"):
        allowance("10M")


def test_a_process_knows_what_it_has() -> None:
    assert 1 << 20 < memory.private_memory() < 1 << 40
