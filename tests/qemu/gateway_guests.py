"""Guests of a few instructions in front of the trap gateway, and emulators that die; shared by its tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import Trap
from vmbus.wire.cpuid import CpuidLeaf

from tests.qemu.bare_guest import long_mode_guest, protected_mode_guest
from tests.qemu.machine_under_test import Machine

HELD = """
main:
    mov $0x40000020, %ecx
    rdmsr
    call hex
    jmp done
"""
"""A guest that waits for one answer, and prints it."""

LEAVES = (CpuidLeaf(0x40000000, 0x40000001, 0x11, 0x22, 0x33), CpuidLeaf(0x40000001, 0xA, 0xB, 0xC, 0xD))
Start = Callable[..., Machine]


@pytest.fixture
def start(qemu: list[str], plugin: Path, tmp_path: Path) -> Start:
    def start(program: str, *, bits: int = 64, wait: str = "on", options: tuple[str, ...] = ()) -> Machine:
        assemble = long_mode_guest if bits == 64 else protected_mode_guest
        return Machine(qemu, plugin, assemble(tmp_path, program), tmp_path, wait=wait, options=options)

    return start


def active(machine: Machine) -> Gateway:
    gateway = machine.attach()
    gateway.set_cpuid(LEAVES)
    gateway.activate()
    return gateway


def refuse(trap: Trap) -> None:
    raise AssertionError(f"{trap} should not have come")


@contextlib.contextmanager
def predecessor(machine: Machine, program: str) -> Iterator[tuple[int, int]]:
    """An emulator that is a process of its own, and killed at the end of the block: its id, and what it printed.

    ``program``: Python, which finds the gateway's socket in ``sys.argv[1]``, and prints the number when it is ready.
    """
    machine.attach().close()  # it listens
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(machine.socket)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
