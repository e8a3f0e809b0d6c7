"""Emulators with a journal and the engine that are killed anywhere: their guest's disk loses and repeats nothing."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from vmbus.machine.engine.build import LIBRARY
from vmbus.native import compiler

from tests.unit.engine.disk_guest import PLACES, DiskGuest
from tests.unit.engine.forked import ForkedMachine, Plan

HERE = Path(__file__).parent
KILLS = 60


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine, compiled so that it can end between any two of its stores."""
    folder = tmp_path_factory.mktemp("engine")
    files = LIBRARY.write_sources(folder)
    command = [compiler(), *LIBRARY.flags, "-DENGINE_STEPS", "-o", str(folder / "engine.so")]
    subprocess.run([*command, *map(str, files), str(HERE / "steps.c")], check=True)
    return folder / "engine.so"


def plans(seed: int, count: int) -> list[Plan]:
    """Return how so many emulators end; some of them while they take the guest over."""
    chance = random.Random(seed)
    kinds = (
        lambda: Plan(engine=1 + chance.randrange(200)),
        lambda: Plan(engine=1 + chance.randrange(20)),
        lambda: Plan(python=1 + chance.randrange(80)),
        lambda: Plan(python=1 + chance.randrange(20)),
    )
    return [chance.choice(kinds)() for _ in range(count)]


@pytest.fixture
def machine(tmp_path: Path, library: Path) -> Iterator[Callable[[str], ForkedMachine]]:
    """Makes a machine whose disk has these options."""
    made: list[ForkedMachine] = []

    def make(options: str) -> ForkedMachine:
        image = tmp_path / "disk.img"
        image.write_bytes(bytes(PLACES * 4096))
        made.append(ForkedMachine(tmp_path, [f"scsi,image={image}{options}"], library))
        return made[0]

    yield make
    made[0].close()


def cases(ordinary: int) -> list[ParameterSet]:
    return [pytest.param(seed, marks=[pytest.mark.full] * (seed >= ordinary)) for seed in range(12)]


@pytest.mark.parametrize("seed", cases(2))
@pytest.mark.parametrize("channels", [1, 2])
def test_a_disk_loses_and_repeats_nothing(
    machine: Callable[[str], ForkedMachine], channels: int, seed: int
) -> None:
    here = machine(f",queues={channels}")
    guest = DiskGuest(here, seed)
    guest.start(channels)
    here.kill()
    here.plans = plans(seed, KILLS)
    while here.plans:
        guest.trade()
    guest.finish()
    assert guest.answered > KILLS


@pytest.mark.parametrize("seed", cases(1))
def test_nor_does_one_that_its_guest_opens_again_and_again(
    machine: Callable[[str], ForkedMachine], seed: int
) -> None:
    here = machine("")
    guest = DiskGuest(here, seed)
    guest.start()
    here.kill()
    here.plans = plans(seed, KILLS)
    while here.plans:
        for _ in range(guest.chance.randrange(20)):
            guest.trade()
        guest.reopen()
    guest.finish()
