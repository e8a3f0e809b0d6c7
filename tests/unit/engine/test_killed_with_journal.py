"""Emulators with a journal and the engine that are killed anywhere: their guest's disk loses and repeats nothing."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from vmbus.machine.engine.build import LIBRARY
from vmbus.native import compiler

from tests.unit.engine.disk_guest import PLACES, DiskGuest
from tests.unit.engine.forked import ForkedMachine, Plan

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine, compiled so that it can end between any two of its stores."""
    folder = tmp_path_factory.mktemp("engine")
    files = LIBRARY.write_sources(folder)
    command = [compiler(), *LIBRARY.flags, "-DENGINE_STEPS", "-o", str(folder / "engine.so")]
    subprocess.run([*command, *map(str, files), str(HERE / "steps.c")], check=True)
    return folder / "engine.so"


def plans(seed: int, count: int) -> list[Plan]:
    chance = random.Random(seed)
    return [
        Plan(engine=1 + chance.randrange(200)) if chance.random() < 0.6 else Plan(python=1 + chance.randrange(80))
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_disk_loses_and_repeats_nothing(tmp_path: Path, library: Path, seed: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(PLACES * 4096))
    machine = ForkedMachine(tmp_path, [f"scsi,image={image}"], library)
    try:
        machine.begin(Plan())
        guest = DiskGuest(machine, seed)
        guest.start()
        machine.kill()
        for plan in plans(seed, 60):
            machine.begin(plan)
            machine.until(lambda: guest.trade() or machine.died(), f"the end at {plan}")  # noqa: B023
        machine.begin(Plan())
        guest.finish()
    finally:
        machine.close()
