"""Every kept input of guided fuzzing, and a few hundred changed ones: valid inputs, and those that were findings."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.fuzz.guided import NAMES, mutations, seeds
from tests.fuzz.targets import TARGETS, GatewaySocket, SavedStates

CHANGED = {"saved_states": 150, "storvsp": 200}
"""Changed inputs of a target that is slow; 300 of the others."""


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """No log of what is refused, which is all there is."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_target_has_a_name_and_seeds() -> None:
    assert tuple(TARGETS) == NAMES
    assert all(seeds(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_kept_inputs_are_no_findings(name: str, request: pytest.FixtureRequest) -> None:
    target = TARGETS[name]()
    if isinstance(target, SavedStates | GatewaySocket):
        request.addfinalizer(target.close)
    kept = [path.read_bytes() for path in seeds(name)]
    for data in kept:
        target(data)
    for data in islice(mutations(kept, random.Random(1)), CHANGED.get(name, 300)):
        target(data)
