"""What a soak takes for growth, and what it does not."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.migration.growth import MIB, Sample, sample, trends

AT_REST = Sample(
    step=0,
    private=60 * MIB,
    resident=300 * MIB,
    proportional=200 * MIB,
    qemu=150 * MIB,
    mappings=400,
    descriptors=40,
    threads=8,
    processes=3,
    files=20,
    tasks=10,
    hosts=5,
)


def run(steps: int, **per_step: float) -> list[Sample]:
    """Samples of a run in which each step leaves a little of something."""
    return [
        replace(
            AT_REST,
            step=step,
            **{name: int(getattr(AT_REST, name) + step * each) for name, each in per_step.items()},
        )
        for step in range(50, steps + 1, 50)
    ]


@pytest.mark.parametrize(
    ("name", "per_step"),
    [
        ("private", 8192),
        ("qemu", 8192),
        ("mappings", 0.02),
        ("descriptors", 0.01),
        ("threads", 0.02),
        ("processes", 0.01),
        ("files", 0.01),
        ("tasks", 0.01),
        ("hosts", 0.01),
    ],
)
def test_what_each_step_leaves_behind_is_found(name: str, per_step: float) -> None:
    assert [trend.name for trend in trends(run(1000, **{name: per_step})) if trend.grows] == [name]


def test_what_varies_does_not_grow() -> None:
    rng = random.Random(1)
    varied = [
        replace(each, private=each.private + rng.randrange(MIB), descriptors=40 + rng.randrange(2))
        for each in run(1000)
    ]
    varied[-1] = replace(varied[-1], private=900 * MIB, descriptors=90)  # one odd sample
    for each in range(10, 18):  # two sides are there
        varied[each] = replace(varied[each], hosts=9, files=24)
    assert not any(trend.grows for trend in trends(varied))


def test_a_short_run_says_nothing() -> None:
    assert trends(run(250)) == []


async def test_a_sample_counts_what_is_there(tmp_path: Path) -> None:
    before = sample(0, os.getpid(), tmp_path)
    (tmp_path / "socket").touch()
    kept = bytearray(os.urandom(4 * MIB))
    with (tmp_path / "socket").open("rb"):
        after = sample(1, os.getpid(), tmp_path)
    assert (after.files - before.files, after.descriptors - before.descriptors) == (1, 1)
    assert len(kept) == 4 * MIB <= after.private - before.private + MIB
    assert after.tasks == before.tasks == 1
