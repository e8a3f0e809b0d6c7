"""Random inputs, a million in ``make test-all``, cause only refusals and no growth of memory.

The seeds are fixed, to repeat a failure.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.guest.matrix import full

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "count", "seed"),
    [
        ("bus_messages", 50_000, 1),
        full("bus_messages", 350_000, 1),
        full("bus_messages", 350_000, 2026),
        ("ring_images", 25_000, 1),
        full("ring_images", 150_000, 1),
        full("ring_images", 150_000, 2026),
        ("storvsc_requests", 8_000, 1),
        full("storvsc_requests", 40_000, 1),
        ("compiled_requests", 1_500, 1),
        full("compiled_requests", 8_000, 1),
    ],
)
def test_random_input_is_refused_and_nothing_else(module: str, count: int, seed: int) -> None:
    words = [
        sys.executable,
        "-m",
        *f"tests.fuzz.{module}".split(),
        "--count",
        str(count),
        "--seed",
        str(seed),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{' '.join(words[1:])}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
