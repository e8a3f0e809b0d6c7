"""A few thousand of the images of ``tests/fuzz/ring_images.py``; run that for a million."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

REASONS = {
    "invalid-ring-pointer",
    "invalid-data-available",
    "invalid-descriptor-lengths",
    "invalid-descriptor-flags",
    "invalid-descriptor-type",
    "invalid-gpa-direct-range-count",
    "invalid-message-length",
    "interrupts-externally-masked",
    "gpa-range-empty",
    "gpa-range-offset",
    "gpa-range-overrun",
    "too-many-gpa-ranges",
    "too-many-gpa-pages",
    "transfer-range-overrun",
    "too-many-transfer-ranges",
}


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    path = Path(__file__).parents[2] / "fuzz" / "ring_images.py"
    spec = importlib.util.spec_from_file_location("ring_images", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_random_images_raise_nothing_else_and_reach_every_reason(fuzz: ModuleType) -> None:
    seen = fuzz.run(seed=1, first=0, count=6000)
    assert set(seen) >= REASONS | {
        "IN_BAND",
        "GPA_DIRECT",
        "TRANSFER_PAGES",
        "COMPLETION",
        "signal",
        "blocked",
    }
